"""Starting points: the networks near a budget that a search begins with.

Networks whose widths are drawn uniformly have about half of the full network's cost; at a tenth of it hardly
any of them lies near. So the chances of the choices are tilted until the mean cost is right, and each draw is
projected into the budget. Nothing is drawn in vain, at any budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from scipy.optimize import brentq
from torch import Tensor

from nni_dbs.cost import Bounds, expected_cost
from nni_dbs.errors import ConfigError
from nni_dbs.projection import project_batch
from nni_dbs.space import Widths, WidthSpace

_SWEEPS = 10
_STEEPEST = 1e6
_TRIES = 5
_NEAR = 0.8  # of the budget: networks that show several options at once use at least so much


def tilted(space: WidthSpace, bounds: Bounds, target: float = 0.97, errors: Tensor | None = None) -> Tensor:
    """The chances of each group's choices at which the mean cost is `target` of the budget.

    P_l(c) is proportional to exp(-(E_l(c) - min E_l) / T - lam * d cost / d P_l(c)). The slopes depend on the
    other groups' chances: damped sweeps from the uniform ones. lam, which may be negative, is a root. The
    prior distribution of PSE-Net (arXiv 2408.16233) in closed form; a reconstruction.

    Args:
        space: The space.
        bounds: The budget; of several limits the one that is tightest at the time counts.
        target: Share of the budget. Where the space cannot reach it, the chances pile up at its end.
        errors: E (G, K), what a choice is expected to lose; T is its standard deviation over
            the groups that have a choice. Default: nothing is known.
            However small the errors are, and be they noise: their standard deviation is the unit, so give
            errors of enough records.

    Returns:
        (G, K) float64 as `WidthSpace.padded_choices`, 0 in the padding; rows sum to 1.

    Raises:
        ConfigError: Errors that are not finite.
    """
    choices, counts = space.padded_choices()
    valid = torch.arange(choices.shape[1]) < counts.unsqueeze(1)
    if errors is not None and not errors[valid].isfinite().all():
        raise ConfigError("errors of the choices must be finite")
    choices = choices.where(valid, 0)
    loss = torch.zeros_like(choices)
    if errors is not None:
        loss = (errors - errors.where(valid, torch.inf).amin(1, keepdim=True)).where(valid, 0)
        free = valid & (counts > 1).unsqueeze(1)
        loss = loss / (errors[free].std(correction=0) + 1e-12) if free.any() else loss

    def chances(tilt: float) -> Tensor:
        p = valid / counts.unsqueeze(1).to(torch.float64)
        for _ in range(_SWEEPS):
            p.requires_grad_()
            (slope,) = torch.autograd.grad(_share(p, choices, bounds), p)
            new = torch.softmax((-loss - tilt * slope).masked_fill(~valid, -torch.inf), 1)
            p = ((p + new) / 2).detach()
        return p

    def share(tilt: float) -> float:
        return float(_share(chances(tilt), choices, bounds))

    low, high = -1.0, 1.0
    while share(low) < target and low > -_STEEPEST:
        low *= 4
    while share(high) > target and high < _STEEPEST:
        high *= 4
    if not share(high) < target < share(low):  # out of reach
        return chances(low if share(low) <= target else high)
    return chances(brentq(lambda tilt: share(tilt) - target, low, high, rtol=1e-4))


def _share(p: Tensor, choices: Tensor, bounds: Bounds) -> Tensor:
    """The mean share of the tightest limit, for independent choices (G, K) with chances p."""
    mean = (p * choices).sum(1)
    variance = (p * choices**2).sum(1) - mean**2
    shares = [
        expected_cost(cost, mean.unsqueeze(0), variance.unsqueeze(0))[0] / most
        for _, cost, most in bounds.limits
    ]
    return torch.stack(shares).max()


def chances_by_width(space: WidthSpace, chances: Tensor) -> dict[str, dict[int, float]]:
    """Chances (G, K) as a mapping group name -> width -> chance."""
    return {
        name: dict(zip(space.choices(name), row.tolist(), strict=False))
        for name, row in zip(space.names, chances, strict=True)
    }


def chances_of(space: WidthSpace, by_width: Mapping[str, Mapping[int, float]]) -> Tensor:
    """The inverse of `chances_by_width`, also for a part of the space: (G, K), 0 in the padding.

    Where none of a group's choices has a chance, all have the same.
    """
    choices, counts = space.padded_choices()
    chances = torch.zeros_like(choices)
    for row, name, count in zip(chances, space.names, counts, strict=True):
        known = by_width.get(name, {})
        found = [known.get(width, 0.0) for width in space.choices(name)]
        row[:count] = torch.tensor(found, dtype=torch.float64)
        row[:count] = row[:count] / row.sum() if row.sum() > 0 else 1 / count
    return chances


def draw(space: WidthSpace, chances: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Networks (n, G) whose groups' choices have the given chances (G, K), independently."""
    choices, _ = space.padded_choices()
    if not len(choices) or not n:
        return torch.empty(n, len(choices), dtype=torch.float64)
    return choices.gather(1, torch.multinomial(chances, n, replacement=True, generator=generator)).T


def draw_evenly(space: WidthSpace, n: int, generator: torch.Generator) -> Tensor:
    """Networks (n, G) of any size: each choice of a group has the same chance."""
    choices, counts = space.padded_choices()
    chosen = (torch.rand(n, len(counts), generator=generator) * counts).long()
    return choices.gather(1, chosen.T).T


def starting_points(
    space: WidthSpace, bounds: Bounds, n: int, generator: torch.Generator, represented: float = 0.02
) -> list[Widths]:
    """A pool of different networks that fill the budget: the uniform one first, then tilted draws.

    Each option of each group (`WidthSpace.options`: its choices, thinned to ten) that the budget allows is
    the nearest one of at least `represented` of the networks (of one, in small pools), as far as there are so
    many different ones, so that a predictor sees all of them. To train a supernet and to fit predictors to;
    DBS samples its starting points at similar budgets (abstract and poster; how is not known, this is a
    reconstruction).

    Args:
        space, bounds: The space and the budget.
        n: Networks; fewer if no more fill the budget.
        generator: Of the draws.
        represented: Share of the pool.

    Raises:
        BudgetError: No network of the space keeps the budget.
        ConfigError: n is not positive.
    """
    if n < 1:
        raise ConfigError(f"the number of starting points must be at least 1, not {n}")
    uniform = project_batch(space.encode(space.largest()).unsqueeze(0), space, bounds)
    chances = tilted(space, bounds)
    pool = _distinct(uniform, n, space, bounds, chances, generator)
    _represent(pool, space, bounds, math.ceil(represented * len(pool)), generator)
    pool = _distinct(pool, n, space, bounds, chances, generator)
    return [space.decode(row) for row in pool]


def _represent(
    pool: Tensor, space: WidthSpace, bounds: Bounds, least: int, generator: torch.Generator
) -> None:
    """Changes networks of the pool (N, G), but the first, until each option is the nearest one of `least`.

    A network is set to a missing option, which it keeps from then on, and its other groups are projected
    anew. That moves other groups, so it goes over all groups a few times.
    """
    kept = torch.zeros(pool.shape, dtype=torch.bool)
    kept[0] = True
    for _ in range(_TRIES):
        changed = False
        for column, name in enumerate(space.names):
            options = torch.tensor(space.options(name), dtype=torch.float64)
            nearest = (pool[:, column, None] - options).abs().argmin(1)  # (N,)
            counts = torch.bincount(nearest, minlength=len(options))
            missing = torch.repeat_interleave(torch.arange(len(options)), (least - counts).clamp(min=0))
            spare = ~kept[:, column] & (counts[nearest] > least)
            order = torch.randperm(len(pool), generator=generator)
            order = order[kept[order].sum(1).argsort(stable=True)]  # those that are the least bound first
            rows = order[spare[order]][: len(missing)]
            wishes = pool[rows]
            wishes[:, column] = options[missing[: len(rows)]]
            keep = kept[rows]
            keep[:, column] = True
            possible = bounds.fits_batch(wishes.where(keep, space.encode(space.smallest())))
            if not possible.any():
                continue
            new = project_batch(wishes[possible], space, bounds, keep[possible])
            bound = keep[possible]
            good = (bound.sum(1) == 1) | (bounds.used_batch(new) >= _NEAR)
            for row, network, kept_now in zip(rows[possible][good], new[good], bound[good], strict=True):
                if not (pool == network).all(1).any():
                    pool[row], kept[row], changed = network, kept_now, True
        if not changed:
            break


def _distinct(
    pool: Tensor, n: int, space: WidthSpace, bounds: Bounds, chances: Tensor, generator: torch.Generator
) -> Tensor:
    """`pool` without repetitions, filled up to n networks."""
    found = dict.fromkeys(map(tuple, pool.tolist()))
    for _ in range(_TRIES):
        if len(found) >= n:
            break
        more = project_batch(draw(space, chances, 2 * n, generator), space, bounds)
        found |= dict.fromkeys(map(tuple, more.tolist()))
    return torch.tensor(list(found)[:n], dtype=torch.float64)
