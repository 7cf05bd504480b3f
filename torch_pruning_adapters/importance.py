"""Which channels of a group are kept first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_pruning_adapters.errors import WidthError
from torch_pruning_adapters.group import ChannelGroup, Member

Importance = Callable[[nn.Module, ChannelGroup], Tensor]
"""Model and group -> (C,) scores; larger is kept longer."""

Order = Mapping[str, Sequence[int] | np.ndarray]
"""Group name -> its channels (C,), most important first."""


def l1_norm(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of absolute weights that compute each channel, over the group's producers: (C,).

    Use it where a group's producers have comparable scales (Li et al., "Pruning Filters for Efficient
    ConvNets", 2017).
    """
    return _producer_sum(model, group, 1)


def l2_norm(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Euclidean norm of the weights that compute each channel, over the group's producers: (C,)."""
    return _producer_sum(model, group, 2).sqrt()


def bn_scale(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of |gamma| of the batch normalisations that each channel passes: (C,).

    Use it on networks trained with BatchNorm, sparsity-regularised ones above all (Liu et al., "Network
    Slimming", 2017). A group without affine BatchNorm falls back on `l2_norm`.
    """
    score = torch.zeros(group.size, dtype=torch.float64)
    found = False
    for member in group.members:
        module = model.get_submodule(member.layer) if member.kind == "norm" else None
        if isinstance(module, _BatchNorm) and module.affine:
            found = True
            _add_by_channel(score, member, module.weight.detach().abs())
    return score if found else l2_norm(model, group)


def channel_order(
    model: nn.Module, groups: Iterable[ChannelGroup], importance: Importance = l2_norm
) -> dict[str, np.ndarray]:
    """Ranks the channels of every group, most important first, ties in the network's order.

    Where a group's `step` is above 1 (grouped convolutions), channels at the same position of every
    block are ranked together: each `step` consecutive entries are one position.

    Raises:
        WidthError: `importance` gave scores of the wrong shape, or NaN.
    """
    order = {}
    for g in groups:
        score = torch.as_tensor(importance(model, g)).detach().to("cpu", torch.float64)
        if score.shape != (g.size,) or bool(score.isnan().any()):
            raise WidthError(
                f"importance of group {g.name!r}: expected {g.size} finite scores, "
                f"got shape {tuple(score.shape)}{' with NaN' if score.isnan().any() else ''}"
            )
        blocks = score.reshape(g.step, g.size // g.step)  # (step, positions)
        ranked = np.argsort(-blocks.sum(0).numpy(), kind="stable")
        order[g.name] = _expand(ranked, g)
    return order


def prefix_order(groups: Iterable[ChannelGroup]) -> dict[str, np.ndarray]:
    """Keeps the first channels (of every block), as slimmable networks trained from scratch do."""
    return {g.name: _expand(np.arange(g.size // g.step), g) for g in groups}


def mirrored_order(groups: Iterable[ChannelGroup], order: Order) -> dict[str, np.ndarray]:
    """The same ranking from its other end: the least important channels first (for BCNet)."""
    return {g.name: np.asarray(order[g.name]).reshape(-1, g.step)[::-1].reshape(-1) for g in groups}


def check_orders(groups: Iterable[ChannelGroup], order: Order) -> dict[str, np.ndarray]:
    """The order of each group as an array (C,); `WidthError` if one is missing or is not an order."""
    checked = {}
    for g in groups:
        if g.name not in order:
            raise WidthError(f"the channel order lacks group {g.name!r}")
        checked[g.name] = check_order(g, order[g.name])
    return checked


def check_order(group: ChannelGroup, order: Sequence[int] | np.ndarray) -> np.ndarray:
    """The order as an array (C,); `WidthError` unless it is one that `channel_order` could give."""
    ranked = np.asarray(order, dtype=int)
    if ranked.shape != (group.size,) or not np.array_equal(np.sort(ranked), np.arange(group.size)):
        raise WidthError(
            f"the channel order of group {group.name!r} is not a permutation of {group.size} channels"
        )
    if not np.array_equal(ranked, _expand(ranked[:: group.step] % (group.size // group.step), group)):
        raise WidthError(
            f"the channel order of group {group.name!r} must rank the {group.step} blocks of its grouped "
            "convolutions alike; use channel_order() or prefix_order()"
        )
    return ranked


def _expand(positions: np.ndarray, group: ChannelGroup) -> np.ndarray:
    """Positions inside a block (C / step,) -> channels of all blocks (C,), position by position."""
    period = group.size // group.step
    return (positions[:, None] + np.arange(group.step) * period).reshape(-1)


def _producer_sum(model: nn.Module, group: ChannelGroup, power: int) -> Tensor:
    """Sum of |weight|**power over all weights that compute a channel: (C,)."""
    score = torch.zeros(group.size, dtype=torch.float64)
    for member in group.producers:
        name, dim = member.tensors[0]
        weight = model.get_submodule(member.layer).get_parameter(name).detach()
        if member.per_block:  # a transposed convolution: each block of rows has its own channels as columns
            weight = weight.unflatten(0, (member.blocks, -1)).transpose(0, 1).flatten(1, 2)
        rows = weight.transpose(0, dim).flatten(1)
        exact = torch.promote_types(weight.dtype, torch.float32)
        norms = torch.linalg.vector_norm(rows, power, dim=1, dtype=exact)
        _add_by_channel(score, member, norms.double() ** power)
    return score


def _add_by_channel(score: Tensor, member: Member, per_entry: Tensor) -> None:
    """Adds values of an axis' entries (size,) to the channels (C,) behind them."""
    values = per_entry.to("cpu", torch.float64)
    for s in member.spans:
        part = values[s.start : s.start + s.length * s.repeat].reshape(s.length, s.repeat)
        score[s.root : s.root + s.length] += part.sum(1)
