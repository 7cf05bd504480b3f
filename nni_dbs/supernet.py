"""The user's own model at any widths.

A `Supernet` changes nothing in the model. For the duration of a `with` block, the `forward` of the layers
that channel groups touch is replaced, and it comes back when the block ends, however it ends:

- `at(widths)` runs them *sliced*, on the active part of each parameter and buffer, at the cost of the narrow
  network, and skips residual blocks of width 0;
- `gated(gates)` multiplies what each layer reads by differentiable factors, at the cost of the full network;
- `parallel(networks)` runs several networks at once, each on its part of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from nni_dbs.errors import DataError
from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    channel_order,
    check_widths,
    mirrored_order,
    prefix_order,
    removed_blocks,
)
from torch_pruning_adapters.calls import unfused_attention
from torch_pruning_adapters.errors import nearest
from torch_pruning_adapters.importance import Order, check_orders
from torch_pruning_adapters.surgery import (
    axes_outside,
    check_model,
    cut_sizes,
    keep_mask,
    kept_entries,
    kept_sizes,
    layer_axes,
    size_attributes,
)

Forward = Callable[..., Any]
_saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
Index = tuple["slice | Tensor", ...]


@dataclass(frozen=True)
class Cut:
    """The active part of a parameter in one use of its layer, as a leaf of its own.

    Attributes:
        parameter: The whole parameter.
        index: Where the part lies: `parameter[index]` has its values.
        part: What the layer computed with.
    """

    parameter: Tensor
    index: Index
    part: Tensor


class Supernet:
    """One model that stands for all its narrower versions, with shared weights.

    Use it to train many widths at once (`nni_dbs.sampling`, `nni_dbs.steps`), to score widths without
    cutting the model for each, and to learn relaxed widths.

    Parameters, `state_dict`, hooks and classes stay as they are, gradients arrive in the model's own
    Parameters, and running statistics in its own buffers (only the active part of them is updated). Blocks
    may be nested: the innermost alone applies. One model runs in one thread at a time; threads need copies.

    Args:
        model: The network, also inside of `DistributedDataParallel`, a Lightning module and so on.
        groups: From `find_channel_groups` on this model.
        order: Group name -> its channels (C,), most important first; width w keeps the first w of them.
            Default: `channel_order` (largest L2 norm first), ranked now and frozen, so that a trained
            network's narrow versions begin with its best channels. `prefix_order` keeps the first channels,
            as slimmable networks trained from scratch do, and is the fastest: it slices views.

    Attributes:
        model, groups, order: As above; hand `order` to `shrink` to cut the same channels.

    Raises:
        WidthError: Groups of another model, or an order that is not one.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], order: Order | None = None) -> None:
        self.model = model
        self.groups = tuple(groups)
        modules = dict(model.named_modules())
        check_model(modules, self.groups)
        if order is None:
            free = [g for g in self.groups if g.frozen is None]
            order = {**prefix_order(self.groups), **channel_order(model, free)}
        self.order = check_orders(self.groups, order)
        self._mirrored = mirrored_order(self.groups, self.order)
        self._axes = layer_axes(self.groups)
        self._readers = {a.member.layer: a.member.reader for a in self._axes if a.member.reader is not None}

    def modules(self) -> Iterator[nn.Module]:
        """All modules that training the supernet trains."""
        return self.model.modules()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that training the supernet trains."""
        return self.model.parameters()

    @property
    def recomputes(self) -> bool:
        """Whether a layer of the running block ran without a graph or under saved-tensor hooks.

        Activation checkpointing does so; then `backward` runs layers again, and belongs inside of the block.
        """
        block = _RUNNING.get(self.model)
        return block is not None and block.recomputes

    @property
    def inexact(self) -> dict[str, str]:
        """Groups at whose widths `gated` and `parallel` only approximate the narrow network, and why.

        A LayerNorm or GroupNorm over a group's channels takes its statistics over the gated ones too, and so
        do means and norms outside of layers. `at` is exact everywhere.
        """
        return {
            g.name: f"{g.statistics.layer!r} takes its statistics over the channels of the group"
            for g in self.groups
            if g.statistics is not None
        }

    @contextmanager
    def at(
        self, widths: Mapping[str, int], cuts: list[Cut] | None = None, *, last: bool = False
    ) -> Iterator[nn.Module]:
        """Within the block the model computes as `shrink(model, groups, widths, order)` does, at its cost.

        Leave the block before or after `backward`, as you like, unless the model recomputes activations
        (`torch.utils.checkpoint`): then call `backward` inside. To compile, trace or export, use `shrink`.

        Args:
            widths: Group name -> channels; a missing group keeps its full width.
            cuts: Where given, all layers compute with detached active parts of their parameters, which are
                collected here: gradients end in these instead of the parameters.
            last: Keep the last channels of each group's order, in place of the first (BCNet).

        Yields:
            The model.

        Raises:
            WidthError: Unknown group, or a width that the group cannot take.
        """
        forwards = self._sliced(widths, cuts, last)
        with running(self.model, forwards):
            yield self.model

    @contextmanager
    def gated(self, gates: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Within the block every layer that reads a group's channels reads them times the group's gate.

        For relaxed widths: the gates get gradients. With gates of 0 and 1 (`gates_of`) the outputs equal
        those of the narrow network, whatever lies between (BatchNorm, a sigmoid, a sum, a concatenation),
        because channels are gated where they are consumed; `inexact` lists the exceptions. The residual
        stream of a group is gated at each of its readers, which equals gating all its writers after their
        normalisation, as DMCP and DSA do, where functions between are homogeneous (ReLU). Behind others
        (ReLU6, SiLU) a relaxed gate m gives m * f(x) instead of f(m * x).

        Args:
            gates: Group name -> (C,) factors, or (B, C) with one row for each sample of the batch, in the
                order of the network's channels (see `by_rank`). Groups without a gate run in full. With rows,
                the first dimension of every layer's input must run over the samples.

        Yields:
            The model.

        Raises:
            WidthError: Unknown or frozen group, or a gate of the wrong shape.
        """
        self._check_gates(gates)
        with running(self.model, self._gated(gates)):
            yield self.model

    @contextmanager
    def parallel(self, networks: Sequence[Mapping[str, int]]) -> Iterator[nn.Module]:
        """Within the block the k-th equal part of each batch runs through the k-th network, in one pass.

        The parallel sub-networks of PSE-Net (arXiv 2408.16233), whose treatment of BatchNorm is unknown;
        here each part of the batch has statistics of its own in train mode (a reconstruction: any other
        treatment gives wrong gradients). The loss averaged over the batch then has the mean of the
        networks' gradients, and channels that no network uses get a gradient of exactly zero. Every pass
        costs a full-width pass. At least 16 images for each network keep the statistics sound; recalibrate
        BatchNorm before you score a network.

        In every layer the first dimension must run over the samples in the order of the batch: a model that
        transposes time and batch, or stacks several views of the batch, would get the parts mixed up.

        Args:
            networks: Widths of each part; the batch must be divisible by their number.

        Yields:
            The model.

        Raises:
            WidthError: As for `at`, or widths remove residual blocks.
            DataError: In the forward pass, if the batch is not divisible.
        """
        if not networks:
            raise WidthError("parallel() needs the widths of at least one network")
        hard = [self.gates_of(widths) for widths in networks]
        gates = {name: torch.stack([gate[name] for gate in hard]) for name in hard[0]}
        narrowed = {name: gate for name, gate in gates.items() if not bool(gate.all())}
        forwards = self._gated(narrowed, parts=len(networks))
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                forwards[module] = _InParts(name, module, len(networks))
        with running(self.model, forwards):
            yield self.model

    def gates_of(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Gates of 0 and 1 that stand for hard widths: name of each group that is not frozen -> (C,).

        Raises:
            WidthError: As for `at`, or the widths remove residual blocks.
        """
        kept = self._kept(widths)
        removed = removed_blocks(self.groups, widths)
        if removed:
            raise WidthError(
                f"gates cannot remove residual blocks ({', '.join(removed)} have width 0), they leave the "
                "constants that their layers add; use at() or shrink()"
            )
        parameter = next(self.model.parameters())
        gates = {}
        for g in self.groups:
            if g.frozen is None:
                gates[g.name] = torch.zeros(g.size, dtype=parameter.dtype, device=parameter.device)
                gates[g.name][torch.from_numpy(kept[g.name])] = 1
        return gates

    def by_rank(self, name: str, factors: Tensor) -> Tensor:
        """Factors of a group's channels from most to least important (..., C), in the network's order."""
        rank = np.argsort(self.order[name])
        return factors.index_select(-1, torch.from_numpy(rank).to(factors.device))

    def _sliced(
        self, widths: Mapping[str, int], cuts: list[Cut] | None = None, last: bool = False
    ) -> dict[nn.Module, Replacement]:
        """What the layers that narrow do instead, and what removed blocks do."""
        kept = self._kept(widths, last)
        narrowed = {g.name for g in self.groups if len(kept[g.name]) < g.size}
        removed = removed_blocks(self.groups, widths)
        touched = [axis for axis in self._axes if not narrowed.isdisjoint(axis.groups)]
        axes = axes_outside(touched, removed)
        forwards: dict[nn.Module, Replacement] = {
            submodule(self.model, block): _Removed() for block in removed
        }
        keep = keep_mask(self.groups, kept)
        entries, sizes = kept_entries(axes, keep), kept_sizes(axes, keep)
        layers = dict.fromkeys((*entries, *sizes))
        if cuts is not None:
            layers.update(dict.fromkeys(n for n, m in self.model.named_modules() if any(_given(m))))
        for layer in layers:
            module = submodule(self.model, layer)
            part = _Part(module, entries.get(layer, {}), sizes.get(layer, {}), cuts)
            reader = submodule(self.model, self._readers.get(layer, layer))
            sliced = forwards.setdefault(reader, _Sliced())
            if isinstance(sliced, _Sliced):  # else it lies in a block that is removed
                sliced.parts.append(part)
        return forwards

    def _kept(self, widths: Mapping[str, int], last: bool = False) -> dict[str, np.ndarray]:
        """The channels of each group that stay, ascending."""
        check_widths(self.groups, widths)
        order = self._mirrored if last else self.order
        return {g.name: np.sort(order[g.name][: widths.get(g.name, g.size)]) for g in self.groups}

    def _gated(self, gates: Mapping[str, Tensor], parts: int | None = None) -> dict[nn.Module, Replacement]:
        numbers = np.cumsum([0, *(g.size for g in self.groups)])  # of each group's first channel
        first = dict(zip((g.name for g in self.groups), numbers, strict=False))
        forwards: dict[nn.Module, Replacement] = {}
        for axis in self._axes:
            layer = axis.member.layer
            on_axis = {name: gates[name] for name in axis.groups if name in gates}
            if axis.member.role != "consumer" or not on_axis:
                continue
            position = np.full(numbers[-1] + 1, -1)  # of a channel among those of `on_axis`
            length = 0
            for name, gate in on_axis.items():
                size = gate.shape[-1]
                position[first[name] : first[name] + size] = length + np.arange(size)
                length += size
            module = submodule(self.model, layer)
            factors = _Factors(layer, list(on_axis.values()), position[axis.channels], parts)
            if axis.member.reader is None and axis.member.kind in ("conv", "linear"):
                after = module.weight.dim() - 2  # of a convolution, its spatial dimensions
                forwards[module] = _Gated(factors, after)
                continue
            reader = submodule(self.model, self._readers.get(layer, layer))
            weighted = forwards.setdefault(reader, _GatedWeights())
            assert isinstance(weighted, _GatedWeights)
            ((tensor, dim),) = axis.member.tensors
            weighted.parts.append((module, tensor, dim, factors))
        return forwards

    def _check_gates(self, gates: Mapping[str, Tensor]) -> None:
        by_name = {g.name: g for g in self.groups}
        for name, gate in gates.items():
            if name not in by_name:
                raise WidthError(f"no channel group {name!r} in this model{nearest(name, by_name)}")
            g = by_name[name]
            if g.frozen is not None:
                raise WidthError(f"group {name!r} keeps its {g.size} channels: {g.frozen}")
            if gate.dim() not in (1, 2) or gate.shape[-1] != g.size:
                raise WidthError(
                    f"the gate of group {name!r} must have shape ({g.size},) or (batch, {g.size}), "
                    f"not {tuple(gate.shape)}"
                )


def submodule(model: nn.Module, name: str) -> Any:
    """`get_submodule` without its checks, which take a fifth of a change of widths."""
    module: Any = model
    for part in name.split(".") if name else ():
        module = module._modules[part]
    return module


class Replacement:
    """What a layer does instead of its `forward`; copies of the layer get the original.

    Attributes:
        block: Of all replacements that are made together.
        forward: The one that it replaces.
        own: The same, if the layer itself had it instead of its class.
    """

    block: _Block
    forward: Forward
    own: Forward | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.block.recomputes:
            self.block.recomputes = not torch.is_grad_enabled() or _saved_tensor_hooks(True) is not None
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return copy.deepcopy(self.forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.forward.__self__, self.forward.__name__)  # type: ignore[attr-defined]


class _Removed(Replacement):
    """A residual block without its branch."""

    def run(self, x: Tensor) -> Tensor:
        return x


def _given(module: nn.Module) -> Iterator[bool]:
    """For each parameter that the module could have, whether it does."""
    return (parameter is not None for parameter in module._parameters.values())


class _Part:
    """The active part of one module's parameters, buffers and sizes.

    Args:
        module: The layer.
        entries: tensor name -> dimension -> kept entries.
        sizes: Integer attributes and their values.
        cuts: Collects the parts of parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        entries: Mapping[str, Mapping[int, np.ndarray]],
        sizes: Mapping[str, int],
        cuts: list[Cut] | None,
    ) -> None:
        self.module = module
        self.cuts = cuts
        self.parameters: dict[str, Index] = {}
        self.buffers: dict[str, Index] = {}
        shape = None
        length = 0
        for name, kept in entries.items():
            length = len(next(iter(kept.values())))
            for indices, tensors in (
                (self.parameters, module._parameters),
                (self.buffers, module._buffers),
            ):
                tensor = tensors.get(name)
                if tensor is not None:
                    indices[name] = _index(tensor, kept)
                    if name == "weight":
                        shape = [len(kept.get(d, range(n))) for d, n in enumerate(tensor.shape)]
        self.sizes = cut_sizes(module, shape, length) if entries else {}
        self.sizes.update(size_attributes(module, sizes))
        if cuts is not None:
            whole = {name: () for name, tensor in module._parameters.items() if tensor is not None}
            self.parameters = {**whole, **self.parameters}

    def enter(self) -> Callable[[], None]:
        """Puts the part in the place of the whole; what it returns undoes that."""
        module = self.module
        parameters: dict[str, Any] = {name: module._parameters[name] for name in self.parameters}
        buffers: dict[str, Any] = {name: module._buffers[name] for name in self.buffers}
        sizes = {name: vars(module)[name] for name in self.sizes}

        def leave() -> None:
            vars(module).update(sizes)
            for name, index in self.buffers.items():
                active = module._buffers[name]
                module._buffers[name] = buffers[name]
                if module.training and active is not buffers[name] and not _is_view(index):
                    # unseen by autograd, as BatchNorm's own updates: graphs of other widths stay valid
                    buffers[name].data.index_copy_(0, index[0], active)
            module._parameters.update(parameters)

        try:
            for name, index in self.parameters.items():
                module._parameters[name] = self._part(parameters[name], index)  # type: ignore[assignment]
            for name, index in self.buffers.items():
                module._buffers[name] = _take(buffers[name], index)
            vars(module).update(self.sizes)
        except BaseException:
            leave()
            raise
        return leave

    def _part(self, parameter: nn.Parameter, index: Index) -> Tensor:
        if self.cuts is None or not (parameter.requires_grad and torch.is_grad_enabled()):
            return _take(parameter, index)
        part = _take(parameter.detach(), index).requires_grad_()
        self.cuts.append(Cut(parameter, index, part))
        return part


class _Sliced(Replacement):
    """A module on active parts: its own, and those of modules whose weights it applies itself."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        undo = []
        try:
            for part in self.parts:
                undo.append(part.enter())
            return self.forward(*args, **kwargs)
        finally:
            for leave in reversed(undo):
                leave()


class _Factors:
    """The gates of the groups on a layer's input axis.

    Args:
        layer: Its name, for messages.
        gates: (C,) or (B, C) of each group; (parts, C) where `parts` is given.
        channels: (N,) the channel behind each entry of the input axis, counted through `gates`; -1 for an
            entry of no group.
        parts: In how many parts the batch is split, one row of the gates for each.
    """

    def __init__(self, layer: str, gates: list[Tensor], channels: np.ndarray, parts: int | None) -> None:
        self.layer = layer
        self.gates = gates
        self.parts = parts
        self.open = bool(channels.min() < 0)
        length = sum(gate.shape[-1] for gate in gates)
        self.channels: Tensor | None = None
        if not np.array_equal(channels, np.arange(length)):
            self.channels = torch.from_numpy(np.where(channels < 0, length, channels)).to(gates[0].device)

    def of_input(self, x: Tensor, after: int) -> Tensor:
        """In the shape and precision of the layer's input; `after` dimensions follow its channels."""
        rows = {len(gate) for gate in self.gates if gate.dim() == 2}
        wrong = rows - {1, len(x)}
        if wrong and self.parts is None:
            raise DataError(f"gates for a batch of {max(wrong)} met {len(x)} samples at layer {self.layer!r}")
        gates = [gate.expand(max(rows), -1) for gate in self.gates] if rows else self.gates
        factors = self._joined(gates)
        if self.parts is not None:
            factors = factors.repeat_interleave(_part_size(self.layer, x, self.parts), dim=0)
        shape = [1] * x.dim()
        shape[-1 - after] = -1
        if factors.dim() == 2:
            shape[0] = len(factors)
        return factors.reshape(shape).to(x.dtype)

    def of_weight(self, weight: Tensor, dim: int) -> Tensor:
        """In the shape and precision of a weight whose dimension `dim` reads the channels."""
        if any(gate.dim() == 2 for gate in self.gates):
            raise WidthError(
                f"the weights of {self.layer!r} are not applied by a layer, so samples cannot have gates of "
                "their own there; run the networks one after another, by another rule than the parallel one"
            )
        factors = self._joined(self.gates)[: weight.shape[dim]]
        shape = [-1 if d == dim else 1 for d in range(weight.dim())]
        return factors.reshape(shape).to(weight.dtype)

    def _joined(self, gates: list[Tensor]) -> Tensor:
        if self.open:  # entries of no group
            gates = [*gates, gates[0].new_ones(*gates[0].shape[:-1], 1)]
        factors = torch.cat(gates, dim=-1) if len(gates) > 1 else gates[0]
        return factors if self.channels is None else factors.index_select(-1, self.channels)


class _Gated(Replacement):
    """A layer that reads its input times the gates of the groups on its input axis."""

    def __init__(self, factors: _Factors, after: int) -> None:
        self.factors = factors
        self.after = after

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.forward(args[0] * self.factors.of_input(args[0], self.after), *args[1:], **kwargs)
        name, x = next(iter(kwargs.items()))
        return self.forward(**{**kwargs, name: x * self.factors.of_input(x, self.after)})


class _GatedWeights(Replacement):
    """A module that applies weights itself, times the gates of what they read.

    Its parts are (module, tensor, dimension that reads, factors).
    """

    def __init__(self) -> None:
        self.parts: list[tuple[nn.Module, str, int, _Factors]] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        whole = [(module, name, module._parameters[name]) for module, name, _, _ in self.parts]
        try:
            for module, name, dim, factors in self.parts:
                weight: Any = module._parameters[name]
                module._parameters[name] = weight * factors.of_weight(weight, dim)
            return self.forward(*args, **kwargs)
        finally:
            for module, name, weight in reversed(whole):
                module._parameters[name] = weight


class _InParts(Replacement):
    """A BatchNorm that normalises each part of the batch by itself in train mode."""

    def __init__(self, layer: str, module: _BatchNorm, parts: int) -> None:
        self.layer = layer
        self.module = module
        self.parts = parts

    def run(self, input: Tensor) -> Tensor:
        if not self.module.training and self.module.running_mean is not None:
            return self.forward(input)
        parts = input.split(_part_size(self.layer, input, self.parts))
        return torch.cat([self.forward(part) for part in parts])


def _part_size(layer: str, x: Tensor, parts: int) -> int:
    if len(x) % parts:
        raise DataError(
            f"a batch of {len(x)} (at layer {layer!r}) cannot be split equally among {parts} sub-networks; "
            "use a multiple as batch size and drop the last smaller batch (drop_last=True)"
        )
    return len(x) // parts


class _Block:
    """Replacements that come and go together."""

    def __init__(self, forwards: Mapping[nn.Module, Replacement]) -> None:
        self.forwards = dict(forwards)
        self.recomputes = False
        for replacement in self.forwards.values():
            replacement.block = self

    def install(self) -> None:
        if any(isinstance(module.forward, Replacement) for module in self.forwards):
            raise RuntimeError(
                "layers of this model are inside of a block of a supernet of another module; leave that first"
            )
        for module, replacement in self.forwards.items():
            replacement.forward, replacement.own = module.forward, vars(module).get("forward")
            module.forward = replacement

    def remove(self) -> None:
        for module, replacement in self.forwards.items():
            if vars(module).get("forward") is not replacement:
                continue  # someone replaced it in turn
            if replacement.own is None:
                del module.forward
            else:
                module.forward = replacement.own


_RUNNING: WeakKeyDictionary[nn.Module, _Block] = WeakKeyDictionary()
"""The innermost block of each model."""


@contextmanager
def running(model: nn.Module, forwards: Mapping[nn.Module, Replacement]) -> Iterator[None]:
    """Within the block these modules of the model run their replacements, those of outer blocks do not."""
    outer, inner = _RUNNING.pop(model, None), _Block(forwards)
    if outer is not None:
        outer.remove()
    try:
        inner.install()
        _RUNNING[model] = inner
        with unfused_attention():
            yield
    finally:
        inner.remove()
        _RUNNING.pop(model, None)
        if outer is not None:
            outer.install()
            _RUNNING[model] = outer


class _Select(torch.autograd.Function):
    """`tensor[index]` for indices without repetition, whose gradient is written instead of added."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Index) -> Tensor:
        ctx.index, ctx.size, ctx.stride = index, tensor.shape, tensor.stride()
        return _select(tensor, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.new_empty_strided(ctx.size, ctx.stride).zero_()
        whole[ctx.index] = gradient
        return whole, None


def _select(tensor: Tensor, index: Index) -> Tensor:
    """`tensor[index]`, one dimension after another, which is faster."""
    for dim, entries in enumerate(index):
        if isinstance(entries, Tensor):
            tensor = tensor.index_select(dim, entries.flatten())
        else:
            tensor = tensor[(slice(None),) * dim + (entries,)]
    return tensor


def _take(tensor: Tensor, index: Index) -> Tensor:
    if _is_view(index):
        return tensor[index]
    if tensor.dim() == 1 or not (tensor.requires_grad and torch.is_grad_enabled()):
        return _select(tensor, index)
    return _Select.apply(tensor, index)


def _is_view(index: Index) -> bool:
    return not any(isinstance(entries, Tensor) for entries in index)


def _index(tensor: Tensor, kept: Mapping[int, np.ndarray]) -> Index:
    """Slices where the kept entries are the first ones, else indices, ready for `tensor[index]`."""
    index: list[slice | Tensor] = []
    for dim in range(max(kept) + 1):
        entries = kept.get(dim)
        if entries is None:
            index.append(slice(None))
        elif entries[-1] == len(entries) - 1:
            index.append(slice(len(entries)))
        else:
            index.append(torch.from_numpy(entries).to(tensor.device))
    if sum(isinstance(entries, Tensor) for entries in index) == 2:
        rows, columns = index  # weights are cut in their first two dimensions
        return rows[:, None], columns  # type: ignore[index]
    return tuple(index)
