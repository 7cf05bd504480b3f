"""The sweep over torchvision's models: what it finds out about a model, and how it goes on after failures."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import list_models

from torch_pruning_adapters import find_channel_groups, shrink

ROOT = Path(__file__).parents[1]
FAMILIES = ("", ".segmentation", ".detection", ".video", ".optical_flow")
MODELS = [n for f in FAMILIES for n in list_models(module=importlib.import_module(f"torchvision.models{f}"))]
EVERYWHERE = ["budget", "outputs", "sliced", "flops", "reload", "training", "export", "onnx"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples can be imported; torch gets its number of threads back."""
    monkeypatch.syspath_prepend(ROOT)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def module(name: str) -> Any:
    return importlib.import_module(f"examples.benchmarks.{name}")


def check(row: Any) -> None:
    """A sound row; only onnxruntime, which need not be installed, may be missing."""
    detector = row.family == "detection"
    assert sorted(row.checks) == sorted([*EVERYWHERE, *(["forward"] if detector else [])])
    assert (row.groups_before_suppression is None) != detector
    assert row.error is None and row.problems == []
    missing = [] if importlib.util.find_spec("onnxruntime") else ["onnx"]
    assert [text.split(":")[0] for text in row.limits] == missing
    assert 0 < row.lowest_flops < row.pruned_flops < row.flops
    assert 2 * row.pruned_flops <= row.lowest_flops + row.flops
    assert row.prunable_share == pytest.approx(1 - row.lowest_flops / row.flops, abs=1e-4)
    assert sum(entry["groups"] for entry in row.frozen.values()) < row.groups
    assert set(row.seconds) == {"trace", "verify", "shrink", "all"}


@pytest.mark.filterwarnings("ignore")  # of the exporters
def test_resnet18() -> None:
    told: list[int] = []
    row = module("coverage_checks").examine("resnet18", lambda row: told.append(len(row.checks)))
    check(row)
    assert (row.groups, row.frozen) == (12, {})
    assert told[0] == 0 and told == sorted(told)


def sound(row: Any) -> None:
    """Everything that the full network can do, the pruned one can, and grouping took less than a minute."""
    assert row.error is None and row.problems == []
    assert sum(entry["groups"] for entry in row.frozen.values()) < row.groups
    assert row.seconds["verify"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str) -> None:
    sound(module("coverage").in_own_process(name, 1200))


def test_the_table_has_every_model() -> None:
    record = json.loads((ROOT / "examples/benchmarks/coverage.json").read_text())
    rows = [module("coverage_table").Row(**row) for row in record["rows"]]
    assert sorted(row.name for row in rows) == sorted(MODELS)
    for row in rows:
        sound(row)
    text = (ROOT / "examples/benchmarks/coverage.md").read_text()
    assert text == module("coverage_table").table(record["versions"], rows)


@pytest.mark.filterwarnings("ignore")  # of torch.jit
def test_mistakes_are_noticed() -> None:
    checks, models = module("coverage_checks"), module("torchvision_models")
    net = models.build("resnet18")
    groups = find_channel_groups(net, models.inputs_of("resnet18"), verify=False)
    models.randomise(net)
    pruned = checks.halved(checks.empty_row("resnet18"), net, groups)
    reverse = {name: order[::-1] for name, order in pruned.supernet.order.items()}
    other = shrink(net, groups, pruned.widths, reverse)
    headless = copy.deepcopy(pruned.small)
    headless.fc = nn.Linear(headless.fc.in_features, 7)
    unused = copy.deepcopy(pruned.small)
    unused.fc.requires_grad_(False)

    def what(key: str, **wrong: Any) -> str:
        return checks.outcome(lambda: checks.CHECKS[key](dataclasses.replace(pruned, **wrong)))[0]

    assert what("budget", bound=pruned.flops) == "ok"
    assert what("budget", bound=pruned.flops - 1).endswith(f"allowed are {pruned.flops - 1}")
    assert what("flops", flops=7) == f"FlopsCost says {pruned.flops}, fvcore 7"
    assert what("sliced", small=other).startswith("differs by ")
    assert what("outputs", small=other) == "ok"
    assert what("outputs", small=headless) == "other shapes of outputs"
    assert what("reload", small=headless).startswith("ResultError: ")
    assert what("training", small=unused) == "2 parameters get no gradient, such as fc.bias"


def test_detectors_before_suppression_have_the_groups_of_the_detector() -> None:
    heads = module("detection_heads")

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def backbone(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"0": self.conv(images)}

        def head(self, features: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"logits": self.out(features[0])}

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(list(self.backbone(images).values()))["logits"]

    model, x = Detector().eval(), torch.randn(1, 3, 8, 8)
    wrapped = heads.before_suppression(model)
    assert isinstance(wrapped, heads.OneStage)
    groups = find_channel_groups(model, x)
    small = shrink(wrapped, heads.groups_of_wrapped(groups), {"conv": 5})
    assert torch.equal(small(x)["logits"], shrink(model, groups, {"conv": 5})(x))


def test_failed_checks_are_told_apart_from_what_the_full_network_cannot_do() -> None:
    checks, tables = module("coverage_checks"), module("coverage_table")
    with pytest.raises(checks.CheckError, match=r"differs by 0\.5"):
        checks.check_close([torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 2.0])], 0.1)
    with pytest.raises(checks.CheckError, match="differs by nan"):
        checks.check_close(torch.tensor([torch.nan]), torch.ones(1), 0.1)
    assert checks.check_close([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.1])], 0.1) < 0.05

    def broken() -> None:
        raise ValueError("first line\nsecond line")

    assert checks.outcome(broken) == ("ValueError: first line", None)

    row = tables.Row("a", "video", "1x3", groups=3, frozen={"why": {"groups": 2, "example": "b.c"}})
    row.checks = {"flops": "wrong", "export": "ok", "onnx": f"{tables.UNPRUNED}no such operator"}
    other = tables.Row("d", "video", "1x3", error="stopped after 1 s")
    assert row.problems == ["flops: wrong"] and other.problems == ["stopped after 1 s"]
    text = tables.table({"python": "3", "torch": "2"}, [row, other])
    assert "python 3, torch 2" in text
    assert "\n- a: flops: wrong\n- d: stopped after 1 s\n" in text
    assert "\n- a: onnx: unpruned fails too: no such operator\n" in text
    assert "\n- a: 2 (`b.c`): why\n" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(tables.COLUMNS) + 1}


def test_the_sweep_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = module("coverage")
    out = tmp_path / "made" / "coverage.json"
    measured: list[str] = []

    def instead(name: str, timeout: float) -> Any:
        measured.append(name)
        row = module("coverage_checks").empty_row(name)
        row.error = "UnsupportedModelError: no" if name == "alexnet" else None
        return row

    monkeypatch.setattr(bench, "in_own_process", instead)

    def run(*arguments: str) -> list[str]:
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["coverage", "--quiet", "--out", str(out), *arguments])
        bench.main()
        record = json.loads(out.read_text())
        assert {"python", "torch", "torchvision", "torch-pruning", "fvcore", "onnxruntime"} <= set(
            record["versions"]
        )
        assert out.with_suffix(".md").read_text().count("\n- alexnet: UnsupportedModelError: no\n") == 1
        return [row["name"] for row in record["rows"]]

    assert run("--models", "raft_small", "alexnet") == ["alexnet", "raft_small"]
    assert run("--models", "optical flow", "alexnet") == ["alexnet", "raft_large", "raft_small"]
    assert measured == ["raft_large"]
    run("--models", "alexnet", "--fresh")
    assert measured == ["alexnet"]
    with pytest.raises(SystemExit, match="resnet19"):
        run("--models", "resnet19")

    record = json.loads(out.read_text())
    out.write_text(json.dumps({**record, "versions": {**record["versions"], "torch": "1.0"}}))
    with pytest.raises(SystemExit, match="other versions"):
        run()


def test_a_process_that_is_stopped_or_dies_leaves_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = module("coverage")
    row = bench.in_own_process("resnet18", 0.05)
    assert (row.name, row.error, row.checks) == ("resnet18", "stopped after 0.05 s", {})
    monkeypatch.setattr(sys, "executable", "false")
    assert bench.in_own_process("resnet18", 60).error.startswith("the process ended with 1")


def test_every_model_has_a_family_and_inputs() -> None:
    models = module("torchvision_models")
    sizes = {family: len(names) for family, names in models.FAMILIES.items()}
    assert min(sizes.values()) >= 2 and sizes["classification"] >= 80
    for name in (name for names in models.FAMILIES.values() for name in names):
        inputs = models.inputs_of(name, 2)
        assert len(inputs) == (2 if name.startswith("raft") else 1)
        assert all(len(x) == 2 and x.isfinite().all() for x in inputs)
