"""The command line: every command on a small network, and every mistake in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import nni_dbs.latency
from nni_dbs import load_pruned
from nni_dbs.cli import main
from nni_dbs.plugin import job
from nni_dbs.plugin.searching import EvaluatingPruner
from nni_dbs.training import reinitialise

ROOT = Path(__file__).parent.parent
CONFIG = {
    "model": "examples.cifar_resnet:resnet20",
    "arguments": {"widths": [4, 8, 16]},
    "data": {"name": "digits"},
    "method": "uniform",
    "budget": 0.5,
    "divisor": 1,
    "train": {"epochs": 2, "lr": 0.05},
    "finetune": {"epochs": 1, "lr": 0.01},
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["prune", str(folder / "config.yaml"), "--out", str(folder / "out"), "--quiet"]) == 0
    return folder / "out"


def test_prune_writes_the_whole_directory(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml",
        "widths.yaml",
        "groups.json",
        "weights.safetensors",
        "result.json",
        "report.md",
        "widths.png",
        "flops.png",
        "checkpoint",
    }
    result = json.loads((run / "result.json").read_text())
    assert 0.98 * result["full_flops"] / 2 <= result["flops"] <= result["full_flops"] / 2
    assert set(result["metrics"]) == {"full", "pruned", "fine-tuned", "reloaded"}
    assert result["metrics"]["reloaded"] == result["metrics"]["fine-tuned"]
    assert {"train", "prune", "finetune", "export"} <= set(result["seconds"])
    report = (run / "report.md").read_text()
    assert "![widths](widths.png)" in report and "| fine-tuned |" in report
    model = load_pruned(run)
    assert sum(p.numel() for p in model.parameters()) == result["params"]


def test_evaluate_repeats_the_runs_accuracy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["test_accuracy"]
    assert found == json.loads((run / "result.json").read_text())["metrics"]["fine-tuned"]


def test_plot_draws_again(run: Path) -> None:
    picture = run / "widths.png"
    picture.unlink()
    assert main(["plot", str(run)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_weights_also_after_a_kill(run: Path, config: Path, tmp_path: Path) -> None:
    """A run stopped in the second epoch of training, then in fine-tuning, ends at the same weights."""
    out = tmp_path / "out"
    for stage, steps in (("train", 20), ("finetune", 5)):
        with pytest.MonkeyPatch.context() as patch:
            _kill_after(patch, stage, steps)
            with pytest.raises(KeyboardInterrupt):
                main(["prune", str(config), "--out", str(out), "--quiet", "--resume"])
    assert main(["prune", str(config), "--out", str(out), "--quiet", "--resume"]) == 0
    mine, other = load_file(out / "weights.safetensors"), load_file(run / "weights.safetensors")
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def _kill_after(patch: pytest.MonkeyPatch, stage: str, steps: int) -> None:
    from nni_dbs import training

    check = training._check_loss

    def killed(loss: float, name: str, step: int, lr: float) -> None:
        check(loss, name, step, lr)
        if name == stage and step >= steps:
            raise KeyboardInterrupt

    patch.setattr(training, "_check_loss", killed)


def test_random_search_from_the_shell(config: Path, tmp_path: Path) -> None:
    overrides = ["method=random", "options.candidates=3", "options.calibration_steps=2", "train.epochs=1"]
    out = tmp_path / "out"
    assert main(["prune", str(config), *overrides, "--out", str(out), "--quiet"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == "random" and result["evaluations"] == 3
    logged = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    assert len(logged) == 3 and all(0.98 * found["flops"] < result["flops"] for found in logged)
    best = max(logged, key=lambda found: found["score"])
    assert best["widths"] == result["widths"] and best["flops"] == result["flops"]


# --- the search of DBS -------------------------------------------------------------------------------

DBS = {
    **CONFIG,
    "model": "examples.cifar_resnet:CifarResNet",
    "arguments": {"depth": 8, "widths": [4, 8, 16]},
    "method": "dbs",
    "options": {"points": 5, "evaluations": 7, "per_round": 1, "calibration_steps": 1, "dim": 16},
    "supernet": {"epochs": 2, "lr": 0.02},
    "finetune": {"epochs": 2, "lr": 0.01},
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of DBS, beside its configuration."""
    folder = tmp_path_factory.mktemp("dbs")
    (folder / "config.yaml").write_text(yaml.safe_dump(DBS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["prune", str(folder / "config.yaml"), "--out", str(folder / "out"), "--quiet"]) == 0
    return folder / "out"


def _prune(searched: Path, out: Path, *overrides: str) -> int:
    config = searched.parent / "config.yaml"
    return main(["prune", str(config), *overrides, "--out", str(out), "--quiet", "--resume"])


def _result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def _assert_same_run(out: Path, other: Path) -> None:
    mine, theirs = _result(out), _result(other)
    for key in mine.keys() - {"seconds"}:
        assert mine[key] == theirs[key], key
    weights, expected = load_file(out / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}
    if (other / "search.jsonl").exists():
        assert (out / "search.jsonl").read_bytes() == (other / "search.jsonl").read_bytes()


def _before_the_final_training(searched: Path, out: Path) -> Path:
    """A copy of the run as it was when its search was done."""
    shutil.copytree(searched, out)
    for name in ("result.json", "report.md", "weights.safetensors", "checkpoint/finetune.safetensors"):
        (out / name).unlink()
    return out


def test_dbs_from_the_shell(searched: Path) -> None:
    pictures = ("widths", "flops", "search", "front", "predictions")
    report = (searched / "report.md").read_text()
    for name in pictures:
        assert (searched / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name}.png)" in report
    assert "starting points: 5, " in report and "held-out Kendall tau: " in report
    result = _result(searched)
    assert result["method"] == "dbs" and result["evaluations"] == 7
    assert [fit["evaluations"] for fit in result["fits"]] == [5, 6, 7]
    assert result["flops"] <= result["full_flops"] / 2
    assert set(result["metrics"]) == {"full", "pruned", "fine-tuned", "reloaded"}
    assert result["metrics"]["reloaded"] == result["metrics"]["fine-tuned"]
    lines = [json.loads(line) for line in (searched / "search.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["points"] * 5 + ["round 1", "round 2"]
    assert result["widths"] in [line["widths"] for line in lines]


def test_evolution_on_a_predictor_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = {"predictor": True, "initial": 4, "evaluations": 6, "per_round": 2, "calibration_steps": 1}
    epochs = {"train": {"epochs": 0}, "supernet": {"epochs": 1, "lr": 0.02}, "finetune": {"epochs": 0}}
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump({**DBS, "method": "evolution", "options": options, **epochs}))
    assert main(["prune", str(config), "--out", str(out), "--quiet"]) == 0
    result = _result(out)
    assert result["method"] == "evolution" and result["evaluations"] == 6
    assert [fit["evaluations"] for fit in result["fits"]] == [4, 6]
    report = (out / "report.md").read_text()
    assert "![predictions](predictions.png)" in report and "![search](search.png)" in report


def test_a_search_without_a_checkpoint_is_not_thrown_away(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    log = shutil.copy(searched / "search.jsonl", out)
    config = str(searched.parent / "config.yaml")
    assert "--resume" in _fails(["prune", config, "--out", str(out), "--quiet"], capsys)
    assert Path(log).read_bytes() == (searched / "search.jsonl").read_bytes()


def test_a_latency_budget_killed_in_every_stage_resumes_to_the_same_run(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that finds what is chosen slower than what the model was fitted to."""

    def medians(models: list[torch.nn.Module], *args: Any, **length: float) -> list[float]:
        first, second = (0.2 + 1e-4 * sum(p.numel() for p in m.parameters()) for m in models)
        return [first, second * (1.2 if length and second < first else 1)]

    monkeypatch.setattr(nni_dbs.latency, "medians_ms", medians)
    overrides = ["budget={flops: 0.9, latency_ms: 0.7}"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _prune(searched, whole, *overrides) == 0
    lines = [json.loads(line) for line in (whole / "search.jsonl").read_text().splitlines()]
    assert {"points", "smaller"} <= {line["stage"] for line in lines} and len(lines) > 7
    result = _result(whole)
    assert result["latency_ms"] <= 0.7 * result["full_latency_ms"]
    assert result["widths"] in [line["widths"] for line in lines if line["stage"] == "smaller"]
    fitted = len(json.loads((whole / "latency.json").read_text())["measured"])

    for kill in (
        lambda patch: _kill_after_calls(patch, nni_dbs.latency, "medians_ms", fitted - 3),
        lambda patch: _kill_after(patch, "supernet", 20),
        lambda patch: _kill_after_networks(patch, 3),
        lambda patch: _kill_after_calls(patch, nni_dbs.latency, "medians_ms", 2),  # of those chosen
        lambda patch: _kill_after_networks(patch, 1),  # of those smaller
        lambda patch: _kill_after_calls(patch, nni_dbs.latency, "medians_ms", 0),
    ):
        with pytest.MonkeyPatch.context() as patch:
            kill(patch)
            with pytest.raises(KeyboardInterrupt):
                _prune(searched, out, *overrides)
    assert _prune(searched, out, *overrides) == 0
    _assert_same_run(out, whole)


def _kill_after_calls(patch: pytest.MonkeyPatch, module: Any, name: str, count: int) -> None:
    function, left = getattr(module, name), count

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    patch.setattr(module, name, killed)


def test_plot_draws_the_search_again(searched: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(searched, out)
    names = {path.name for path in out.glob("*.png")}
    for path in out.glob("*.png"):
        path.unlink()
    assert main(["plot", str(out)]) == 0
    assert {path.name for path in out.glob("*.png")} == names


def test_a_search_killed_in_every_stage_resumes_to_the_same_run(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for kill in (
        lambda patch: _kill_after(patch, "train", 20),
        lambda patch: _kill_after(patch, "supernet", 20),
        lambda patch: _kill_after_networks(patch, 3),
        lambda patch: _kill_after_networks(patch, 3),
        lambda patch: _kill_after(patch, "finetune", 20),
        lambda patch: patch.setattr(job, "save_pruned", _killed),
    ):
        with pytest.MonkeyPatch.context() as patch:
            kill(patch)
            with pytest.raises(KeyboardInterrupt):
                _prune(searched, out)
        assert not (out / "result.json").exists()
        started = (out / "checkpoint" / "supernet.safetensors").exists()
        capsys.readouterr()
        if started:
            assert _prune(searched, out, "options.points=6") == 2
            assert "another configuration" in capsys.readouterr().err
    assert len((out / "search.jsonl").read_text().splitlines()) == 7
    assert _prune(searched, out) == 0
    _assert_same_run(out, searched)
    assert _prune(searched, out, "final=scratch") == 2


def _killed(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def _kill_after_networks(patch: pytest.MonkeyPatch, count: int) -> None:
    record, left = EvaluatingPruner._record, count

    def killed(self: EvaluatingPruner, *args: Any) -> None:
        nonlocal left
        record(self, *args)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    patch.setattr(EvaluatingPruner, "_record", killed)


def test_pse_net_killed_in_each_stage_resumes_to_the_same_run(searched: Path, tmp_path: Path) -> None:
    overrides = ["method=pse_net", "options={initial: 3, evaluations: 6, per_round: 2}"]
    overrides += ["train.epochs=0", "supernet.epochs=2", "supernet.batch_size=16", "finetune.epochs=0"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _prune(searched, whole, *overrides) == 0
    result = _result(whole)
    assert result["method"] == "pse_net" and result["evaluations"] == 6
    assert {"widths", "flops", "search", "front", "prior"} == {path.stem for path in whole.glob("*.png")}
    chances = [sum(row.values()) for row in result["prior"].values()]
    assert chances == pytest.approx([1.0] * len(chances))
    with pytest.MonkeyPatch.context() as patch:
        _kill_after(patch, "supernet", result["counts"]["supernet steps"] // 2 + 1)
        with pytest.raises(KeyboardInterrupt):
            _prune(searched, out, *overrides)
    with pytest.MonkeyPatch.context() as patch:
        _kill_after_networks(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            _prune(searched, out, *overrides)
    assert _prune(searched, out, *overrides) == 0
    _assert_same_run(out, whole)


def test_autoslim_killed_while_it_slims_resumes_to_the_same_run(searched: Path, tmp_path: Path) -> None:
    """Also: what its log has above the budget, the pictures show."""
    shorter = [
        f"{stage}.epochs={epochs}" for stage, epochs in (("train", 0), ("supernet", 1), ("finetune", 0))
    ]
    overrides = ["method=autoslim", "options={limit: 3}", *shorter]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _prune(searched, whole, *overrides) == 0
    result = _result(whole)
    lines = [json.loads(line) for line in (whole / "search.jsonl").read_text().splitlines()]
    assert result["method"] == "autoslim" and result["evaluations"] == len(lines)
    assert lines[0]["stage"] == "round 1" and lines[0]["used"] > 1
    assert result["widths"] in [line["widths"] for line in lines]
    assert {"widths", "flops", "search", "front"} == {path.stem for path in whole.glob("*.png")}
    for count in (3, len(lines) // 2):
        with pytest.MonkeyPatch.context() as patch:
            _kill_after_networks(patch, count)
            with pytest.raises(KeyboardInterrupt):
                _prune(searched, out, *overrides)
    assert _prune(searched, out, *overrides) == 0
    _assert_same_run(out, whole)


@pytest.mark.parametrize(("final", "stage"), [("scratch", "from scratch"), ("distill", "distilled")])
def test_final_trainings_of_the_same_search(final: str, stage: str, searched: Path, tmp_path: Path) -> None:
    out = _before_the_final_training(searched, tmp_path / "out")
    assert _prune(searched, out, f"final={final}") == 0
    result, other = _result(out), _result(searched)
    assert result["widths"] == other["widths"] and result["fits"] == other["fits"]
    assert set(result["metrics"]) == {"full", "pruned", stage, "reloaded"}
    assert result["metrics"]["pruned"] == other["metrics"]["pruned"]
    assert result["metrics"]["reloaded"] == result["metrics"][stage]
    assert f"| {stage} |" in (out / "report.md").read_text()
    trained = [load_pruned(directory).state_dict()["fc.weight"] for directory in (out, searched)]
    assert not torch.equal(*trained)


@pytest.mark.slow
@pytest.mark.parametrize("final", ["scratch", "distill"])
def test_a_final_training_killed_in_its_second_epoch_resumes(
    final: str, searched: Path, tmp_path: Path
) -> None:
    whole, killed = (_before_the_final_training(searched, tmp_path / name) for name in ("whole", "killed"))
    assert _prune(searched, whole, f"final={final}") == 0
    with pytest.MonkeyPatch.context() as patch:
        _kill_after(patch, "finetune", 20)
        with pytest.raises(KeyboardInterrupt):
            _prune(searched, killed, f"final={final}")
    assert (killed / "checkpoint" / "finetune.safetensors").exists()
    assert _prune(searched, killed, f"final={final}") == 0
    _assert_same_run(killed, whole)


def test_distilling_for_no_epochs_keeps_the_pruned_network(searched: Path, tmp_path: Path) -> None:
    out = _before_the_final_training(searched, tmp_path / "out")
    assert _prune(searched, out, "final=distill", "finetune.epochs=0") == 0
    assert _result(out)["metrics"]["distilled"] == _result(out)["metrics"]["pruned"]


def test_from_scratch_begins_at_new_weights(searched: Path, tmp_path: Path) -> None:
    untrained = _before_the_final_training(searched, tmp_path / "out")
    assert _prune(searched, untrained, "final=scratch", "finetune.epochs=0") == 0
    drawn = load_pruned(searched)
    reinitialise(drawn, seed=0)
    weights = load_file(untrained / "weights.safetensors")
    assert all(torch.equal(weights[name], parameter) for name, parameter in drawn.named_parameters())


@pytest.mark.parametrize(
    ("name", "shape", "groups"),
    [
        ("lraspp_mobilenet_v3_large", "3x64x64", "30 of 30"),
        ("raft_small", "3x128x128", "38 of 39"),
        ("r3d_18", "3x4x32x32", "12 of 12"),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "3x64x64", " of "),
    ],
)
def test_groups_of_every_kind_of_model(
    name: str, shape: str, groups: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["groups", name, "--input", shape]) == 0
    printed = capsys.readouterr().out
    assert f"{groups}" in printed.splitlines()[-1]
    if name.startswith("fasterrcnn"):
        assert "rpn.head.cls_logits" in printed and "aten.topk" in printed


def test_groups_and_cost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["groups", "resnet18", "--input", "3x64x64", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)
    assert [g["name"] for g in groups][:2] == ["conv1", "layer1.0.conv1"] and len(groups) == 12
    assert main(["groups", "resnet18", "--input", "3x64x64"]) == 0
    assert "12 of 12 groups can be cut" in capsys.readouterr().out

    widths = tmp_path / "widths.yaml"
    widths.write_text(yaml.safe_dump({"layer4.1.conv1": 256}))
    assert main(["cost", "resnet18", "--widths", str(widths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["flops"]["full"] == 1_814_073_344
    assert found["flops"]["full"] - found["flops"]["cost"] == 2 * 256 * 512 * 9 * 7 * 7
    assert found["params"]["full"] - found["params"]["cost"] == 2 * 256 * 512 * 9 + 2 * 256


# --- methods that learn their widths while they train ---------------------------------------------------


EPOCHS = {"dmcp": 2, "tas": 3, "dsa": 2}


def _architecture_config(method: str) -> dict[str, Any]:
    return {
        **CONFIG,
        "model": "examples.cifar_resnet:CifarResNet",
        "arguments": {"depth": 14 if method == "tas" else 8, "widths": [4, 6, 8]},
        "method": method,
        "options": {"candidates": 3} if method == "dmcp" else {},
        "train": {"epochs": 1, "lr": 0.05},
        "supernet": {"epochs": EPOCHS[method], "lr": 0.02},
        "finetune": {"epochs": 1, "lr": 0.01},
        "teacher": {"weight": 0.9},
    }


@pytest.fixture(scope="module", params=["dmcp", "tas", "dsa"])
def learnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one of them, beside its configuration."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.yaml").write_text(yaml.safe_dump(_architecture_config(request.param)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["prune", str(folder / "config.yaml"), "--out", str(folder / "out"), "--quiet"]) == 0
    return folder / "out"


def test_learnt_widths_from_the_shell(learnt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _result(learnt)
    method = result["method"]
    of_an_epoch = {"dmcp": 16, "tas": 8, "dsa": 15}  # all of 1078 images, a half, nine tenths
    steps = EPOCHS[method] * of_an_epoch[method]
    assert result["counts"]["supernet steps"] == steps
    assert result["counts"]["architecture steps"] == len(result["architecture"])
    assert {"dmcp": 16, "tas": 24, "dsa": 13}[method] == len(result["architecture"])
    assert 0.8 * result["full_flops"] / 2 <= result["flops"] <= result["full_flops"] / 2
    assert set(result["metrics"]) == {"full", "pruned", "fine-tuned", "reloaded"}
    assert result["metrics"]["reloaded"] == result["metrics"]["fine-tuned"]
    report = (learnt / "report.md").read_text()
    for name in ("widths", "flops"):
        assert (learnt / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![{name}]({name}.png)" in report
    assert main(["evaluate", str(learnt), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["test_accuracy"]
    assert found == result["metrics"]["reloaded"]
    if method == "dmcp":
        lines = [json.loads(line) for line in (learnt / "search.jsonl").read_text().splitlines()]
        assert len(lines) == result["evaluations"] == 3
        assert result["widths"] == max(lines, key=lambda line: line["score"])["widths"]


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("dmcp", "dsa")]


@pytest.mark.parametrize("learnt", ["tas", *SLOW], indirect=True)
def test_a_run_killed_while_it_learns_its_widths_resumes_to_the_same_run(
    learnt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        _kill_after(patch, "supernet", 20)  # in the second or third epoch
        with pytest.raises(KeyboardInterrupt):
            _prune(learnt, out)
    assert (out / "checkpoint" / "supernet.safetensors").exists()
    assert not (out / "checkpoint" / "finetune.safetensors").exists()
    assert _prune(learnt, out) == 0
    _assert_same_run(out, learnt)


@pytest.mark.parametrize("learnt", ["tas", *SLOW], indirect=True)
def test_the_teacher_matters(learnt: Path, tmp_path: Path) -> None:
    out = _before_the_final_training(learnt, tmp_path / "out")
    assert _prune(learnt, out, "teacher.weight=0") == 0
    result, other = _result(out), _result(learnt)
    assert result["widths"] == other["widths"]
    assert result["metrics"]["pruned"] == other["metrics"]["pruned"]
    weights, taught = (load_file(directory / "weights.safetensors") for directory in (out, learnt))
    assert not torch.equal(weights["fc.weight"], taught["fc.weight"])


def test_methods_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}  (" in text for name in job.METHODS)


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nni-dbs: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.epochs=1", "unknown key 'trian' (did you mean 'train'?)"),
        ("train.epoch=1", "unknown key 'train.epoch' (did you mean 'epochs'?)"),
        ("data.rot=x", "unknown key 'data.rot'"),
        ("data.name=digit", "did you mean 'digits'?"),
        ("model=resnet81", "did you mean 'resnet18'?"),
        ("model=examples.nothing:net", "cannot import the model"),
        ("arguments.depth=3", "cannot build 'examples.cifar_resnet:resnet20'"),
        ("budget=1K", "reachable"),
        ("budget=lots", "cannot read the budget 'lots'"),
        ("budget=-3", "must be positive"),
        ("method=unifrom", "did you mean 'uniform'?"),
        ("options.candidates=3", "options of method 'uniform': no option 'candidates'"),
        ("options.importanse=l2", "did you mean 'importance'?"),
        ("teacher.weight=2", "teacher: weight must lie in [0, 1]"),
        ("config_list=[{op_types: [Conv3d]}]", "selects no layer"),
        ("device=gpu", "expected auto, cpu or cuda"),
        ("train.lr=1e9", "lower train.lr"),
        ("train.epochs=two", "train.epochs: expected int"),
        ("train.momentum=0", "momentum must lie in (0, 1)"),
        ("workers=-1", "must not be negative"),
        ("data={name: cifar10}", "'data.root' is missing"),
        ("arguments.num_classes=3", "set arguments.num_classes=10"),
    ],
)
def test_mistakes_in_the_configuration(
    override: str, message: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", str(config), "train.epochs=1", override, "--out", str(tmp_path / "out"), "--quiet"]
    assert message in _fails(command, capsys)


def test_a_mistake_costs_no_training_and_the_same_directory_takes_the_next_try(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prune = ["prune", str(config), "train.epochs=1", "finetune.epochs=0", "--out", str(out), "--quiet"]
    for mistake in ("budget=1K", "options.candidates=3", "config_list=[{op_types: [Conv3d]}]"):
        _fails([*prune, mistake], capsys)
        assert not (out / "checkpoint").exists()
    _fails([*prune, "train.lr=1e9"], capsys)
    assert main(prune) == 0
    assert main([*prune, "budget=0.4", "--resume"]) == 2  # a finished run is not overwritten


def test_what_cannot_be_drawn_anew_is_told_before_the_training(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convnext = ["model=convnext_tiny", "arguments={num_classes: 10}", "final=scratch"]
    found = _fails(["prune", str(config), *convnext, "--out", str(tmp_path / "out"), "--quiet"], capsys)
    assert "cannot be trained from scratch" in found
    assert not (tmp_path / "out").exists()


def test_mistakes_with_files(
    run: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    prune = ["prune", str(config), "--quiet", "--out"]
    assert "cannot write" in _fails([*prune, str(file / "out")], capsys)
    assert "continue it with --resume" in _fails([*prune, str(run)], capsys)
    assert "another configuration" in _fails([*prune, str(run), "--resume", "seed=1"], capsys)
    assert "cannot read" in _fails(["prune", str(tmp_path / "none.yaml")], capsys)
    assert "no directory" in _fails(["evaluate", str(tmp_path / "none")], capsys)

    widths = run / "widths.yaml"
    command = ["cost", "mobilenet_v2", "--widths", str(widths), "--input", "3x64x64"]
    assert "the widths were made for another model" in _fails(command, capsys)
    assert "--input" in _fails(["groups", "resnet18", "--input", "big"], capsys)


def test_truncated_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.yaml", "widths.yaml", "groups.json"):
        (damaged / name).write_bytes((run / name).read_bytes())
    (damaged / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes()[:-100])
    assert "is damaged" in _fails(["evaluate", str(damaged)], capsys)


def test_empty_data(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "val" / "cat").mkdir(parents=True)
    data = f"data={{name: imagefolder, root: {tmp_path / 'images'}}}"
    message = _fails(["prune", str(config), data, "--quiet", "--out", str(tmp_path / "out")], capsys)
    assert "images" in message


def test_a_fresh_process_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nni_dbs.cli", "evaluate", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "nni-dbs" in line] == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr
