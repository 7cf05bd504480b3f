"""NNI pruners that learn their widths while the weights are trained: DMCP, TAS and DSA."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from nni.compression.utils.evaluator import Evaluator
from torch import nn

from nni_dbs.algorithms.dmcp import DMCPSearch
from nni_dbs.algorithms.dsa import DSASearch
from nni_dbs.algorithms.tas import TASSearch
from nni_dbs.algorithms.tas_supernet import TASSupernet
from nni_dbs.bilevel import ArchitectureSearch, check_architecture, check_second
from nni_dbs.errors import ConfigError
from nni_dbs.plugin.evaluator import train_architecture
from nni_dbs.plugin.searching import EvaluatingPruner
from nni_dbs.space import Widths
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import ChannelGroup, find_residual_blocks
from torch_pruning_adapters.calls import Inputs
from torch_pruning_adapters.group import lies_in

_LOGGED = 200  # steps on the architecture


class ArchitecturePruner(EvaluatingPruner):
    """What the pruners share whose `compress(max_steps, max_epochs)` trains weights and widths together.

    Training runs through the evaluator. Train what `export` gives anew, or fine-tune it, or train it with the
    full network as a teacher (`nni_dbs.training`).

    Args:
        second: Batches for the steps on the architecture, as the training step takes them; iterated again
            and again. Default, for the methods that want data of their own: the second half of each batch in
            which the architecture is trained. `nni_dbs.data.split_in_two` splits a data set for good.
        steps_per_epoch: Steps of the optimizer in an epoch; needed where `compress` is given `max_epochs`
            alone, as schedules run over the whole training.
        candidates: Networks to decide between: 1 takes the method's own choice, more are evaluated first.
        lr: Learning rate of the architecture; see the method's search for the default.
        calibration_steps: See `EvaluatingPruner`; for `candidates`.
        kwargs: See `WidthPruner`.
    """

    trains_supernet = True

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        second: Iterable[Any] | None = None,
        steps_per_epoch: int | None = None,
        candidates: int = 1,
        lr: float | None = None,
        calibration_steps: int = 20,
        **kwargs: Any,
    ) -> None:
        if candidates < 1:
            raise ConfigError(f"candidates must be at least 1, not {candidates}")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ConfigError(f"steps_per_epoch must be at least 1, not {steps_per_epoch}")
        check_architecture(lr=lr)
        check_second(second)
        super().__init__(
            model, config_list, evaluator, existed_wrappers, calibration_steps=calibration_steps, **kwargs
        )
        self.second = second
        self.steps_per_epoch = steps_per_epoch
        self.candidates = candidates
        self.lr = lr

    @abstractmethod
    def _search(self, model: nn.Module, steps: int) -> ArchitectureSearch:
        """Made anew for each `compress`, for a training of so many steps."""

    def _choose(self, model: nn.Module) -> Widths:
        if self.evaluator is None:
            raise ConfigError(f"{type(self).__name__} needs an evaluator to train")
        search = self._search(model, steps := self._steps())
        with self._stage("supernet"):
            self.evaluator.bind_model(model)
            try:
                with train_architecture(self.evaluator, search, steps, self.second) as step:
                    self.evaluator.train(*self._duration)
            finally:
                self.evaluator.unbind_model()
        if not search.log:
            raise ConfigError(
                f"the training ended after {step.taken} of {steps} steps, before the architecture was "
                "trained: give compress() a longer one, or the true steps_per_epoch"
            )
        self.counts["supernet steps"] = step.taken
        self.counts["architecture steps"] = len(search.log)
        self.search = search
        with self._stage("search"):
            networks = search.networks(self.candidates)
        widths = networks[0] if len(networks) == 1 else self._best(model, networks)
        self.order = search.settle(widths)
        return widths

    def _measured_inside(self, widths: Widths) -> Widths:
        found = super()._measured_inside(widths)
        self.order = self.search.settle(found)
        return found

    def _compress(self) -> None:
        super()._compress()
        log = self.search.log
        last = len(log) - 1
        self.result.architecture = [log[i] for i in np.linspace(0, last, min(last + 1, _LOGGED)).astype(int)]

    def _steps(self) -> int:
        max_steps, max_epochs = self._duration
        limits = [] if max_steps is None else [max_steps]
        if max_epochs is not None and self.steps_per_epoch is not None:
            limits.append(max_epochs * self.steps_per_epoch)
        if not limits:
            raise ConfigError(
                f"{type(self).__name__} has schedules over the whole training: give compress() max_steps, or "
                "the pruner steps_per_epoch"
            )
        if min(limits) < 2:
            raise ConfigError(
                f"{type(self).__name__} learns its widths in training: give it more than {min(limits)} steps"
            )
        return min(limits)

    def _best(self, model: nn.Module, networks: list[Widths]) -> Widths:
        """The network with the best score."""
        known = self._logged()
        scores = {}
        for widths in networks:
            if widths not in known:
                self.order = self.search.settle(widths)
                with self._stage("evaluate"):
                    known[widths] = self._evaluate(model, widths, "sampled")
            scores[widths] = known[widths]
        self.counts["evaluations"] = len(scores)
        return max(scores, key=scores.__getitem__)


class DMCPPruner(ArchitecturePruner):
    """DMCP: each group keeps its channels bin by bin, with learned probabilities (a Markov chain).

    Use it where training time is plenty: each step trains four sub-networks, and in the second half of the
    training the full one once more. It begins near the narrowest network and grows.

    Sources and reconstructions: `nni_dbs.algorithms.dmcp`.

    Args:
        limit: Most widths of a group that its chain visits.
        kwargs: See `ArchitecturePruner`.
    """

    method = "dmcp"

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        limit: int = 10,
        **kwargs: Any,
    ) -> None:
        check_architecture(limit=limit)
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)
        self.limit = limit

    def _search(self, model: nn.Module, steps: int) -> DMCPSearch:
        return DMCPSearch(
            Supernet(model, self.space.groups, self.order),
            self.space,
            self.bounds,
            steps=steps,
            seed=self.seed,
            limit=self.limit,
            lr=self.lr,
        )


class TASPruner(ArchitecturePruner):
    """TAS: each group chooses among some widths, each stage of residual blocks among depths.

    Use it for residual networks, where it may leave whole blocks out, and with the full network as a teacher
    of the final training.

    NNI's masks cannot say that a block is left out: where TAS does, `compress` warns, and only what `export`
    gives is the network.

    Sources and reconstructions: `nni_dbs.algorithms.tas`.

    Args:
        limit: Most candidate widths of a group.
        depth: Search depths too.
        kwargs: See `ArchitecturePruner`.
    """

    method = "tas"
    second_share = 0.5

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        limit: int = 8,
        depth: bool = True,
        **kwargs: Any,
    ) -> None:
        check_architecture(limit=limit)
        self.depth = depth
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)
        self.limit = limit

    def _groups(
        self, model: nn.Module, inputs: Inputs, selected: Mapping[str, Mapping[str, float]]
    ) -> tuple[ChannelGroup, ...]:
        groups = super()._groups(model, inputs, selected)
        if not self.depth:
            return groups
        groups = find_residual_blocks(model, groups, inputs)
        free = {layer for layer, ratios in selected.items() if ratios.get("max_sparse_ratio", 1) == 1}
        held = {p.layer for g in groups for p in g.producers} - free
        kept = {g.block for g in groups if g.block and any(lies_in(layer, [g.block]) for layer in held)}
        return tuple(dataclasses.replace(g, block=None) if g.block in kept else g for g in groups)

    def _smallest(self) -> Widths:
        return self.space.without({g.block for g in self.space.groups if g.block is not None}).smallest()

    def _search(self, model: nn.Module, steps: int) -> TASSearch:
        candidates = {name: self.space.options(name, self.limit) for name in self.space.names}
        supernet = TASSupernet(model, self.space.groups, candidates, self.example_inputs, self.order)
        return TASSearch(
            supernet,
            self.space,
            self.bounds,
            steps=steps,
            seed=self.seed,
            limit=self.limit,
            lr=self.lr,
        )


class DSAPruner(ArchitecturePruner):
    """DSA: each group has a keep ratio; the budget holds by splitting, as in ADMM.

    Its steps are the cheapest of the three, and it keeps arbitrary channels: those with the largest BatchNorm
    scales at the end. From scratch, or from a pretrained model with `warmup=0`.

    Sources and reconstructions: `nni_dbs.algorithms.dsa`.

    Args:
        warmup: Share of the training before the ratios move.
        every: Steps on the weights for each on the ratios.
        kwargs: See `ArchitecturePruner`; `candidates` is 1, as the result of DSA is one network.
    """

    method = "dsa"
    second_share = 0.1

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        warmup: float = 0.1,
        every: int = 2,
        **kwargs: Any,
    ) -> None:
        DSASearch.check(warmup, every)
        if kwargs.get("candidates", 1) > 1:
            raise ConfigError(f"candidates: DSA decides on one network, not {kwargs['candidates']}")
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)
        self.warmup = warmup
        self.every = every

    def _search(self, model: nn.Module, steps: int) -> DSASearch:
        return DSASearch(
            Supernet(model, self.space.groups, self.order),
            self.space,
            self.bounds,
            steps=steps,
            seed=self.seed,
            warmup=self.warmup,
            every=self.every,
            lr=self.lr,
        )
