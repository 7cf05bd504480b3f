"""NNI pruners that evaluate networks before they choose one."""

from __future__ import annotations

import itertools
import math
import statistics
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from nni.compression.utils.evaluator import Evaluator
from torch import nn
from tqdm import tqdm

from nni_dbs.errors import ConfigError, ResultError, TrainingError
from nni_dbs.plugin.evaluator import recalibrate_batchnorm, score
from nni_dbs.plugin.pruner import LATENCY_TRIES, WidthPruner
from nni_dbs.projection import leaves_room
from nni_dbs.result import append_search, load_search
from nni_dbs.search import RandomSearch, Searcher
from nni_dbs.space import Widths
from torch_pruning_adapters import mirrored_order, shrink

Executor = Callable[["SearchPruner", nn.Module], None]

CALIBRATION_STEPS = 20  # by default
_MEASURED = 10  # of the best networks, where latency is bounded
_SMALLER = 4  # of these, where none keeps it


class EvaluatingPruner(WidthPruner):
    """What the pruners share that score networks with the evaluator.

    Each network is cut out of the model, its BatchNorm statistics are estimated anew on the evaluator's
    training data, and the evaluator's metric is its score.

    Args:
        calibration_steps: Training batches for BatchNorm; 0 keeps the full model's statistics.
        kwargs: See `WidthPruner`.

    Attributes:
        mirrored: Whether a network's score is the mean of two, of its first channels and of its last ones.
    """

    mirrored = False

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        calibration_steps: int,
        **kwargs: Any,
    ) -> None:
        if calibration_steps < 0:
            raise ConfigError(f"calibration_steps must not be negative, not {calibration_steps}")
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)
        self.calibration_steps = calibration_steps

    def _evaluate(self, model: nn.Module, widths: Widths, stage: str) -> float:
        if self.evaluator is None:
            raise ConfigError(f"{type(self).__name__} needs an evaluator to score networks")
        sides = [self.order, mirrored_order(self.space.groups, self.order)][: 2 if self.mirrored else 1]
        found = statistics.mean(self._score(shrink(model, self.space.groups, widths, o)) for o in sides)
        if not math.isfinite(found):
            raise TrainingError(
                f"a network scored {found}: lower the learning rate of the supernet, or look at the evaluator"
            )
        self._record(widths, found, stage)
        return found

    def _score(self, small: nn.Module) -> float:
        assert self.evaluator is not None
        self._recalibrate(small)
        return score(self.evaluator, small)

    def _recalibrate(self, small: nn.Module) -> None:
        """Gives the BatchNorms of a cut network statistics of its own."""
        if self.calibration_steps:
            assert self.evaluator is not None
            recalibrate_batchnorm(self.evaluator, small, self.calibration_steps)

    def _record(self, widths: Widths, score: float, stage: str) -> None:
        """Appends an evaluated network to the log."""
        if self.log is not None:
            append_search(self.log, widths, score, stage, self.costs, self.bounds)

    def _logged(self) -> dict[Widths, float]:
        """Scores of the log of an interrupted run; otherwise the log begins anew."""
        if self.log is None:
            return {}
        if not self.resume:
            try:
                self.log.unlink(missing_ok=True)
            except OSError as error:
                raise ResultError(f"cannot write {self.log}: {error.strerror or error}") from error
            return {}
        return {Widths(line["widths"]): line["score"] for line in load_search(self.log)}


class SearchPruner(EvaluatingPruner):
    """What the pruners with a `Searcher` share: rounds of asking, evaluating and telling.

    Chosen is the best network that uses 98 % of the budget, or cannot grow. Where latency is bounded, the
    best are measured, and the first that keeps the budget is chosen; if none does, smaller ones of their
    shapes are evaluated too.

    Args:
        evaluations: Networks to evaluate altogether; fewer if the budget has no more to offer, and some
            more, of stage "smaller" in the log, where none of the best keeps a latency.
        per_round: How many of them the searcher is asked for at a time.
        calibration_steps: See `EvaluatingPruner`.
        executor: Called once before the rounds, with this pruner and the model, to score networks elsewhere
            and add them to `log` (which it needs); the rounds evaluate what is still missing.
        kwargs: See `WidthPruner`.

    Attributes:
        prior: What is known of the widths before the search: group name -> width -> chance.
    """

    prior: dict[str, dict[int, float]] | None = None

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        evaluations: int,
        per_round: int,
        calibration_steps: int,
        executor: Executor | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("evaluations", evaluations), ("per_round", per_round)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        super().__init__(
            model, config_list, evaluator, existed_wrappers, calibration_steps=calibration_steps, **kwargs
        )
        if executor is not None and self.log is None:
            raise ConfigError("an executor adds its scores to a log: give log=")
        self.evaluations = evaluations
        self.per_round = per_round
        self.executor = executor

    @abstractmethod
    def _searcher(self) -> Searcher:
        """Made anew for each `compress`."""

    @abstractmethod
    def tuner_arguments(self) -> dict[str, Any]:
        """Arguments of a `WidthTuner` that proposes what this pruner would."""

    def _choose(self, model: nn.Module) -> Widths:
        with self._stage("points"):
            searcher = self._searcher()
        return self._search(model, searcher)

    def _search(self, model: nn.Module, searcher: Searcher) -> Widths:
        """Rounds until enough networks are evaluated, and the choice."""
        known = self._logged()
        if self.executor is not None:
            assert self.log is not None
            with self._stage("experiment"):
                self.executor(self, model)
            for line in load_search(self.log):
                known[Widths(line["widths"])] = line["score"]
                searcher.tell(line["widths"], line["score"])

        def tell(widths: Widths, stage: str) -> None:
            with self._stage("evaluate"):
                if widths not in known:
                    known[widths] = self._evaluate(model, widths, stage)
            searcher.tell(widths, known[widths])

        with tqdm(
            total=self.evaluations,
            initial=len(searcher.told),
            desc=self.method,
            unit="network",
            disable=True if self.quiet else None,
        ) as bar:
            while len(searcher.told) < self.evaluations:
                with self._stage("search"):
                    asked = searcher.ask(min(self.per_round, self.evaluations - len(searcher.told)))
                if not asked:
                    break
                for widths in asked:
                    tell(widths, searcher.stage(widths))
                    bar.update()
                bar.set_postfix(best=f"{max(searcher.told.values()):.2f}")
        with self._stage("search"):
            searcher.fit()
            ranked = searcher.ranked()
        full = (widths for widths in ranked if not leaves_room(widths, self.space, self.bounds))
        best = list(itertools.islice(full, 1 if self.latency is None else _MEASURED)) or ranked[:1]
        chosen = best[0] if self.latency is None else self._in_time(best, searcher, tell)
        self.counts["evaluations"] = len(searcher.told)
        return chosen

    def _in_time(self, best: list[Widths], searcher: Searcher, tell: Callable[[Widths, str], None]) -> Widths:
        """The first that keeps the latency when it is measured; where none does, the best smaller one."""
        assert self.latency is not None
        for tries in range(LATENCY_TRIES + 1):
            if tries > 0:
                smaller = dict.fromkeys(map(self._smaller, best[:_SMALLER]))
                for widths in smaller:
                    tell(widths, "smaller")
                with self._stage("search"):
                    searcher.fit()
                    best = [widths for widths in searcher.ranked() if widths in smaller]
            with self._stage("measure"):
                for widths in best:
                    if self.latency.measure(widths) <= self.most_latency:
                        return widths
        raise self._too_slow(best)


class RandomPruner(SearchPruner):
    """The best of some random networks inside the budget, by the evaluator's score.

    A cheap search, and the one that others have to beat at equal numbers of evaluations.

    Args:
        candidates: How many networks to draw.
        calibration_steps: See `EvaluatingPruner`.
        kwargs: See `WidthPruner`.
    """

    method = "random"

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        candidates: int = 16,
        calibration_steps: int = CALIBRATION_STEPS,
        **kwargs: Any,
    ) -> None:
        if candidates < 1:
            raise ConfigError(f"candidates must be at least 1, not {candidates}")
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            evaluations=candidates,
            per_round=candidates,
            calibration_steps=calibration_steps,
            **kwargs,
        )

    def _searcher(self) -> Searcher:
        return RandomSearch(self.space, self.bounds, self.seed)

    def tuner_arguments(self) -> dict[str, Any]:
        return {"searcher": "random", "seed": self.seed, "per_round": self.per_round}
