"""AutoSlim: greedy slimming of a trained supernet; one run gives a network for every budget.

From the largest network on, every group in turn is tried one option narrower, and the network that scores
best is kept. The way down does not depend on a budget: a budget says where to leave it.

Source: Yu & Huang, AutoSlim: Towards One-Shot Architecture Search for Channel Numbers (2019, arXiv
1903.11728). Published are the supernet, trained by the sandwich rule, and greedy slimming by accuracy. Read
in public code (MMRazor's): the score alone decides, whatever cost is saved; a network is recorded where it
first keeps a target; 11 ratios a group, from 2/12 to 12/12; scores on one large batch, by whose own
statistics BatchNorm normalises. Reconstructions: what an option is for any group (`WidthSpace.options`), that
the first group wins a tie (the code takes the last), several limits at once, and that the network which is
recorded grows until it fills the budget, for the last step overshoots it.

Use it for several budgets of one model, or to see how accuracy falls on the way. Each step takes as many
evaluations as groups can still be narrowed, and most of them lie far above the budget; where one budget
counts, DBS needs fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from nni_dbs.cost import Bounds
from nni_dbs.errors import BudgetError
from nni_dbs.projection import project
from nni_dbs.space import Widths, WidthSpace

LIMIT = 12  # options of a group: both ends and ten between


def narrower(widths: Mapping[str, int], space: WidthSpace, limit: int = LIMIT) -> list[Widths]:
    """The networks with one group one option narrower, in the order of the groups.

    Args:
        widths: A width for every group of the space.
        space: Its options (`WidthSpace.options`) are the steps.
        limit: Most options of a group, from 2.

    Returns:
        None for groups that are at their narrowest; empty for the smallest network.
    """
    found = []
    for name in space.names:
        below = [w for w in space.options(name, limit) if w < widths[name]]
        if below:
            found.append(Widths({**widths, name: below[-1]}))
    return found


def slimmed(space: WidthSpace, score: Callable[[Widths], float], limit: int = LIMIT) -> Iterator[Widths]:
    """The way from the largest network to the smallest, each time to the best one that is narrower.

    FLOPs and parameters fall with every network. Stop reading where enough is slimmed: nothing is scored
    ahead.

    Args:
        space: The space.
        score: Of a network, finite, higher is better; called once for every candidate. Of equal scores the
            first counts.
        limit: See `narrower`.
    """
    widths = space.largest()
    yield widths
    while candidates := narrower(widths, space, limit):
        widths = max(candidates, key=score)
        yield widths


def within(trajectory: Iterable[Widths], space: WidthSpace, bounds: Bounds) -> Widths:
    """The network for a budget: the first of a trajectory that keeps it, grown in its shape to fill it.

    Never above the budget; it uses 98 % of it, or no group can grow by one more choice.

    Args:
        trajectory: From `slimmed`, which is read no further than needed.
        space: Whose choices the network grows by; finer than the options of the way.
        bounds: The budget.

    Raises:
        BudgetError: No network of the space keeps the budget, or none of the trajectory does.
    """
    bounds.check_reachable(space.smallest(), space.largest())
    used = float("inf")
    for widths in trajectory:
        if bounds.fits(widths):
            return project(widths, space, bounds)
        used = bounds.used(widths)
    raise BudgetError(
        f"this run ended above the budget (at {used:.2f} times of it): run for the smallest budget that you "
        "need, which serves all larger ones"
    )
