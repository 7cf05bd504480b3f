"""The searches as strategies of NNI's NAS, over a `WidthModelSpace`."""

from __future__ import annotations

import inspect
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
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_dbs.algorithms.dmcp import DMCPSearch
from nni_dbs.algorithms.dsa import DSASearch
from nni_dbs.algorithms.tas import TASSearch
from nni_dbs.algorithms.tas_supernet import TASSupernet
from nni_dbs.bilevel import ArchitectureSearch, BilevelStep, check_architecture, check_second
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
    network that it belongs to at any concurrency. `export_top_models` has the searcher's order, by all
    results together. A resumed experiment goes on as if nothing had interrupted it, where trials run one by
    one; networks that were running are evaluated again.

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
        for name in options.keys() & {"searcher", "optimize_mode"}:
            raise ConfigError(f"{type(self).__name__} has no option {name!r}: NNI's NAS maximises")
        self._options = {"searcher": self.searcher, "seed": seed, "per_round": per_round, **options}
        check_arguments(self._options)
        self._log = None if log is None else Path(log)
        self.study: Study | None = None  # since the experiment began
        self._models: dict[Widths, ExecutableModelSpace] = {}  # NNI itself keeps weak references only
        self._useless: set[Widths] = set()  # whose results are no numbers

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
            widths = self._begun.propose()
            if widths is None:
                break
            self._models[widths] = model = self._frozen(widths)
            self.engine.submit_models(model)
        self.engine.wait_models()
        self._learn()
        for widths in self._models:
            if widths not in self._begun.scores:
                _logger.warning("a trial without a result is left out: %s", dict(widths))

    def list_models(self, sort: bool = True, limit: int | None = None) -> Iterator[ExecutableModelSpace]:
        """The networks that have results, the best first; with `sort=False`, whatever was submitted."""
        if not sort or self.study is None:
            yield from super().list_models(sort, limit)
            return
        for widths in self.study.ranked()[:limit]:
            yield self._models.get(widths) or self._trained(widths)

    def state_dict(self) -> dict[str, Any]:
        """All proposals, with their results."""
        if self.study is None:
            return {}
        self._learn()
        return self.study.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from there, or from the log, which has all results that arrived."""
        self._begun.load_state_dict(state_dict)

    @property
    def _begun(self) -> Study:
        if self.study is None:
            raise RuntimeError("the strategy has not been initialized")
        return self.study

    def _learn(self) -> None:
        """Takes the results that have arrived; a trial's end says nothing, as NNI may name another's."""
        for widths, model in self._models.items():
            if model.metric is not None and widths not in self._begun.scores and widths not in self._useless:
                value = model.metric
                try:
                    self._begun.learn(widths, value.get("default") if isinstance(value, Mapping) else value)
                except TrainingError as error:
                    self._useless.add(widths)
                    _logger.error("a result is left out: %s", error)

    def _frozen(self, widths: Widths) -> ExecutableModelSpace:
        return self.model_space.freeze(sample_of(self._begun.problem.space, widths))

    def _trained(self, widths: Widths) -> ExecutableModelSpace:
        """A network of an earlier run."""
        model = self._frozen(widths)
        model.status = ModelStatus.Trained
        model.metrics.final = self._begun.scores[widths]
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

    `NasExperiment` runs it with the raw model format and the sequential engine, which it takes by default.
    `export_top_models` gives the network that the method decided on: as an instance with the channels and
    weights of the training, whose BatchNorm statistics are those of many widths, so train it further or
    estimate them anew; as a dict, its widths alone.

    A killed experiment's `resume` goes on from the last checkpoint of the evaluator's Trainer, if that has a
    `ModelCheckpoint(dirpath, save_last=True)`. Lightning unpickles it: NNI's modules keep classes in it.

    Args:
        second: Batches for the steps on the architecture. Default, for the methods that want data of their
            own: the evaluator's validation batches, as NNI's own differentiable strategies do, so that its
            validation metric is no measure of what comes out; without any, the second half of each batch.
        lr: Learning rate of the architecture; see the method's search for the default.
        seed: Of everything random in the search.

    Raises:
        ConfigError: An evaluator that gives no access to its training, or one without an end.
        TrainingError: The training failed.
    """

    bilevel: ClassVar[bool]

    def __init__(
        self, *, second: Iterable[Any] | None = None, lr: float | None = None, seed: int = 0
    ) -> None:
        check_architecture(lr=lr)
        check_second(second)
        super().__init__()
        self.second = second
        self.lr = lr
        self.seed = seed
        self.widths: Widths | None = None  # since the training ended

    @abstractmethod
    def _search(self, space: WidthModelSpace, steps: int) -> ArchitectureSearch: ...

    def mutate_model(self, model: WidthModelSpace) -> WidthModelSpace:
        """NNI's hook; the model needs no change, as sub-networks are views of it."""
        return _checked(model)

    def mutate_evaluator(self, evaluator: Any) -> Lightning:
        """NNI's hook; the evaluator is taken as it is, and its training step patched while it runs."""
        name = type(self).__name__
        if not isinstance(evaluator, Lightning):
            raise ConfigError(
                f"{name} trains weights and widths together, and a {type(evaluator).__name__} gives no "
                "access to its training: use a Lightning evaluator (nni.nas.evaluator.pytorch), or "
                "DBSStrategy, which runs trials"
            )
        if evaluator.is_mutable():
            raise ConfigError(f"{name} chooses widths only: fix the choices of the evaluator's arguments")
        if evaluator.datamodule is None and evaluator.train_dataloaders is None and evaluator.val_dataloaders:
            raise ConfigError(f"{name} trains, and the evaluator has validation batches only")
        if evaluator.trainer.state.finished:
            raise ConfigError("the evaluator's Trainer has ended a training already: make a new one")
        return evaluator

    def _run(self) -> None:
        space: WidthModelSpace = self.supernet
        evaluator = self._mutated_model_space.evaluator
        training = _Training(lambda steps: self._search(space, steps), space, lambda: self._second(evaluator))
        evaluator.trainer.callbacks.append(training)
        try:
            super()._run()
        finally:
            evaluator.trainer.callbacks.remove(training)
            training.patches.close()
        if self._mutated_model_space.status != ModelStatus.Trained:
            raise TrainingError("the training failed, and the engine went on: its log says why")
        assert training.step is not None
        self.search = training.step.search
        self.widths = self.search.networks(1)[0]
        space.order = self.search.settle(self.widths)

    def list_models(self, sort: bool = True, limit: int | None = 1) -> Iterator[RawFormatModelSpace]:
        """The network that the method decided on, alone."""
        if self.widths is None:
            raise RuntimeError("the strategy has not been run")
        yield self.model_space.freeze(sample_of(self.supernet.widths, self.widths))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from the checkpoint that the state names, or else from the last one."""
        evaluator = self._mutated_model_space.evaluator
        last = _last_checkpoint(evaluator.trainer)
        super().load_state_dict({"ckpt_path": last, **state_dict} if last else state_dict)
        if "weights_only" in inspect.signature(evaluator.trainer.fit).parameters:
            evaluator.fit_kwargs.setdefault("weights_only", False)

    def _second(self, evaluator: Lightning) -> Iterable[Any] | None:
        if self.second is not None or not self.bilevel:
            return self.second
        loaders = evaluator.val_dataloaders
        for owner in (evaluator.datamodule, evaluator.module):
            if loaders is None and owner is not None and is_overridden("val_dataloader", owner):
                loaders = owner.val_dataloader()
        if isinstance(loaders, (list, tuple)):
            if len(loaders) > 1:
                raise ConfigError(
                    "the evaluator has several validation loaders: give second= the batches to take"
                )
            loaders = loaders[0] if loaders else None
        return loaders


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
        space: WidthModelSpace,
        second: Callable[[], Iterable[Any] | None],
    ) -> None:
        self.begin = begin
        self.space = space
        self.second = second
        self.step: BilevelStep | None = None
        self.saved: dict[str, Any] = {}
        self.patches = ExitStack()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict  # Lightning has it before the data's length is known

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "several networks share one backward pass: remove automatic_optimization = False"
            )
        steps = _steps(trainer)
        self.space.train()  # Lightning >= 2.2 trains in the mode it finds
        search = self.begin(steps)
        if not any(search.due(taken, taken / steps) for taken in range(steps)):
            raise ConfigError(
                f"none of the training's {steps} steps would train the architecture: give the Trainer more "
                "epochs"
            )
        _train_too(search.parameters.values(), trainer, self.space)
        self.step = BilevelStep(search, pl_module.training_step, steps, second=self.second())
        if self.saved:
            self.step.load_state_dict(self.saved)
        self.patches.enter_context(patched_step(pl_module, "training_step", self.step))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.step is None else self.step.state_dict()


def _steps(trainer: pl.Trainer) -> int:
    """How often a Trainer will call the training step."""
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ConfigError(
            "schedules run over the whole training: give the Trainer max_epochs, or max_steps where the data "
            "has no length"
        )
    calls = int(steps) * trainer.accumulate_grad_batches
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    return calls if epochs in (None, -1) or batches == math.inf else min(calls, int(batches) * epochs)


def _train_too(parameters: Iterable[nn.Parameter], trainer: pl.Trainer, space: nn.Module) -> None:
    """Lets the optimizer group that has a BatchNorm's parameters train these too."""
    added = list(parameters)
    norms = {id(p) for m in space.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if added:
        home = next((g for g in groups if any(id(p) in norms for p in g["params"])), groups[0])
        home["params"].extend(added)


def _last_checkpoint(trainer: pl.Trainer) -> str | None:
    """The `last.ckpt` of a killed training, where its folder is known from the start."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
        return None
    path = Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    return str(path) if path.exists() else None


def _checked(space: Any) -> WidthModelSpace:
    if not isinstance(space, WidthModelSpace):
        raise ConfigError(f"expected a WidthModelSpace, not a {type(space).__name__}")
    return space


def _width_space(model_space: ExecutableModelSpace) -> WidthModelSpace:
    """The space that an experiment runs on; the simplified format has only its constructor's arguments."""
    if isinstance(model_space, RawFormatModelSpace):
        return _checked(model_space.model_space)
    return _checked(model_space.model.trace_copy().get(traceable=False))
