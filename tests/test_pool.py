"""Starting points: the tilted chances against exact expectations, and what a pool must contain."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import CASES, Net, conv, head
from test_projection import growable
from torch import Tensor, nn

from nni_dbs import Budget, FlopsCost, ParamsCost, Widths, WidthSpace
from nni_dbs.cost import Bounds, Limit
from nni_dbs.errors import BudgetError, ConfigError
from nni_dbs.pool import draw, starting_points, tilted
from nni_dbs.projection import project, project_batch
from torch_pruning_adapters import find_channel_groups

Costs = dict[str, Any]
Problem = tuple[WidthSpace, Costs]


def priced(model: nn.Module, x: Tensor, divisor: int = 1, ignore: tuple[str, ...] = ()) -> Problem:
    groups = find_channel_groups(model, x, ignore, verify=False)
    costs = {"flops": FlopsCost(model, x, groups), "params": ParamsCost(model, groups)}
    return WidthSpace(groups, min_ratio=0.1, divisor=divisor), costs


@functools.cache
def chain() -> Problem:
    """Ten groups of ten options; no layer reads and computes one and the same group."""
    return priced(nn.Sequential(*[conv(40, 40) for _ in range(11)]), torch.zeros(1, 40, 8, 8), divisor=4)


@functools.cache
def small() -> Problem:
    """Four groups of 12 to 24 choices, more than a group has options."""
    widths = (3, 12, 24, 16, 20)
    layers = [conv(a, b) for a, b in itertools.pairwise(widths)]

    def forward(net: Net, x: Tensor) -> Tensor:
        for i in range(4):
            x = getattr(net, f"layer{i}")(x).relu()
        return head(net, x)

    net = Net(forward, fc=nn.Linear(20, 10), **{f"layer{i}": layer for i, layer in enumerate(layers)})
    return priced(net, torch.zeros(1, 3, 8, 8))


@functools.cache
def uneven() -> Problem:
    """Groups of 1 (frozen), 4, 5 and 6 choices."""
    model, x = CASES["concat"].build()
    extended = nn.Sequential(conv(3, 3), model).double()
    return priced(extended, x, ignore=("0",))


def within(problem: Problem, budget: float | Mapping[str, float]) -> tuple[WidthSpace, Bounds]:
    space, costs = problem
    return space, Budget.parse(budget).bound(costs)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoded(space: WidthSpace, networks: list[Widths]) -> Tensor:
    return torch.stack([space.encode(w) for w in networks])


def mean_widths(space: WidthSpace, chances: Tensor) -> Tensor:
    """(G,)"""
    rows = zip(chances, space.names, strict=True)
    return torch.stack(
        [row[: len(space.choices(n))] @ torch.tensor(space.choices(n)).double() for row, n in rows]
    )


# --- chances -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("target", [0.97, 0.8])
def test_the_mean_cost_is_the_target(budget: float, target: float) -> None:
    """In a chain the expected cost is the cost of the expected widths."""
    space, bounds = within(chain(), budget)
    mean = mean_widths(space, tilted(space, bounds, target))
    ((_, cost, most),) = bounds.limits
    assert float(cost.batch(mean.unsqueeze(0))) == pytest.approx(target * most, rel=1e-3)


def test_the_mean_cost_counts_the_variance_where_a_layer_has_one_group_twice() -> None:
    model, x = CASES["shared"].build()
    space, costs = priced(model, x)
    bounds = Budget.parse(0.4).bound(costs)
    (row,) = tilted(space, bounds)
    (name,) = space.names
    mean = sum(float(p) * costs["flops"]({name: w}) for p, w in zip(row, space.choices(name), strict=True))
    assert mean == pytest.approx(0.97 * math.floor(0.4 * costs["flops"].full), rel=1e-3)


def test_near_a_tenth_the_tilt_hits_more_often_than_uniform_draws() -> None:
    space, bounds = within(chain(), 0.1)
    chances = tilted(space, bounds)
    ((_, cost, most),) = bounds.limits

    def hits(chances: Tensor, n: int) -> tuple[float, float]:
        """The mean share of the target, and how often it lies within 5 % of it."""
        share = cost.batch(draw(space, chances, n, generator())) / (0.97 * most)
        return float(share.mean()), float(((share - 1).abs() <= 0.05).double().mean())

    mean, often = hits(chances, 20_000)
    _, seldom = hits(torch.full_like(chances, 0.1), 200_000)
    assert abs(mean - 1) < 0.01
    assert seldom > 0
    assert often > 10 * seldom


@pytest.mark.parametrize("budget", [0.15, 0.6, {"flops": 0.5, "params": 0.4}])
def test_rows_are_distributions_without_padding(budget: float | dict[str, float]) -> None:
    space, bounds = within(uneven(), budget)
    chances = tilted(space, bounds)
    counts = torch.tensor([len(space.choices(n)) for n in space.names])
    valid = torch.arange(chances.shape[1]) < counts.unsqueeze(1)
    assert sorted(counts.tolist()) == [1, 4, 5, 6]
    assert chances.dtype == torch.float64
    assert (chances[~valid] == 0).all()
    assert (chances[valid] > 0).all()
    torch.testing.assert_close(chances.sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_chances_fall_with_the_width_at_small_budgets_and_rise_at_large_ones() -> None:
    steps = {share: tilted(*within(chain(), share)).diff(dim=1) for share in (0.1, 0.9)}
    assert (steps[0.1] < 0).all()
    assert (steps[0.9] > 0).all()


def test_logarithms_of_the_chances_are_the_tilt_times_the_slopes() -> None:
    """A group's slopes are proportional to its widths, so its chances are a geometric series."""
    logs = tilted(*within(chain(), 0.3)).log()
    torch.testing.assert_close(
        logs.diff(n=2, dim=1), torch.zeros(10, 8, dtype=torch.float64), rtol=0, atol=0.01
    )


def test_groups_that_cost_more_are_tilted_more() -> None:
    """The outer layers of the chain are 40 wide on one side, so the outer groups cost more."""
    space, bounds = within(chain(), 0.1)
    mean = mean_widths(space, tilted(space, bounds))
    assert (mean[[0, -1]] < mean[1:-1].min()).all()


def test_the_tighter_limit_counts() -> None:
    space, costs = small()
    loose = Budget.parse({"flops": 1.0, "params": 0.2}).bound(costs)
    alone = Budget.parse({"params": 0.2}).bound(costs)
    assert torch.equal(tilted(space, loose), tilted(space, alone))
    both = Budget.parse({"flops": 0.25, "params": 0.25}).bound(costs)
    chances = tilted(space, both)
    mean = mean_widths(space, chances).unsqueeze(0)
    shares = [float(cost.batch(mean)) / most for _, cost, most in both.limits]
    assert max(shares) == pytest.approx(0.97, rel=1e-3)


class Total:
    """A cost that is no polynomial: the square root of the total width."""

    def __init__(self, space: WidthSpace) -> None:
        self.space = space
        self.full = self(space.largest())

    def __call__(self, widths: Mapping[str, int]) -> float:
        return float(self.batch(self.space.encode(widths).unsqueeze(0)))

    def batch(self, widths: Tensor) -> Tensor:
        return widths.to(torch.float64).sum(1).sqrt()


def test_costs_of_other_kinds_take_the_expected_widths() -> None:
    space, _ = chain()
    cost = Total(space)
    bounds = Bounds(((Limit("latency_ms", 0.5, True), cost, 0.5 * cost.full),))
    mean = mean_widths(space, tilted(space, bounds))
    assert float(mean.sum().sqrt()) == pytest.approx(0.97 * 0.5 * cost.full, rel=1e-3)


def test_unreachable_targets_pile_up_at_the_end() -> None:
    space, costs = chain()
    least = costs["flops"](space.smallest())
    assert (tilted(space, Budget.parse(least).bound(costs))[:, 0] > 0.99).all()
    assert (tilted(space, Budget.parse(2 * costs["flops"].full).bound(costs))[:, -1] > 0.99).all()


def test_errors_lower_the_logarithms_in_units_of_their_deviation() -> None:
    space, bounds = within(chain(), 0.3)
    errors = torch.randn(10, 10, dtype=torch.float64, generator=generator())
    chances = tilted(space, bounds, errors=errors)
    rest = chances.log() + errors / errors.std()
    zeros = torch.zeros(10, 8, dtype=torch.float64)
    torch.testing.assert_close(rest.diff(n=2, dim=1), zeros, rtol=0, atol=0.05)
    ((_, cost, most),) = bounds.limits
    mean = mean_widths(space, chances).unsqueeze(0)
    assert float(cost.batch(mean)) == pytest.approx(0.97 * most, rel=1e-3)


def test_errors_that_are_all_alike_say_nothing() -> None:
    space, bounds = within(uneven(), 0.3)
    shape = space.padded_choices()[0].shape
    assert torch.equal(tilted(space, bounds, errors=torch.full(shape, 3.0)), tilted(space, bounds))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_errors_that_are_not_finite_are_refused(bad: float) -> None:
    space, bounds = within(chain(), 0.5)
    errors = torch.zeros_like(space.padded_choices()[0])
    errors[1, 0] = bad
    with pytest.raises(ConfigError, match="must be finite"):
        tilted(space, bounds, errors=errors)


def test_errors_in_the_padding_do_not_matter() -> None:
    space, bounds = within(uneven(), 0.3)
    choices, _ = space.padded_choices()
    errors = torch.rand(choices.shape, dtype=torch.float64, generator=generator())
    filled = [tilted(space, bounds, errors=errors.where(choices.isfinite(), x)) for x in (0.0, 9.0, math.nan)]
    assert torch.equal(filled[0], filled[1])
    assert torch.equal(filled[0], filled[2])


def test_draws_follow_the_chances() -> None:
    space, bounds = within(uneven(), 0.3)
    chances = tilted(space, bounds)
    n = 20_000
    networks = draw(space, chances, n, generator())
    assert networks.shape == (n, 4)
    for column, (name, row) in enumerate(zip(space.names, chances, strict=True)):
        for width, p in zip(space.choices(name), row.tolist(), strict=False):
            often = float((networks[:, column] == width).double().mean())
            assert abs(often - p) <= 4 * (p * (1 - p) / n) ** 0.5
    free = networks[:, networks.var(0) > 0]
    correlation = torch.corrcoef(free.T) - torch.eye(3)
    assert correlation.abs().max() < 4 / n**0.5


# --- pools -------------------------------------------------------------------------------------------

BUDGETS = [0.1, 0.3, 0.5, {"flops": 0.4, "params": 0.3}]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("problem", [chain, small])
def test_a_pool_keeps_the_budget_and_shows_every_option(problem: Any, budget: Any) -> None:
    n = 100
    space, bounds = within(problem(), budget)
    pool = starting_points(space, bounds, n, generator())
    assert len(set(pool)) == len(pool) == n
    assert all(w in space and bounds.fits(w) for w in pool)
    assert pool[0] == project(space.largest(), space, bounds)
    for (name, option), often in shown(space, bounds, pool).items():
        if often < 0.02 * n:
            assert often == different(space, bounds, name, option)


def shown(space: WidthSpace, bounds: Bounds, pool: list[Widths]) -> dict[tuple[str, int], int]:
    """How often each option that the budget allows is the nearest one of a network."""
    counts = {}
    for name in space.names:
        options = space.options(name)
        nearest = [min(options, key=lambda o, w=w: abs(o - w[name])) for w in pool]
        for option in options:
            if bounds.fits({**space.smallest(), name: option}):
                counts[name, option] = nearest.count(option)
    return counts


def different(space: WidthSpace, bounds: Bounds, name: str, option: int) -> int:
    """About how many networks have this option and cannot grow elsewhere: those of 500 random wishes."""
    random = generator()
    wishes = torch.stack([space.encode({**space.sample(random), name: option}) for _ in range(500)])
    keep = torch.zeros(wishes.shape, dtype=torch.bool)
    keep[:, space.names.index(name)] = True
    return len(project_batch(wishes, space, bounds, keep).unique(dim=0))


def test_options_are_represented_as_often_as_asked_for() -> None:
    space, bounds = within(chain(), 0.3)
    pools = (starting_points(space, bounds, 100, generator(), represented=share) for share in (0, 0.06))
    without, with_share = (min(shown(space, bounds, pool).values()) for pool in pools)
    assert without < 6 <= with_share


def test_small_pools_show_every_option() -> None:
    space, bounds = within(chain(), 0.3)
    pool = starting_points(space, bounds, 24, generator())
    assert min(shown(space, bounds, pool).values()) >= 1
    assert (
        min(shown(space, bounds, starting_points(space, bounds, 24, generator(), represented=0)).values())
        == 0
    )


def test_without_options_to_show_nothing_can_grow() -> None:
    space, bounds = within(small(), 0.3)
    pool = starting_points(space, bounds, 30, generator(), represented=0)
    assert len(pool) == 30
    assert all(growable(w, space, bounds) == [] for w in pool)


@pytest.mark.parametrize("budget", [0.5, 0.9])
def test_a_small_pool_stays_near_the_budget(budget: float) -> None:
    """One option that is shown may leave budget unused; several of them do not pile up in one network."""
    space, bounds = within(small(), budget)
    used = []
    for column, name in enumerate(space.names):
        wish = space.encode({**space.largest(), name: space.options(name)[0]}).unsqueeze(0)
        keep = torch.arange(len(space.names)).unsqueeze(0) == column
        (row,) = project_batch(wish, space, bounds, keep)
        used.append(bounds.used(space.decode(row)))
    pool = starting_points(space, bounds, 16, generator())
    assert min(bounds.used(w) for w in pool) >= 0.9 * min(used)


def all_full_networks(space: WidthSpace, bounds: Bounds) -> set[Widths]:
    """Every network inside the budget of which no group can grow: by trying all."""
    names = space.names
    every = [Widths(zip(names, w, strict=True)) for w in itertools.product(*map(space.choices, names))]
    return {w for w in every if bounds.fits(w) and growable(w, space, bounds) == []}


@pytest.mark.parametrize("budget", [0.3, 0.6, 1.0])
def test_a_pool_of_a_tiny_space_has_all_that_there_is(budget: float) -> None:
    space, bounds = within(uneven(), budget)
    pool = starting_points(space, bounds, 500, generator())
    assert len(pool) == len(set(pool)) < 500
    assert all(bounds.fits(w) for w in pool)
    assert set(pool) >= all_full_networks(space, bounds)
    assert pool[0] == project(space.largest(), space, bounds)


def test_one_starting_point_is_the_uniform_network() -> None:
    space, bounds = within(small(), 0.3)
    assert starting_points(space, bounds, 1, generator()) == [project(space.largest(), space, bounds)]


def test_pools_follow_the_generator() -> None:
    space, bounds = within(small(), 0.3)
    first, again, other = (starting_points(space, bounds, 40, generator(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first[0] == other[0]
    assert len(set(first) & set(other)) < 30


def test_pools_leave_the_global_random_state_alone() -> None:
    space, bounds = within(uneven(), 0.3)
    before = torch.get_rng_state()
    starting_points(space, bounds, 5, generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [0, -3])
def test_too_few_starting_points(n: int) -> None:
    with pytest.raises(ConfigError, match=f"must be at least 1, not {n}"):
        starting_points(*within(small(), 0.3), n, generator())


def test_an_impossible_budget() -> None:
    space, costs = small()
    bounds = Budget.parse(costs["flops"](space.smallest()) - 1).bound(costs)
    with pytest.raises(BudgetError, match="below the smallest network"):
        starting_points(space, bounds, 5, generator())


def test_spaces_without_a_choice_have_one_starting_point() -> None:
    model, x = CASES["plain"].build()
    frozen = priced(model, x, ignore=("a", "b"))
    assert starting_points(*within(frozen, 1.0), 5, generator()) == [{"a": 6, "b": 5}]


def test_a_network_without_groups_has_one_starting_point() -> None:
    empty = priced(nn.Linear(3, 4), torch.zeros(1, 3))
    assert starting_points(*within(empty, 1.0), 5, generator()) == [{}]
