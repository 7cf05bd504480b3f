"""Cutting a model down to given widths."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from torch_pruning_adapters.errors import WidthError, nearest
from torch_pruning_adapters.group import ChannelGroup, Member, lies_in
from torch_pruning_adapters.importance import Order, channel_order, check_orders

Kept = dict[str, np.ndarray]


def shrink(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    widths: Mapping[str, int],
    order: Order | None = None,
) -> nn.Module:
    """A smaller copy of `model` that keeps `widths[name]` channels of each group.

    Every tensor is sliced once, and full-size weights are never copied. The model itself is not touched,
    not even read beyond its structure and the kept weights. Use it to turn searched widths into a plain
    module; make a new optimizer for it, the parameters are new objects. Residual blocks whose groups have
    width 0 become `nn.Identity`.

    Args:
        model: The model that `groups` were found on, or another instance of its architecture.
        groups: From `find_channel_groups`.
        widths: Group name -> channels to keep; a missing group keeps its full width.
        order: Group name -> its channels (C,), most important first, as `channel_order` gives them
            (which is the default): the first `widths[name]` are kept, in the network's own order.

    Raises:
        WidthError: Unknown group, a width that the group cannot take, or groups of another model.
    """
    groups = tuple(groups)
    check_widths(groups, widths)
    narrowed = [g for g in groups if widths.get(g.name, g.size) < g.size]
    modules = dict(model.named_modules())
    check_model(modules, narrowed)
    if order is None:
        order = channel_order(model, narrowed)
    kept = kept_channels(narrowed, widths, order)

    removed = removed_blocks(narrowed, widths)
    memo: dict[int, object] = {id(modules[block]): nn.Identity() for block in removed}
    lengths: dict[str, int] = {}
    keep = keep_mask(narrowed, kept)
    axes = axes_outside(layer_axes(narrowed), removed)
    for layer, tensors in kept_entries(axes, keep).items():
        for name, entries in tensors.items():
            tensor = getattr(modules[layer], name, None)
            if tensor is not None:
                memo[id(tensor)] = _slice(tensor, entries)
            lengths[layer] = len(next(iter(entries.values())))
    small = _copy(model, memo)
    for block in removed:
        cast(nn.Module, memo[id(modules[block])]).training = modules[block].training
    for layer, length in lengths.items():
        module = cast(nn.Module, memo[id(modules[layer])])
        weight = getattr(module, "weight", None)
        vars(module).update(cut_sizes(module, None if weight is None else weight.shape, length))
    for layer, sizes in kept_sizes(axes, keep).items():
        module = cast(nn.Module, memo[id(modules[layer])])
        vars(module).update(size_attributes(module, sizes))
    return small


def check_widths(groups: Iterable[ChannelGroup], widths: Mapping[str, int]) -> None:
    """Raises `WidthError` unless every width belongs to a group and is one that it can take.

    Width 0 removes the group's residual block, so all groups of the block must have it.
    """
    by_name = {g.name: g for g in groups}
    removed = set()
    for name, width in widths.items():
        if name not in by_name:
            raise WidthError(
                f"no channel group {name!r} in this model{nearest(name, by_name)}; "
                "the widths were made for another model"
            )
        check_width(by_name[name], width)
        if width == 0:
            removed.add(by_name[name].block)
    for g in by_name.values() if removed else ():
        if g.block in removed and widths.get(g.name, g.size) != 0:
            gone = next(n for n, w in widths.items() if w == 0 and by_name[n].block == g.block)
            raise WidthError(
                f"block {g.block!r} goes as a whole: group {gone!r} has width 0, but {g.name!r} has "
                f"{widths.get(g.name, g.size)}; give both 0, or neither"
            )


def check_width(group: ChannelGroup, width: int) -> None:
    """Raises `WidthError` unless the group can take this width (0 only together with its whole block)."""
    if isinstance(width, bool) or not isinstance(width, (int, np.integer)):
        raise WidthError(f"group {group.name!r} cannot have {width!r} channels, only a whole number")
    if width == group.size or (width == 0 and group.block is not None):
        return
    if group.frozen is not None:
        raise WidthError(f"group {group.name!r} keeps its {group.size} channels: {group.frozen}")
    if not 0 < width < group.size or width % group.step:
        multiple = f" multiples of {group.step}" if group.step > 1 else ""
        raise WidthError(
            f"group {group.name!r} cannot have {width} channels, only{multiple or ' widths'} "
            f"up to {group.size}"
        )


def removed_blocks(groups: Iterable[ChannelGroup], widths: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the residual blocks that these widths remove, in the order of the groups."""
    gone = (g.block for g in groups if g.block is not None and widths.get(g.name, g.size) == 0)
    return tuple(dict.fromkeys(gone))


def kept_channels(groups: Iterable[ChannelGroup], widths: Mapping[str, int], order: Order) -> Kept:
    """The channels of each group that stay, ascending: group name -> (width,)."""
    groups = tuple(groups)
    ranked = check_orders(groups, order)
    return {g.name: np.sort(ranked[g.name][: widths.get(g.name, g.size)]) for g in groups}


def is_depthwise(module: nn.Module) -> bool:
    """A convolution with one filter for each channel."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


@dataclass(frozen=True)
class LayerAxis:
    """One axis of a layer, and the groups whose channels lie on it.

    Attributes:
        member: Any of the axis' members.
        groups: Names of the groups on the axis.
        channels: (member.size,) the channel behind each entry, counted through all groups of the model one
            after another; -1 stands for an entry of no group.
    """

    member: Member
    groups: tuple[str, ...]
    channels: np.ndarray


def layer_axes(groups: Iterable[ChannelGroup]) -> list[LayerAxis]:
    """Every axis that the groups touch."""
    shares: dict[Any, list[tuple[Member, str, np.ndarray]]] = {}
    offset = 0
    for g in groups:
        for m in g.members:
            if m.kind != "statistics":
                shares.setdefault(m.axis, []).append((m, g.name, offset + np.arange(g.size)))
        offset += g.size
    axes = []
    for parts in shares.values():
        channels = np.full(parts[0][0].size, -1)
        for member, _, numbers in parts:
            member.apply(numbers, channels)
        axes.append(LayerAxis(parts[0][0], tuple(dict.fromkeys(name for _, name, _ in parts)), channels))
    return axes


def axes_outside(axes: Iterable[LayerAxis], blocks: Collection[str]) -> list[LayerAxis]:
    """The axes of layers that do not lie in any of these blocks."""
    return [axis for axis in axes if not blocks or not lies_in(axis.member.layer, blocks)]


def keep_mask(groups: Iterable[ChannelGroup], kept: Kept) -> np.ndarray:
    """Which channels of all groups stay; the last entry, for what belongs to no group, is True.

    `keep_mask(groups, kept)[axis.channels]` says which entries of a `LayerAxis` of the same groups stay.
    """
    masks = []
    for g in groups:
        mask = np.zeros(g.size, dtype=bool)
        mask[kept[g.name]] = True
        masks.append(mask)
    return np.concatenate([*masks, np.ones(1, dtype=bool)])


def kept_entries(axes: Iterable[LayerAxis], keep: np.ndarray) -> dict[str, dict[str, dict[int, np.ndarray]]]:
    """What stays of each tensor: layer -> tensor -> dimension -> kept entries, ascending.

    Args:
        axes: From `layer_axes`.
        keep: From `keep_mask`.
    """
    layers: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for axis in axes:
        member, mask = axis.member, keep[axis.channels]
        index = {n: np.flatnonzero(mask[: member.size // n]) for n in {1, member.blocks_of("weight")}}
        for name, dim in member.tensors:
            layers.setdefault(member.layer, {}).setdefault(name, {})[dim] = index[member.blocks_of(name)]
    return layers


def kept_sizes(axes: Iterable[LayerAxis], keep: np.ndarray) -> dict[str, dict[str, int]]:
    """The integer attributes that modules must have: layer -> attribute -> value; arguments as above."""
    layers: dict[str, dict[str, int]] = {}
    for axis in axes:
        if axis.member.attribute is not None:
            length = int(keep[axis.channels].sum())
            layers.setdefault(axis.member.layer, {})[axis.member.attribute] = length
    return layers


def size_attributes(module: nn.Module, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The attributes that hold these sizes: themselves, or tuples and lists (`shape[0]`) with these parts."""
    attributes: dict[str, Any] = {}
    for key, size in sizes.items():
        name, _, place = key.partition("[")
        if not place:
            attributes[name] = size
            continue
        parts = list(attributes.get(name, vars(module)[name]))
        parts[int(place.rstrip("]"))] = size
        attributes[name] = type(vars(module)[name])(parts)
    return attributes


def check_model(modules: Mapping[str, nn.Module], groups: Iterable[ChannelGroup]) -> None:
    """Raises `WidthError` unless the model has the layers of the groups, in the sizes that they had."""
    for m in (m for g in groups for m in g.members):
        if m.layer not in modules:
            raise WidthError(
                f"the model has no layer {m.layer!r}{nearest(m.layer, modules)}; "
                "the groups were found on another model"
            )
        for name, dim in m.tensors:
            tensor = getattr(modules[m.layer], name, None)
            length = m.size // m.blocks_of(name)
            if tensor is not None and tensor.shape[dim : dim + 1] != (length,):
                raise WidthError(
                    f"{m.layer}.{name} has shape {tuple(tensor.shape)} where these groups expect {length} "
                    f"in dimension {dim}; they were found on another model"
                )


def select(tensor: Tensor, entries: Mapping[int, np.ndarray]) -> Tensor:
    """The kept entries (dimension -> entries) of a tensor, in its memory layout; differentiable."""
    part = tensor
    for dim, index in sorted(entries.items()):
        part = part.index_select(dim, torch.from_numpy(index).to(part.device))
    for layout, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            part = part.contiguous(memory_format=layout)
    return part


def _slice(tensor: Tensor, entries: Mapping[int, np.ndarray]) -> Tensor:
    data = select(tensor.detach(), entries)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def _copy(model: nn.Module, memo: dict[int, object]) -> nn.Module:
    """`copy.deepcopy(model, memo)`, an order of magnitude faster on the parts that every module has.

    Modules that say themselves how to be copied (`__deepcopy__`, `__getstate__`) are left to deepcopy.
    """
    usual = getattr(nn.Module, "__getstate__", None)
    plain = {
        m: m.__new__(type(m))
        for m in _modules_to_copy(model, memo)
        if getattr(type(m), "__getstate__", None) is usual and not hasattr(type(m), "__deepcopy__")
    }
    memo.update({id(m): shell for m, shell in plain.items()})
    for module, shell in plain.items():
        for name, value in vars(module).items():
            if name != "_compiled_call_impl":  # as in Module.__getstate__
                shell.__dict__[name] = _copy_attribute(value, memo)
    return copy.deepcopy(model, memo)


def _modules_to_copy(module: nn.Module, memo: Mapping[int, object]) -> Iterator[nn.Module]:
    """`module.modules()` without those that have their copy in `memo`, and what lies in these alone."""
    replaced = [m for m in module.modules() if id(m) in memo]
    inside = {m for block in replaced for m in block.modules()}
    return (m for m in module.modules() if m not in inside)


def _copy_attribute(value: Any, memo: dict[int, object]) -> Any:
    kind = type(value)
    if kind in _ATOMIC or (kind is tuple and all(type(part) in _ATOMIC for part in value)):
        return value
    if kind in (dict, OrderedDict, set) and not value:
        return kind()
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict:
        return {name: _copy_attribute(part, memo) for name, part in value.items()}
    if kind is nn.Parameter:
        memo[id(value)] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        return memo[id(value)]
    if kind is Tensor and not value.requires_grad:
        memo[id(value)] = value.clone()
        return memo[id(value)]
    return copy.deepcopy(value, memo)


_ATOMIC = {bool, int, float, str, type(None), torch.device, torch.dtype}


def cut_sizes(module: nn.Module, weight: Sequence[int] | None, channels: int) -> dict[str, Any]:
    """The size attributes that a layer must have after a cut.

    Args:
        module: The layer, before or after the cut.
        weight: Shape of its cut weight; None for a layer without one.
        channels: Length of its cut axis.
    """
    if isinstance(module, _ConvNd) and weight is not None:
        rows, columns = weight[:2]
        if is_depthwise(module):
            return {"groups": rows, "in_channels": rows, "out_channels": rows}
        if module.transposed:
            return {"in_channels": rows, "out_channels": columns * module.groups}
        return {"out_channels": rows, "in_channels": columns * module.groups}
    if isinstance(module, nn.Linear) and weight is not None:
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return {"num_features": channels}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": (channels,)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": channels}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": channels}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": channels}
    return {}
