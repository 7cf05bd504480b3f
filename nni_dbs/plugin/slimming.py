"""The NNI pruner that slims a supernet greedily: AutoSlim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nni.compression.utils.evaluator import Evaluator
from torch import nn
from tqdm import tqdm

from nni_dbs.algorithms import autoslim
from nni_dbs.cost import Budget
from nni_dbs.errors import BudgetError, ConfigError, EvaluatorError
from nni_dbs.evaluate import use_batch_statistics
from nni_dbs.plugin.supernets import SupernetPruner
from nni_dbs.space import Widths

_POINTS = 64  # starting points, for the rules that train these


class AutoSlimPruner(SupernetPruner):
    """AutoSlim: the supernet is slimmed greedily, and one run gives a network for every budget.

    `compress(max_steps, max_epochs)` trains the model as a supernet for that long through the evaluator (by
    the sandwich rule). Then, from the full network on, every group is tried one option narrower, and the
    best of these networks is the next, until one keeps the budget. It grows in its shape to fill what the
    last step left over. `within` gives the networks of larger budgets, at no further evaluation.

    For several budgets, or to see what each costs: a step takes as many evaluations as groups can still be
    narrowed. The scores alone decide, and of equal ones the first group's counts: give the evaluator a metric
    that seldom ties (accuracy on many images, or a loss with its sign changed).

    Sources and reconstructions: `nni_dbs.algorithms.autoslim`.

    Args:
        limit: Most options of a group, from 2: fewer make larger steps, and fewer evaluations.
        rule, per_step: See `SupernetPruner`. spfs and path_fair train networks near this budget, the others
            serve all budgets alike.
        calibration_steps: Training batches for the BatchNorms of each network; 0 keeps the full model's
            statistics; None normalises by the statistics of the evaluation batches themselves, as AutoSlim
            does, which takes batches that are large and not sorted by class.
        kwargs: See `WidthPruner`. Networks in `log` may be above the budget, where `used` exceeds 1.

    Attributes:
        trajectory: The networks on the way, from the full one to the first that keeps the budget.
    """

    method = "autoslim"

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        limit: int = autoslim.LIMIT,
        rule: str = "sandwich",
        per_step: int = 2,
        calibration_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if limit < 2:
            raise ConfigError(f"limit must be at least 2 options of a group, not {limit}")
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            rule=rule,
            per_step=per_step,
            calibration_steps=calibration_steps or 0,
            **kwargs,
        )
        self.limit = limit
        self.batch_statistics = calibration_steps is None
        self.trajectory: list[Widths] = []

    def within(self, budget: Budget | float | str | Mapping[str, float | str]) -> Widths:
        """The network of the same run for another budget of FLOPs and parameters, larger than the run's.

        As a run of its own would give it, but for the rules that train starting points, which are of the
        run's own budget. With the model unwrapped (`unwrap_model`), cut it out by
        `torch_pruning_adapters.shrink(model, pruner.space.groups, widths, pruner.order)`.

        Raises:
            BudgetError: The run ended above it, or it bounds latency.
            ConfigError: Before `compress`.
        """
        parsed = Budget.parse(budget)
        if not self.trajectory:
            raise ConfigError("no network is slimmed yet: call compress() first")
        if any(limit.kind == "latency_ms" for limit in parsed.limits):
            raise BudgetError(
                "a latency must be measured: compress a pruner of this budget, with the same log and "
                "resume=True, so that no network is scored again"
            )
        bounds = parsed.bound({"flops": self.flops, "params": self.params})
        return autoslim.within(self.trajectory, self.space, bounds)

    def _choose(self, model: nn.Module) -> Widths:
        self.trajectory = []
        self._train(model, self._starting_points(_POINTS))
        known = self._logged()
        scores: dict[Widths, float] = {}
        with tqdm(desc=self.method, unit="network", disable=True if self.quiet else None) as bar:

            def score(widths: Widths, stage: str) -> float:
                if widths not in scores:
                    with self._stage("evaluate"):
                        found = known[widths] if widths in known else self._evaluate(model, widths, stage)
                    scores[widths] = found
                    bar.update()
                return scores[widths]

            for widths in autoslim.slimmed(
                self.space, lambda widths: score(widths, f"round {len(self.trajectory)}"), self.limit
            ):
                self.trajectory.append(widths)
                bar.set_postfix(used=f"{self.bounds.used(widths):.3f}")
                if self.bounds.fits(widths):
                    break
            with self._stage("search"):
                chosen = autoslim.within(self.trajectory, self.space, self.bounds)
            score(chosen, "grown")
        self.counts["evaluations"] = len(scores)
        return chosen

    def _evaluate(self, model: nn.Module, widths: Widths, stage: str) -> float:
        try:
            return super()._evaluate(model, widths, stage)
        except ValueError as error:
            if self.batch_statistics and "more than 1 value per channel" in str(error):
                raise EvaluatorError(
                    "a batch of the evaluation is too small to normalise by its own statistics: evaluate in "
                    "larger batches, or give calibration_steps"
                ) from error
            raise

    def _recalibrate(self, small: nn.Module) -> None:
        if self.batch_statistics:
            use_batch_statistics(small)
        else:
            super()._recalibrate(small)
