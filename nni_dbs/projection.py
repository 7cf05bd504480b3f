"""Projection: the network of a space that is closest in shape to a wish and fills the budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nni_dbs.cost import Bounds
from nni_dbs.errors import BudgetError
from nni_dbs.space import Widths, WidthSpace

FULL = 0.98  # of the budget: what a network to keep uses, or no group can grow
_BISECTIONS = 50


def project(widths: Mapping[str, int], space: WidthSpace, bounds: Bounds) -> Widths:
    """The network of the space that is closest in shape to `widths` and fills the budget.

    All widths are scaled by one factor, as large as the budget allows, and rounded down to choices; what
    rounding left over goes to the groups that lie furthest below their scaled width, until no group can
    grow by one more choice. Never above the budget, for any widths.

    Args:
        widths: What is wished for, inside the budget or not; missing groups at full width.
        space: The allowed widths.
        bounds: The budget on this model (`Budget.bound`); its costs must not fall when a width grows.

    Raises:
        BudgetError: Not even the smallest network keeps the budget.
    """
    return space.decode(project_batch(space.encode(widths).unsqueeze(0), space, bounds)[0])


def project_batch(wishes: Tensor, space: WidthSpace, bounds: Bounds, keep: Tensor | None = None) -> Tensor:
    """`project` for many: wishes (N, G), in the order of `WidthSpace.encode`, to networks (N, G) float64.

    Args:
        wishes: Positive widths, relaxed ones too.
        space, bounds: As in `project`.
        keep: (N, G) bool: groups that stay at their wish, rounded down to a choice, while the others scale.

    Raises:
        BudgetError: Not even the smallest network keeps the budget, or not with what is to be kept.
    """
    bounds.check_reachable(space.smallest(), space.largest())
    if not wishes.numel():
        return wishes.to(torch.float64)
    choices, counts = space.padded_choices()
    wishes = wishes.to(torch.float64).clamp(min=1)
    fixed = torch.zeros(wishes.shape, dtype=torch.bool) if keep is None else keep
    rows = torch.arange(wishes.shape[1])

    def scaled(factor: Tensor) -> Tensor:
        """(N, G) position of the widest choice up to the scaled wish, or of the narrowest."""
        aim = torch.where(fixed, wishes, wishes * factor.unsqueeze(1))
        return (torch.searchsorted(choices, aim.T.contiguous(), right=True).T - 1).clamp(min=0)

    def fits(positions: Tensor) -> Tensor:
        return bounds.fits_batch(choices[rows, positions])

    low = torch.zeros(len(wishes), dtype=torch.float64)
    if not fits(scaled(low)).all():
        raise BudgetError("the groups to keep are over the budget, even with all others at their narrowest")
    largest = choices[rows, counts - 1]
    high = (largest / wishes).amax(1) * (1 + 1e-9)
    low = torch.where(fits(scaled(high)), high, low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = fits(scaled(middle))
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    positions = scaled(low)
    _fill(positions, wishes, choices, counts, bounds, ~fixed)
    return choices[rows, positions]


def leaves_room(widths: Widths, space: WidthSpace, bounds: Bounds) -> bool:
    """Whether a network uses less than 98 % of the budget although some group, alone, could grow."""
    if bounds.used(widths) >= FULL:
        return False
    wider = [[w for w in space.choices(name) if w > widths[name]] for name in space.names]
    grown = [space.encode({**widths, name: w[0]}) for name, w in zip(space.names, wider, strict=True) if w]
    return bool(grown) and bool(bounds.fits_batch(torch.stack(grown)).any())


def _fill(
    positions: Tensor, wishes: Tensor, choices: Tensor, counts: Tensor, bounds: Bounds, growing: Tensor
) -> None:
    """Grows networks (N, G) choice by choice in place, the group furthest below its wish first."""
    groups = torch.arange(len(choices))
    growing = growing & (positions + 1 < counts)
    active = growing.any(1).nonzero().squeeze(1)
    while len(active):
        now = positions[active]  # (A, G)
        after = choices[groups, (now + 1).minimum(counts - 1)]  # (A, G) the next choice of each group
        rows, columns = growing[active].nonzero(as_tuple=True)
        grown = choices[groups, now][rows]
        grown[torch.arange(len(rows)), columns] = after[rows, columns]
        fitting = torch.zeros(now.shape, dtype=torch.bool)
        fitting[rows, columns] = bounds.fits_batch(grown)  # costs never fall: what does not fit, never will
        order = torch.where(fitting, after / wishes[active], torch.inf)
        chosen = order.argmin(1)
        able = fitting.any(1)
        positions[active[able], chosen[able]] += 1
        growing[active] = fitting & (positions[active] + 1 < counts)
        active = active[growing[active].any(1)]
