"""Trial cuts: is what the groups say true of this model?"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torch_pruning_adapters.calls import Inputs, call, hooked, tensors_in
from torch_pruning_adapters.errors import UnsupportedModelError
from torch_pruning_adapters.group import ChannelGroup
from torch_pruning_adapters.importance import Order
from torch_pruning_adapters.surgery import is_depthwise, keep_mask, kept_channels, layer_axes, shrink

TOLERANCE = 1e-3  # relative; rounding stays below 1e-4, a wrong index changes outputs by tenths


def freeze_unsafe(
    model: nn.Module, example_inputs: Inputs, groups: Sequence[ChannelGroup]
) -> tuple[ChannelGroup, ...]:
    """Freezes the groups whose cut breaks the model or changes more than the cut channels.

    All groups are tried together on a copy; only where that fails are they halved until each culprit
    stands alone, so a sound model costs two trials whatever its size. Groups that fail only together are
    all frozen. The cut copy must give the outputs of the uncut one with the consumers' columns of the
    dropped channels set to zero: equal whatever lies between, except where a LayerNorm, a GroupNorm or the
    scores of attention are taken over the channels (there the cut copy must run and give finite outputs of
    the right shapes). The layers that keep all their outputs are compared one by one, and what the uncut
    copy computed goes on from there: a detector's heads are compared before proposals and boxes are
    selected by them.
    """
    trial = _Trial(model, example_inputs, groups)
    reasons: dict[str, str] = {}

    def search(suspects: list[ChannelGroup]) -> None:
        reason = trial.run(suspects) if suspects else None
        if reason is None:
            return
        if len(suspects) == 1:
            reasons[suspects[0].name] = reason
            return
        half = len(suspects) // 2
        search(suspects[:half])
        search(suspects[half:])
        left = [g for g in suspects if g.name not in reasons]
        reason = trial.run(left) if left else None
        if reason is not None:  # each half is sound by itself
            reasons.update({g.name: f"{reason} (cut together with others)" for g in left})

    free = [g for g in groups if g.frozen is None]
    search([g for g in free if g.statistics is None])
    search([g for g in free if g.statistics is not None])
    return tuple(dataclasses.replace(g, frozen=reasons[g.name]) if g.name in reasons else g for g in groups)


class _Trial:
    """A copy of the model, with constant tensors (fresh norms, zero-initialised layers) made random."""

    def __init__(self, model: nn.Module, example_inputs: Inputs, groups: Sequence[ChannelGroup]) -> None:
        narrowing = {m.layer for g in groups if g.frozen is None for m in g.producers}
        self.keeping = [
            name
            for name, m in model.named_modules()
            if isinstance(m, (_ConvNd, nn.Linear)) and name not in narrowing and not is_depthwise(m)
        ]
        try:
            self.model = copy.deepcopy(model).eval()
        except (RuntimeError, TypeError) as error:
            raise UnsupportedModelError(
                f"the model cannot be copied ({error}); does a module keep a tensor of its last forward pass?"
            ) from error
        self.example_inputs = example_inputs
        generator = torch.Generator().manual_seed(0)
        self.rng = np.random.default_rng(0)
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                    values = torch.rand(tensor.shape, generator=generator) + 0.5
                    tensor.copy_(values)

    @torch.no_grad()
    def run(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Cuts the groups to random channels; None, or what went wrong."""
        widths, order = {}, {}
        for g in groups:
            units = g.size // g.step
            # not a single one: GroupNorm refuses to normalise one value, which the smallest maps would be
            widths[g.name] = g.step * int(self.rng.integers(min(2, units - 1), units))
            order[g.name] = self._random_order(g)
        with _recorded(self.model, self.keeping) as heads:
            whole = self._without(groups, widths, order)
        exact = all(g.statistics is None for g in groups)
        try:
            small = shrink(self.model, groups, widths, order)
            with _replayed(small, self.keeping, heads) as found:
                cut = tensors_in(call(small, self.example_inputs))
        except Exception as error:
            return f"the cut model fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if len(cut) != len(whole) or any(a.shape != b.shape for a, b in zip(cut, whole, strict=True)):
            return "cutting changes the shape of the network's output"
        pairs = [(a, b) for name in self.keeping for a, b in zip(found[name], heads[name], strict=False)]
        pairs = [(a, b) for a, b in pairs if a.shape == b.shape]  # others run for each channel
        pairs += zip(cut, whole, strict=True)
        if not exact:
            finite = all(_finite(a) or not _finite(b) for a, b in pairs)
            return None if finite else "the cut model's output is not finite"
        if not all(_close(a, b) for a, b in pairs if a.is_floating_point() and a.numel()):
            return "the cut model computes something else than the uncut one without these channels"
        return None

    def _random_order(self, g: ChannelGroup) -> np.ndarray:
        period = g.size // g.step
        positions = self.rng.permutation(period)
        return (positions[:, None] + np.arange(g.step) * period).reshape(-1)

    def _without(self, groups: Sequence[ChannelGroup], widths: dict[str, int], order: Order) -> list[Tensor]:
        """Outputs of the uncut copy whose consumers do not read the dropped channels."""
        keep = keep_mask(groups, kept_channels(groups, widths, order))
        saved: list[tuple[Tensor, Tensor]] = []
        for axis in layer_axes(groups):
            if axis.member.role != "consumer":
                continue
            ((name, dim),) = axis.member.tensors
            weight = getattr(self.model.get_submodule(axis.member.layer), name)
            saved.append((weight, weight.clone()))
            mask = keep[axis.channels][: axis.member.size // axis.member.blocks_of(name)]
            shape = [-1 if d == dim else 1 for d in range(weight.dim())]
            weight.mul_(torch.from_numpy(mask).to(weight).reshape(shape))
        try:
            return tensors_in(call(self.model, self.example_inputs))
        finally:
            for tensor, value in reversed(saved):
                tensor.copy_(value)


@contextmanager
def _recorded(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block the layers' outputs are kept, in the order of their calls."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, out: Tensor) -> None:
        outputs[name].append(out.clone())  # an activation may write into it

    with _hooked(model, {name: functools.partial(keep, name) for name in layers}):
        yield outputs


@contextmanager
def _replayed(
    model: nn.Module, layers: Sequence[str], recorded: dict[str, list[Tensor]]
) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block the layers' outputs are kept, and the recorded ones go on in their place."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def replace(name: str, out: Tensor) -> Tensor:
        outputs[name].append(out.clone())
        known = recorded[name][len(outputs[name]) - 1 :]
        return known[0].clone() if known and known[0].shape == out.shape else out

    with _hooked(model, {name: functools.partial(replace, name) for name in layers}):
        yield outputs


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    def hook(fn: Callable[[Tensor], Tensor | None]) -> Callable[..., Tensor | None]:
        return lambda _module, _inputs, out: fn(out)

    handles = [model.get_submodule(name).register_forward_hook(hook(fn)) for name, fn in hooks.items()]
    with hooked(handles):
        yield


def _finite(t: Tensor) -> bool:
    return bool(t.isfinite().all())


def _close(a: Tensor, b: Tensor) -> bool:
    if not bool(b.isfinite().all()):
        return bool((a.isfinite() == b.isfinite()).all())
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
