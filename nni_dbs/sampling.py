"""Which sub-networks a training step trains: the rules, as endless iterators of steps.

Every rule is a pure function of its arguments and of the generator that it draws from: the same seed gives
the same steps, on every rank of a distributed training and after a resume (skip the steps that are done).
`nni_dbs.steps` turns a `Step` into a loss.

    steps = spfs(space, draw_paths(pool, generator))

Rules compare as follows; DBS finds that the fairer ones rank sub-networks better, PSE-Net trains faster.

| rule | networks of a step | fairness |
|---|---|---|
| `single` | a given one | none: this is ordinary training |
| `uniform` | a random one | in expectation |
| `sandwich` | largest, smallest, n - 2 random | the extremes are always trained |
| `path_fair` | drawn paths | each path equally often |
| `spfs` | largest, smallest, drawn paths | each path equally often, and the extremes always |
| `bcnet` | a random one, then its complement, both sides of each | each channel equally often |

Under `single`, `uniform`, `path_fair` and `bcnet` weight decay and momentum also move channels that a step
leaves out; the other rules train all channels in every step.

`in_parallel` runs the networks of any rule in one pass, each on its part of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from nni_dbs.cost import PolynomialCost
from nni_dbs.errors import ConfigError
from nni_dbs.space import Widths, WidthSpace

Draws = Iterator[tuple[Widths, ...]]


@dataclass(frozen=True)
class Step:
    """What one step of the optimiser trains.

    Attributes:
        networks: In the order in which they are run. Equal ones are trained once, except in parallel, where
            each has its own part of the batch.
        distilled: The first learns from the labels, the others from the first; else all from the labels.
        parallel: All run at once, each on its part of the batch; else one after another on all of it.
        mirrored: Each is trained on the first channels of every group and on the last ones, with half of the
            loss each. Neither distilled nor parallel.
    """

    networks: tuple[Widths, ...]
    distilled: bool = False
    parallel: bool = False
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not self.networks:
            raise ConfigError("a step needs at least one network")
        if self.mirrored and (self.distilled or self.parallel):
            raise ConfigError("networks are trained on both sides from the labels, one after another")
        object.__setattr__(self, "networks", tuple(map(Widths, self.networks)))


def single(widths: Widths) -> Iterator[Step]:
    """The same network in every step."""
    return repeat(Step((widths,)))


def uniform(space: WidthSpace, generator: torch.Generator) -> Iterator[Step]:
    """One random network a step, each group's width drawn from its choices with equal chances."""
    while True:
        yield Step((space.sample(generator),))


def sandwich(space: WidthSpace, generator: torch.Generator, networks: int = 4) -> Iterator[Step]:
    """The sandwich rule: the largest network, `networks - 2` random ones, the smallest; distilled.

    Yu & Huang, "Universally Slimmable Networks" (2019), as in their released configurations. The largest
    comes first, for the others learn from it.
    """
    if networks < 2:
        raise ConfigError(f"a sandwich has at least 2 networks, not {networks}")
    while True:
        drawn = [space.sample(generator) for _ in range(networks - 2)]
        yield Step((space.largest(), *drawn, space.smallest()), distilled=True)


def path_fair(draws: Draws) -> Iterator[Step]:
    """Strict path-wise fairness (rule c of DBS): the drawn paths, all learning from the labels.

    Args:
        draws: From `draw_paths` or `draw_options`.
    """
    for drawn in draws:
        yield Step(drawn)


def spfs(space: WidthSpace, draws: Draws) -> Iterator[Step]:
    """The strict path-wise fair sandwich rule of DBS (rule d): largest, drawn paths, smallest; distilled.

    The default for supernets whose sub-networks are to be ranked. What DBS calls a path is not known; both
    readings are here as reconstructions: a path is one of the starting points (`draw_paths`, the default,
    because the abstract says that the rule trains these), or one option for each group (`draw_options`).

    A drawn path that is the largest or the smallest network is trained once in that step. Fairness is that
    of the draws alone; the extremes are trained more often by design.

    Args:
        space: Gives the largest and the smallest network.
        draws: From `draw_paths` or `draw_options`.
    """
    for drawn in draws:
        yield Step((space.largest(), *drawn, space.smallest()), distilled=True)


def bcnet(space: WidthSpace, generator: torch.Generator) -> Iterator[Step]:
    """One random network a step, on the first channels of each group and on the last; next its complement.

    Su et al., "BCNet: Searching for Network Width with Bilaterally Coupled Network" (2021). Where narrow
    networks always keep a group's first channels, these are trained far more often than its last ones. Here
    width c has two sides, channels 1 to c and C - c + 1 to C, and a step with c is followed by one with
    C - c, so that in the two each channel is trained exactly twice. Widths are drawn from the choices below
    the full one, whose complement has no channels, so that no group is trained at its full width; groups
    without such a choice always are. A complement may be narrower than all choices: choose `min_ratio` with
    that in mind. As in the released code, but for its complement, which is off by one.

    Score a network on both sides: `Supernet.at(widths, last=True)` is the other one.
    """
    drawn_from = {g.name: [w for w in space.choices(g.name) if 0 < w < g.size] for g in space.groups}
    while True:
        drawn = {
            name: choices[int(torch.randint(len(choices), (), generator=generator))]
            for name, choices in drawn_from.items()
            if choices
        }
        complement = {g.name: g.size - drawn[g.name] for g in space.groups if g.name in drawn}
        for widths in (drawn, complement):
            yield Step((Widths(widths),), mirrored=True)


def in_parallel(steps: Iterator[Step], distilled: bool = False) -> Iterator[Step]:
    """The networks of each step at once, as PSE-Net trains them (arXiv 2408.16233, reconstructed).

    Args:
        steps: Of any rule; 4 networks (a sandwich of 4, or `spfs` with 2 paths) are the default there.
        distilled: Let the first network teach the others. Each then runs on all images of the batch, at
            the cost of one full-width pass each; without, each has its own part of the images and labels,
            at the cost of one full-width pass altogether.
    """
    for step in steps:
        yield dataclasses.replace(step, distilled=distilled, parallel=True)


def draw_paths(pool: Sequence[Widths], generator: torch.Generator, per_step: int = 2) -> Draws:
    """Starting points without replacement, a new permutation whenever all had their turn (reading A).

    After any number of draws two points' counts differ by at most 1, and they are equal whenever
    `len(pool)` divides the number of points drawn. No point comes twice in one draw.

    Args:
        pool: The starting points; equal ones count once.
        generator: Of the permutations.
        per_step: Points of each draw.
    """
    points = tuple(dict.fromkeys(pool))
    if not 1 <= per_step <= len(points):
        raise ConfigError(
            f"cannot draw {per_step} different paths a step from {len(points)}; give more starting points"
        )

    def cycles() -> Iterator[list[Widths]]:
        while True:
            yield [points[i] for i in torch.randperm(len(points), generator=generator)]

    return _draw(cycles(), per_step)


def draw_options(
    space: WidthSpace,
    generator: torch.Generator,
    per_step: int = 2,
    cost: PolynomialCost | None = None,
    target: float | None = None,
) -> Draws:
    """Paths in which each option of each group comes equally often (reading B, FairNAS for widths).

    A cycle is a table of K paths, K being the most options that a group has; each group's column runs
    through permutations of its options. Over whole cycles every option of a group with K options is
    drawn equally often; with fewer options, counts differ by at most 1 at the end of each cycle and are
    equal when their number divides the paths so far. No path comes twice in one draw.

    Args:
        space: Its choices are the options. Because all of them appear, the mean cost is pinned near that of
            the uniform networks; for another budget restrict the options (`WidthSpace.within`).
        generator: Of the permutations and the swaps.
        per_step: Paths of each draw.
        cost: Of the same groups. With `target`, entries of a table are swapped inside of their column while
            sum over its paths of (cost / target - 1)^2 falls, which keeps the counts.
        target: Cost that every path should have.
    """
    choices = [space.choices(g.name) for g in space.groups]
    length = max((len(c) for c in choices), default=0)
    if not 1 <= per_step <= length:
        raise ConfigError(f"cannot draw {per_step} paths a step from cycles of {length}; draw fewer")
    if (cost is None) != (target is None):
        raise ConfigError("give cost and target together, or neither")
    if target is not None and target <= 0:
        raise ConfigError(f"target must be a positive cost, not {target}")

    def cycles() -> Iterator[list[Widths]]:
        left = [torch.empty(0, dtype=torch.float64) for _ in choices]  # of each group's permutation
        while True:
            for i, options in enumerate(choices):
                while len(left[i]) < length:
                    permutation = torch.randperm(len(options), generator=generator)
                    more = torch.tensor(options, dtype=torch.float64)[permutation]
                    left[i] = torch.cat([left[i], more])
            table = torch.stack([column[:length] for column in left], dim=1)
            left = [column[length:] for column in left]
            if cost is not None and target is not None:
                table = balance(table, cost, target, generator)
            yield [space.decode(path) for path in table]

    return _draw(cycles(), per_step)


def balance(
    table: Tensor, cost: PolynomialCost, target: float, generator: torch.Generator, sweeps: int = 20
) -> Tensor:
    """Paths (K, G) whose costs are nearer to `target`, with the same entries in every column.

    Swaps entries of two paths in one column where that lowers the sum of (cost / target - 1)^2; stops when
    a sweep over the columns finds nothing, or after `sweeps` of them.
    """
    table = table.clone()
    rows, columns = table.shape
    error = (cost.batch(table) / target - 1) ** 2  # (K,)
    for _ in range(sweeps):
        improved = False
        for column in range(columns):
            pairs = torch.randperm(rows, generator=generator)[: rows // 2 * 2].reshape(2, -1)
            swapped = table.clone()
            swapped[pairs, column] = table[pairs.flip(0), column]
            new = (cost.batch(swapped) / target - 1) ** 2
            better = pairs[:, new[pairs].sum(0) < error[pairs].sum(0)].flatten()
            table[better] = swapped[better]
            error[better] = new[better]
            improved = improved or len(better) > 0
        if not improved:
            break
    return table


def _draw(cycles: Iterator[list[Widths]], per_step: int) -> Draws:
    """Consecutive paths of the cycles; where a draw crosses into a new one, it takes no path again."""
    left: list[Widths] = []
    while True:
        drawn, left = left[:per_step], left[per_step:]
        if len(drawn) < per_step:
            left = next(cycles)
            fresh = [path for path in left if path not in drawn][: per_step - len(drawn)]
            left = [path for path in left if path not in fresh]
            drawn += fresh
        yield tuple(drawn)


Rule = Callable[[WidthSpace, Sequence[Widths], torch.Generator, int], Iterator[Step]]

RULES: dict[str, Rule] = {
    "spfs": lambda space, points, g, n: spfs(space, draw_paths(points, g, n)),
    "spfs_options": lambda space, points, g, n: spfs(space, draw_options(space, g, n)),
    "path_fair": lambda space, points, g, n: path_fair(draw_paths(points, g, n)),
    "sandwich": lambda space, points, g, n: sandwich(space, g, n + 2),
    "uniform": lambda space, points, g, n: uniform(space, g),
    "parallel": lambda space, points, g, n: in_parallel(sandwich(space, g, n + 2)),
    "bcnet": lambda space, points, g, n: bcnet(space, g),
}
"""How a supernet can be trained: (space, starting points, generator, drawn networks a step) -> steps."""

RULES_OF_POINTS = ("spfs", "path_fair")
"""Those of `RULES` that train starting points; the others train networks of the whole space."""
