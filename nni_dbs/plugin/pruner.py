"""NNI pruners that choose the widths of whole channel groups for a budget.

NNI has no registry of pruners: importing the class is the registration.

    from nni_dbs import UniformPruner
    pruner = UniformPruner(model, config_list, evaluator, budget="300M")
    _, masks = pruner.compress()
    small = pruner.export("out/")
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting
from nni.compression.utils.evaluator import Evaluator
from schema import SchemaError
from torch import Tensor, nn

from nni_dbs.cost import Bounds, Budget, Cost, FlopsCost, Limit, ParamsCost
from nni_dbs.errors import BudgetError, ConfigError
from nni_dbs.latency import LatencyCost
from nni_dbs.plugin.evaluator import repair
from nni_dbs.projection import project
from nni_dbs.result import Result, describe_device, save_pruned
from nni_dbs.space import Widths, WidthSpace
from torch_pruning_adapters import (
    ChannelGroup,
    Member,
    WidthError,
    channel_order,
    find_channel_groups,
    kept_channels,
    l2_norm,
    removed_blocks,
    shrink,
)
from torch_pruning_adapters.calls import Inputs, map_tensors, tensors_in
from torch_pruning_adapters.errors import nearest
from torch_pruning_adapters.importance import Importance, Order
from torch_pruning_adapters.surgery import keep_mask, layer_axes

SELECTING_KEYS = (
    "op_types",
    "op_names",
    "op_names_re",
    "exclude_op_types",
    "exclude_op_names",
    "exclude_op_names_re",
)
RATIO_KEYS = ("sparse_ratio", "min_sparse_ratio", "max_sparse_ratio")
KEYS = (*SELECTING_KEYS, *RATIO_KEYS)
Choices = Mapping[str, Iterable[int]] | Callable[[ChannelGroup], Iterable[int]]
LATENCY_TRIES = 10
_HELD = 0.95  # of a latency budget: measurements of 2 s each have a standard deviation of 2 to 3 %


class WidthPruner(Pruner):
    """What all pruners of this package share; a subclass chooses the widths.

    `config_list` means what it means in NNI: it selects layers, and a channel group is pruned only if every
    layer that produces its channels is selected. `min_sparse_ratio` and `max_sparse_ratio` bound the
    group's width (the bounds of its producers intersect). Where no `budget` is given, `sparse_ratio` r
    stands for the FLOPs of the network whose selected groups all keep 1 - r of their channels; a `budget`
    takes its place. Other keys have no meaning for whole channels and are refused.

    Args:
        model: The network; wrapped in place, as every NNI pruner does.
        config_list: See above.
        evaluator: An NNI evaluator; methods that need no training or scores do without.
        existed_wrappers: For `from_compressor`.
        budget: As `Budget.parse` takes it: `"300M"` FLOPs, `0.5`, `{"flops": 0.5, "params": "2M"}`.
        example_inputs: Inputs of the model, as `find_channel_groups` takes them; of a batch the first sample
            counts. Default: the evaluator's dummy input, else a 1x3x224x224 guess (with a warning, and
            only relative budgets make sense then).
        min_ratio, divisor: See `WidthSpace`.
        choices: Widths that groups may take in their place: group name -> widths, or a function of a
            `ChannelGroup`, such as `paper_choices` of `nni_dbs.algorithms.dmcp` and `tas`.
        importance: Which channels stay; see `torch_pruning_adapters.importance`.
        seed: Of everything random.
        quiet: No progress bars.
        log: A file that gets one JSON line for each network that a search evaluates, at once.
        resume: Take the scores that `log` has instead of evaluating these networks again (give the same
            model and settings as then; it does not say which). Otherwise `compress` begins it anew.
        latency_table: Where measured latencies are kept and found again, see `LatencyCost`; for budgets that
            bound `latency_ms`, which is that of one sample on the model's device.

    Raises:
        BudgetError: Unreadable or impossible budget.
        ConfigError: A `config_list` that has no meaning here.
        UnsupportedModelError: The model cannot be grouped.
    """

    method: str
    trains_supernet = False  # whether compress() takes a duration
    second_share = 0.0  # of the training data, where the method wants a second part of it

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict | None = None,
        *,
        budget: Budget | float | str | Mapping[str, float | str] | None = None,
        example_inputs: Inputs | None = None,
        min_ratio: float = 0.1,
        divisor: int = 8,
        choices: Choices | None = None,
        importance: Importance = l2_norm,
        seed: int = 0,
        quiet: bool = False,
        log: str | Path | None = None,
        resume: bool = False,
        latency_table: str | Path | None = None,
    ) -> None:
        parsed = None if budget is None else Budget.parse(budget)
        if _wrappers(model):
            raise ConfigError(
                "the model is wrapped by another compressor: call its unwrap_model() first, "
                f"or {type(self).__name__}.from_compressor to go on from it"
            )
        config_list = _in_todays_words(config_list)
        selected = _selected_layers(model, config_list)
        if evaluator is not None:
            repair(evaluator)
        inputs = _one_sample(model, example_inputs, evaluator, parsed)
        groups = self._groups(model, inputs, selected)
        self.space = _bounded(_among(WidthSpace(groups, min_ratio, divisor), choices), selected)
        self.flops, self.params = FlopsCost(model, inputs, groups), ParamsCost(model, groups)
        self.latency: LatencyCost | None = None
        self.seconds: dict[str, float] = {}
        self.budget = parsed or self._budget_of_sparse_ratio(selected)
        if any(limit.kind == "latency_ms" for limit in self.budget.limits):
            with self._stage("latency model"):
                self.latency = LatencyCost(
                    model, inputs, self.space, table=latency_table, seed=seed, quiet=quiet
                )
        self._fitting_seconds = self.seconds
        self.bounds = self.budget.bound(self.costs)
        self.bounds.check_reachable(self._smallest(), self.space.largest())
        self._limits = {limit.kind: most for limit, _, most in self.bounds.limits}
        if self.latency is not None and self.most_latency < self.latency.full:
            self.bounds = self._with_latency(_HELD * self.most_latency)
            if not self.bounds.fits(self._smallest()):
                raise BudgetError(
                    f"{self.budget}: the smallest network takes more than {_HELD:.0%} of it, which leaves no "
                    "room for errors of measurement; raise the budget or lower min_ratio"
                )
        self.example_inputs = inputs
        self.importance = importance
        self.seed = seed
        self.quiet = quiet
        self.log = None if log is None else Path(log)
        self.resume = resume
        self.order: Order = {}
        self._result: Result | None = None
        try:
            super().__init__(
                model, [*config_list, *_others_to_mask(model, groups, selected)], evaluator, existed_wrappers
            )
        except SchemaError as error:
            raise ConfigError(f"config_list: {' '.join(str(error).split())}") from error

    @classmethod
    def from_compressor(
        cls, compressor: Compressor, new_config_list: list[dict], *args: Any, **kwargs: Any
    ) -> WidthPruner:
        """Goes on from another compressor, as in NNI; takes the place of an earlier pruner of widths."""
        pruner = super().from_compressor(compressor, new_config_list, *args, **kwargs)
        pruner.fused_compressors = [
            c for c in pruner.fused_compressors if c is pruner or not isinstance(c, WidthPruner)
        ]
        return pruner

    @property
    def widths(self) -> Widths:
        """The chosen widths, after `compress`."""
        return self.result.widths

    @property
    def result(self) -> Result:
        """The record of the search, after `compress`."""
        if self._result is None:
            raise ConfigError("nothing is chosen yet: call compress() first")
        return self._result

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, dict]:
        """Chooses the widths and masks the model accordingly.

        Returns:
            The model, still wrapped and masked, and the masks as `{layer: {"weight": ..., "bias": ...}}`.
        """
        joined = len(self.fused_compressors) > 1
        if joined and (self.evaluator is None or max_steps is max_epochs is None):
            raise ConfigError(
                "compressors joined by from_compressor train together: give an evaluator, and compress() "
                "max_steps or max_epochs"
            )
        self._result = None
        return super().compress(max_steps, max_epochs)

    def export(
        self, directory: str | Path | None = None, source: Mapping[str, Any] | None = None
    ) -> nn.Module:
        """The pruned model as a plain, smaller module; the wrapped one stays as it is.

        Make a new optimizer to fine-tune it: its parameters are new.

        Args:
            directory: Where to save it, for `load_pruned`.
            source: See `save_pruned`.
        """
        result = self.result
        with self._plain_model() as model:
            small = shrink(model, self.space.groups, result.widths, self.order)
        for module in small.modules():
            forward = vars(module).get("forward")
            if getattr(forward, "__func__", None) is type(module).forward:
                del module.forward  # left by NNI's unwrap
        if directory is not None:
            save_pruned(directory, small, self.space.groups, result.widths, self.order, result, source)
        return small

    @property
    def costs(self) -> dict[str, Cost]:
        """What the budget may bound, by kind; latency only where it does."""
        latency: dict[str, Cost] = {} if self.latency is None else {"latency_ms": self.latency}
        return {"flops": self.flops, "params": self.params, **latency}

    def _groups(
        self, model: nn.Module, inputs: Inputs, selected: Mapping[str, Mapping[str, float]]
    ) -> tuple[ChannelGroup, ...]:
        """The channel groups; those that `config_list` does not select are frozen."""
        return tuple(_frozen_unless_selected(g, selected) for g in find_channel_groups(model, inputs))

    def _smallest(self) -> Widths:
        """The smallest network that the method can choose."""
        return self.space.smallest()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _choose(self, model: nn.Module) -> Widths:
        """The method: widths inside the budget for the plain (unwrapped) model."""
        raise NotImplementedError

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        given = not (max_steps is max_epochs is None)
        if given and not self.trains_supernet:
            raise ConfigError(f"{type(self).__name__} trains nothing: call compress() without a duration")
        if self.trains_supernet and not given:
            raise ConfigError(
                f"{type(self).__name__} trains a supernet: give compress() max_steps or max_epochs"
            )
        self._duration = max_steps, max_epochs
        self._compress()

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        if self.trains_supernet and self._result is None:
            raise ConfigError(
                f"{type(self).__name__} trains a supernet of its own: call its compress() before another "
                "compressor joins it"
            )

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        if self._result is None:  # else this pruner was done before another compressor joined it
            self._compress()

    def _compress(self) -> None:
        self.seconds = dict(self._fitting_seconds)
        self.counts: dict[str, int] = {}
        with self._plain_model() as model:
            self.order = channel_order(model, self.space.groups, self.importance)
            widths = self._choose(model)
            if self.latency is not None:
                with self._stage("measure"):
                    widths = self._measured_inside(widths)
                self.counts["latency measurements"] = self.latency.measurements
            device = next(model.parameters()).device
        self._result = Result(
            method=self.method,
            seed=self.seed,
            budget=str(self.budget),
            widths=widths,
            flops=self.flops(widths),
            full_flops=self.flops.full,
            params=self.params(widths),
            full_params=self.params.full,
            limits=self._limits,
            evaluations=self.counts.get("evaluations", 0),
            counts=self.counts,
            seconds=self.seconds,
            device=describe_device(device),
        )
        if self.latency is not None:
            self._result.latency_ms = self.latency.measure(widths)
            self._result.full_latency_ms = self.latency.full
            self._result.latency_error = self.latency.error
        self.update_masks(self._masks(widths))

    @property
    def most_latency(self) -> float:
        """Milliseconds that a network may take when it is measured: the budget's, with a little to spare."""
        return next(most for _, cost, most in self.bounds.limits if cost is self.latency)

    def _with_latency(self, most: float) -> Bounds:
        return Bounds(
            tuple((lim, cost, most if cost is self.latency else own) for lim, cost, own in self.bounds.limits)
        )

    def _measured_inside(self, widths: Widths) -> Widths:
        """The network, or one of its shape so much smaller that its measured latency keeps the budget."""
        assert self.latency is not None
        tries = 0
        while self.latency.measure(widths) > self.most_latency:
            if tries == LATENCY_TRIES:
                raise self._too_slow([widths])
            widths, tries = self._smaller(widths), tries + 1
        return widths

    def _smaller(self, widths: Widths) -> Widths:
        """A network of the same shape that keeps the latency, if it differs as much from its prediction."""
        assert self.latency is not None
        space = self.space.without(removed_blocks(self.space.groups, widths))
        predicted, least = self.latency(widths), self.latency(space.smallest())
        slower = self.latency.measure(widths) / predicted
        most = max(min(self.most_latency / slower, 0.99 * predicted), least)
        return project(widths, space, self._with_latency(most))

    def _too_slow(self, networks: Sequence[Widths]) -> BudgetError:
        assert self.latency is not None
        best = min(map(self.latency.measure, networks))
        return BudgetError(
            f"no network of this shape keeps {self.budget} when it is measured: the last took {best:.3g} ms, "
            f"{self.most_latency:.3g} ms are allowed ({1 - _HELD:.0%} is held back); measure on a quieter "
            "machine or raise the budget"
        )

    @contextmanager
    def _plain_model(self) -> Iterator[nn.Module]:
        """The model without NNI's wrappers, which come back with the same Parameter objects.

        Unwrapping gives the modules copies of these; what was learnt meanwhile is copied back.
        """
        wrappers = _wrappers(self.bound_model)  # of all joined compressors
        for wrapper in wrappers:
            wrapper.unwrap()
        try:
            yield self.bound_model
        finally:
            for wrapper in wrappers:
                _keep_learnt(wrapper)
                wrapper.wrap()

    def _masks(self, widths: Widths) -> dict[str, dict[str, Tensor]]:
        """Masks of all rows that compute or normalise dropped channels, over whole groups."""
        groups = self.space.groups
        if removed := removed_blocks(groups, widths):
            warnings.warn(
                f"these widths remove the residual blocks {', '.join(removed)}, which masks cannot say: in "
                "the masked model they still add constants; evaluate the model that export() gives",
                stacklevel=2,
            )
        keep = keep_mask(groups, kept_channels(groups, widths, self.order))
        masks: dict[str, dict[str, Tensor]] = {}
        for axis in layer_axes(groups):
            layer = axis.member.layer
            if axis.member.role == "consumer" or layer not in self._module_wrappers:
                continue
            rows = torch.from_numpy(keep[axis.channels])
            spaces = self._module_wrappers[layer].pruning_target_spaces
            for name, dim in axis.member.tensors:
                if name in spaces and spaces[name].target is not None:
                    target = spaces[name].target
                    shape = [-1 if d == dim else 1 for d in range(target.dim())]
                    masks.setdefault(layer, {})[name] = (
                        rows.to(target).reshape(shape).expand_as(target).clone()
                    )
        return masks

    def _budget_of_sparse_ratio(self, selected: Mapping[str, dict]) -> Budget:
        """The FLOPs of the network whose groups keep 1 - sparse_ratio of their channels."""
        free = [g for g in self.space.groups if g.frozen is None]
        ratios = [
            [selected[p.layer]["sparse_ratio"] for p in _choosable(g) if "sparse_ratio" in selected[p.layer]]
            for g in free
        ]
        if not any(ratios):
            raise BudgetError(
                "no budget: give budget= (such as 0.5 or '300M'), or sparse_ratio in config_list"
            )
        widths = {
            g.name: max(round((1 - min(r, default=0.0)) * g.size / g.step), 1) * g.step
            for g, r in zip(free, ratios, strict=True)
        }
        share = math.nextafter(self.flops(widths) / self.flops.full, math.inf)  # the network itself must fit
        return Budget((Limit("flops", share, relative=True),))


class UniformPruner(WidthPruner):
    """Every group keeps the same share of its channels, as large as the budget allows.

    The same up to rounding: widths are multiples of `divisor`, and what rounding leaves of the budget goes to
    the groups furthest below their share. `divisor=1` is the purest form.

    The baseline to beat, and the method of choice where there is no time to search. Needs no evaluator.
    """

    method = "uniform"

    def _choose(self, model: nn.Module) -> Widths:
        with self._stage("search"):
            return project(self.space.largest(), self.space, self.bounds)


def _wrappers(model: nn.Module) -> list[Any]:
    return [m._nni_wrapper for m in model.modules() if "_nni_wrapper" in m._modules]


@torch.no_grad()
def _keep_learnt(wrapper: Any) -> None:
    """Copies an unwrapped module's parameters into those that its wrapper brings back."""
    for spaces in (wrapper.pruning_target_spaces, wrapper.quantization_target_spaces):
        for name, space in spaces.items():
            if isinstance(space.target, nn.Parameter):
                space.target.copy_(wrapper.module.get_parameter(name))


def _in_todays_words(config_list: Sequence[dict]) -> list[dict]:
    """The list without NNI's older keys, such as `sparsity`, `exclude` and `op_partial_names`.

    NNI translates a list whose first entry has one of them, into targets, which have no meaning here.
    """
    if not config_list:
        raise ConfigError("config_list is empty: select layers, such as [{'op_types': ['Conv2d']}]")
    given = deepcopy(list(config_list))
    configs = trans_legacy_config_list(given)
    if configs is given:
        return given
    for config in configs:
        if config.get("target_names") == ["weight", "bias"]:
            del config["target_names"]
            config |= config.pop("target_settings")["weight"]
            del config["granularity"]
    return configs


def _selected_layers(model: nn.Module, config_list: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Layer name -> its ratios, for the layers that `config_list` selects."""
    selected: dict[str, dict[str, float]] = {}
    names = dict(model.named_modules())
    for config in config_list:
        for key in config:
            if key not in KEYS:
                raise ConfigError(
                    f"config_list: {key!r} has no meaning for whole channel groups"
                    f"{nearest(key, KEYS)}; it takes {', '.join(KEYS)}"
                )
        for name in config.get("op_names", ()):
            if name not in names:
                raise ConfigError(f"config_list: the model has no layer {name!r}{nearest(name, names)}")
        layers, ratios, _ = select_modules_by_config(model, config)
        for name, value in ratios.items():
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"config_list: {name} must lie in [0, 1], not {value!r}")
        for layer, module in layers.items():
            if type(module).__name__ not in PruningSetting.registry:
                raise ConfigError(
                    f"config_list: {layer!r} is a {type(module).__name__}, which has no channels to prune; "
                    "narrow the selection, such as with op_types: [Conv2d]"
                )
            selected.setdefault(layer, dict(ratios))
    if not selected:
        raise ConfigError(f"config_list: {config_list} selects no layer of this model")
    return selected


def _choosable(g: ChannelGroup) -> list[Member]:
    """The producers that `config_list` decides about: layers, not weights that other modules apply."""
    layers = [p for p in g.producers if p.kind in ("conv", "linear") and p.reader is None]
    return layers or list(g.producers)


def _frozen_unless_selected(g: ChannelGroup, selected: Mapping[str, Any]) -> ChannelGroup:
    left_out = [p.layer for p in _choosable(g) if p.layer not in selected]
    if g.frozen is None and left_out:
        return dataclasses.replace(g, frozen=f"config_list does not select {left_out[0]!r}")
    return g


def _among(space: WidthSpace, choices: Choices | None) -> WidthSpace:
    if choices is None:
        return space
    if callable(choices):
        choices = {g.name: choices(g) for g in space.groups if g.frozen is None}
    try:
        return space.among(choices)
    except WidthError as error:
        raise ConfigError(f"choices: {error}") from error


def _bounded(space: WidthSpace, selected: Mapping[str, dict[str, float]]) -> WidthSpace:
    """The space inside the intersection of each group's `min_sparse_ratio` and `max_sparse_ratio`."""
    bounds = {}
    for g in space.groups:
        if g.frozen is None:
            ratios = [selected[p.layer] for p in _choosable(g)]
            low = max(1 - r.get("max_sparse_ratio", 1.0) for r in ratios)
            high = min(1 - r.get("min_sparse_ratio", 0.0) for r in ratios)
            bounds[g.name] = (low, high)
    try:
        return space.within(bounds)
    except WidthError as error:
        raise ConfigError(
            f"config_list: min_sparse_ratio and max_sparse_ratio leave no choice: {error}"
        ) from error


def _others_to_mask(
    model: nn.Module, groups: Sequence[ChannelGroup], selected: Mapping[str, dict]
) -> list[dict]:
    """A config that also wraps the normalisations and depthwise layers of the prunable groups.

    NNI masks only wrapped layers, and a BatchNorm turns a masked channel into its bias.
    """
    layers = {
        m.layer for g in groups if g.frozen is None for m in g.members if m.kind in ("norm", "depthwise")
    }
    names = sorted(layers - set(selected))
    for name in names:
        kind = type(model.get_submodule(name)).__name__
        if kind not in PruningSetting.registry:  # SyncBatchNorm, InstanceNorm2d, a user's own layer
            PruningSetting.register(kind, PruningSetting.default_setting)
    return [{"op_names": names}] if names else []


def _one_sample(
    model: nn.Module, example_inputs: Inputs | None, evaluator: Evaluator | None, budget: Budget | None
) -> Inputs:
    """The first sample of the example inputs, on the model's device."""
    inputs = example_inputs
    if inputs is None:
        inputs = getattr(evaluator, "dummy_input", None)
    if inputs is None:
        inputs = getattr(evaluator, "_dummy_input", None)  # LightningEvaluator
    if inputs is None:
        if budget is not None and not budget.is_relative:
            raise BudgetError(
                f"{budget} needs the size of the model's input: give example_inputs=, "
                "or dummy_input to the evaluator"
            )
        warnings.warn("no example_inputs and no dummy_input: guessing one image of 3x224x224", stacklevel=4)
        inputs = torch.zeros(1, 3, 224, 224, dtype=next(model.parameters()).dtype)
    device = next(model.parameters()).device
    batch = next((len(t) for t in tensors_in(inputs) if t.dim()), 0)

    def first(t: Tensor) -> Tensor:
        return (t[:1] if t.dim() and len(t) == batch else t).to(device)

    return map_tensors(inputs, first)
