"""Finding a model's coupled channels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torch_pruning_adapters.errors import nearest
from torch_pruning_adapters.graph import Axis, Inputs, Traced, is_depthwise, trace
from torch_pruning_adapters.group import ChannelGroup, Member, spans_of
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


def _read_groups(traced: Traced, model: nn.Module) -> list[ChannelGroup]:
    """Splits the traced axes into groups: connected channels that lie on the same set of axes."""
    axes = traced.axes
    if not axes:
        return []
    label, offset = _components(axes)
    axis_of = np.repeat(np.arange(len(axes)), [a.size for a in axes])

    # (component, axis) -> number of entries; components with equal rows belong to one group
    code, counts = np.unique(label * len(axes) + axis_of, return_counts=True)
    component, axis = code // len(axes), code % len(axes)
    first = np.flatnonzero(np.diff(component, prepend=-1))  # row at which a component begins
    length = np.diff(np.append(first, len(code)))
    before = np.maximum(np.arange(len(code)) - np.repeat(length, length), 0)
    like_before = np.logical_and.reduceat((axis == axis[before]) & (counts == counts[before]), first)
    like_before[1:] &= length[1:] == length[:-1]
    like_before[:1] = False
    run = np.flatnonzero(~like_before)  # neighbours are mostly alike, so there are few runs
    numbers: dict[bytes, int] = {}
    group_of = np.empty(len(label), dtype=int)  # of a component
    for start, stop in zip(run, np.append(run[1:], len(first)), strict=True):
        rows = slice(first[start], first[start] + length[start])
        signature = axis[rows].tobytes() + counts[rows].tobytes()
        group_of[component[first[start:stop]]] = numbers.setdefault(signature, len(numbers))

    shares: list[dict[int, np.ndarray]] = [{} for _ in numbers]  # group -> axis -> its entries there
    for i in range(len(axes)):
        number = group_of[label[offset[i] : offset[i + 1]]]
        for n in number[:1] if (number == number[0]).all() else np.unique(number):
            shares[n][i] = np.flatnonzero(number == n)

    producer_rank = {id(m): i for i, m in enumerate(model.modules())}
    groups = []
    for entries in shares:
        producers = [i for i in entries if axes[i].role == "producer"]
        if not producers:
            continue
        root = min(producers, key=lambda i: producer_rank[id(axes[i].module)])
        if traced.reaches_output & set(entries) and not any(axes[i].role == "consumer" for i in entries):
            continue
        labels = {i: label[offset[i] + index] for i, index in entries.items()}
        group = _read_group(traced, entries, labels, root)
        groups.append((producer_rank[id(axes[root].module)], entries[root][0], group))
    groups.sort(key=lambda found: found[:2])
    return _with_names([g for _, _, g in groups])


def _components(axes: list[Axis]) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of all axes' entries: a label for each entry, and each axis' first entry."""
    offset = np.cumsum([0, *(a.size for a in axes)])
    edges = [np.zeros((0, 2), dtype=int)]
    for i, a in enumerate(axes):
        for index, source, root in zip(a.index, a.source, a.root, strict=True):
            edges.append(np.stack([offset[i] + index, offset[root] + source], axis=1))
    u, v = np.concatenate(edges).T
    label = np.arange(offset[-1])
    while True:
        low = np.minimum(label[u], label[v])
        new = label.copy()
        np.minimum.at(new, u, low)
        np.minimum.at(new, v, low)
        new = new[new]
        if np.array_equal(new, label):
            return label, offset
        label = new


def _read_group(
    traced: Traced, entries: Mapping[int, np.ndarray], labels: Mapping[int, np.ndarray], root: int
) -> ChannelGroup:
    """One group, from its entries on each axis and the components that they belong to."""
    axes = traced.axes
    channels, first = np.unique(labels[root], return_index=True)  # (C,) ascending components
    position = np.empty(len(channels), dtype=int)  # of a component in the order of the root's axis
    position[np.argsort(first)] = np.arange(len(channels))
    size = len(channels)

    frozen = next((traced.blocked[i] for i in entries if i in traced.blocked), None)
    if traced.reaches_output & set(entries):
        frozen = "reaches the network's output"
    members, step = [], 1
    for i in sorted(entries, key=lambda i: (i != root, i)):
        roots = position[np.searchsorted(channels, labels[i])]
        member, reason = _member(axes[i], entries[i], roots, size)
        frozen = frozen or reason
        if member is not None:
            members.append(member)
            step = math.lcm(step, member.blocks)
    if size % step:
        frozen = frozen or f"{size} channels cannot be split into {step} equal blocks"
        step = 1
    elif step == size > 1:
        frozen = frozen or f"its grouped layers leave one channel in each of {step} blocks"
    elif size == 1:
        frozen = frozen or "a single channel"
    return ChannelGroup(axes[root].layer, size, step, tuple(members), frozen)


def _member(axis: Axis, index: np.ndarray, roots: np.ndarray, size: int) -> tuple[Member | None, str | None]:
    """The group's member on an axis (None where nothing is to be cut), and a reason to freeze the group."""
    module = axis.module
    blocks, per_block = 1, False
    if isinstance(module, nn.Parameter):
        dims = [d for d, n in enumerate(module.shape) if n == axis.size > 1]
        if not dims:
            return None, None
        layer, _, attribute = axis.layer.rpartition(".")
        member = Member(
            layer, "through", "parameter", ((attribute, dims[0]),), axis.size, spans_of(index, roots)
        )
        several = f"parameter {axis.layer!r} has {len(dims)} dimensions of {axis.size}"
        return member, several if len(dims) > 1 else None
    if isinstance(module, _ConvNd) and not is_depthwise(module):
        blocks = module.groups
        out_dim = 1 if module.transposed else 0
        dim = out_dim if axis.role == "producer" else 1 - out_dim
        tensors: tuple[tuple[str, int], ...] = (("weight", dim),)
        if axis.role == "producer":
            tensors += (("bias", 0),)
        kind = "conv"
        per_block = blocks > 1 and dim == 1
    elif isinstance(module, _ConvNd):
        kind, tensors = "depthwise", (("weight", 0), ("bias", 0))
        if module.in_channels != module.out_channels:
            return None, f"{axis.layer!r} is a depthwise convolution that changes the number of channels"
    elif isinstance(module, nn.Linear):
        kind = "linear"
        tensors = (("weight", 0), ("bias", 0)) if axis.role == "producer" else (("weight", 1),)
    elif isinstance(module, nn.LayerNorm):
        kind = "layernorm"
        if len(module.normalized_shape) > 1:
            return None, f"{axis.layer!r} normalises over more than the channels"
        tensors = (("weight", 0), ("bias", 0))
    elif isinstance(module, nn.GroupNorm):
        kind, tensors, blocks = "groupnorm", (("weight", 0), ("bias", 0)), module.num_groups
    elif isinstance(module, nn.PReLU):
        kind, tensors = "prelu", (("weight", 0),)
    elif isinstance(module, nn.Embedding):
        kind, tensors = "embedding", (("weight", 1),)
    else:
        kind, tensors = "norm", tuple((n, 0) for n in ("weight", "bias", "running_mean", "running_var"))
    member = Member(
        axis.layer, axis.role, kind, tensors, axis.size, spans_of(index, roots), blocks, per_block
    )
    whole = len(member.spans) == 1 and member.spans[0].length * member.spans[0].repeat == axis.size == size
    if blocks > 1 and not whole:
        return (
            member,
            f"only a part of the channels of {axis.layer!r}, which splits them into {blocks} blocks",
        )
    return member, None


def _with_names(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Names each group after its root; `name[a:b]` where the root's channels fall into several groups."""
    taken: dict[str, int] = {}
    for g in groups:
        taken[g.name] = taken.get(g.name, 0) + 1
    named = []
    for g in groups:
        if taken[g.name] > 1:
            start = g.producers[0].spans[0].start
            g = dataclasses.replace(g, name=f"{g.name}[{start}:{start + g.size}]")
        named.append(g)
    return named
