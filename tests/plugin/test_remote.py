"""Trials on another machine: NNI's remote service, with a real SSH server on the loopback address."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_experiment import ROOT, config, described_experiment, running_servers
from test_study import rows_of

import nni_dbs
from nni_dbs import Widths
from nni_dbs.errors import TrainingError
from nni_dbs.plugin import experiment as experiments
from nni_dbs.plugin.experiment import run_experiment
from nni_dbs.plugin.searching import SearchPruner
from nni_dbs.plugin.trial import Trial
from nni_dbs.result import load_search

asyncssh = pytest.importorskip("asyncssh", reason="there is no SSH server: pip install asyncssh")
from ssh_server import SSHServer  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    """A machine that has this repository installed, and whose servers listen on the loopback address."""
    preload = f"--require {Path(experiments.__file__).with_name('loopback.js')}"
    has = {"PYTHONPATH": str(ROOT), "NODE_OPTIONS": preload, "OMP_NUM_THREADS": "1"}
    with SSHServer(tmp_path / "machine", {**os.environ, **has}) as machine:
        yield machine


def no_local_evaluation(*_: object) -> float:
    raise AssertionError("a network was evaluated in this process")


def test_trials_run_through_ssh_and_score_as_here(
    server: SSHServer, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(SearchPruner, "_evaluate", no_local_evaluation)
    stop, listening = experiments.Experiment.stop, []

    def noting_stop(experiment: experiments.Experiment) -> None:
        listening.append(running_servers())
        stop(experiment)

    monkeypatch.setattr(experiments.Experiment, "stop", noting_stop)
    service = {"platform": "remote", "nniManagerIp": "127.0.0.1", "machineList": [server.machine]}
    described = config(
        tmp_path,
        options={"candidates": 3, "calibration_steps": 3},
        train={"epochs": 1, "lr": 0.05},
        experiment={"port": free_port, "service": service},
    )
    nni_dbs.experiment(described, tmp_path / "out", quiet=True)
    lines = load_search(tmp_path / "out" / "search.jsonl")
    here = Trial(tmp_path / "out" / "experiment")
    assert len(lines) == 3
    for line in lines:
        assert line["score"] == here.score(Widths(line["widths"]), "finetune", 3)
    (place,) = (tmp_path / "machine" / "nni-experiments").glob("*/environments/*/trials")
    rows = rows_of(tmp_path / "out" / "results.csv")
    assert {path.name for path in place.iterdir()} == {row["trial"] for row in rows if row["score"]}
    assert not list((tmp_path / "out" / "nni").glob("*/environments/*/trials"))
    assert any("launch_trial_keeper" in command for command in server.commands)
    assert f"127.0.0.1:{free_port}" in listening[0] and "0.0.0.0:" + str(free_port) not in listening[0]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["widths"] in [line["widths"] for line in lines]


def test_what_goes_wrong_on_another_machine_is_told(
    server: SSHServer, tmp_path: Path, free_port: int
) -> None:
    service = {"platform": "remote", "nniManagerIp": "127.0.0.1", "machineList": [server.machine]}
    described = described_experiment(tmp_path, 2, "raise ValueError('no data there')", service)
    with pytest.raises(TrainingError, match=r"ValueError: no data there \(see 127.0.0.1:~/nni-experiments/"):
        run_experiment(described, free_port, tmp_path / "search.jsonl", quiet=True)
    another = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
    (tmp_path / "machine" / "authorized_keys").write_bytes(another.export_public_key())
    described = described_experiment(tmp_path, 2, "", service)
    with pytest.raises(TrainingError, match=r"NNI's manager stopped: .*authentication methods failed"):
        run_experiment(described, free_port, tmp_path / "search.jsonl", quiet=True)
