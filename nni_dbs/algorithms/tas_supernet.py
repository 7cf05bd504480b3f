"""The network in which TAS searches: two widths of each channel group, and all depths of a stage, at once.

Channel-wise interpolation brings both widths to equally many channels; every candidate width has BatchNorms
of its own. Sources and reconstructions: `nni_dbs.algorithms.tas`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from nni_dbs.supernet import Replacement, Supernet, running, submodule
from torch_pruning_adapters import ChannelGroup, WidthError
from torch_pruning_adapters.calls import Inputs, call, preserved, tensors_in
from torch_pruning_adapters.errors import nearest
from torch_pruning_adapters.importance import Order
from torch_pruning_adapters.surgery import LayerAxis, keep_mask

Reads = tuple["str | None", "str | None"]
"""A source and the BatchNorm that alone reads an output of it; None: something else."""


def interpolate_channels(x: Tensor, channels: int, dim: int = 1) -> Tensor:
    """Adaptive average pooling along the channels ("channel-wise interpolation"), in either direction.

    Of N channels, output i is the mean of inputs floor(i N / channels) ... ceil((i + 1) N / channels) - 1.
    It keeps constants, but not the mean in general: 0, 1, 2, 3 become 0, 0.5, 1, 2, 2.5, 3.

    Args:
        x: (N, C, ...) in any memory format; returned as it is if it has as many channels.
        channels: Of the result.
        dim: Dimension of the channels.
    """
    size = x.shape[dim]
    if size == channels:
        return x
    if size < channels:  # each window has one or two channels; thrice as fast as pooling
        i = torch.arange(channels, device=x.device)
        first, last = i * size // channels, ((i + 1) * size - 1) // channels
        return (x.index_select(dim, first) + x.index_select(dim, last)) / 2
    rows = x.movedim(dim, -1)  # (..., C)
    pooled = F.adaptive_avg_pool1d(rows.reshape(1, -1, size), channels)
    return pooled.reshape(*rows.shape[:-1], channels).movedim(-1, dim)


class Pair(NamedTuple):
    """Two candidate widths of a group and their weights.

    Attributes:
        widths: Different, or the same one twice, which then runs alone.
        weights: (2,), adding up to 1; without effect for equal widths.
    """

    widths: tuple[int, int]
    weights: Tensor


def single(widths: Mapping[str, int]) -> dict[str, Pair]:
    """Pairs that stand for one network: `TASSupernet.sampled` runs it with its own BatchNorms.

    Width 0 in all groups of a residual block removes it.
    """
    weights = torch.tensor([1.0, 0.0])
    return {name: Pair((width, width), weights) for name, width in widths.items()}


def depth_candidates(blocks: int) -> tuple[int, ...]:
    """The public code's candidate depths of a stage: all of up to 3 blocks, else 1, 3, 5, ... and all blocks.

    7 blocks -> 1, 3, 5, 7; 8 blocks -> 1, 3, 5, 7, 8.
    """
    if blocks <= 3:
        return tuple(range(1, blocks + 1))
    return tuple(sorted({*range(1, blocks + 1, 2), blocks}))


@dataclass(frozen=True)
class Stage:
    """A run of residual blocks, the last of which can be left out. At depth d, d - 1 of `blocks` stay.

    Attributes:
        name: Dotted name of what leads the run, and always stays.
        sequential: Dotted name of the `nn.Sequential` of them all.
        blocks: Dotted names of the blocks after the leader, in their order.
    """

    name: str
    sequential: str
    blocks: tuple[str, ...]

    @property
    def depths(self) -> tuple[int, ...]:
        """Candidates, ascending; the leader counts as a block."""
        return depth_candidates(1 + len(self.blocks))

    def removed(self, depth: int) -> tuple[str, ...]:
        """The blocks that are left out at a depth."""
        return self.blocks[depth - 1 :]


def find_stages(model: nn.Module, groups: Iterable[ChannelGroup]) -> tuple[Stage, ...]:
    """Runs of residual blocks that follow each other in an `nn.Sequential`.

    The child before a run leads it (a block that strides, or a stem); if a run begins its Sequential, its
    first block does. In torchvision's ResNets each layer is a stage of all its blocks; in MobileNetV2, whose
    blocks lie in one Sequential, each resolution and width is one. Residual blocks elsewhere, or alone in
    their Sequential, form none. (The paper has the stages of its ResNets.)

    Args:
        model: The network.
        groups: Its groups, from `find_residual_blocks`.
    """
    known = {g.block for g in groups if g.block is not None}
    stages = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            children = [f"{path}.{child}" if path else child for child in module._modules]
            stages += _runs(path, children, known)
    return tuple(stages)


def _runs(sequential: str, children: Sequence[str], known: Collection[str]) -> list[Stage]:
    runs: list[list[str]] = []  # leader and blocks of each
    for child in children:
        if child in known and runs:
            runs[-1].append(child)
        else:
            runs.append([child])
    return [Stage(run[0], sequential, tuple(run[1:])) for run in runs if len(run) > 1]


class TASSupernet(Supernet):
    """A supernet that runs two candidate widths of each group, and all candidate depths, at once.

    Each BatchNorm that alone takes the output of a convolution or linear layer, directly, gets a copy for
    every candidate width of each group on its axis. With a group's widths a and b, weights w and m = max(a,
    b), its output is w_a CWI(BN_a(y[:a]), m) + w_b CWI(BN_b(y[:b]), m), where y is the layer's output and CWI
    `interpolate_channels`. Depthwise convolutions, too. All layers of the group take the same widths and
    weights, so that sums and concatenations fit, and activations have m channels. What the paper computes in
    full and pads by zeros, the supernet slices (`at`): the outputs are the same.

    Reconstruction: a layer whose output goes elsewhere (to a sum, a concatenation, an activation, or to
    several) is mixed there, w_a CWI(y[:a], m) + w_b CWI(y[:b], m). A BatchNorm of what was mixed before, as
    in networks with pre-activation and in DenseNet, keeps the model's own parameters and statistics, m
    channels of them. So do LayerNorm, GroupNorm and InstanceNorm, and all layers of groups with a single
    candidate. Layers that run in train mode only (auxiliary heads) count as layers without a BatchNorm. Where
    a group has a step (grouped convolutions), each of its blocks of channels is interpolated by itself.

    Channels are counted in the supernet's order: the first c are the c most important. The paper, which
    trains from scratch, keeps the first ones: `prefix_order`.

    The copies in `norms` begin with the parameters and statistics of their channels. They are not part of the
    model: its optimiser must train them beside the model's parameters, and they have to be moved where it is
    moved (`norms.to(device)`). `DistributedDataParallel` around the model does not average the copies'
    gradients, and needs `find_unused_parameters=True`, as the original BatchNorms rest.

    Args:
        model, groups, order: As for `Supernet`.
        candidates: Group name -> ascending candidate widths (`WidthLogits.candidates`); a missing group keeps
            its full width.
        example_inputs: As for `find_channel_groups`; one pass in eval mode shows which layers a BatchNorm
            follows.

    Attributes:
        stages: Of the model (`find_stages`), for `DepthLogits`.
        norms: The copies.

    Raises:
        WidthError: Groups or candidates of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        candidates: Mapping[str, Sequence[int]],
        example_inputs: Inputs,
        order: Order | None = None,
    ) -> None:
        super().__init__(model, groups, order)
        self.stages = find_stages(model, self.groups)
        self.candidates = {g.name: tuple(candidates.get(g.name, (g.size,))) for g in self.groups}
        for name, widths in candidates.items():
            if not widths or min(widths) < 1:
                raise WidthError(f"group {name!r} needs at least one candidate width, and none below 1")
            for width in widths:
                self._kept({name: width})
        self._points = self._find_points(example_inputs)
        self.norms = nn.ModuleDict()
        for point in self._points:
            norm = submodule(model, point.layer)
            for name, share in point.shares.items() if isinstance(norm, _BatchNorm) else ():
                for width in self.candidates[name]:
                    self.norms[_key(point.layer, name, width)] = _cut(norm, share.of(width))

    def modules(self) -> Iterator[nn.Module]:
        return chain(super().modules(), self.norms.modules())

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain(super().parameters(), self.norms.parameters())

    @contextmanager
    def sampled(
        self, pairs: Mapping[str, Pair], depths: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Within the block the model runs both widths of every pair, mixed by their weights.

        Stages add up their outputs at all candidate depths by the depths' weights. These outputs have equally
        many channels, as the blocks of a stage share the residual group's draw, so that none is interpolated.

        Weights get gradients. The copies of BatchNorm follow the mode of the original. Leave the block, nest
        blocks and recompute activations as with `at`.

        Args:
            pairs: Group name -> pair, from `WidthLogits.sample` or `single`; groups without one run at their
                full width, with the model's own BatchNorm. A pair of zeros removes the group's block.
            depths: Stage name -> (D,), from `DepthLogits.sample`; other stages run all their blocks.

        Yields:
            The model.

        Raises:
            WidthError: Unknown group or stage, or a width or weights that do not belong to its candidates.
        """
        forwards = self._mixed(pairs)
        forwards |= self._deep(depths or {})
        with running(self.model, forwards):
            yield self.model

    @torch.no_grad()
    def adopt(self, widths: Mapping[str, int]) -> None:
        """Writes the BatchNorm copies of these widths into the channels of the model that the widths keep.

        Call it after the search: `shrink(model, groups, widths, order)` and `at(widths)` then compute what
        `sampled(single(widths))` does. A width between two candidates takes the copy of the wider one; then
        recalibrate. Groups that are not named, and removed blocks, keep what they have.

        Raises:
            WidthError: Unknown group, or a width that the group cannot take.
        """
        self._kept(widths)
        for point in self._points:
            whole = _tensors(submodule(self.model, point.layer))
            for name, share in point.shares.items():
                width = widths.get(name, 0)
                wider = next((c for c in self.candidates[name] if c >= width > 0), None)
                key = _key(point.layer, name, wider or 0)
                for attribute, part in _tensors(self.norms[key]).items() if key in self.norms else ():
                    target = whole[attribute]
                    if part.dim():
                        kept = part.unflatten(0, (share.copies, -1))[:, : width // share.step]
                        target[torch.from_numpy(share.of(width)).to(target.device)] = kept.flatten()
                    else:
                        target.copy_(part)

    def _check_pairs(self, pairs: Mapping[str, Pair]) -> None:
        by_name = {g.name: g for g in self.groups}
        for name, pair in pairs.items():
            if name not in by_name:
                raise WidthError(f"no channel group {name!r} in this model{nearest(name, by_name)}")
            if by_name[name].block is not None and pair.widths == (0, 0):
                continue
            for width in set(pair.widths) - set(self.candidates[name]):
                raise WidthError(
                    f"{width} is not among the candidate widths of group {name!r}: {self.candidates[name]}"
                )

    def _mixed(self, pairs: Mapping[str, Pair]) -> dict[nn.Module, Replacement]:
        self._check_pairs(pairs)
        widths = {name: max(pair.widths) for name, pair in pairs.items()}
        kept = self._kept(widths)
        keep = keep_mask(self.groups, kept)
        forwards = self._sliced(widths)
        for point in self._points:
            active = keep[point.axis.channels]
            position, length = np.cumsum(active) - 1, int(active.sum())  # among the active entries
            mixes = [
                _Mix.of(pairs[name], share, position, length, self._norms_of(point.layer, name, pairs[name]))
                for name, share in point.shares.items()
                if name in pairs
            ]
            mixes = [mix for mix in mixes if not mix.idle]
            if mixes:
                module = submodule(self.model, point.layer)
                narrow = forwards.get(module)
                if isinstance(module, _BatchNorm):
                    forwards[module] = _MixedNorm(module, narrow, mixes, length)
                else:
                    forwards[module] = _Mixed(module, narrow, mixes)
        return forwards

    def _norms_of(self, layer: str, group: str, pair: Pair) -> list[nn.Module]:
        return [self.norms[key] for w in pair.widths if (key := _key(layer, group, w)) in self.norms]

    def _deep(self, depths: Mapping[str, Tensor]) -> dict[nn.Module, Replacement]:
        by_name = {stage.name: stage for stage in self.stages}
        forwards: dict[nn.Module, Replacement] = {}
        for name, weights in depths.items():
            if name not in by_name:
                raise WidthError(f"no stage {name!r} in this model{nearest(name, by_name)}")
            stage = by_name[name]
            if weights.shape != (len(stage.depths),):
                raise WidthError(
                    f"stage {name!r} needs weights of its depths {stage.depths}, not of shape "
                    f"{tuple(weights.shape)}"
                )
            sequential = submodule(self.model, stage.sequential)
            deep = forwards.setdefault(sequential, _Deep(sequential))
            assert isinstance(deep, _Deep)
            deep.add(stage, weights)
        return forwards

    def _find_points(self, example_inputs: Inputs) -> list[_Point]:
        """The layers at which groups with a choice are mixed."""
        axes: dict[str, LayerAxis] = {}
        sources: set[str] = set()
        norms: set[str] = set()
        for axis in self._axes:
            layer, role = axis.member.layer, axis.member.role
            is_norm = isinstance(submodule(self.model, layer), _BatchNorm)
            if is_norm or role == "producer" or axis.member.kind == "depthwise":
                axes[layer] = axis
                (norms if is_norm else sources).add(layer)
        normalised, normalising = _direct(_readers(self.model, sources, norms, example_inputs))
        numbers = np.cumsum([0, *(g.size for g in self.groups)])
        points = []
        for layer in axes:
            if layer not in normalising | (sources - normalised):
                continue
            axis = axes[layer]
            shares = {
                g.name: _Share.on(axis.channels - first, self.order[g.name], g.step)
                for g, first in zip(self.groups, numbers, strict=False)
                if g.name in axis.groups and len(self.candidates[g.name]) > 1
            }
            if shares:
                points.append(_Point(layer, axis, shares))
        return points


def _readers(model: nn.Module, sources: set[str], norms: set[str], inputs: Inputs) -> list[Reads]:
    """Which of the norms read which of the sources' outputs, in a pass in eval mode."""
    outputs: list[tuple[str, Tensor, Node | None]] = []
    read: list[tuple[str, int | None]] = []  # norm, number of the output

    def on_output(source: str, output: Tensor) -> None:
        outputs.append((source, output, output.grad_fn))

    def on_input(norm: str, x: Tensor | None = None) -> None:
        read.append((norm, next((i for i, (_, output, _) in enumerate(outputs) if output is x), None)))

    handles = []
    try:
        for layer in sources:
            handles.append(
                submodule(model, layer).register_forward_hook(
                    lambda _, __, output, layer=layer: on_output(layer, output)
                )
            )
        for layer in norms:
            handles.append(
                submodule(model, layer).register_forward_pre_hook(
                    lambda _, args, layer=layer: on_input(layer, *args[:1])
                )
            )
        with preserved(model), torch.enable_grad():
            model.eval()
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            uses = _uses(call(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    links: list[Reads] = [(None, norm) for norm, i in read if i is None]
    for i, (source, _, node) in enumerate(outputs):
        own = [norm for norm, j in read if j == i]
        alone = len(own) == 1 and uses[node] <= 1
        links += [(source, own[0])] if alone else [(source, None), *((None, norm) for norm in own)]
    return links


def _uses(outputs: Any) -> Counter[Node | None]:
    """How many operations on the way to the outputs read the result of each."""
    uses: Counter[Node | None] = Counter()
    todo = [t.grad_fn for t in tensors_in(outputs)]
    while todo:
        node = todo.pop()
        for before, _ in node.next_functions if node is not None else ():
            if not uses[before]:
                todo.append(before)
            uses[before] += 1
    return uses


def _direct(links: Sequence[Reads]) -> tuple[set[str | None], set[str | None]]:
    """The sources all of whose outputs go straight into norms that read nothing else, and these norms."""
    direct = [link for link in links if None not in link]
    while True:
        others = {end for link in links if link not in direct for end in link}
        left = [link for link in direct if others.isdisjoint(link)]
        if left == direct:
            return {source for source, _ in direct}, {norm for _, norm in direct}
        direct = left


class _Share(NamedTuple):
    """Where a group's channels lie on an axis.

    Attributes:
        entries: (P, M) for each position in the order of importance, in each of M copies: the same channels
            again, or the blocks of a group with a step.
        step: Channels of each position.
    """

    entries: np.ndarray
    step: int

    @classmethod
    def on(cls, channels: np.ndarray, order: np.ndarray, step: int) -> _Share:
        """On an axis with these channels (size,), counted from the group's first; the group's order (C,)."""
        at = np.flatnonzero((channels >= 0) & (channels < len(order)))
        at = at[np.argsort(channels[at], kind="stable")].reshape(len(order), -1)[order]  # (C, copies)
        return cls(at.reshape(len(order) // step, -1), step)

    @property
    def copies(self) -> int:
        """M."""
        return self.entries.shape[1]

    def of(self, width: int) -> np.ndarray:
        """Entries of a width (M * P',): all its positions, in one copy after another."""
        return self.entries[: width // self.step].T.flatten()


class _Point(NamedTuple):
    """A layer at whose output groups are mixed.

    Attributes:
        layer: Its name.
        axis: Of its output.
        shares: Group name -> where it lies.
    """

    layer: str
    axis: LayerAxis
    shares: dict[str, _Share]


def _key(layer: str, group: str, width: int) -> str:
    return f"{layer} {group} {width}".replace(".", "/")


def _tensors(norm: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    named = {**norm._parameters, **norm._buffers}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _cut(norm: _BatchNorm, entries: np.ndarray) -> _BatchNorm:
    """A copy of a BatchNorm for these entries."""
    narrow = copy.deepcopy(norm)
    index = torch.from_numpy(entries)
    for name, tensor in _tensors(norm).items():
        part = tensor.detach()[index.to(tensor.device)] if tensor.dim() else tensor.clone()
        setattr(narrow, name, nn.Parameter(part, tensor.requires_grad) if name in norm._parameters else part)
    narrow.num_features = len(entries)
    return narrow


class _Mix(NamedTuple):
    """A group's part in a mixed layer, in units of positions P on an axis where it has M copies of each.

    Attributes:
        weights: (2,)
        lengths: The two widths.
        copies: M.
        entries: (M * P,) where the wider one's channels lie; None if they are the whole axis, in order.
        norms: A BatchNorm for each width, or none.
    """

    weights: Tensor
    lengths: tuple[int, int]
    copies: int
    entries: Tensor | None
    norms: Sequence[nn.Module]

    @classmethod
    def of(
        cls, pair: Pair, share: _Share, position: np.ndarray, length: int, norms: Sequence[nn.Module]
    ) -> _Mix:
        """On a narrowed axis of that length; `position` is that of each entry of the whole axis."""
        a, b = pair.widths
        at = position[share.of(max(a, b))]
        everything = np.array_equal(at, np.arange(length))
        entries = None if everything else torch.from_numpy(at)
        return cls(pair.weights, (a // share.step, b // share.step), share.copies, entries, norms)

    @property
    def idle(self) -> bool:
        return self.lengths[0] == self.lengths[1] and not self.norms

    def mixed(self, x: Tensor) -> Tensor:
        """(N, M * P, ...) -> the same shape."""
        if self.lengths[0] == self.lengths[1]:
            return self._at(x, 0)
        w = self.weights.to(device=x.device, dtype=x.dtype)
        return w[0] * self._at(x, 0) + w[1] * self._at(x, 1)

    def _at(self, x: Tensor, k: int) -> Tensor:
        widest, length = max(self.lengths), self.lengths[k]
        part = x.unflatten(1, (self.copies, widest)).narrow(2, 0, length).flatten(1, 2)
        if self.norms:
            part = self.norms[k](part)
        return interpolate_channels(part.unflatten(1, (self.copies, length)), widest, dim=2).flatten(1, 2)


class _Mixed(Replacement):
    """A layer whose output is mixed of two candidate widths of each group on its axis.

    Args:
        module: The layer.
        narrow: What it does at the wider ones; None: all of it.
        mixes: The groups to mix, at least one.
    """

    def __init__(self, module: nn.Module, narrow: Replacement | None, mixes: Sequence[_Mix]) -> None:
        self.module: Any = module
        self.narrow = narrow
        self.mixes = mixes

    def run(self, *args: Any, **kwargs: Any) -> Any:
        y = self.usual(*args, **kwargs)
        dim = 1 - self.module.weight.dim()  # a convolution's spatial dimensions follow the channels
        y = y.movedim(dim, 1)
        return self.mixed(y, y).movedim(1, dim)

    def usual(self, *args: Any, **kwargs: Any) -> Any:
        if self.narrow is None:
            return self.forward(*args, **kwargs)
        self.narrow.forward = self.forward
        return self.narrow.run(*args, **kwargs)

    def mixed(self, x: Tensor, rest: Tensor) -> Tensor:
        """The groups' entries of x (N, C, ...), mixed, and the others of `rest`."""
        for mix in self.mixes:
            if mix.entries is None:
                return mix.mixed(x)
            entries = mix.entries.to(x.device)
            part = mix.mixed(x.index_select(1, entries))
            rest = rest.index_copy(1, entries, part.to(rest.dtype))
        return rest


class _MixedNorm(_Mixed):
    """The same for a BatchNorm, which itself normalises only what belongs to no group that is mixed.

    Args:
        module, narrow, mixes: As above.
        length: Of its axis at the wider widths.
    """

    def __init__(
        self, module: nn.Module, narrow: Replacement | None, mixes: Sequence[_Mix], length: int
    ) -> None:
        super().__init__(module, narrow, mixes)
        mixed = sum(mix.copies * max(mix.lengths) for mix in mixes)
        self.complete = mixed == length

    def run(self, input: Tensor) -> Tensor:
        for mix in self.mixes:
            for norm in mix.norms:
                norm.train(self.module.training)
        return self.mixed(input, input if self.complete else self.usual(input))


class _Deep(Replacement):
    """A Sequential with stages that add up their outputs at several depths."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights: dict[str, Tensor] = {}  # () of each child that ends a candidate depth
        self.last: set[str] = set()  # child of each stage

    def add(self, stage: Stage, weights: Tensor) -> None:
        children = [name.rpartition(".")[2] for name in (stage.name, *stage.blocks)]
        for depth, weight in zip(stage.depths, weights.unbind(), strict=True):
            self.weights[children[depth - 1]] = weight
        self.last.add(children[-1])

    def run(self, input: Tensor) -> Tensor:
        x = input
        total: Tensor | None = None
        for name, child in self.module._modules.items():
            assert child is not None
            x = child(x)
            if name in self.weights:
                part = self.weights[name].to(device=x.device, dtype=x.dtype) * x
                total = part if total is None else total + part
            if total is not None and name in self.last:
                x, total = total, None
        return x
