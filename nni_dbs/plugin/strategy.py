"""The searches as strategies of NNI's NAS, over a `WidthModelSpace`."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from nni.nas.evaluator.pytorch import Lightning
from nni.nas.execution import ExecutionEngine
from nni.nas.oneshot.pytorch.strategy import OneShotStrategy
from nni.nas.space import ExecutableModelSpace, ModelStatus, RawFormatModelSpace
from nni.nas.strategy import Strategy

from nni_dbs.algorithms.dmcp import DMCPSearch
from nni_dbs.algorithms.dsa import DSASearch
from nni_dbs.algorithms.tas import TASSearch
from nni_dbs.algorithms.tas_supernet import TASSupernet
from nni_dbs.bilevel import ArchitectureSearch, BilevelStep, check_architecture
from nni_dbs.errors import ConfigError, TrainingError
from nni_dbs.plugin.evaluator import patched_step
from nni_dbs.plugin.nas import WidthModelSpace, sample_of
from nni_dbs.space import Widths
from nni_dbs.study import Study, check_arguments
from nni_dbs.supernet import Supernet

_logger = logging.getLogger(f"nni.{__name__}")


class SearchStrategy(Strategy):
    """Trials of networks inside of the budget, proposed by one of our searchers.

    For the sequential engine and NNI's training services, in raw or simplified model format. The experiment's
    `max_trial_number` ends it, or a space of which every network was proposed. Each result is paired with the
    network that it belongs to at any concurrency. The first of `export_top_models` is the searcher's choice,
    by all results together; the others follow by their own result.

    Args:
        seed: Of the searcher.
        per_round: How many networks the searcher is asked for at a time.
        log: A `search.jsonl` for the results, with a `results.csv` beside it; what it holds already is known
            from the start. Without one, results survive in NNI's checkpoint only, which a killed experiment
            does not write.
        options: The searcher's own; see `Study`.

    Raises:
        ConfigError: An option without a meaning, an evaluator with choices of its own, or a space of
            another kind.
    """

    searcher: ClassVar[str]

    def __init__(
        self, *, seed: int = 0, per_round: int = 4, log: str | Path | None = None, **options: Any
    ) -> None:
        super().__init__()
        self._options = {"searcher": self.searcher, "seed": seed, "per_round": per_round, **options}
        check_arguments(self._options)
        self._log = None if log is None else Path(log)
        self._models: dict[Widths, ExecutableModelSpace] = {}  # NNI itself keeps weak references only
        self._running: dict[Widths, ExecutableModelSpace] = {}

    def _initialize(self, model_space: ExecutableModelSpace, engine: ExecutionEngine) -> ExecutableModelSpace:
        widths = _width_space(model_space)
        others = model_space.simplify().keys() - widths.problem.space.to_nni().keys()
        if others:
            raise ConfigError(
                f"{type(self).__name__} chooses widths only, and the evaluator offers choices too "
                f"({', '.join(sorted(others))}): fix them, or use one of NNI's own strategies"
            )
        self.study = Study(widths.problem, self._log, **self._options)
        return model_space

    def _run(self) -> None:
        while self.wait_for_resource():
            self._learn()
            widths = self.study.propose()
            if widths is None:
                break
            model = self._frozen(widths)
            self._models[widths] = self._running[widths] = model
            self.engine.submit_models(model)
        self.engine.wait_models()
        self._learn()

    def list_models(self, sort: bool = True, limit: int | None = None) -> Iterator[ExecutableModelSpace]:
        """The networks that have results, best first; with `sort=False`, whatever was submitted."""
        if not sort:
            yield from super().list_models(sort, limit)
            return
        scores = self.study.scores
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        if ranked:
            best = self.study.best()
            ranked = [best, *(widths for widths in ranked if widths != best)]
        for widths in ranked[:limit]:
            yield self._models.get(widths) or self._trained(widths)

    def state_dict(self) -> dict[str, Any]:
        """All results."""
        return {"results": [(dict(widths), score) for widths, score in self.study.scores.items()]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from these results."""
        for widths, score in state_dict["results"]:
            if Widths(widths) not in self.study.scores:
                self.study.learn(widths, score)

    def _learn(self) -> None:
        for widths, model in list(self._running.items()):
            if model.metric is not None:
                del self._running[widths]
                value = model.metric
                try:
                    self.study.learn(widths, value.get("default") if isinstance(value, Mapping) else value)
                except TrainingError as error:
                    _logger.error("a result is left out: %s", error)
            elif model.status.completed():
                del self._running[widths]
                _logger.warning("a trial without a result is left out: %s", dict(widths))

    def _frozen(self, widths: Widths) -> ExecutableModelSpace:
        return self.model_space.freeze(sample_of(self.study.problem.space, widths))

    def _trained(self, widths: Widths) -> ExecutableModelSpace:
        """A network of an earlier run."""
        model = self._frozen(widths)
        model.status = ModelStatus.Trained
        model.metrics.final = self.study.scores[widths]
        return model


class DBSStrategy(SearchStrategy):
    """DBS: a predictor that is refitted as results come in, and a differentiable search on it.

    Use it where a trial takes minutes or more, so that few are to be spent. Options: `points` (how many
    networks come before the first fit), `latent`, `starts`, `fresh`, `optimism`; see
    `nni_dbs.algorithms.dbs.DBSSearch`.
    """

    searcher = "dbs"


class EvolutionStrategy(SearchStrategy):
    """Mutation and crossover inside of the budget. Use it to compare with, or for hundreds of cheap trials.

    Options: `initial`, `parents`, `mutation`; see `nni_dbs.search.EvolutionSearch`.
    """

    searcher = "evolution"


class ArchitectureStrategy(OneShotStrategy):
    """Weights and widths trained together, by the experiment's Lightning evaluator: one long trial.

    `export_top_models` gives the network that the method decided on; as an instance, with the weights of the
    training. `NasExperiment` runs it with the raw model format and the sequential engine, which it takes by
    default; its `resume` goes on from the evaluator's last checkpoint, if its Trainer writes any.

    Args:
        second: Batches for the steps on the architecture. Default, for the methods that want data of their
            own: the evaluator's validation batches, as NNI's own differentiable strategies do, so that its
            validation metric is no measure of what comes out.
        lr: Learning rate of the architecture; see the method's search for the default.
        seed: Of everything random in the search.

    Raises:
        ConfigError: An evaluator that gives no access to its training, or one without an end.
    """

    bilevel: ClassVar[bool]

    def __init__(
        self, *, second: Iterable[Any] | None = None, lr: float | None = None, seed: int = 0
    ) -> None:
        check_architecture(lr=lr)
        super().__init__()
        self.second = second
        self.lr = lr
        self.seed = seed

    @abstractmethod
    def _search(self, space: WidthModelSpace, steps: int) -> ArchitectureSearch: ...

    def mutate_model(self, model: WidthModelSpace) -> WidthModelSpace:
        """NNI's hook; the model needs no change, as sub-networks are views of it."""
        return _checked(model)

    def mutate_evaluator(self, evaluator: Any) -> Lightning:
        """NNI's hook; the evaluator is taken as it is, and its training step patched while it runs."""
        if not isinstance(evaluator, Lightning):
            raise ConfigError(
                f"{type(self).__name__} trains weights and widths together, and a {type(evaluator).__name__} "
                "gives no access to its training: use a Lightning evaluator (nni.nas.evaluator.pytorch), or "
                "DBSStrategy, which runs trials"
            )
        if evaluator.is_mutable():
            raise ConfigError(
                f"{type(self).__name__} chooses widths only: fix the choices of the evaluator's arguments"
            )
        return evaluator

    def _run(self) -> None:
        space: WidthModelSpace = self.supernet
        evaluator = self._mutated_model_space.evaluator
        training = _Training(lambda steps: self._search(space, steps), self._second(evaluator), space)
        evaluator.trainer.callbacks.append(training)
        try:
            super()._run()
        finally:
            evaluator.trainer.callbacks.remove(training)
            training.restore()
        if training.step is None or not training.step.search.log:
            raise ConfigError(
                "the training ended before the architecture was trained: give the Trainer more epochs"
            )
        self.search = training.step.search
        self.widths = self.search.networks(1)[0]
        space.order = self.search.settle(self.widths)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[RawFormatModelSpace]:
        """The network that the method decided on, alone."""
        yield self.model_space.freeze(sample_of(self.supernet.widths, self.widths))

    def _second(self, evaluator: Lightning) -> Iterable[Any] | None:
        if self.second is not None or not self.bilevel:
            return self.second
        if evaluator.datamodule is not None:
            return _FromDataModule(evaluator.datamodule)
        return evaluator.val_dataloaders


class DMCPStrategy(ArchitectureStrategy):
    """DMCP: each group keeps its channels bin by bin, with learned probabilities. See `DMCPPruner`.

    Args:
        limit: Most widths of a group that its chain visits.
        kwargs: See `ArchitectureStrategy`.
    """

    bilevel = DMCPSearch.bilevel

    def __init__(self, *, limit: int = 10, **kwargs: Any) -> None:
        check_architecture(limit=limit)
        super().__init__(**kwargs)
        self.limit = limit

    def _search(self, space: WidthModelSpace, steps: int) -> DMCPSearch:
        supernet = Supernet(space.model, space.widths.groups, space.order)
        return DMCPSearch(
            supernet, space.widths, space.bounds, steps=steps, seed=self.seed, limit=self.limit, lr=self.lr
        )


class TASStrategy(ArchitectureStrategy):
    """TAS: each group chooses among some widths. See `TASPruner`, which searches depths too.

    A choice of NNI's says nothing of blocks that are left out, so depths stay.

    Args:
        limit: Most candidate widths of a group.
        kwargs: See `ArchitectureStrategy`.
    """

    bilevel = TASSearch.bilevel

    def __init__(self, *, limit: int = 8, **kwargs: Any) -> None:
        check_architecture(limit=limit)
        super().__init__(**kwargs)
        self.limit = limit

    def _search(self, space: WidthModelSpace, steps: int) -> TASSearch:
        candidates = {name: space.widths.options(name, self.limit) for name in space.widths.names}
        supernet = TASSupernet(
            space.model, space.widths.groups, candidates, space.example_inputs, space.order
        )
        return TASSearch(
            supernet, space.widths, space.bounds, steps=steps, seed=self.seed, limit=self.limit, lr=self.lr
        )


class DSAStrategy(ArchitectureStrategy):
    """DSA: each group has a keep ratio; the budget holds by splitting, as in ADMM. See `DSAPruner`.

    Args:
        warmup: Share of the training before the ratios move; 0 where the space's weights are trained.
        every: Steps on the weights for each on the ratios.
        kwargs: See `ArchitectureStrategy`.
    """

    bilevel = DSASearch.bilevel

    def __init__(self, *, warmup: float = 0.1, every: int = 2, **kwargs: Any) -> None:
        DSASearch.check(warmup, every)
        super().__init__(**kwargs)
        self.warmup = warmup
        self.every = every

    def _search(self, space: WidthModelSpace, steps: int) -> DSASearch:
        supernet = Supernet(space.model, space.widths.groups, space.order)
        return DSASearch(
            supernet,
            space.widths,
            space.bounds,
            steps=steps,
            seed=self.seed,
            warmup=self.warmup,
            every=self.every,
            lr=self.lr,
        )


class _Training(pl.Callback):
    """Makes a Lightning training one of weights and widths; its state joins Lightning's checkpoints."""

    def __init__(
        self,
        begin: Callable[[int], ArchitectureSearch],
        second: Iterable[Any] | None,
        space: WidthModelSpace,
    ) -> None:
        self.begin = begin
        self.second = second
        self.space = space
        self.step: BilevelStep | None = None
        self.patches = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.step is not None or stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "several networks share one backward pass: remove automatic_optimization = False"
            )
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ConfigError(
                "schedules run over the whole training: give the Trainer max_epochs or max_steps"
            )
        pl_module.train()  # Lightning >= 2.2 trains in the mode it finds
        search = self.begin(int(steps))
        # The evaluator's optimizer finds there what the search trains beside the model.
        self.space.extend_with(search.parameters)
        calls = int(steps) * trainer.accumulate_grad_batches
        self.step = BilevelStep(search, pl_module.training_step, calls, second=self.second)
        self.patches.enter_context(patched_step(pl_module, "training_step", self.step))

    def restore(self) -> None:
        self.patches.close()
        self.space.extend_with({})

    def state_dict(self) -> dict[str, Any]:
        return {} if self.step is None else self.step.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.step is not None
        self.step.load_state_dict(state_dict)


class _FromDataModule:
    """The validation batches of a data module, which has them only while it is trained."""

    def __init__(self, module: pl.LightningDataModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[Any]:
        return iter(self.module.val_dataloader())


def _checked(space: Any) -> WidthModelSpace:
    if not isinstance(space, WidthModelSpace):
        raise ConfigError(f"expected a WidthModelSpace, not a {type(space).__name__}")
    return space


def _width_space(model_space: ExecutableModelSpace) -> WidthModelSpace:
    """The space that an experiment runs on; the simplified format has only its constructor's arguments."""
    if isinstance(model_space, RawFormatModelSpace):
        return _checked(model_space.model_space)
    return _checked(model_space.model.trace_copy().get(traceable=False))
