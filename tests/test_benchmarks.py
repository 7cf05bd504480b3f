"""Every speed benchmark runs to its end in a tiny setting and writes the record that it documents."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nni_dbs.errors import DataError

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "cost_speed": {"per_second", "per_second_with_gradient", "prune_and_count_seconds", "ratio"},
    "surgery_speed": {"params", "given_order_ms", "default_order_ms", "torch_pruning/default", "nni/default"},
    "grouping_speed": {"unverified_ms", "verified_ms", "torch_pruning_ms", "unverified/torch_pruning"},
    "budget_hit": {"fvcore_flops", "percent_of_budget", "groups_that_can_grow", "project_seconds"},
    "search_speed": {"variant", "groups", "points_s", "fit_s", "round_s", "choice_s", "all_s", "random_s"},
    "latency_budget": {"method", "full_ms", "pruned_ms", "ratio", "kept", "fit_error"},
    "supernet_speed": {"order", "measured", "ms", "against", "against_ms", "ratio"},
    "supernet_memory": {"step", "order", "peak_mb", "gradients_mb", "of_plain", "of_aim"},
    "search_step": {"method", "ms", "plain_ms", "ratio"},
    "prior_hits": {"groups", "uniform", "prior", "searched", "prior/uniform", "searched/uniform"},
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmarks set torch to one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")  # of torch.jit, fvcore and NNI
@pytest.mark.parametrize("name", COLUMNS)
def test_quick_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / f"{name}.json"
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--repeats", "1", "--out", str(out)])
    importlib.import_module(f"examples.benchmarks.{name}").main()

    record = json.loads(out.read_text())
    assert set(record) == {"command", "cpu", "threads", "versions", "settings", "rows"}
    assert record["command"].startswith(f"python -m examples.benchmarks.{name} --quick")
    assert record["threads"] == 1
    assert record["settings"]["repeats"] == 1
    assert {"python", "torch", "torch-pruning"} <= set(record["versions"])
    assert record["rows"]
    for row in record["rows"]:
        assert row["model"] == "resnet18"
        assert set(row) >= COLUMNS[name]
        assert all(math.isfinite(v) and v >= 0 for v in row.values() if not isinstance(v, str))
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(record["rows"])
    assert table[0].split() == list(record["rows"][0])


def test_budget_is_filled_in_a_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "budget_hit.json"
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["budget_hit", "--quick", "--repeats", "1", "--out", str(out)])
    importlib.import_module("examples.benchmarks.budget_hit").main()
    for row in json.loads(out.read_text())["rows"]:
        assert 98 <= row["percent_of_budget"] <= 100
        assert row["groups_that_can_grow"] == 0


@pytest.mark.skipif("CHANNEL_BENCH" not in os.environ, reason="CHANNEL_BENCH does not name the table")
@pytest.mark.slow
def test_searches_on_the_external_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "channel_bench.json"
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["channel_bench", "--quick", "--repeats", "1", "--out", str(out)])
    bench = importlib.import_module("examples.benchmarks.channel_bench")
    bench.main()
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["rows"]] == list(bench.METHODS)
    assert {row["predictor"] for row in record["settings"]["tau"]} == set(bench.PREDICTORS)
    table = bench.Table(bench.table_path())
    inside = table.truth[table.band(table.bounds(bench.SHARES[0]), 0.0)]
    assert all(0 <= row["gap"] < float(inside.max() - inside.mean()) for row in record["rows"])


@pytest.mark.skipif("CHANNEL_BENCH" not in os.environ, reason="CHANNEL_BENCH does not name the table")
@pytest.mark.slow
def test_tuners_on_the_external_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tuners.json"
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["tuners", "--quick", "--repeats", "1", "--out", str(out)])
    bench = importlib.import_module("examples.benchmarks.tuners")
    bench.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == list(bench.METHODS)
    for row in rows:
        told = row["method"].startswith("NNI") and not row["method"].endswith("free refusals")
        assert row["gap"] >= 0 and (told or row["trials inside"] == 1)


def test_the_external_table_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("CHANNEL_BENCH", raising=False)
    bench = importlib.import_module("examples.benchmarks.channel_bench")
    with pytest.raises(DataError, match="CHANNEL_BENCH"):
        bench.table_path()


@pytest.mark.filterwarnings("ignore")  # networks of a tiny training score alike, and have no tau
def test_rank_consistency_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    bench = importlib.import_module("examples.benchmarks.rank_consistency")
    out = tmp_path / "rank.json"
    monkeypatch.setattr(sys, "argv", ["rank_consistency", "--quick", "--out", str(out)])
    bench.main()
    whole = json.loads(out.read_text())
    assert [row["ranked by"] for row in whole["rows"]] == [*bench.METHODS, "FLOPs", "another seed"]
    kinds = [run["kind"] for run in whole["runs"]]
    assert [kinds.count(kind) for kind in ("tune", "alone", "supernet")] == [6, 8, 7]
    assert (tmp_path / "rank.png").stat().st_size > 10_000

    left = [run for i, run in enumerate(whole["runs"]) if i % 7]
    out.write_text(json.dumps({**whole, "runs": left}))
    trained: list[Any] = []
    run = bench.run
    monkeypatch.setattr(bench, "run", lambda task, *args: trained.append(task) or run(task, *args))
    bench.main()
    assert len(trained) == len(whole["runs"]) - len(left) == 3
    assert without_times(json.loads(out.read_text())) == without_times(whole)


def without_times(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    times = ("seconds", "cost")
    rows, runs = (
        [{k: str(v) for k, v in entry.items() if k not in times} for entry in record[part]]
        for part in ("rows", "runs")
    )
    return rows, sorted(runs, key=lambda run: (run["kind"], run["method"], run["seed"]))


def test_the_networks_to_rank_lie_in_the_band_and_train_no_supernet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    bench = importlib.import_module("examples.benchmarks.rank_consistency")
    setting = bench.setup(bench.Sizes(train=8, validation=8, test=8))
    assert len(set(setting.networks)) == 24 and not set(setting.networks) & set(setting.points)
    used = [setting.bounds.used(widths) for widths in setting.networks]
    assert all(0.8 <= share <= 1.05 for share in used) and max(used) > 1


def test_intervals_and_pairs_of_seeds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    bench = importlib.import_module("examples.benchmarks.rank_consistency")
    truth = np.arange(30.0)
    same, reverse = truth**3, -truth
    assert bench.interval(bench.resampled(same[None], truth[None])) == pytest.approx([1, 1], rel=1e-14)
    assert bench.mean_tau(np.stack([same, reverse]), np.stack([truth, truth])) == 0
    noisy = truth + np.random.default_rng(0).normal(0, 10, 30)
    low, high = bench.interval(bench.resampled(noisy[None], truth[None]))
    assert -1 < low < bench.mean_tau(noisy[None], truth[None]) < high < 1 and high - low > 0.1
    first, second = bench.pairs_of_seeds(np.array([[1.0, 2.0], [3.0, 5.0], [6.0, 7.0]]))
    assert first.tolist() == [[1, 2], [1, 2], [3, 5]] and second.tolist() == [[3, 5], [6, 7], [6, 7]]
    runs = [
        {"kind": "tune", "method": m, "rate": r, "scores": [s, s]}
        for m, r, s in (("spfs", 0.1, 3.0), ("spfs", 0.2, 4.0), ("parallel", 0.1, 5.0))
    ]
    assert bench.best_rate(runs, "spfs") == 0.2 and bench.best_rate(runs, "parallel_twice") == 0.1


CLUTTER = {
    "clutter_methods": (
        ["full", "uniform", "random", "dbs", "dmcp", "tas", "dsa"],
        {"accuracy", "sd", "gain", "gain_sd", "flops", "params", "from_uniform", "search/train"},
    ),
    "tas_table": (["uniform", "random", "tas"], {"plain", "plain_sd", "init", "kd", "full", "flops"}),
}


@pytest.mark.filterwarnings("ignore")  # of torch.jit and NNI
@pytest.mark.parametrize("name", CLUTTER)
def test_runs_on_clutter_are_kept_by_seed_and_merged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods, columns = CLUTTER[name]
    monkeypatch.syspath_prepend(ROOT)
    bench = importlib.import_module(f"examples.benchmarks.{name}")

    def record_of(out: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, "--quick", *arguments, "--out", str(tmp_path / out)])
        bench.main()
        return json.loads((tmp_path / out).read_text())

    record_of("a.json", "--seeds", "0", "--methods", methods[-1])
    first = record_of("a.json", "--seeds", "0")
    assert first["runs"][0]["method"] == methods[-1]
    assert [row["method"] for row in first["rows"]] == methods
    assert all(set(row) >= columns for row in first["rows"])
    assert all(run["flops_share"] <= 0.5 for run in first["runs"] if run["method"] != "full")

    second = record_of("b.json", "--seeds", "1", "--methods", "uniform")
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    monkeypatch.setattr(bench, "runs_of", None)
    merged = record_of("c.json", "--merge", *files)
    assert merged["runs"] == first["runs"] + second["runs"]
    assert merged["command"] == [first["command"], second["command"]]
    row = next(row for row in merged["rows"] if row["method"] == "uniform")
    scores = [run["plain" if name == "tas_table" else "test_accuracy"] for run in merged["runs"]
              if run["method"] == "uniform"]  # fmt: skip
    assert row["seeds"] == 2
    assert row["plain" if name == "tas_table" else "accuracy"] == pytest.approx(sum(scores) / 2, abs=1e-4)

    table = capsys.readouterr().out.splitlines()[-len(merged["rows"]) - 1 :]
    assert table[0].split() == list(merged["rows"][0])


def test_gains_on_clutter_are_paired_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    bench = importlib.import_module("examples.benchmarks.clutter_methods")
    same = dict.fromkeys(
        ("flops_share", "params_share", "from_uniform", "search_seconds", "train_seconds"), 1.0
    )

    def run(seed: int, method: str, accuracy: float, is_uniform: bool) -> dict[str, Any]:
        found = {"seed": seed, "method": method, "test_accuracy": accuracy, "is_uniform": is_uniform}
        return {**same, **found}

    runs = [
        run(1, "dbs", 80.0, False),
        run(0, "uniform", 60.0, True),
        run(1, "uniform", 76.0, True),
        run(0, "dbs", 62.0, False),
        run(2, "dbs", 10.0, False),
    ]
    _, dbs = bench.summary(runs)
    assert (dbs["seeds"], dbs["gain"], dbs["gain_sd"]) == (3, 3.0, math.sqrt(2))
    bench.check(runs)
    with pytest.raises(SystemExit, match=r"\('tas', 4\)"):
        bench.check([*runs, run(4, "tas", 70.0, True)])


def test_repeats_must_be_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["budget_hit", "--repeats", "0"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("examples.benchmarks.budget_hit").main()
    assert stopped.value.code == 2
