"""Trial cuts: is what the groups say true of this model?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from torch_pruning_adapters.calls import Inputs, call, tensors_in
from torch_pruning_adapters.errors import UnsupportedModelError
from torch_pruning_adapters.group import ChannelGroup
from torch_pruning_adapters.importance import Order
from torch_pruning_adapters.surgery import keep_mask, kept_channels, layer_axes, shrink

TOLERANCE = 1e-3  # relative; rounding stays below 1e-4, a wrong index changes outputs by tenths


def freeze_unsafe(
    model: nn.Module, example_inputs: Inputs, groups: Sequence[ChannelGroup]
) -> tuple[ChannelGroup, ...]:
    """Freezes the groups whose cut breaks the model or changes more than the cut channels.

    All groups are tried together on a copy; only where that fails are they halved until each culprit
    stands alone, so a sound model costs two trials whatever its size. Groups that fail only together are
    all frozen. The cut copy must give the outputs of the uncut one with the consumers' columns of the
    dropped channels set to zero: equal whatever lies between, except where a LayerNorm or GroupNorm takes
    statistics over the channels (there the cut copy must run and give finite outputs of the right shapes).
    """
    trial = _Trial(model, example_inputs)
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
    search([g for g in free if not _mixes_channels(g)])
    search([g for g in free if _mixes_channels(g)])
    return tuple(dataclasses.replace(g, frozen=reasons[g.name]) if g.name in reasons else g for g in groups)


def _mixes_channels(group: ChannelGroup) -> bool:
    return any(m.kind in ("layernorm", "groupnorm", "statistics") for m in group.members)


class _Trial:
    """A copy of the model, with constant tensors (fresh norms, zero-initialised layers) made random."""

    def __init__(self, model: nn.Module, example_inputs: Inputs) -> None:
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
            widths[g.name] = g.step * int(self.rng.integers(1, g.size // g.step))
            order[g.name] = self._random_order(g)
        try:
            small = shrink(self.model, groups, widths, order)
            cut = tensors_in(call(small, self.example_inputs))
        except Exception as error:
            return f"the cut model fails: {type(error).__name__}: {str(error).splitlines()[0]}"
        whole = self._without(groups, widths, order)
        if [t.shape for t in cut] != [t.shape for t in whole]:
            return "cutting changes the shape of the network's output"
        if any(_mixes_channels(g) for g in groups):
            return (
                None if all(bool(t.isfinite().all()) for t in cut) else "the cut model's output is not finite"
            )
        for a, b in zip(cut, whole, strict=True):
            if a.is_floating_point() and not _close(a, b):
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


def _close(a: Tensor, b: Tensor) -> bool:
    if not bool(b.isfinite().all()):
        return bool((a.isfinite() == b.isfinite()).all())
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
