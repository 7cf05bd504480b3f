"""Networks scored by the trials of an NNI experiment: on this machine's cores, other machines, or a cluster.

What trials and tuner need lies in the experiment directory, which NNI carries to where trials run:
`config.yaml`, `problem.json` and `weights.safetensors`; `nni.yml` is the experiment for `nnictl create`.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import nni
import requests
import yaml
from nni.experiment import Experiment
from nni.experiment.config import CustomAlgorithmConfig, ExperimentConfig
from requests import RequestException
from safetensors.torch import save_model
from torch import nn
from tqdm import tqdm

from nni_dbs.config import Config
from nni_dbs.cost import Budget
from nni_dbs.errors import ConfigError, TrainingError
from nni_dbs.files import write
from nni_dbs.plugin.register import NAMES
from nni_dbs.plugin.searching import SearchPruner
from nni_dbs.plugin.tuner import STOPPED
from nni_dbs.problem import Problem
from nni_dbs.result import load_search

_POLL = 1.0  # seconds
_TIMEOUT = 20.0
_TUNER = "nni_dbs.plugin.tuner.WidthTuner"


class NNIExecutor:
    """Scores a pruner's networks by an NNI experiment whose tuner is a searcher like the pruner's own.

    As many trials as the pruner has evaluations, less those that its log has already.

    Args:
        config: The run's; its section `experiment` says how trials run.
        out: The run's directory, with the experiment directory `experiment` and NNI's own files, `nni`.
        quiet: No progress bar, and nothing from NNI but errors.
    """

    def __init__(self, config: Config, out: Path, quiet: bool = False) -> None:
        self.config = config
        self.out = out.resolve()
        self.directory = self.out / "experiment"
        self.quiet = quiet
        check_experiment(config)

    def __call__(self, pruner: SearchPruner, model: nn.Module) -> None:
        """Runs the experiment; `pruner.log` has its results afterwards.

        Raises:
            ConfigError: The port is in use, or NNI refuses the training service.
            TrainingError: The tuner or NNI's manager stopped, or all trials failed.
        """
        assert pruner.log is not None
        known = len(load_search(pruner.log))
        if known >= pruner.evaluations:
            return
        self.prepare(pruner, model)
        described = self.described(pruner, pruner.evaluations - known)
        run_experiment(described, self.config.experiment.port, pruner.log, self.quiet)

    def prepare(self, pruner: SearchPruner, model: nn.Module) -> None:
        """Writes the experiment directory."""
        costs = {"flops": pruner.flops, "params": pruner.params}
        problem = Problem(pruner.space, costs, pruner.order, self.config.budget, pruner.prior)
        problem.save(self.directory / "problem.json")
        write(self.directory / "config.yaml", lambda path: path.write_text(self.config.to_yaml()))
        write(self.directory / "weights.safetensors", lambda path: save_model(model, str(path)))
        described = self.described(pruner, pruner.evaluations)
        content = {**described.json(), "tuner": self._named_tuner(pruner)}
        write(self.directory / "nni.yml", lambda path: path.write_text(yaml.safe_dump(content)))

    def described(self, pruner: SearchPruner, trials: int) -> ExperimentConfig:
        """The experiment in NNI's words."""
        options = self.config.experiment
        python = sys.executable if options.service["platform"] == "local" else "python3"
        return ExperimentConfig(
            experiment_name=f"{self.config.model} {self.config.method}",
            search_space=pruner.space.to_nni(),
            trial_command=f"{shlex.quote(python)} -m nni_dbs.plugin.trial {self._trial_options(pruner)}",
            trial_code_directory=self.directory,
            trial_concurrency=options.concurrency,
            max_trial_number=trials,
            experiment_working_directory=self.out / "nni",
            tuner=CustomAlgorithmConfig(
                class_name=_TUNER, code_directory=self.directory, class_args=self._class_args(pruner)
            ),
            training_service=options.service,
        )

    def _trial_options(self, pruner: SearchPruner) -> str:
        if self.config.experiment.trials == "train":
            return "--train"
        recipe = "supernet" if pruner.trains_supernet else "finetune"
        mirrored = " --mirrored" if pruner.mirrored else ""
        return f"--recipe {recipe} --calibration-steps {pruner.calibration_steps}{mirrored}"

    def _class_args(self, pruner: SearchPruner) -> dict[str, Any]:
        assert pruner.log is not None
        return {
            "problem": str(self.directory / "problem.json"),
            "log": str(pruner.log.resolve()),
            **pruner.tuner_arguments(),
        }

    def _named_tuner(self, pruner: SearchPruner) -> dict[str, Any]:
        arguments = self._class_args(pruner)
        searcher = arguments.pop("searcher")
        name = next(name for name, known in NAMES.items() if known == searcher)
        return {"name": name, "classArgs": arguments}


def check_experiment(config: Config) -> None:
    """Raises `ConfigError` for an experiment that NNI would refuse, or a budget that a tuner cannot keep."""
    if any(limit.kind == "latency_ms" for limit in Budget.parse(config.budget).limits):
        raise ConfigError(
            "executor: a tuner knows no latency_ms, which is measured on this machine; set executor=local"
        )
    service = config.experiment.service
    if not isinstance(service.get("platform"), str):
        raise ConfigError("experiment.service: name its platform, such as {platform: local}")
    if service["platform"] == "remote" and not {"nniManagerIp", "nni_manager_ip"} & service.keys():
        raise ConfigError(
            "experiment.service: give nniManagerIp, the address of this machine as the others see it "
            "(NNI itself would tell them localhost)"
        )
    try:
        described = ExperimentConfig(
            search_space={},
            trial_command="true",
            trial_concurrency=config.experiment.concurrency,
            tuner=CustomAlgorithmConfig(class_name=_TUNER),
            training_service=service,
        )
        described.json()
    except Exception as error:  # of any kind: NNI's checks are assertions, attribute and type errors too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"experiment.service: NNI refuses {service}: {reason}") from error


def run_experiment(described: ExperimentConfig, port: int, log: Path, quiet: bool = False) -> None:
    """Runs an NNI experiment to its end and stops its manager, whatever happens.

    On the local training service, and where `nniManagerIp` is 127.0.0.1, the manager listens on the loopback
    address only.

    Args:
        described: The experiment.
        port: Of NNI's manager and portal; remote services take the next one too.
        log: The tuner's, to count the results in.
        quiet: See `NNIExecutor`.

    Raises:
        ConfigError: The port is in use.
        TrainingError: The tuner or the manager stopped, or no trial had a result.
    """
    check_port(port)
    if quiet:
        nni.silence_stdout()
    before, trials = len(load_search(log)), described.max_trial_number
    experiment = Experiment(described)
    root = Path(described.experiment_working_directory) / experiment.id
    with loopback() if _stays_here(described) else nullcontext():
        try:
            experiment.start(port)
        except Exception as error:
            raise TrainingError(f"NNI's manager did not start ({error}); see {root / 'log'}") from error
    try:
        with tqdm(total=trials, desc="experiment", unit="trial", disable=True if quiet else None) as bar:
            while not _finished(experiment, root):
                time.sleep(_POLL)
                bar.update(len(load_search(log)) - before - bar.n)
        if len(load_search(log)) == before:
            raise TrainingError(f"none of the {trials} trials had a result: {_trials_reason(experiment)}")
    finally:
        experiment.stop()


def _stays_here(described: ExperimentConfig) -> bool:
    """Whether nobody but this machine, or who has a tunnel to it, needs to reach NNI's manager."""
    service = described.training_service
    addresses = (described.nni_manager_ip, getattr(service, "nni_manager_ip", None))
    return getattr(service, "platform", None) == "local" or "127.0.0.1" in addresses


def check_port(port: int) -> None:
    """Raises `ConfigError` if something listens on a port of this machine."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(
                f"experiment.port: something listens on port {port} already; set another one, such as "
                f"experiment.port={port + 10}, or stop it (nnictl stop)"
            )


def _finished(experiment: Experiment, root: Path) -> bool:
    if cause := _tuners_failure(root):
        raise TrainingError(cause)
    try:
        status = experiment.get_status()
    except RequestException:  # which it does not answer when it ends, such as where SSH fails
        status = "ERROR"
    if status == "ERROR":
        raise TrainingError(f"NNI's manager stopped: {_managers_failure(root)}")
    if status == "TUNER_NO_MORE_TRIAL":  # which NNI itself waits in for ever
        return all(job.status not in ("WAITING", "RUNNING") for job in experiment.list_trial_jobs())
    return status in ("DONE", "STOPPED")


def _managers_failure(root: Path) -> str:
    """The first error that NNI's manager wrote down."""
    log = root / "log" / "nnimanager.log"
    lines = log.read_text().splitlines() if log.exists() else []
    errors = [line.partition(" ERROR ")[2] for line in lines if " ERROR " in line]
    return f"{errors[0] if errors else 'its log has no error'} (see {log})"


def _tuners_failure(root: Path) -> str | None:
    """What the tuner wrote down before it ended its process; NNI's manager notices half a minute later."""
    log = root / "log" / "dispatcher.log"
    lines = log.read_text().splitlines() if log.exists() else []
    causes = [line.partition(STOPPED)[2] for line in lines if STOPPED in line]
    return f"{STOPPED}{causes[-1]} (see {log})" if causes else None


def _trials_reason(experiment: Experiment) -> str:
    """The last line of a trial's stderr, wherever it ran, and where its files are."""
    reasons = []
    for job in experiment.list_trial_jobs():
        url = f"http://localhost:{experiment.port}/api/v1/nni/trial-file/{job.trialJobId}/stderr"
        with suppress(RequestException):
            lines = requests.get(url, timeout=_TIMEOUT).text.strip().splitlines()
            reasons.append(f"{lines[-1]} (see {job.logPath})")
    return reasons[0] if reasons else "NNI cannot read their stderr"


@contextmanager
def loopback() -> Iterator[None]:
    """Lets node, started inside, bind its servers to the loopback address."""
    before = os.environ.get("NODE_OPTIONS")
    script = Path(__file__).with_name("loopback.js")
    os.environ["NODE_OPTIONS"] = f'{before or ""} --require "{script}"'.strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ["NODE_OPTIONS"]
        else:
            os.environ["NODE_OPTIONS"] = before
