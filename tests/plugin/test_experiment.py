"""Experiments: trials that score as pruners do, the executor, and what NNI's manager really does."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nni
import psutil
import pytest
import yaml
from nni.experiment import Experiment
from nni.experiment.config import CustomAlgorithmConfig, ExperimentConfig
from nni.runtime.trial_command_channel import TrialCommandChannel, set_default_trial_command_channel
from test_study import problem, quality, rows_of
from torch import nn

import nni_dbs
from nni_dbs import Widths, WidthTuner, load_pruned
from nni_dbs.cli import main
from nni_dbs.config import Config, load_config
from nni_dbs.errors import ConfigError, ResultError, TrainingError
from nni_dbs.plugin import experiment as experiments
from nni_dbs.plugin import trial as trials
from nni_dbs.plugin.experiment import NNIExecutor, loopback, run_experiment
from nni_dbs.plugin.job import prune
from nni_dbs.plugin.register import NAMES
from nni_dbs.plugin.searching import SearchPruner
from nni_dbs.plugin.trial import Trial
from nni_dbs.plugin.tuner import check_class_args
from nni_dbs.problem import Problem
from nni_dbs.result import load_search
from nni_dbs.training import accuracy, sgd, training_loop, training_step
from torch_pruning_adapters import shrink

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": "examples.cifar_resnet:resnet20",
    "arguments": {"widths": [4, 8, 16]},
    "data": {"name": "digits"},
    "method": "random",
    "options": {"candidates": 6, "calibration_steps": 3},
    "budget": 0.5,
    "divisor": 1,
    "train": {"epochs": 0},
    "supernet": {"epochs": 0, "batch_size": 32},
    "finetune": {"epochs": 0},
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config(folder: Path, **changes: Any) -> Config:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return load_config(path)


class Enough(Exception):
    """Ends a run."""


@pytest.fixture(scope="module", params=["random", "dbs", "bcnet", "pse_net"])
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[Widths, float]]:
    """An experiment directory, and what the pruner itself says of two networks."""
    folder = tmp_path_factory.mktemp("prepared")
    options: dict[str, Any] = {"points": 4, "evaluations": 4, "calibration_steps": 3}
    changes: dict[str, Any] = {} if request.param == "random" else {"method": "dbs", "options": options}
    if request.param == "pse_net":
        changes = {"method": "pse_net", "options": {"initial": 2, "evaluations": 4, "calibration_steps": 3}}
    if request.param == "bcnet":
        options["rule"] = "bcnet"
    scores: dict[Widths, float] = {}

    def score_here(pruner: SearchPruner, model: nn.Module) -> None:
        NNIExecutor(described, folder / "out").prepare(pruner, model)
        for widths in pruner._searcher().ask(2):
            scores[widths] = pruner._evaluate(model, widths, "")
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        described = config(folder, **changes, train={"epochs": 1, "lr": 0.05}, executor="nni")
        with pytest.raises(Enough):
            prune(described, folder / "out", quiet=True, executor=score_here)
    return folder / "out" / "experiment", scores


class Channel(TrialCommandChannel):
    """NNI's side of a trial."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters
        self.reported: list[tuple[str, Any]] = []

    def receive_parameter(self) -> Any:
        return {"parameter_id": 3, "parameters": self.parameters}

    def send_metric(self, type: str, parameter_id: Any, trial_job_id: str, sequence: int, value: Any) -> None:
        self.reported.append((type, value))


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Channel]]:
    yield lambda parameters: set_default_trial_command_channel(Channel(parameters))  # type: ignore
    monkeypatch.setattr("nni.runtime.trial_command_channel._channel", None)


def test_a_trial_scores_as_the_pruner_does_and_says_of_what(
    prepared: tuple[Path, dict[Widths, float]], channel: Callable[[Any], Channel]
) -> None:
    directory, scores = prepared
    found = Problem.load(directory / "problem.json")
    command = shlex.split(yaml.safe_load((directory / "nni.yml").read_text())["trialCommand"])
    assert command[:3] == [sys.executable, "-m", "nni_dbs.plugin.trial"]
    assert len(set(scores.values())) == 2
    for widths, score in scores.items():
        nnis = channel({name: widths[name] for name in found.space.to_nni()})
        assert trials.main([str(directory), *command[3:]]) == 0
        costs = {kind: cost(widths) for kind, cost in found.costs.items()}
        result = {"default": score, **costs, "widths": dict(widths), "trial": nni.get_trial_id()}
        assert nnis.reported == [("FINAL", result)]


@pytest.mark.parametrize("prepared", ["random"], indirect=True)
def test_a_trial_trains_alone_and_reports_every_epoch(
    prepared: tuple[Path, dict[Widths, float]], channel: Callable[[Any], Channel], tmp_path: Path
) -> None:
    directory, scores = prepared
    widths = next(iter(scores))
    for name in ("problem.json", "weights.safetensors"):
        (tmp_path / name).symlink_to(directory / name)
    text = yaml.safe_load((directory / "config.yaml").read_text())
    text["finetune"] |= {"epochs": 2, "lr": 0.05, "batch_size": 256}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
    found = Problem.load(directory / "problem.json")
    nnis = channel({name: widths[name] for name in found.space.to_nni()})
    assert trials.main([str(tmp_path), "--train"]) == 0
    assert [kind for kind, _ in nnis.reported] == ["PERIODICAL", "FINAL"]
    final = nnis.reported[-1][1]
    assert final["widths"] == dict(widths)
    plain = Trial(tmp_path)
    small, recipe = shrink(plain.model, found.space.groups, widths, found.order), plain.config.finetune
    loop = training_loop(plain.splits.train, recipe, device=plain.device, seed=plain.config.seed, quiet=True)
    loop(small, sgd(small, recipe), training_step(recipe.label_smoothing))
    assert final["default"] == accuracy(small, plain.splits.validation, device=plain.device)


@pytest.mark.parametrize("prepared", ["random"], indirect=True)
def test_mistakes_of_a_trial_are_one_line(
    prepared: tuple[Path, dict[Widths, float]],
    channel: Callable[[Any], Channel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, _ = prepared
    for parameters, message in (
        (None, "an NNI experiment that starts"),
        ({"conv9": 3}, "no width for group"),
    ):
        channel(parameters)
        assert trials.main([str(directory)]) == 2
        assert message in capsys.readouterr().err
    assert trials.main([str(tmp_path)]) == 2
    assert "nni-dbs prepare writes it" in capsys.readouterr().err
    for name in ("problem.json", "config.yaml"):
        (tmp_path / name).symlink_to(directory / name)
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(ResultError, match=r"weights\.safetensors is damaged"):
        Trial(tmp_path)


class FakeNNI:
    """Runs the trials of an experiment in this process, with the tuner that it describes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: tuple[int, ...] = ()) -> None:
        self.fails = fails
        self.runs: list[ExperimentConfig] = []
        monkeypatch.setattr(experiments, "run_experiment", self)

    def __call__(self, described: ExperimentConfig, port: int, log: Path, quiet: bool) -> None:
        described.json()  # NNI's own checks
        self.runs.append(described)
        tuner = WidthTuner(**described.tuner.class_args)
        tuner.update_search_space(described.search_space)
        for number in range(described.max_trial_number):
            parameters = tuner.generate_parameters(number)
            widths = tuner.study.problem.space.from_nni(parameters)
            if number not in self.fails:
                tuner.receive_trial_result(number, parameters, quality(widths))


def no_local_evaluation(*_: Any) -> float:
    raise AssertionError("a network was evaluated in this process")


@pytest.mark.parametrize("method", ["random", "dbs"])
def test_an_experiment_scores_everything_and_the_pruner_chooses(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeNNI(monkeypatch)
    monkeypatch.setattr(SearchPruner, "_evaluate", no_local_evaluation)
    options = {"points": 4, "evaluations": 6, "per_round": 2} if method == "dbs" else {"candidates": 6}
    described = config(tmp_path, method=method, options=options)
    rows = nni_dbs.experiment(described, tmp_path / "out", quiet=True)
    (run,) = fake.runs
    assert run.max_trial_number == 6 and run.trial_concurrency == 2
    lines = load_search(tmp_path / "out" / "search.jsonl")
    assert len(lines) == 6 and all(line["used"] <= 1 for line in lines)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["widths"] in [line["widths"] for line in lines] and result["evaluations"] == 6
    assert result["flops"] <= 0.5 * result["full_flops"]
    if method == "random":
        assert quality(result["widths"]) == max(line["score"] for line in lines)
    assert len(rows_of(tmp_path / "out" / "results.csv")) == 6
    assert [row.stage for row in rows] == ["full", "pruned", "fine-tuned", "reloaded"]
    assert load_pruned(tmp_path / "out") is not None


def test_what_failed_is_evaluated_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNNI(monkeypatch, fails=(1, 4))
    here: list[Widths] = []

    def evaluate(self: SearchPruner, model: nn.Module, widths: Widths, stage: str) -> float:
        here.append(widths)
        self._record(widths, quality(widths), stage)
        return quality(widths)

    monkeypatch.setattr(SearchPruner, "_evaluate", evaluate)
    nni_dbs.experiment(config(tmp_path), tmp_path / "out", quiet=True)
    assert len(here) == 2 and len(load_search(tmp_path / "out" / "search.jsonl")) == 6


def test_a_resumed_run_scores_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNNI(monkeypatch)
    monkeypatch.setattr(SearchPruner, "_evaluate", no_local_evaluation)
    described = config(tmp_path)
    nni_dbs.experiment(described, tmp_path / "out", quiet=True)
    log = tmp_path / "out" / "search.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:20])  # killed while the fifth was written
    (tmp_path / "out" / "result.json").unlink()
    nni_dbs.experiment(described, tmp_path / "out", resume=True, quiet=True)
    assert [run.max_trial_number for run in fake.runs] == [6, 2]
    again = log.read_text().splitlines(keepends=True)
    assert again[:4] == lines[:4] and len({json.dumps(json.loads(a)["widths"]) for a in again}) == 6
    (tmp_path / "out" / "result.json").unlink()
    nni_dbs.experiment(described, tmp_path / "out", resume=True, quiet=True)
    assert len(fake.runs) == 2
    with pytest.raises(ResultError, match="another configuration"):
        changed = dataclasses.replace(described.experiment, trials="train")
        nni_dbs.experiment(
            dataclasses.replace(described, experiment=changed), tmp_path / "out", resume=True, quiet=True
        )


def test_prepare_writes_an_experiment_that_nni_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path)
    arguments = ["prepare", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "experiment.port=18111", "experiment.concurrency=3"]) == 0
    path = tmp_path / "out" / "experiment" / "nni.yml"
    assert f"nnictl create --config {path} --port 18111" in capsys.readouterr().out
    loaded = ExperimentConfig.load(path)
    assert loaded.json()["tuner"]["name"] == "DBSRandom" and loaded.trial_concurrency == 3
    assert loaded.search_space == Problem.load(path.parent / "problem.json").space.to_nni()
    fake = FakeNNI(monkeypatch)
    monkeypatch.setattr(SearchPruner, "_evaluate", no_local_evaluation)
    arguments = loaded.tuner.class_args | {"searcher": "random"}
    loaded.tuner = CustomAlgorithmConfig(class_name="x.Y", code_directory=tmp_path, class_args=arguments)
    fake(loaded, 0, tmp_path, True)  # as nnictl would
    assert main(["prune", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "out"), "--resume",
                 "--quiet"]) == 0  # fmt: skip
    assert len(fake.runs) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "cluster"}, "expected local or nni"),
        ({"experiment": {"trials": "both"}}, "expected score or train"),
        ({"experiment": {"concurrency": 0}}, "concurrency must be at least 1"),
        ({"experiment": {"prt": 1}}, r"unknown key 'experiment.prt' \(did you mean 'port'\?\)"),
        ({"experiment": {"service": {"platform": "loca"}}}, "experiment.service: NNI refuses"),
        (
            {"experiment": {"service": {"platform": "remote", "nniManagerIp": "10.0.0.1"}}},
            "service: NNI refuses",
        ),
        ({"experiment": {"service": {"platform": "remote"}}}, "service: give nniManagerIp"),
        ({"experiment": {"service": {"platform": "local", "gpus": 2}}}, "experiment.service: NNI refuses"),
        ({"experiment": {"service": {}}}, "name its platform"),
        (
            {"method": "uniform", "options": {}},
            "the networks of dbs, pse_net, evolution, random; method 'uniform' asks for none",
        ),
        ({"method": "autoslim", "options": {}}, "method 'autoslim' asks for none of it: set executor=local"),
        ({"budget": {"flops": 0.5, "latency_ms": 3}}, "set executor=local"),
    ],
)
def test_experiments_without_a_meaning_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        nni_dbs.experiment(config(tmp_path, **changes), tmp_path / "out", quiet=True)


@pytest.mark.parametrize("name", ["config", "remote", "kubernetes"])
def test_the_examples_are_experiments_that_nni_accepts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_rsa").touch()
    (tmp_path / "runs" / "experiment" / "experiment").mkdir(parents=True)
    shutil.copytree(ROOT / "examples" / "experiment", tmp_path / "examples" / "experiment")
    described = ExperimentConfig.load(tmp_path / "examples" / "experiment" / f"{name}.yml")
    assert described.json()["trainingService"]["trialCommand"].startswith("python3 -m nni_dbs.plugin.trial")
    check_class_args(**described.tuner.class_args)
    assert described.tuner.name in NAMES
    own = load_config(tmp_path / "examples" / "experiment" / "digits.yaml")
    assert own.options["evaluations"] == described.max_trial_number
    assert own.options["points"] == described.tuner.class_args["points"]


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} already; set another one"):
            run_experiment(described_experiment(tmp_path), port, tmp_path / "log", quiet=True)


SCRIPT = """
import json, sys, time, nni
parameters = nni.get_next_parameter()
{body}
nni.report_final_result({result})
"""
QUALITY = "sum((i + 1) * w + w ** 0.5 / 1000 for i, w in enumerate(parameters.values()))"


def described_experiment(
    folder: Path, number: int = 6, body: str = "", service: dict[str, Any] | None = None, **options: Any
) -> ExperimentConfig:
    """An experiment whose trials are quick: they load no torch."""
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "quick.py").write_text(SCRIPT.format(body=body, result=QUALITY))
    problem().save(folder / "code" / "problem.json")
    class_args = {"problem": "problem.json", "log": str(folder / "search.jsonl"), "searcher": "random"}
    return ExperimentConfig(
        search_space=problem().space.to_nni(),
        trial_command=f"{'python3' if service else sys.executable} quick.py",
        trial_code_directory=folder / "code",
        trial_concurrency=2,
        max_trial_number=number,
        experiment_working_directory=folder / "nni",
        tuner=CustomAlgorithmConfig(
            class_name="nni_dbs.plugin.tuner.WidthTuner",
            code_directory=folder / "code",
            class_args={**class_args, **options},
        ),
        training_service=service or {"platform": "local"},
    )


def scored_rows(path: Path) -> list[dict[str, str]]:
    """NNI asks for a network or two more than it runs, where several trials end at once."""
    return [row for row in rows_of(path) if row["score"]]


def test_a_real_experiment_pairs_every_network_with_its_own_score(tmp_path: Path, free_port: int) -> None:
    body = f"time.sleep({QUALITY} % 1.5)"  # so that trials overtake one another
    run_experiment(described_experiment(tmp_path, 4, body), free_port, tmp_path / "search.jsonl", quiet=True)
    rows = scored_rows(tmp_path / "results.csv")
    names = problem().space.names
    assert len(rows) == 4
    for row in rows:
        widths = {name: int(row[name]) for name in names}
        assert float(row["score"]) == quality(widths) and problem().bounds().fits(widths)


@pytest.mark.slow
def test_trials_that_die_and_tuners_that_throw_are_told(tmp_path: Path, free_port: int) -> None:
    described = described_experiment(tmp_path, 2, body="raise ValueError('no data here')")
    with pytest.raises(TrainingError, match="none of the 2 trials had a result: ValueError: no data here"):
        run_experiment(described, free_port, tmp_path / "search.jsonl", quiet=True)
    described = described_experiment(tmp_path, 2, budget=10)
    with pytest.raises(TrainingError, match="BudgetError: flops: 10 is below the smallest network"):
        run_experiment(described, free_port, tmp_path / "search.jsonl", quiet=True)


def until(done: Callable[[], bool], seconds: float = 120) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_killed_manager_resumes_without_losing_or_repeating_a_trial(tmp_path: Path, free_port: int) -> None:
    described = described_experiment(tmp_path, 8, body=f"time.sleep({QUALITY} % 1.5)")
    del described.tuner.class_args["log"]
    first = Experiment(described)
    log = tmp_path / "nni" / first.id / "checkpoint" / "search.jsonl"
    with loopback():
        first.start(free_port)
    try:
        until(lambda: len(load_search(log)) >= 3)
    finally:
        manager = first._proc
        assert manager is not None
        manager.kill()
        manager.wait()
        atexit.unregister(first.stop)
    before = load_search(log)
    second = Experiment(described, first.id)
    with loopback():
        second.resume(free_port, wait_completion=False)
    try:
        until(lambda: second.get_status() == "DONE")
    finally:
        second.stop()
    after = load_search(log)
    assert after[: len(before)] == before
    # NNI starts trials again that had reported, and not yet ended; what they report then is dropped.
    assert 8 - described.trial_concurrency <= len(after) <= 8
    networks = [Widths(line["widths"]) for line in after]
    assert len(set(networks)) == len(networks)
    assert [line["score"] for line in after] == [quality(widths) for widths in networks]


@pytest.mark.slow
def test_nnictl_runs_an_experiment_by_the_registered_name(tmp_path: Path, free_port: int) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "NNI_CONFIG_DIR": str(tmp_path / "registry")}
    environment["NODE_OPTIONS"] = f"--require {Path(experiments.__file__).with_name('loopback.js')}"

    def run(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    described = described_experiment(tmp_path, 4)
    content = described.json()
    content["tuner"] = {"name": "DBSEvolution", "classArgs": {"problem": "problem.json", "initial": 2}}
    (tmp_path / "nni.yml").write_text(yaml.safe_dump(content))
    run(sys.executable, "-m", "nni_dbs.cli", "register")
    run("nnictl", "create", "--config", str(tmp_path / "nni.yml"), "--port", str(free_port))
    try:
        running = Experiment.connect(free_port)
        until(lambda: running.get_status() == "DONE")
        assert f"127.0.0.1:{free_port}" in running_servers()
        with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/oview") as page:
            assert page.status == 200
        finals = [m for ms in running.get_job_metrics().values() for m in ms if m.type == "FINAL"]
        log = tmp_path / "nni" / running.id / "checkpoint" / "search.jsonl"
        scores = sorted(line["score"] for line in load_search(log))
        assert len(scores) == 4 and sorted(float(m.data) for m in finals) == scores
    finally:
        run("nnictl", "stop", "--all")
    for row in scored_rows(log.parent / "results.csv"):
        assert float(row["score"]) == quality({name: int(row[name]) for name in problem().space.names})
    run("nnictl", "view", running.id, "--port", str(free_port))
    try:
        viewed = Experiment.connect(free_port)
        assert viewed.get_status() == "VIEWED"
        assert sorted(float(m.data) for ms in viewed.get_job_metrics().values() for m in ms) == scores
    finally:
        run("nnictl", "stop", "--all")


def running_servers() -> str:
    """Addresses that processes of this machine listen on."""
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return " ".join(f"{address.ip}:{address.port}" for address in listening)
