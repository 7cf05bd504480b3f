"""The searchers as a tuner of NNI's experiments.

NNI's manager gives a tuner ten seconds from the start of its process to its connection, imports and all. So
this module imports little, and the tuner loads its problem, and torch, when NNI asks for the first time.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nni
import psutil
from nni import ClassArgsValidator
from nni.tuner import Tuner

if TYPE_CHECKING:
    from nni_dbs.study import Study

_logger = logging.getLogger(f"nni.{__name__}")  # NNI writes its own loggers into dispatcher.log
STOPPED = "the tuner stopped: "


def _in_dispatcher() -> bool:
    return os.environ.get("SDK_PROCESS") == "dispatcher"


def _fatal(method: Callable[..., Any]) -> Callable[..., Any]:
    """Ends NNI's dispatcher process, with the cause in its log, when a method of the tuner fails.

    NNI itself notes the exception, and waits for a message of its manager, which may never come. The manager
    needs about half a minute to miss a process that ended.
    """

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except nni.NoMoreTrialError:
            raise
        except Exception as error:
            if _in_dispatcher():
                _logger.exception("%s%s: %s", STOPPED, type(error).__name__, " ".join(str(error).split()))
                logging.shutdown()
                os._exit(1)
            raise

    return guarded


def _end_with_manager() -> None:
    """Ends this process when the manager that began it is gone.

    NNI's dispatcher survives it, and disturbs the next manager on its port: it connects to that one too.
    """
    managers = [process for process in psutil.Process().parents() if process.name().startswith("node")]

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while managers[0].is_running() and managers[0].status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        os._exit(1)

    if managers:
        threading.Thread(target=watch, daemon=True).start()


class WidthTuner(Tuner):
    """Proposes widths inside of a budget, to the trials of an NNI experiment.

    By name, once `nni-dbs register` has made it known:

        tuner: {name: DBS, classArgs: {problem: problem.json}}

    or without: `CustomAlgorithmConfig(class_name="nni_dbs.plugin.tuner.WidthTuner", class_args={...})`.
    The experiment's search space is `space.to_nni()`, or that with fewer choices, or empty for all choices of
    the problem. A trial gets a width for each group that has several, and reports a number, or a dict with
    `default`; one that carries its `widths` too survives NNI's mispaired records (microsoft/nni#5726).

    Results and resuming: see `nni_dbs.study.Study`.

    Args:
        problem: A file of `Problem.save`. Relative paths begin at the experiment's trialCodeDirectory.
        log: Of the study. Default: `search.jsonl` in NNI's checkpoint directory of the experiment.
        options: Those of `Study`: `budget`, `searcher`, `seed`, `per_round`, `optimize_mode`, and the
            searcher's own.
    """

    def __init__(self, problem: str, log: str | None = None, **options: Any) -> None:
        super().__init__()
        self._arguments = problem, log, options
        self._study: Study | None = None
        self._search_space: Mapping[str, Any] | None = None  # that the study does not know yet
        self._proposed: dict[int, Any] = {}  # parameter id -> Widths, in this life of the tuner
        self._resumed = False
        if _in_dispatcher():
            _end_with_manager()

    @property
    def study(self) -> Study:
        """What the tuner knows.

        Raises:
            ConfigError, BudgetError, ResultError: As `Study` and `Problem.load`.
        """
        if self._study is None:
            from nni_dbs.problem import Problem
            from nni_dbs.study import Study

            problem, log, options = self._arguments
            checkpoint = Path(os.environ.get("NNI_CHECKPOINT_DIRECTORY", "."))
            path = _located(log) if log else checkpoint / "search.jsonl"
            check_class_args(problem=problem, log=log, **options)
            self._study = Study(Problem.load(_located(problem)), path, resumed=self._resumed, **options)
        if self._search_space is not None:
            self._study.narrow(self._search_space)
            self._search_space = None
        return self._study

    def load_checkpoint(self) -> None:
        """NNI resumes an experiment: its own records of finished trials will come first."""
        self._resumed = True

    def update_search_space(self, search_space: Mapping[str, Any]) -> None:
        """Networks will be of `search_space`; also while the experiment runs.

        It returns at once: a resumed experiment forgets results that arrive before it does.
        """
        self._search_space = search_space

    @_fatal
    def generate_parameters(self, parameter_id: int, **kwargs: Any) -> dict[str, int]:
        """Widths of a network inside of the budget that was not proposed before.

        Raises:
            NoMoreTrialError: The budget has no more to offer.
        """
        widths = self.study.propose()
        if widths is None:
            raise nni.NoMoreTrialError("every network inside of the budget was proposed")
        self._proposed[parameter_id] = widths
        return {name: widths[name] for name in self.study.problem.space.to_nni()}

    @_fatal
    def receive_trial_result(self, parameter_id: int, parameters: Any, value: Any, **kwargs: Any) -> None:
        """Learns a trial's result; what is no result is left out, with a message in dispatcher.log."""
        widths = _carried(value) or self._proposed.get(parameter_id)
        if widths is None:
            _logger.warning("a result of parameters %s, which were not proposed here", parameter_id)
        else:
            self._learn(widths, value, kwargs.get("trial_job_id"))

    def trial_end(self, parameter_id: int, success: bool, **kwargs: Any) -> None:
        """Tells of a trial that failed or was killed.

        Which one is not certain: at a concurrency above 1 NNI may name another one. A network without a
        result is not proposed again, unless the experiment is resumed.
        """
        if not success:
            _logger.warning(
                "a trial failed or was killed: its network is left out. Its stderr says why "
                "(environments/*/trials/*/trial.stderr in the experiment's directory)"
            )

    @_fatal
    def import_data(self, data: list[Mapping[str, Any]]) -> None:
        """Learns results of other trials: what NNI has recorded, on resume, and what a user imports.

        NNI's records pair parameters with other trials' values. On resume only those are taken that carry
        their widths; the others are in the log.
        """
        resumed, self._resumed = self._resumed, False
        for record in data:
            value = record.get("value")
            widths = _carried(value)
            with _left_out():
                if widths is None and not resumed:
                    widths = self.study.problem.space.from_nni(record.get("parameter") or {})
                if widths is not None:
                    self._learn(widths, value, value.get("trial") if isinstance(value, Mapping) else None)

    def _learn(self, widths: Mapping[str, int], value: Any, trial: str | None) -> None:
        with _left_out():
            self.study.learn(widths, value.get("default") if isinstance(value, Mapping) else value, trial)


@contextlib.contextmanager
def _left_out() -> Iterator[None]:
    """Leaves out a result that is none, or is of another model, and says so in dispatcher.log."""
    from nni_dbs.errors import TrainingError
    from torch_pruning_adapters import WidthError

    try:
        yield
    except (TrainingError, WidthError) as error:
        _logger.error("a result is left out: %s", error)


class WidthTunerValidator(ClassArgsValidator):
    """NNI's way to check `classArgs` before an experiment begins."""

    def validate_class_args(self, **kwargs: Any) -> None:
        check_class_args(**kwargs)


def check_class_args(problem: Any = None, log: Any = None, budget: Any = None, **options: Any) -> None:
    """Raises `ConfigError` or `BudgetError` for arguments that `WidthTuner` cannot take; opens no file."""
    from nni_dbs.cost import Budget
    from nni_dbs.errors import ConfigError
    from nni_dbs.study import check_arguments

    if not isinstance(problem, str):
        raise ConfigError("classArgs.problem: give the path of a problem.json, as nni-dbs prepare writes it")
    if not isinstance(log, (str, type(None))):
        raise ConfigError(f"classArgs.log: expected a path, not {log!r}")
    if budget is not None:
        Budget.parse(budget)
    check_arguments(options)


def _carried(value: Any) -> Mapping[str, int] | None:
    """The widths that a result carries."""
    widths = value.get("widths") if isinstance(value, Mapping) else None
    return widths if isinstance(widths, Mapping) else None


def _located(path: str) -> Path:
    """A path relative to the experiment's trialCodeDirectory; tuners run in NNI's log directory."""
    if "--exp_params" not in sys.argv:
        return Path(path)
    encoded = sys.argv[sys.argv.index("--exp_params") + 1]
    return Path(json.loads(base64.b64decode(encoded)).get("trialCodeDirectory", ".")) / path
