"""Proposing widths inside a budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from nni_dbs.cost import Bounds
from nni_dbs.space import Widths, WidthSpace

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
    bounds.check_reachable(space.smallest(), space.largest())
    choices = [np.array(space.choices(name)) for name in space.names]
    wish = np.maximum(space.encode(widths).numpy(), 1)

    def scaled(factor: float) -> np.ndarray:
        """(G,) position of the widest choice up to the scaled wish, or of the narrowest."""
        return np.array(
            [
                max(np.searchsorted(c, w * factor, side="right") - 1, 0)
                for c, w in zip(choices, wish, strict=True)
            ]
        )

    def fits(positions: np.ndarray) -> bool:
        row = [c[p] for c, p in zip(choices, positions, strict=True)]
        return bool(bounds.fits_batch(torch.tensor([row], dtype=torch.float64))[0])

    low, high = 0.0, max((c[-1] / w for c, w in zip(choices, wish, strict=True)), default=0.0) * (1 + 1e-9)
    if fits(scaled(high)):
        low = high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    positions = scaled(low)

    growing = {i for i, c in enumerate(choices) if len(c) > 1}
    while growing:
        growing = {i for i in growing if positions[i] + 1 < len(choices[i])}
        nearest = sorted(growing, key=lambda i: (choices[i][positions[i] + 1] / wish[i], i))
        for i in nearest:
            positions[i] += 1
            if fits(positions):
                break
            positions[i] -= 1
            growing.discard(i)  # costs never fall, so it will not fit later either
    return Widths({name: int(c[p]) for name, c, p in zip(space.names, choices, positions, strict=True)})
