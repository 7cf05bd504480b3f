"""Finding a model's coupled channels."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torch_pruning_adapters.calls import Inputs
from torch_pruning_adapters.channels import OUTPUT, Channels, SizeAxis, TensorAxis
from torch_pruning_adapters.errors import nearest
from torch_pruning_adapters.group import ChannelGroup, Member, Product, Role, Span, spans_of
from torch_pruning_adapters.surgery import is_depthwise
from torch_pruning_adapters.trace import trace
from torch_pruning_adapters.verify import freeze_unsafe


def find_channel_groups(
    model: nn.Module, example_inputs: Inputs, ignore: Iterable[str] = (), verify: bool = True
) -> tuple[ChannelGroup, ...]:
    """The channels of `model` that can be cut, as groups that must be cut together.

    Start here: the groups span the space of widths, and `shrink` cuts by them. Layers that only compute
    the network's outputs form no group. The model comes back as it was (mode, requires_grad, hooks).

    Args:
        model: Any module of convolutions and linear layers; frozen parameters are fine.
        example_inputs: A tensor, a sequence of positional inputs or a mapping of named ones, on the
            model's device. One sample is enough.
        ignore: Dotted names of layers (or of modules around them) whose outputs keep all their channels;
            their inputs may still narrow.
        verify: Cut a copy at random widths and compare its outputs with the uncut copy whose dropped
            channels are not read; a group that fails is frozen with the reason. Costs a copy of the
            model and a few forward passes.

    Returns:
        Groups in the order of the model's layers. `frozen` says why a group cannot be cut.

    Raises:
        UnsupportedModelError: The model cannot be traced; the message names the cause.
        ValueError: `ignore` names something that the model does not have.
    """
    ignored = _ignored_layers(model, ignore)
    groups = [
        dataclasses.replace(g, frozen=f"ignored: {hit[0]}") if hit and g.frozen is None else g
        for g in _read_groups(trace(model, example_inputs), model)
        for hit in [[m.layer for m in g.members if m.layer in ignored and m.role != "consumer"]]
    ]
    return freeze_unsafe(model, example_inputs, groups) if verify else tuple(groups)


def _ignored_layers(model: nn.Module, ignore: Iterable[str]) -> set[str]:
    names = dict(model.named_modules())
    ignored: set[str] = set()
    for name in ignore:
        if name not in names:
            raise ValueError(f"ignore: the model has no layer {name!r}{nearest(name, names)}")
        ignored |= {n for n in names if n == name or n.startswith(f"{name}.")}
    return ignored


@dataclass(frozen=True)
class _Axis:
    """Entries of the model that channels lie on, before they are split among groups."""

    layer: str
    role: Role
    kind: str
    numbers: np.ndarray
    tensors: tuple[tuple[str, int], ...] = ()
    blocks: int = 1
    per_block: bool = False
    attribute: str | None = None
    reader: str | None = None


_REPARAMETRIZING = (WeightNorm, SpectralNorm)


def _axes(channels: Channels, model: nn.Module) -> list[_Axis]:
    """All axes of a traced model: of layers, of bare parameters, and of integer attributes."""
    modules = dict(model.named_modules())
    axes = []
    for layer, lines in channels.passed.items():
        first = lines[0][: getattr(modules[layer], "num_features", None)]  # InstanceNorm sees them per sample
        for line in lines[1:]:
            channels.cut_together(line[: len(first)], first)
        axes += _norm_axes(layer, modules[layer], first)
    for axis in channels.axes:
        owners = {layer for layer, _ in axis.names}
        readers = channels.readers_of(axis)
        reader = None if readers <= owners else _common(readers | owners)
        for layer, tensor in axis.names if len(axis.numbers) else ():
            axes += _tensor_axes(channels, layer, modules[layer], tensor, axis, reader)
            if _is_parametrized(modules[layer]):
                channels.fix(axis.numbers, f"{layer.split('.parametrizations')[0]!r} is parametrized")
    sizes: dict[tuple[str, str], list[SizeAxis]] = {}  # an attribute may be read often, and in several places
    for size in (*channels.sizes, *_attention_sizes(channels, modules)):
        sizes.setdefault((size.module, size.attribute), []).append(size)
    for (layer, attribute), read in sizes.items():
        readers = {size.reader for size in read}
        reader = None if readers == {layer} else _common(readers | {layer})
        axes.append(_Axis(layer, "through", "size", read[0].numbers, attribute=attribute, reader=reader))
    return axes


def _is_parametrized(module: nn.Module) -> bool:
    """Whether weights are computed from others: by a parametrization, or by hooks as before these."""
    hooks = (type(hook) for hook in module._forward_pre_hooks.values())
    return isinstance(module, ParametrizationList) or any(kind in _REPARAMETRIZING for kind in hooks)


def _attention_sizes(channels: Channels, modules: Mapping[str, nn.Module]) -> Iterator[SizeAxis]:
    """What `nn.MultiheadAttention` keeps beside its `embed_dim` and does not read when it runs."""
    for size in channels.sizes:
        module = modules[size.module]
        if isinstance(module, nn.MultiheadAttention) and size.attribute == "embed_dim":
            yield dataclasses.replace(size, attribute="head_dim", numbers=size.numbers[: module.head_dim])
            if module.in_proj_weight is not None:
                yield dataclasses.replace(size, attribute="kdim")
                yield dataclasses.replace(size, attribute="vdim")
    for axis in channels.axes:
        for layer, tensor in axis.names:
            attribute = {"k_proj_weight": "kdim", "v_proj_weight": "vdim"}.get(tensor)
            if attribute and axis.dim == 1 and isinstance(modules[layer], nn.MultiheadAttention):
                yield SizeAxis(layer, attribute, layer, axis.numbers)


def _common(names: Iterable[str]) -> str:
    """The innermost module around all of these."""
    parts = [name.split(".") if name else [] for name in names]
    return ".".join(p for p, *others in zip(*parts, strict=False) if set(others) <= {p})


def _norm_axes(layer: str, module: nn.Module, numbers: np.ndarray) -> list[_Axis]:
    names = ("weight", "bias", "running_mean", "running_var")
    if isinstance(module, nn.LayerNorm):
        return [_Axis(layer, "through", "layernorm", numbers, (("weight", 0), ("bias", 0)))]
    if isinstance(module, nn.GroupNorm):
        tensors = (("weight", 0), ("bias", 0))
        return [_Axis(layer, "through", "groupnorm", numbers, tensors, module.num_groups)]
    return [_Axis(layer, "through", "norm", numbers, tuple((n, 0) for n in names))]


def _tensor_axes(
    channels: Channels, layer: str, module: nn.Module, tensor: str, axis: TensorAxis, reader: str | None
) -> list[_Axis]:
    """What a dimension of a parameter or buffer is to its layer."""
    dim, numbers = axis.dim, axis.numbers
    role: Role
    if layer in channels.passed:
        return []
    if isinstance(module, (_ConvNd, nn.Linear)) and tensor in ("weight", "bias"):
        if tensor == "bias" or dim > 1:
            return []
        if is_depthwise(module):
            if dim == 1:
                return []
            return [
                _Axis(layer, "through", "depthwise", numbers, (("weight", 0), ("bias", 0)), reader=reader)
            ]
        computes = dim == (1 if getattr(module, "transposed", False) else 0)
        kind, blocks = ("conv", module.groups) if isinstance(module, _ConvNd) else ("linear", 1)
        tensors = (("weight", dim), ("bias", 0)) if computes else (("weight", dim),)
        role = "producer" if computes else "consumer"
        return [_Axis(layer, role, kind, numbers, tensors, blocks, blocks > 1 and dim == 1, reader=reader)]
    if isinstance(module, nn.Embedding):
        role = "through" if channels.is_consumed(numbers) else "producer"  # also the output's weight, or not
        return [_Axis(layer, role, "embedding", numbers, (("weight", 1),), reader=reader)] if dim else []
    if isinstance(module, nn.PReLU):
        return [_Axis(layer, "through", "prelu", numbers, (("weight", 0),), reader=reader)]
    role = "through"
    if channels.is_consumed(numbers):
        role = "consumer"
    elif channels.is_produced(numbers) and tensor in module._parameters:
        role = "producer"
    per_block = axis.blocks > 1
    return [_Axis(layer, role, "parameter", numbers, ((tensor, dim),), axis.blocks, per_block, reader=reader)]


def _read_groups(channels: Channels, model: nn.Module) -> list[ChannelGroup]:
    """Splits the axes into groups: channels that are cut together make a unit, like units make a group."""
    axes = _axes(channels, model)
    counted = [line for count in channels.counts for line in count.dims]
    lines = [a.numbers for a in axes] + counted
    if not axes:
        return []
    units = [channels.unit(line) for line in lines]
    unit = np.concatenate(units)
    line_of = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    reasons = _reasons(channels)

    # (unit, line) -> number of entries; units with equal rows belong to one group
    code, counts = np.unique(unit * len(lines) + line_of, return_counts=True)
    row_unit, row_line = code // len(lines), code % len(lines)
    first = np.flatnonzero(np.diff(row_unit, prepend=-1))
    stop = np.append(first[1:], len(code))
    alike: dict[tuple[bytes, bytes, str | None], list[int]] = {}
    for start, end in zip(first, stop, strict=True):
        number = int(row_unit[start])
        signature = (row_line[start:end].tobytes(), counts[start:end].tobytes(), reasons.get(number))
        alike.setdefault(signature, []).append(number)

    rank = {name: i for i, (name, _) in enumerate(model.named_modules())}
    mixing: dict[str, np.ndarray] = {}
    for module, numbers in channels.statistics:  # a module may take several
        over = mixing.get(module, numbers[:0])
        mixing[module] = np.union1d(over, channels.unit(numbers))
    found = []
    for (row_lines, _, reason), members in alike.items():
        on = np.frombuffer(row_lines, dtype=row_line.dtype)
        producers = [i for i in on if i < len(axes) and axes[i].role == "producer"]
        consumers = any(i < len(axes) and axes[i].role == "consumer" for i in on)
        bare = all(axes[i].kind == "parameter" for i in producers)
        if not producers or (not consumers and (reason == OUTPUT or (bare and reason is not None))):
            continue
        root = min(producers, key=lambda i: rank[axes[i].layer])
        entries = {int(i): np.flatnonzero(np.isin(units[i], members)) for i in on}
        group = _read_group(channels, axes, lines, entries, root, reason)
        group = _with_statistics(group, axes, mixing, np.array(members), len(entries[root]))
        if group.frozen is None and not consumers and all(m.kind != "statistics" for m in group.members):
            group = dataclasses.replace(group, frozen="nothing that is followed reads it")
        group = dataclasses.replace(group, products=_products(channels, len(axes), entries))
        found.append((rank[axes[root].layer], entries[root][0], group))
    found.sort(key=lambda f: f[:2])
    return _with_names([g for _, _, g in found])


def _reasons(channels: Channels) -> dict[int, str]:
    """Unit -> why it cannot be cut: the output above all, else what was met first."""
    reasons: dict[int, str] = {}
    for numbers, reason in channels.frozen:
        for number in np.unique(channels.unit(numbers)).tolist():
            if reason == OUTPUT:
                reasons[number] = reason
            else:
                reasons.setdefault(number, reason)
    return reasons


def _read_group(
    channels: Channels,
    axes: Sequence[_Axis],
    lines: Sequence[np.ndarray],
    entries: Mapping[int, np.ndarray],
    root: int,
    reason: str | None,
) -> ChannelGroup:
    """One group, from its entries on each axis.

    The channels of unit p are `p + b * P`, b = 0 ... step - 1, where P is the number of units.
    """
    units, first = np.unique(channels.unit(lines[root][entries[root]]), return_index=True)
    place = np.empty(len(units), dtype=int)  # of a unit in the order of the root's axis
    place[np.argsort(first)] = np.arange(len(units))
    count = len(units)
    real = [i for i in entries if i < len(axes) and axes[i].kind != "size"]
    step = math.gcd(*(len(entries[i]) // count for i in real))
    size = step * count
    members = []
    for i in sorted((i for i in entries if i < len(axes)), key=lambda i: (i != root, i)):
        numbers = lines[i][entries[i]]
        position = place[np.searchsorted(units, channels.unit(numbers))]
        channel = _channels_of(channels, numbers, position, count, step)
        a = axes[i]
        members.append(
            Member(
                a.layer,
                a.role,
                a.kind,
                a.tensors,
                len(lines[i]),
                spans_of(entries[i], channel),
                a.blocks,
                a.per_block,
                a.attribute,
                a.reader,
            )
        )
    if reason is None and count == 1:
        reason = "a single channel" if size == 1 else f"its {size} channels can only be cut together"
    return ChannelGroup(axes[root].layer, size, step, tuple(members), reason)


def _channels_of(
    channels: Channels, numbers: np.ndarray, position: np.ndarray, count: int, step: int
) -> np.ndarray:
    """The group's channel behind each entry of an axis, from the entries' units (by position).

    A unit has `step` channels. Its entries on an axis are dealt to them in order, all entries of one and the
    same channel to one.
    """
    if step == 1:
        return position
    same = channels.channel(numbers)
    order = np.lexsort((np.arange(len(numbers)), position))
    share = len(numbers) // count  # entries of a unit
    distinct = np.empty((count, share), dtype=int)  # which of the unit's channels an entry is, by first sight
    for row, of_unit in zip(distinct, same[order].reshape(count, share), strict=True):
        _, first, inverse = np.unique(of_unit, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=int)
        rank[np.argsort(first)] = np.arange(len(first))
        row[:] = rank[inverse]
    channel = np.empty(len(numbers), dtype=int)
    channel[order] = (np.arange(count)[:, None] + distinct % step * count).reshape(-1)
    return channel


def _with_statistics(
    group: ChannelGroup, axes: Sequence[_Axis], mixing: Mapping[str, np.ndarray], units: np.ndarray, size: int
) -> ChannelGroup:
    """The group with a member for each module, but layers for it, that takes statistics over its channels."""
    layers = {m.layer for m in group.members if m.kind in ("layernorm", "groupnorm")}
    members = tuple(
        Member(module, "through", "statistics", (), group.size, (Span(0, 0, group.size),))
        for module, over in mixing.items()
        if module not in layers and np.isin(over, units).any()
    )
    return dataclasses.replace(group, members=group.members + members)


def _products(channels: Channels, offset: int, entries: Mapping[int, np.ndarray]) -> tuple[Product, ...]:
    found, at = [], offset
    for number, count in enumerate(channels.counts):
        for dimension, line in enumerate(count.dims):
            if at in entries:
                found.append(
                    Product(count.module, number, dimension, count.amount, len(line), len(entries[at]))
                )
            at += 1
    return tuple(found)


def _with_names(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Names each group after its root: the layer, its tensor if several of them are roots, its channels."""
    roots = [(g.name, g.producers[0].tensors[0][0]) for g in groups]
    layers, tensors = Counter(layer for layer, _ in set(roots)), Counter(roots)
    named = []
    for g, (layer, tensor) in zip(groups, roots, strict=True):
        name = layer if layer and layers[layer] == 1 else f"{layer}.{tensor}".lstrip(".")
        if tensors[layer, tensor] > 1:
            start = g.producers[0].spans[0].start
            name = f"{name}[{start}:{start + g.size}]"
        named.append(dataclasses.replace(g, name=name))
    return named
