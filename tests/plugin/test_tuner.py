"""The tuner behind NNI's own dispatcher: pairing, failures, imports, resuming, registration."""

from __future__ import annotations

import base64
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nni
import pytest
from nni.runtime import msg_dispatcher
from nni.runtime.msg_dispatcher import MsgDispatcher
from nni.runtime.tuner_command_channel import CommandType
from nni.tools.package_utils import AlgoMeta, get_algo_meta, register_algo_meta
from nni.tools.package_utils.tuner_factory import (
    create_builtin_class_instance,
    create_customized_class_instance,
    create_validator_instance,
)
from test_study import problem, quality, rows_of

from nni_dbs import WidthTuner
from nni_dbs.cli import main
from nni_dbs.errors import ConfigError
from nni_dbs.plugin.register import NAMES, register, unregister
from nni_dbs.plugin.tuner import check_class_args
from nni_dbs.study import SEARCHERS


class Manager:
    """NNI's dispatcher as its manager talks to it, with the parameters that it was sent."""

    def __init__(self, tuner: WidthTuner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(msg_dispatcher, "_next_parameter_id", 0)
        monkeypatch.setattr(msg_dispatcher, "_trial_params", {})
        self.dispatcher = MsgDispatcher("ws://_unittest_", tuner)
        self.sent: list[tuple[CommandType, str]] = []
        self.dispatcher.send = lambda command, data: self.sent.append((command, data))  # type: ignore
        self.tuner = tuner

    def begin(self, space: Mapping[str, Any]) -> None:
        self.dispatcher.process_command(CommandType.Initialize, space)

    def request(self, n: int) -> list[dict[str, Any]]:
        """The new trials: `parameter_id` and `parameters`."""
        before = len(self.sent)
        self.dispatcher.process_command(CommandType.RequestTrialJobs, n)
        new = [json.loads(data) for command, data in self.sent[before:] if command is CommandType.NewTrialJob]
        return new

    def report(self, trial: Mapping[str, Any], value: Any, job: str = "T") -> None:
        data = {"parameter_id": trial["parameter_id"], "type": "FINAL", "value": nni.dump(value)}
        self.dispatcher.process_command(CommandType.ReportMetricData, {**data, "trial_job_id": job})

    def end(self, trial: Mapping[str, Any], event: str, job: str = "T") -> None:
        data = {"trial_job_id": job, "event": event, "hyper_params": json.dumps(trial)}
        self.dispatcher.process_command(CommandType.TrialEnd, data)

    def score(self, trial: Mapping[str, Any]) -> float:
        return quality(self.tuner.study.problem.space.from_nni(trial["parameters"]))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    problem().save(tmp_path / "problem.json")
    return tmp_path


def tuner(directory: Path, **options: Any) -> WidthTuner:
    given = {"searcher": "random", "log": str(directory / "search.jsonl"), **options}
    return WidthTuner(str(directory / "problem.json"), **given)


def test_trials_get_widths_inside_of_the_budget(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(tuner(directory, searcher="dbs", points=6), monkeypatch)
    space = manager.tuner.study.problem.space
    manager.begin(space.to_nni())
    for _ in range(6):
        for trial in manager.request(2):
            assert set(trial["parameters"]) == set(space.to_nni())
            widths = space.from_nni(trial["parameters"])
            assert manager.tuner.study.bounds.fits(widths)
            manager.report(trial, {"default": quality(widths)})
    assert len(manager.tuner.study.scores) == 12


@pytest.mark.parametrize("carried", [False, True])
def test_results_are_paired_at_any_order_of_arrival(
    carried: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(tuner(directory), monkeypatch)
    manager.begin({})
    space = manager.tuner.study.problem.space
    running = manager.request(4)
    for i in (2, 0, 3, 1, 2, 2, 0, 1):
        trial = running.pop(i)
        widths = space.from_nni(trial["parameters"])
        extra = {"widths": dict(widths)} if carried else {}
        manager.end(running[0], "SUCCEEDED")  # NNI names another trial, and may do so before the result
        manager.report(trial, {"default": quality(widths), **extra})
        running += manager.request(1)
    scored = [row for row in rows_of(directory / "results.csv") if row["score"]]
    assert len(scored) == 8
    for row in scored:
        assert float(row["score"]) == quality({name: int(row[name]) for name in space.names})


def test_a_tuner_without_more_networks_still_pairs_what_runs(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NNI forgets the parameters of the first of several trials when it gets fewer than it asked for."""
    manager = Manager(tuner(directory), monkeypatch)
    manager.begin({})
    study = manager.tuner.study
    last = [study.propose(), None]
    monkeypatch.setattr(study, "propose", lambda: last.pop(0))
    (trial,) = manager.request(2)
    assert manager.sent[-1][0] is CommandType.NoMoreTrialJobs
    manager.report(trial, 1.5)
    assert study.scores == {study.problem.space.from_nni(trial["parameters"]): 1.5}


def test_failed_trials_are_left_out_and_not_proposed_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager(tuner(directory), monkeypatch)
    manager.begin({})
    failed, done = manager.request(2)
    manager.end(failed, "FAILED")
    manager.report(done, manager.score(done))
    others = [trial["parameters"] for trial in manager.request(12)]
    assert failed["parameters"] not in others
    assert [bool(row["score"]) for row in rows_of(directory / "results.csv")] == [False, True] + 12 * [False]
    assert "failed or was killed" in caplog.text and "trial.stderr" in caplog.text


@pytest.mark.parametrize("value", [None, "abc", float("nan"), {"accuracy": 1}, {"default": None}, True])
def test_what_is_no_result_is_left_out_with_a_message(
    value: Any, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager(tuner(directory), monkeypatch)
    manager.begin({})
    bad, good = manager.request(2)
    manager.report(bad, value)
    manager.report(good, 3.0)
    assert list(manager.tuner.study.scores.values()) == [3.0]
    assert "report a finite number" in caplog.text


def test_resuming_ignores_nnis_mispaired_export(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Manager(tuner(directory), monkeypatch)
    first.begin({})
    trials = first.request(4)
    for trial in trials[:3]:
        first.report(trial, first.score(trial))
    space = first.tuner.study.problem.space
    swapped = [
        {"parameter": trials[i]["parameters"], "value": first.score(trials[(i + 1) % 3])} for i in range(3)
    ]
    lost = space.from_nni(trials[3]["parameters"])  # its result reached NNI's database, and not the tuner
    saved = {"default": quality(lost), "widths": dict(lost), "trial": "X"}
    swapped.append({"parameter": trials[0]["parameters"], "value": json.dumps(saved)})

    second = Manager(tuner(directory), monkeypatch)
    second.tuner.load_checkpoint()
    second.begin({})
    second.dispatcher.process_command(CommandType.ImportData, swapped)
    scores = second.tuner.study.scores
    assert scores == {w: quality(w) for w in (space.from_nni(t["parameters"]) for t in trials)}
    assert second.tuner.study.searcher.told == scores
    new = second.request(10)
    assert not {space.from_nni(t["parameters"]) for t in new} & set(scores)
    second.report(new[0], second.score(new[0]))  # NNI counts parameters from 0 again
    assert len(rows_of(directory / "results.csv")) == 4 + 10
    with (directory / "results.csv").open() as file:
        for row in csv.DictReader(file):
            if row["score"]:
                assert float(row["score"]) == quality({name: int(row[name]) for name in space.names})


def test_what_a_user_imports_is_learnt(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = Manager(tuner(directory), monkeypatch)
    manager.tuner.load_checkpoint()
    manager.begin({})
    manager.dispatcher.process_command(CommandType.ImportData, [])  # NNI's own, first
    (trial,) = manager.request(1)
    own = {"parameter": trial["parameters"], "value": 7.0}
    foreign = {"parameter": {"conv9": 3}, "value": 1.0}
    group = next(iter(trial["parameters"]))
    strange = [
        {"parameter": {**trial["parameters"], group: "x"}, "value": 2.0},
        {"parameter": {**trial["parameters"], group: 3}, "value": 2.0},
        {"parameter": {group: 16}, "value": 2.0},
        {"value": 2.0},
        {"parameter": {}, "value": {"default": 2.0, "widths": {group: "wide"}}},
    ]
    manager.dispatcher.process_command(CommandType.ImportData, [foreign, *strange, own])
    assert list(manager.tuner.study.scores.values()) == [7.0]
    assert caplog.text.count("of another search space") >= 3


def test_the_log_is_in_nnis_checkpoint_directory_by_default(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(directory / "checkpoint"))
    manager = Manager(tuner(directory, log=None), monkeypatch)
    manager.begin({})
    (trial,) = manager.request(1)
    manager.report(trial, 1.0)
    assert {path.name for path in (directory / "checkpoint").iterdir()} == {"search.jsonl", "results.csv"}


def test_relative_paths_begin_at_the_code_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    described = base64.b64encode(json.dumps({"trialCodeDirectory": str(directory)}).encode()).decode()
    monkeypatch.setattr(sys, "argv", ["nni", "--exp_params", described])
    made = WidthTuner("problem.json", log="logs/search.jsonl", searcher="random")
    assert made.study.log == directory / "logs" / "search.jsonl"


def test_a_tuner_that_fails_ends_nnis_process_with_the_cause(directory: Path) -> None:
    """Otherwise NNI would wait for ever for a tuner that does not answer."""
    code = (
        "from nni_dbs import WidthTuner; "
        f"tuner = WidthTuner({str(directory / 'problem.json')!r}, budget=10); "
        "tuner.generate_parameters(0); print('alive')"
    )
    nnis = {"SDK_PROCESS": "dispatcher", "NNI_LOG_DIRECTORY": str(directory), "NNI_LOG_LEVEL": "info"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **nnis},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "alive" not in done.stdout
    log = (directory / "dispatcher.log").read_text()
    assert "the tuner stopped: BudgetError: flops: 10 is below the smallest network" in log


def test_the_tuners_module_loads_without_torch() -> None:
    """NNI's manager waits ten seconds for a tuner."""
    code = "import sys, nni_dbs.plugin.tuner as t; t.WidthTuner('x'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "classArgs.problem: give the path"),
        ({"problem": "x", "log": 3}, "classArgs.log: expected a path"),
        ({"problem": "x", "budget": "300X"}, "cannot read the budget"),
        ({"problem": "x", "searcher": "dbx"}, "did you mean 'dbs'"),
    ],
)
def test_class_args_without_a_meaning_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_class_args(**arguments)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NNI_CONFIG_DIR", str(tmp_path / "nni"))
    yield tmp_path / "nni" / "registered_algorithms.yml"


def test_registered_names_make_tuners(registry: Path, directory: Path) -> None:
    assert register() == registry
    first = registry.read_text()
    assert register() == registry and registry.read_text() == first
    log = str(directory / "log")
    for name, searcher in NAMES.items():
        arguments = {"problem": str(directory / "problem.json"), "log": log}
        made = create_builtin_class_instance(name, arguments, "tuners")
        assert isinstance(made, WidthTuner)
        assert type(made.study.searcher) is SEARCHERS[searcher]
        with pytest.raises(ConfigError):
            create_validator_instance("tuners", name).validate_class_args(problem="x", seed="one")
    unregister()
    assert all(get_algo_meta(name) is None for name in NAMES)
    unregister()


def test_registering_leaves_the_tuners_of_others_alone(registry: Path) -> None:
    own = {"builtinName": "Mine", "className": "mine.Tuner"}
    register_algo_meta(AlgoMeta.load(own, "tuner"))
    register()
    unregister()
    mine = get_algo_meta("Mine")
    assert mine is not None and mine.class_name == "mine.Tuner"
    register_algo_meta(AlgoMeta.load({**own, "builtinName": "DBS"}, "tuner"))
    with pytest.raises(ConfigError, match="nnictl algo unregister DBS"):
        register()
    unregister()
    assert get_algo_meta("DBS") is not None and get_algo_meta("DBSRandom") is None


def test_the_command_says_where_it_wrote(registry: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["register"]) == 0
    names = "DBS, DBSEvolution, DBSGuidedEvolution, DBSRandom"
    assert capsys.readouterr().out == f"{names} registered in {registry}\n"
    assert main(["register", "--remove"]) == 0
    assert str(registry) in capsys.readouterr().out and get_algo_meta("DBS") is None


def test_a_registry_that_cannot_be_used_is_told(
    registry: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.parent.mkdir()
    registry.write_text("tuners: [")
    assert main(["register"]) == 2
    assert "damaged" in capsys.readouterr().err
    monkeypatch.setenv("NNI_CONFIG_DIR", str(registry))  # a file
    assert main(["register"]) == 2
    assert "set NNI_CONFIG_DIR" in capsys.readouterr().err


def test_without_registration_nni_makes_it_as_a_custom_algorithm(directory: Path) -> None:
    described = {
        "codeDirectory": str(directory),
        "className": "nni_dbs.plugin.tuner.WidthTuner",
        "classArgs": {"problem": str(directory / "problem.json"), "log": str(directory / "log")},
    }
    made = create_customized_class_instance(described)
    assert isinstance(made, WidthTuner) and made.study.problem.space.names == problem().space.names
