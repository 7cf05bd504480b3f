"""What each operator of PyTorch does to channels.

One rule for each kind of operator, at the level at which PyTorch dispatches them: there are few kinds
there, and layers, functions and methods all end in them. Operators that move entries (`view`, `cat`,
`roll`) are applied to the channels' numbers themselves. An operator without a rule freezes what it reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from torch_pruning_adapters.calls import map_tensors, tensors_in
from torch_pruning_adapters.channels import FIXED, FROM_CONSTANT, Block, Channels, Count, Facts
from torch_pruning_adapters.lengths import Length

aten = torch.ops.aten
NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass
class Operation:
    """One operator as it was called.

    Attributes:
        op: The operator.
        args: Its arguments.
        out: What it returned.
        function: Name of the Python function that was called around it.
        integers: The integers that were given to that function, in order.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    function: str
    integers: list[int]

    def lengths(self, sizes: Sequence[int]) -> list[int | None]:
        """For each of the sizes the integer that the caller gave for it; None where he gave none."""
        given = self.integers
        if self.function == "unflatten" and given:
            dim = given[0] % self.args[0].dim()
            given = [-1] * dim + given[1:] + [-1] * (len(sizes) - dim - len(given) + 1)
        given = given[: len(sizes)]
        if len(given) != len(sizes) or any(g not in (-1, s) for g, s in zip(given, sizes, strict=True)):
            return [None] * len(sizes)
        return [None if int(g) == -1 else g for g in given]


Rule = Callable[[Channels, Operation], None]
RULES: dict[str, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of operators; by name where not every version or build has them."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(map(str, ops), function))
        return function

    return register


def apply(channels: Channels, operation: Operation) -> None:
    """Learns what a result holds; a rule that does not know this use of its operator freezes the inputs."""
    found = RULES.get(str(operation.op.overloadpacket))
    if found is None:
        found = _pointwise if torch.Tag.pointwise in operation.op.tags else _unknown
    try:
        found(channels, operation)
    except Exception as error:
        _unknown(channels, operation, f" here ({type(error).__name__}: {error})")


def _inputs(operation: Operation) -> list[Tensor]:
    return tensors_in([*operation.args, *operation.kwargs.values()])


def _from_input(channels: Channels, tensors: Sequence[Tensor]) -> bool:
    return any(channels.facts(t).from_input for t in tensors)


def _unknown(channels: Channels, operation: Operation, why: str = "") -> None:
    """An operator without a rule: what it reads cannot be cut."""
    tensors = _inputs(operation)
    channels.fix_all(tensors, f"is read by {operation.op.overloadpacket}, which is not followed{why}")
    for tensor in tensors_in(operation.out):
        channels.learn(tensor, Facts([], _from_input(channels, tensors)))


# --- entry by entry --------------------------------------------------------------------------------------


@rule(
    aten.clone,
    aten.copy_,
    aten.detach,
    aten.alias,
    aten._to_copy,
    aten.lift_fresh,
    aten._prelu_kernel,
    aten.native_dropout,
    aten.where,
    aten.contiguous,
    aten.masked_fill,
    aten.masked_fill_,
    aten.bernoulli_,
    aten.uniform_,
    aten.normal_,
    aten.zero_,
    aten.fill_,
    aten.zeros_like,
    aten.ones_like,
    aten.empty_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.lerp,
    aten.addcmul,
    aten.addcdiv,
    aten.hardswish,
    aten.hardswish_,
    aten.hardsigmoid_,
    aten.log_sigmoid_forward,
)
def _pointwise(channels: Channels, operation: Operation) -> None:
    tensors = _inputs(operation)
    for out in tensors_in(operation.out):
        blocks = _merge(channels, tensors, out)
        channels.learn(out, Facts(blocks, _from_input(channels, tensors)))


def _merge(channels: Channels, tensors: Sequence[Tensor], out: Tensor) -> list[Block]:
    """The blocks of what is computed entry by entry from tensors that are broadcast to the shape of `out`."""
    merged: list[Block] = []
    spread = []  # what each tensor has a value of its own for, and where its channels lie
    for t in tensors:
        shift = out.dim() - t.dim()
        facts = channels.facts(t)
        own = {d + shift for d, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)) if n > 1 and s}
        held: set[int] = set()
        for block in facts.blocks:
            block = block.moved(shift)
            if all(out.shape[d] == n for d, n in zip(block.dims, block.numbers.shape, strict=True)):
                held.update(block.dims)
                merged = _with(channels, merged, block, out.dim(), facts.origin)
        spread.append((own, held, facts))
    for own, held, facts in spread:
        for block in merged:
            if any(d in own - held and not channels.is_rigid(block, d) for d in block.dims):
                channels.fix(block.numbers, facts.origin)
    return merged


def _with(channels: Channels, blocks: list[Block], new: Block, ndim: int, origin: str) -> list[Block]:
    """Blocks of a tensor and one more, tied where they lie on the same dimensions."""
    apart = [b for b in blocks if not set(b.dims) & set(new.dims)]
    for old in blocks:
        if not set(old.dims) & set(new.dims):
            continue
        small, large = sorted((old, new), key=lambda b: len(b.dims))
        if small.dims != large.dims and all(
            channels.is_rigid(large, d) for d in small.dims if d in large.dims
        ):
            channels.fix(small.numbers, FROM_CONSTANT)
        else:
            channels.same(old.spread(ndim), new.spread(ndim), origin)
        new = large if set(small.dims) <= set(large.dims) else _joint(small, large, ndim)
    return [*apart, new]


def _joint(a: Block, b: Block, ndim: int) -> Block:
    dims = tuple(sorted({*a.dims, *b.dims}))
    numbers, _ = np.broadcast_arrays(a.spread(ndim), b.spread(ndim))
    return Block(dims, numbers.squeeze(tuple(d for d in range(ndim) if d not in dims)))


# --- entries that move -----------------------------------------------------------------------------------


@rule(
    aten.permute,
    aten.transpose,
    aten.t,
    aten.unsqueeze,
    aten.squeeze,
    aten.flip,
    aten.rot90,
)
def _moves(channels: Channels, operation: Operation) -> None:
    tensor = operation.args[0]
    facts = channels.facts(tensor)
    outs = tensors_in(operation.out)
    blocks: list[list[Block]] = [[] for _ in outs]
    others = [map_tensors(a, _indices) if tensors_in(a) else a for a in operation.args[1:]]
    for block in facts.blocks:
        numbers = torch.from_numpy(block.spread(tensor.dim())).expand(tensor.shape)
        moved = tensors_in(operation.op(numbers, *others, **operation.kwargs))
        for found, part in zip(blocks, moved, strict=True):
            found += _compressed(part)
    from_input = _from_input(channels, _inputs(operation))  # indices may depend on it
    for out, found in zip(outs, blocks, strict=True):
        channels.learn(out, Facts(_disjoint(channels, found, out.dim()), from_input))


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def _channel_shuffle(channels: Channels, operation: Operation) -> None:
    """Deals channels from equal parts, each of which keeps the same positions."""
    block = channels.facts(operation.args[0]).at(1)
    if block is not None:
        for line in block.along(1):
            channels.split_in_blocks(line, operation.args[1])
    _moves(channels, operation)


@rule(aten.pixel_shuffle, aten.pixel_unshuffle)
def _pixel_shuffle(channels: Channels, operation: Operation) -> None:
    """Between channels and places: the channels that become the places of one are cut together."""
    tensor, out = operation.args[0], operation.out
    _pin(channels, tensor, [tensor.dim() - 2, tensor.dim() - 1], "becomes other channels")
    _moves(channels, operation)
    for block in channels.facts(out).blocks:
        for d in {out.dim() - 2, out.dim() - 1} & {*block.dims}:
            channels.stiffen(block, d)


@rule(aten.roll, aten.unfold, aten.diagonal)
def _shifts(channels: Channels, operation: Operation) -> None:
    """Moves entries by fixed distances: those of channels must then stay where they are."""
    tensor, args = operation.args[0], operation.args[1:]
    op = operation.op.overloadpacket
    if op is aten.roll:
        dims = args[1] if len(args) > 1 and args[1] else range(tensor.dim())
    else:
        dims = args[:1] if op is aten.unfold else (*args[1:], *(0, 1)[len(args[1:]) :])
    _pin(channels, tensor, [d % tensor.dim() for d in dims], "is moved by a fixed distance")
    _moves(channels, operation)


def _indices(index: Tensor) -> Tensor:
    """Indices that pick something, as they would with other inputs: no rows would hold no channels."""
    index = index.cpu()
    if index.dtype in (torch.bool, torch.uint8):
        return index if index.any() else torch.ones_like(index)
    return index if index.numel() else index.new_zeros([max(n, 1) for n in index.shape])


def _compressed(numbers: Tensor) -> list[Block]:
    """Numbers of a whole tensor as a block on the dimensions along which they differ, if any."""
    dims = []
    for d, (length, stride) in enumerate(zip(numbers.shape, numbers.stride(), strict=True)):
        first = numbers.narrow(d, 0, min(length, 1))
        if length > 1 and stride != 0 and not bool((numbers == first).all()):
            dims.append(d)
        else:
            numbers = first
    if not dims or not numbers.numel():
        return []
    return [Block(tuple(dims), numbers.reshape([numbers.shape[d] for d in dims]).numpy().copy())]


def _disjoint(channels: Channels, blocks: list[Block], ndim: int) -> list[Block]:
    """The blocks; those that came to share a dimension (an outer product, flattened) cannot be cut."""
    kept: list[Block] = []
    for block in blocks:
        other = next((b for b in kept if set(b.dims) & set(block.dims)), None)
        if other is None:
            kept.append(block)
            continue
        for b in (other, block):
            channels.fix(b.numbers, "shares a dimension with other channels")
    return kept


@rule(aten.as_strided, aten.as_strided_)
def _strides(channels: Channels, operation: Operation) -> None:
    """Another memory layout of the same shape (pooling of channels-last maps) changes nothing."""
    tensor, sizes = operation.args[:2]
    if list(sizes) != list(operation.out.shape) or tensor.shape != operation.out.shape:
        return _unknown(channels, operation)
    channels.learn(operation.out, channels.facts(tensor))


@rule(aten.constant_pad_nd)
def _pad(channels: Channels, operation: Operation) -> None:
    """Adds entries at the ends of dimensions: those of channels get some that are none."""
    tensor, out = operation.args[0], operation.out
    facts = channels.facts(tensor)
    amounts = [(0, 0)] * tensor.dim()
    for i, pair in enumerate(zip(operation.args[1][::2], operation.args[1][1::2], strict=True)):
        amounts[tensor.dim() - 1 - i] = pair
    blocks = []
    for block in facts.blocks:
        own = [amounts[d] for d in block.dims]
        if any(min(pair) < 0 for pair in own):
            channels.fix(block.numbers, "is cut at a fixed position")
        else:
            blocks.append(Block(block.dims, np.pad(block.numbers, own, constant_values=FIXED)))
    channels.learn(out, Facts(blocks, facts.from_input))


@rule(aten.expand, aten.repeat, aten.repeat_interleave, aten.tile)
def _repeats(channels: Channels, operation: Operation) -> None:
    """Repeats entries; a dimension that is made as long as some channels are many follows them."""
    tensor, out = operation.args[0], operation.out
    if operation.op.overloadpacket is aten.repeat_interleave and len(operation.args) < 2:
        return _unknown(channels, operation)
    _moves(channels, operation)
    facts = channels.facts(out)
    shift = out.dim() - tensor.dim()
    lengths = operation.lengths(out.shape)
    for d, length in enumerate(lengths):
        if isinstance(length, Length) and (d < shift or tensor.shape[d - shift] == 1) and not facts.at(d):
            facts.blocks += _counted(channels, d, length)


def _counted(channels: Channels, dim: int, length: Length) -> list[Block]:
    """The block of a new dimension that is as long as `length` says."""
    if length.channels is not None and length.ratio == 1:
        return [Block((dim,), length.channels)]
    if length.attribute is None and (length.channels is None or length.ratio.denominator > 1):
        return []
    block = Block((dim,), channels.new(int(length)))
    channels.follow(block.numbers[None], length)
    return [block]


@rule(
    aten.zeros,
    aten.ones,
    aten.empty,
    aten.full,
    aten.rand,
    aten.randn,
    aten.arange,
    aten.new_zeros,
    aten.new_ones,
    aten.new_empty,
    aten.new_full,
    aten.eye,
    aten.linspace,
    aten.empty_strided,
    aten.new_empty_strided,
    aten.scalar_tensor,
)
def _makes(channels: Channels, operation: Operation) -> None:
    """A new tensor, whose shape may follow the widths."""
    out = operation.out
    lengths = operation.lengths(out.shape)
    blocks = [b for d, n in enumerate(lengths) if isinstance(n, Length) for b in _counted(channels, d, n)]
    channels.learn(out, Facts(blocks))


@rule(aten.select, aten.index, aten.index_select, aten.unbind)
def _picks(channels: Channels, operation: Operation) -> None:
    """Takes entries at given positions: those of channels must then stay where they are."""
    tensor = operation.args[0]
    where: Any = operation.args[1] if len(operation.args) > 1 else 0
    picked = operation.op.overloadpacket is aten.index
    dims = _indexed(where) if picked else [int(where) % tensor.dim()]
    _pin(channels, tensor, dims, "is read at fixed positions")
    _moves(channels, operation)


def _indexed(indices: Sequence[Tensor | None]) -> list[int]:
    """The dimensions that advanced indexing picks from."""
    dims: list[int] = []
    dim = 0
    for index in indices:
        span = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.dim()
        if index is not None:
            dims += range(dim, dim + span)
        dim += span
    return dims


def _pin(channels: Channels, tensor: Tensor, dims: Sequence[int], reason: str) -> None:
    """Fixes the channels along dimensions that are not rigid."""
    for block in channels.facts(tensor).blocks:
        if any(d in block.dims and not channels.is_rigid(block, d) for d in dims):
            channels.fix(block.numbers, reason)


@rule(aten.slice)
def _slice(channels: Channels, operation: Operation) -> None:
    tensor = operation.args[0]
    dim, start, end, step = (*operation.args[1:], *(0, None, None, 1)[len(operation.args) - 1 :])[:4]
    length = tensor.shape[dim]
    begin, stop, step = slice(start, end, step).indices(length)
    block = channels.facts(tensor).at(dim % tensor.dim())
    if block is not None and (stop - begin, step) != (length, 1) and not channels.is_rigid(block, dim):
        if step == 1:
            _cut(channels, operation, block, dim, stop - begin, {begin, stop})
        else:
            channels.fix(block.numbers, "is cut at a fixed position")
    _moves(channels, operation)


@rule(aten.split, aten.split_with_sizes)
def _split(channels: Channels, operation: Operation) -> None:
    tensor = operation.args[0]
    dim = (operation.args[2] if len(operation.args) > 2 else operation.kwargs.get("dim", 0)) % tensor.dim()
    block = channels.facts(tensor).at(dim)
    parts = [part.shape[dim] for part in operation.out]
    if block is not None and len(parts) > 1 and not channels.is_rigid(block, dim):
        if operation.op.overloadpacket is aten.split:
            _cut(channels, operation, block, dim, parts[0], set())
        else:
            _cut_in_sizes(channels, operation, block, dim, parts)
    _moves(channels, operation)


def _cut(
    channels: Channels, operation: Operation, block: Block, dim: int, size: int, bounds: Collection[int]
) -> None:
    """A part of so many entries is cut from a dimension: it must follow the widths, or the channels stay."""
    line = block.along(dim)
    into_parts = operation.function in ("chunk", "tensor_split")  # their integers count parts, not entries
    lengths = [g for g in operation.integers if isinstance(g, Length) and int(g) in (size, *bounds)]
    if into_parts and line.shape[1] % size == 0:
        for row in line:
            channels.split_in_blocks(row, line.shape[1] // size)
        return
    if into_parts or not lengths:
        channels.fix(block.numbers, "is cut at a fixed position")
    equal = operation.op.overloadpacket is aten.split  # all parts have the size that was given
    for length in lengths:
        first = line[:, : int(length)]
        if (equal or length.channels is not None) and line.shape[1] % int(length) == 0:
            for row in line:
                channels.split_in_blocks(row, line.shape[1] // int(length))
        channels.follow(first, length)


def _cut_in_sizes(
    channels: Channels, operation: Operation, block: Block, dim: int, parts: Sequence[int]
) -> None:
    """A dimension of channels is cut into parts of given sizes."""
    lengths = operation.lengths(parts)
    if not any(isinstance(length, Length) for length in lengths):
        channels.fix(block.numbers, "is cut at a fixed position")
    ends = np.cumsum(parts)
    for part, end, length in zip(parts, ends, lengths, strict=True):
        if isinstance(length, Length):
            channels.follow(block.along(dim)[:, end - part : end], length)


@rule(aten._weight_norm_interface)
def _weight_norm(channels: Channels, operation: Operation) -> None:
    tensors = list(operation.args[:2])
    weight, norm = operation.out
    channels.learn(weight, Facts(_merge(channels, tensors, weight)))
    channels.learn(norm, Facts(list(channels.facts(tensors[1]).blocks)))


@rule(aten.cat)
def _cat(channels: Channels, operation: Operation) -> None:
    tensors = list(operation.args[0])
    out = operation.out
    dim = operation.args[1] % out.dim() if len(operation.args) > 1 else 0
    tensors = [t for t in tensors if t.dim() == out.dim()]  # an empty one-dimensional tensor is allowed
    on = [channels.facts(t).at(dim) for t in tensors]
    dims = tuple(sorted({d for b in on if b is not None for d in b.dims}))
    blocks: list[Block] = []
    if dims:
        parts = []
        for t, block in zip(tensors, on, strict=True):
            shape = [t.shape[d] if d in dims else 1 for d in range(t.dim())]
            numbers = np.full(1, FIXED) if block is None else block.spread(t.dim())
            parts.append(np.broadcast_to(numbers, shape))
        joint = np.concatenate(parts, axis=dim)
        blocks = _compressed(torch.from_numpy(joint))
    others = []
    for t in tensors:  # the other dimensions have one length each
        rest = [b for b in channels.facts(t).blocks if dim not in b.dims]
        others.append(Facts(rest, channels.facts(t).from_input))
    for facts in others:
        for block in facts.blocks:
            blocks = _with(channels, blocks, block, out.dim(), facts.origin)
    for t, facts in zip(tensors, others, strict=True):
        held = {d for b in channels.facts(t).blocks for d in b.dims}
        for block in blocks:
            open_dims = [d for d in block.dims if d != dim and d not in held and t.shape[d] > 1]
            if t.shape[dim] and any(not channels.is_rigid(block, d) for d in open_dims):
                channels.fix(block.numbers, facts.origin)
    channels.learn(out, Facts(blocks, _from_input(channels, tensors)))


@rule(aten.stack)
def _stack(channels: Channels, operation: Operation) -> None:
    tensors, out = list(operation.args[0]), operation.out
    dim = operation.args[1] % out.dim() if len(operation.args) > 1 else 0
    blocks = _merge(channels, tensors, tensors[0])
    moved = [Block(tuple(d + (d >= dim) for d in b.dims), b.numbers) for b in blocks]
    channels.learn(out, Facts(moved, _from_input(channels, tensors)))


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def _view(channels: Channels, operation: Operation) -> None:
    """Splits and merges dimensions. Of a dimension of channels that is split, one part can shrink."""
    tensor, out = operation.args[0], operation.out
    facts = channels.facts(tensor)
    lengths = operation.lengths(out.shape)
    blocks = []
    for block in facts.blocks:
        blocks += _viewed(channels, tensor.shape, out.shape, block, lengths)
    channels.learn(out, Facts(_disjoint(channels, blocks, out.dim()), facts.from_input))


def _viewed(
    channels: Channels,
    before: Sequence[int],
    after: Sequence[int],
    block: Block,
    lengths: Sequence[int | None],
) -> list[Block]:
    if math.prod(before) == 0:
        before, after = [max(n, 1) for n in before], [max(n, 1) for n in after]
    if math.prod(before) != math.prod(after):
        channels.fix(block.numbers, "is empty where it is reshaped")
        return []
    runs = _runs(before, after)
    touched = [(i, o) for i, o in runs if set(i) & set(block.dims)]
    inside = {d for i, _ in touched for d in i}
    outside = {d for _, o in touched for d in o}
    numbers = np.broadcast_to(
        block.spread(len(before)), [n if d in inside else 1 for d, n in enumerate(before)]
    )
    shape = [n if d in outside else 1 for d, n in enumerate(after)]
    found = _compressed(torch.tensor(numbers.reshape(shape)))
    if not found:
        return []
    (new,) = found
    for _, dims in touched:
        _settle(channels, new, [d for d in dims if d in new.dims], lengths)
    return [new]


def _settle(channels: Channels, block: Block, dims: Sequence[int], lengths: Sequence[int | None]) -> None:
    """Decides which of the dimensions that one run of entries became can shrink, and what they follow."""
    loose = [d for d in dims if not channels.is_rigid(block, d)]
    if not loose:
        return
    able = [d for d in loose if lengths[d] is None or isinstance(lengths[d], Length)]
    if not able:
        channels.fix(block.numbers, f"is reshaped to a fixed length, {lengths[loose[-1]]}")
        return
    for d in loose:
        if d != able[-1]:
            channels.stiffen(block, d)
    length = lengths[able[-1]]
    if isinstance(length, Length):
        channels.follow(block.along(able[-1]), length)


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions that hold the same entries before and after a reshape."""
    runs: list[tuple[list[int], list[int]]] = []
    i = o = 0
    while i < len(before) or o < len(after):
        ins, outs = [], []
        if i < len(before):
            ins, i = [i], i + 1
        if o < len(after):
            outs, o = [o], o + 1
        held, made = math.prod(before[d] for d in ins), math.prod(after[d] for d in outs)
        while held != made:
            if (held < made and i < len(before)) or o == len(after):
                ins.append(i)
                held, i = held * before[i], i + 1
            else:
                outs.append(o)
                made, o = made * after[o], o + 1
        runs.append((ins, outs))
    return runs


# --- reductions and what runs along a dimension --------------------------------------------------------


def _dims(operation: Operation, position: int = 1) -> list[int]:
    """The dimensions that a reduction runs over."""
    ndim = operation.args[0].dim()
    dims = operation.args[position] if len(operation.args) > position else operation.kwargs.get("dim")
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in ([dims] if isinstance(dims, int) else dims)] if ndim else []


def _reduced(channels: Channels, operation: Operation, dims: Sequence[int], statistics: bool) -> None:
    tensor = operation.args[0]
    facts = channels.facts(tensor)
    outs = tensors_in(operation.out)
    kept_dims = outs[0].dim() == tensor.dim()
    blocks = []
    for block in facts.blocks:
        over = [d for d in block.dims if d in dims]
        if any(not channels.is_rigid(block, d) for d in over):
            _mixed(channels, operation, block, statistics)
            continue
        numbers = block.numbers
        for d in sorted(over, reverse=True):
            numbers = numbers.take(0, axis=block.dims.index(d))
        rest = tuple(d for d in block.dims if d not in over)
        if rest:
            place = rest if kept_dims else tuple(d - sum(r < d for r in dims) for d in rest)
            blocks.append(Block(place, numbers))
    for out in outs:
        channels.learn(out, Facts(list(blocks), facts.from_input))


def _mixed(channels: Channels, operation: Operation, block: Block, statistics: bool) -> None:
    if statistics:
        channels.statistics.append((channels.module, np.unique(block.numbers)))
    else:
        name = operation.op.overloadpacket
        channels.fix(block.numbers, f"{name} runs over its channels, which changes with their number")


@rule(aten.mean, aten.var, aten.std, aten.var_mean, aten.std_mean)
def _average(channels: Channels, operation: Operation) -> None:
    """Means over channels are statistics, as those of LayerNorm: taken over what is kept."""
    _reduced(channels, operation, _dims(operation), True)


@rule(aten.linalg_vector_norm, aten.norm)
def _norm(channels: Channels, operation: Operation) -> None:
    _reduced(channels, operation, _dims(operation, 2), True)


@rule(
    aten.sum,
    aten.amax,
    aten.amin,
    aten.max,
    aten.min,
    aten.prod,
    aten.logsumexp,
    aten.any,
    aten.all,
    aten.argmax,
)
def _sum(channels: Channels, operation: Operation) -> None:
    if len(operation.args) > 1 and isinstance(operation.args[1], Tensor):  # the larger of two
        return _pointwise(channels, operation)
    _reduced(channels, operation, _dims(operation), False)


@rule(aten._softmax, aten._log_softmax)
def _softmax(channels: Channels, operation: Operation) -> None:
    _along(channels, operation, True)


@rule(aten.cumsum, aten.cumprod, aten.sort, aten.topk)
def _scan(channels: Channels, operation: Operation) -> None:
    _along(channels, operation, False)


def _along(channels: Channels, operation: Operation, statistics: bool) -> None:
    """Something that runs along one dimension and keeps the others."""
    tensor = operation.args[0]
    position = 2 if operation.op.overloadpacket is aten.topk else 1
    dim = operation.args[position] if len(operation.args) > position else operation.kwargs.get("dim", -1)
    facts = channels.facts(tensor)
    kept = []
    for block in facts.blocks:
        if dim % tensor.dim() in block.dims:
            _mixed(channels, operation, block, statistics)
        if dim % tensor.dim() not in block.dims or statistics:
            kept.append(block)
    for out in tensors_in(operation.out):
        channels.learn(out, Facts(list(kept), facts.from_input))


@rule(
    aten.avg_pool1d,
    aten.avg_pool2d,
    aten.avg_pool3d,
    aten._adaptive_avg_pool2d,
    aten._adaptive_avg_pool3d,
    aten.adaptive_avg_pool1d,
    aten.adaptive_max_pool2d,
    aten.adaptive_max_pool3d,
    aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices,
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.reflection_pad3d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.replication_pad3d,
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    aten.upsample_linear1d,
    aten.upsample_bilinear2d,
    aten._upsample_bilinear2d_aa,
    aten.upsample_trilinear3d,
    aten.upsample_bicubic2d,
    aten._upsample_bicubic2d_aa,
    aten.grid_sampler_2d,
    aten.grid_sampler_3d,
)
def _spatial(channels: Channels, operation: Operation) -> None:
    """Pooling, resampling and their kind: everything behind the channel dimension becomes something else."""
    tensor = operation.args[0]
    facts = channels.facts(tensor)
    name = operation.op.overloadpacket
    spatial = int(re.findall(r"([123])d", name.__name__)[0])
    _pin(channels, tensor, range(tensor.dim() - spatial, tensor.dim()), f"{name} runs over its channels")
    kept = [b for b in facts.blocks if max(b.dims) < tensor.dim() - spatial]
    for part in tensors_in(operation.out):
        channels.learn(part, Facts(list(kept), facts.from_input))


@rule("torchvision.roi_align", "torchvision.roi_pool")
def _regions(channels: Channels, operation: Operation) -> None:
    """Regions of feature maps (N, C, H, W) become a batch of their own (R, C, h, w)."""
    facts = channels.facts(operation.args[0])
    kept = [b for b in facts.blocks if b.dims == (1,)]
    for part in tensors_in(operation.out):
        channels.learn(part, Facts(list(kept), facts.from_input))


@rule(aten.index_put, aten.index_put_, aten.scatter, aten.scatter_)
def _puts(channels: Channels, operation: Operation) -> None:
    """Writes entries at given positions into a tensor: rows of other dimensions keep their channels."""
    tensor = operation.args[0]
    indices = operation.args[1]
    if not isinstance(indices, (list, tuple)):
        return _unknown(channels, operation)
    values = operation.args[2]
    _pin(channels, tensor, _indexed(indices), "is written at fixed positions")
    facts, given = channels.facts(tensor), channels.facts(values)
    tail = tensor.dim() - 1 - max(_indexed(indices), default=-1)
    for d in range(1, tail + 1):
        mine, its = facts.at(tensor.dim() - d), given.at(values.dim() - d) if d <= values.dim() else None
        if mine is not None and its is not None and len(mine.dims) == len(its.dims) == 1:
            channels.same(mine.numbers, its.numbers, given.origin)
        elif its is not None:
            channels.fix(its.numbers, facts.origin)
        elif mine is not None and d <= values.dim() and values.shape[values.dim() - d] > 1:
            channels.fix(mine.numbers, given.origin)
    for out in tensors_in(operation.out):
        channels.learn(out, Facts(list(facts.blocks), facts.from_input or given.from_input))


# --- normalisation -----------------------------------------------------------------------------------------


@rule(
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm,
)
def _batch_norm(channels: Channels, operation: Operation) -> None:
    tensor, out = operation.args[0], tensors_in(operation.out)[0]
    lines = [t for t in operation.args[1:5] if isinstance(t, Tensor)]
    _scaled(channels, tensor, lines, 1, out)
    _passed(channels, tensor, 1)


def _passed(channels: Channels, tensor: Tensor, dim: int) -> None:
    """Remembers what a layer normalises: layers without parameters have a size to change, too."""
    block = channels.facts(tensor).at(dim)
    if block is not None and channels.stack and isinstance(channels.stack[-1][1], NORMS):
        channels.passed.setdefault(channels.module, []).append(block.along(dim)[0])


def _scaled(channels: Channels, tensor: Tensor, lines: Sequence[Tensor], dim: int, out: Tensor) -> None:
    """Vectors that belong to one dimension of a tensor: scales, offsets, running statistics."""
    facts = channels.facts(tensor)
    block = facts.at(dim)
    blocks = list(facts.blocks)
    for line in lines:
        own = channels.facts(line).at(0)
        if own is not None and block is None:
            channels.fix(own.numbers, facts.origin)
        elif block is not None:
            numbers = np.full(len(line), FIXED) if own is None else own.numbers
            shape = [1] * tensor.dim()
            shape[dim] = len(line)
            channels.same(block.spread(tensor.dim()), numbers.reshape(shape), channels.facts(line).origin)
    channels.learn(out, Facts(blocks, facts.from_input))


@rule(aten.native_layer_norm)
def _layer_norm(channels: Channels, operation: Operation) -> None:
    tensor, shape, *lines = operation.args[:4]
    out = tensors_in(operation.out)[0]
    tensors = [tensor, *(t for t in lines if isinstance(t, Tensor))]
    blocks = _merge(channels, tensors, out)
    if len(shape) > 1:
        _pin(
            channels,
            tensor,
            range(tensor.dim() - len(shape), tensor.dim()),
            "a LayerNorm runs over several dimensions",
        )
    _passed(channels, tensor, tensor.dim() - 1)
    last, length = channels.facts(tensor).at(tensor.dim() - 1), operation.lengths(shape)[-1]
    if last is not None and isinstance(length, Length):
        channels.follow(last.along(tensor.dim() - 1), length)
    for block in blocks:
        if any(d >= tensor.dim() - len(shape) for d in block.dims):
            channels.statistics.append((channels.module, np.unique(block.numbers)))
    channels.learn(out, Facts(blocks, channels.facts(tensor).from_input))


@rule(aten.native_group_norm)
def _group_norm(channels: Channels, operation: Operation) -> None:
    tensor, weight, bias, _, _, _, groups = operation.args[:7]
    out = tensors_in(operation.out)[0]
    _scaled(channels, tensor, [t for t in (weight, bias) if t is not None], 1, out)
    _passed(channels, tensor, 1)
    block = channels.facts(tensor).at(1)
    if block is not None:
        for line in block.along(1):
            channels.split_in_blocks(line, groups)
        channels.statistics.append((channels.module, np.unique(block.numbers)))


# --- matrix products --------------------------------------------------------------------------------


def _in_layer(channels: Channels) -> bool:
    """Whether the innermost module that runs is a layer, which is counted by itself."""
    return bool(channels.stack) and isinstance(channels.stack[-1][1], (_ConvNd, nn.Linear))


def _weigh(channels: Channels, weight: Tensor, dim: int) -> None:
    """Marks the axes of a weight: the channels that it sums over, and those that it computes."""
    facts = channels.facts(weight)
    if facts.from_input:
        return
    for block in facts.blocks:
        if block.dims == (dim,):
            channels.consumed(block.numbers)
        elif dim not in block.dims:
            channels.produced(block.numbers)


@rule(aten.mm, aten.bmm)
def _mm(channels: Channels, operation: Operation) -> None:
    blocks = _product(channels, *operation.args[:2])
    channels.learn(operation.out, Facts(blocks, _from_input(channels, operation.args[:2])))


@rule(aten.addmm, aten.baddbmm)
def _addmm(channels: Channels, operation: Operation) -> None:
    bias, a, b = operation.args[:3]
    product = operation.out.detach()
    channels.learn(product, Facts(_product(channels, a, b), _from_input(channels, (a, b))))
    blocks = _merge(channels, [product, bias], operation.out)
    channels.learn(operation.out, Facts(blocks, _from_input(channels, (a, b, bias))))


def _product(channels: Channels, a: Tensor, b: Tensor) -> list[Block]:
    """The blocks of `a @ b`: (..., m, k) times (..., k, n), with at most one dimension in front."""
    ndim = a.dim()
    m, k, n = ndim - 2, ndim - 1, ndim  # places in a product before it is summed over k
    left = [_renamed(block, {m: m, k: k}) for block in channels.facts(a).blocks]
    right = [_renamed(block, {m: k, k: n}) for block in channels.facts(b).blocks]
    _sum_over(channels, (a, left), (b, right), k, ndim + 1)
    weights = [(t, d) for t, d in ((b, m), (a, k)) if not channels.facts(t).from_input]
    if weights:
        _weigh(channels, *weights[0])
    positions = [
        block for block in left if any(d != k and not channels.is_rigid(block, d) for d in block.dims)
    ]
    if positions or not _in_layer(channels):  # a layer is counted by its weight, for each position
        _count(channels, a.numel() * b.shape[-1], left, right)
    blocks: list[Block] = []
    for tensor, found in ((a, left), (b, right)):
        for block in found:
            if k not in block.dims:
                place = _renamed(block, {n: k})
                blocks = _with(channels, blocks, place, ndim, channels.facts(tensor).origin)
    for tensor, found in ((a, left), (b, right)):  # a dimension in front is there in both
        if ndim == 3 and tensor.shape[0] > 1 and not any(0 in block.dims for block in found):
            for block in blocks:
                if 0 in block.dims and not channels.is_rigid(block, 0):
                    channels.fix(block.numbers, channels.facts(tensor).origin)
    return blocks


def _renamed(block: Block, names: Mapping[int, int]) -> Block:
    """The block on dimensions of other numbers."""
    dims = [names.get(d, d) for d in block.dims]
    order = np.argsort(dims)
    return Block(tuple(sorted(dims)), np.transpose(block.numbers, order))


def _sum_over(
    channels: Channels, a: tuple[Tensor, list[Block]], b: tuple[Tensor, list[Block]], k: int, ndim: int
) -> None:
    """Ties what is multiplied and summed over the dimension `k` of the product."""
    found = [next((block for block in blocks if k in block.dims), None) for _, blocks in (a, b)]
    for block in found:
        if block is not None and any(d != k and not channels.is_rigid(block, d) for d in block.dims):
            channels.fix(block.numbers, "is summed over together with another dimension")
    left, right = found
    if left is not None and right is not None:
        channels.same(left.spread(ndim), right.spread(ndim), channels.facts(a[0]).origin)
        if channels.facts(a[0]).from_input and channels.facts(b[0]).from_input:
            channels.statistics.append((channels.module, np.unique(left.numbers)))
    for block, other in ((left, b[0]), (right, a[0])):
        if block is not None and (left is None or right is None):
            channels.fix(block.numbers, channels.facts(other).origin)


def _count(channels: Channels, amount: int, *blocks: Sequence[Block]) -> None:
    """Remembers a product whose size depends on widths."""
    dims: dict[int, np.ndarray] = {}
    for block in (b for found in blocks for b in found):
        for d in block.dims:
            if not channels.is_rigid(block, d):
                dims[d] = block.along(d)[0]
    if dims and amount:
        channels.counts.append(Count(channels.module, amount, tuple(dims.values())))


@rule(aten.mv)
def _mv(channels: Channels, operation: Operation) -> None:
    a, b = operation.args[:2]
    blocks = _product(channels, a, _as_column(channels, b))
    channels.learn(operation.out, Facts([x for x in blocks if x.dims == (0,)], _from_input(channels, (a, b))))


def _as_column(channels: Channels, vector: Tensor) -> Tensor:
    column = vector.detach().unsqueeze(1)
    channels.learn(column, channels.facts(vector))
    return column


@rule(aten.convolution, aten._convolution)
def _convolution(channels: Channels, operation: Operation) -> None:
    x, weight, bias = operation.args[:3]
    transposed, groups = operation.args[6], operation.args[8]
    out = operation.out
    facts, kernel = channels.facts(x), channels.facts(weight)
    inputs, outputs = (0, 1) if transposed else (1, 0)
    read, made = kernel.at(inputs), kernel.at(outputs)
    depthwise = groups > 1 and groups == x.shape[1] == out.shape[1]
    if depthwise:
        read = made = kernel.at(0)
    elif groups > 1:
        read, made = (
            _grouped(channels, block, groups, dim) for block, dim in ((read, inputs), (made, outputs))
        )
    block = facts.at(1)
    if block is None:
        _pin(channels, x, range(2, x.dim()), "a convolution runs over its channels")
    elif any(d > 1 and not channels.is_rigid(block, d) for d in block.dims):
        spread = block.spread(x.dim())
        channels.same(spread, spread[tuple(slice(None) if d < 2 else slice(1) for d in range(x.dim()))])
    columns = np.full(x.shape[1], FIXED) if read is None else read.numbers
    shape = [1] * x.dim()
    shape[1] = -1
    numbers = np.full(1, FIXED) if block is None else block.spread(x.dim())
    channels.same(numbers, columns.reshape(shape), (facts if block is None else kernel).origin)
    if not kernel.from_input and not depthwise:
        for found, mark in ((read, channels.consumed), (made, channels.produced)):
            if found is not None:
                mark(found.numbers)
    blocks = [b for b in facts.blocks if b.dims == (0,)]
    if not _in_layer(channels) or any(not channels.is_rigid(b, 0) for b in blocks):
        amount = (x if transposed else out).numel() * weight[0].numel()
        samples = [Block((2,), b.numbers) for b in blocks]
        _count(channels, amount, _sides(read, made, groups, depthwise), samples)
    if made is not None:
        blocks.append(Block((1,), made.numbers))
    channels.learn(out, Facts(blocks, _from_input(channels, (x, weight))))
    if bias is not None:
        _scaled(channels, out, [bias], 1, out)


def _sides(read: Block | None, made: Block | None, groups: int, depthwise: bool) -> list[Block]:
    """What the cost of a convolution is a product of: the channels that one filter reads, and the filters."""
    if depthwise:
        return [] if made is None else [made]
    one = None if read is None else Block((1,), read.numbers[: read.numbers.size // groups])
    return [b for b in (one, None if made is None else Block((0,), made.numbers)) if b is not None]


def _grouped(channels: Channels, block: Block | None, groups: int, dim: int) -> Block | None:
    """The channels on a side of a grouped convolution: every one of its groups keeps the same positions."""
    if block is None:
        return None
    if dim == 0:
        channels.split_in_blocks(block.numbers, groups)
        return block
    axis = channels.axis_of(block.numbers)
    if axis < 0:
        channels.fix(block.numbers, "a grouped convolution computes with it")
        return None
    return Block((1,), channels.in_blocks(axis, groups))


@rule(
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_attention_math_for_mps",
    "aten._scaled_dot_product_cudnn_attention",
)
def _attention(channels: Channels, operation: Operation) -> None:
    """softmax(q k^T) v of q (..., L, E), k (..., S, E), v (..., S, F): (..., L, F)."""
    query, key, value = operation.args[:3]
    last, tokens = query.dim() - 1, query.dim() - 2
    q, k, v = (
        [
            _for_heads(b, query.dim() - 3, query.shape[-3] if query.dim() > 2 else 1)
            for b in channels.facts(t).blocks
        ]
        for t in (query, key, value)
    )
    for t in (query, key, value):
        _pin(channels, t, [tokens], "attention runs over its channels")
        for block in channels.facts(t).blocks:
            if last not in block.dims and any(not channels.is_rigid(block, d) for d in block.dims):
                channels.fix(block.numbers, "attention keeps the number of its heads")
    _sum_over(channels, (query, q), (key, k), last, query.dim())
    pairs = query[..., 0].numel() * key.shape[-2]
    _count(channels, pairs * query.shape[-1], [b for b in q if last in b.dims])
    _count(channels, pairs * value.shape[-1], [b for b in v if last in b.dims])
    out = tensors_in(operation.out)[0]
    kept = [b for b in v if last in b.dims]
    for part in tensors_in(operation.out):
        channels.learn(part, Facts([], _from_input(channels, (query, key, value))))
    channels.learn(out, Facts(kept, _from_input(channels, (query, key, value))))


def _for_heads(block: Block, dim: int, heads: int) -> Block:
    """The block with a head of keys or values for each head of queries, which may share them."""
    if dim not in block.dims:
        return block
    axis = block.dims.index(dim)
    return Block(block.dims, block.numbers.repeat(heads // block.numbers.shape[axis], axis))


@rule(aten.embedding)
def _embedding(channels: Channels, operation: Operation) -> None:
    weight, out = operation.args[0], operation.out
    facts = channels.facts(weight)
    _pin(channels, weight, [0], "is read at fixed positions")
    block = facts.at(1)
    blocks = [] if block is None else [Block((out.dim() - 1,), block.numbers)]
    channels.learn(out, Facts(blocks, True))
