"""Projection onto a budget: never above it, nothing left over, the wish's shape kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import get_model

from nni_dbs import Budget, FlopsCost, ParamsCost, Widths, WidthSpace
from nni_dbs.cost import Bounds
from nni_dbs.errors import BudgetError
from nni_dbs.projection import leaves_room, project, project_batch
from torch_pruning_adapters import find_channel_groups

Costs = dict[str, Any]


@functools.cache
def priced(name: str, divisor: int, size: int = 64) -> tuple[WidthSpace, Costs]:
    """A network's width space and what its members cost."""
    if name in CASES:
        model, x = CASES[name].build()
    else:
        model, x = get_model(name, weights=None), torch.zeros(1, 3, size, size)
    groups = find_channel_groups(model, x, verify=False)
    space = WidthSpace(groups, min_ratio=0.1, divisor=divisor)
    return space, {"flops": FlopsCost(model, x, groups), "params": ParamsCost(model, groups)}


def growable(widths: Widths, space: WidthSpace, bounds: Bounds) -> list[str]:
    """Groups that could take their next choice inside the budget."""
    found = []
    for name in space.names:
        wider = [w for w in space.choices(name) if w > widths[name]]
        if wider and bounds.fits({**widths, name: wider[0]}):
            found.append(name)
    return found


Problem = tuple[WidthSpace, Bounds, dict[str, int]]
SMALL = [("concat_then_add", 1), ("residual", 2), ("resnet18", 32)]
SPACES = [*SMALL, ("resnet18", 8), ("mobilenet_v2", 1), ("regnet_y_400mf", 8)]


@st.composite
def problems(draw: st.DrawFn, spaces: list[tuple[str, int]] = SPACES) -> Problem:
    """A space, a budget that its smallest network keeps, and any wish."""
    space, costs = priced(*draw(st.sampled_from(spaces)))
    kinds = draw(st.sampled_from([("flops",), ("params",), ("flops", "params")]))
    limits = {}
    for kind in kinds:
        least = costs[kind](space.smallest())
        limits[kind] = draw(st.integers(max(least, 2), int(1.1 * costs[kind].full)))
    wish = {g.name: draw(st.integers(0, 2 * g.size)) for g in space.groups if draw(st.booleans())}
    return space, Budget.parse(limits).bound(costs), wish


@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_inside_the_budget_and_nothing_left_over(problem: Problem) -> None:
    space, bounds, wish = problem
    found = project(wish, space, bounds)
    assert found in space
    assert list(found) == list(space.names)
    assert bounds.fits(found)
    assert growable(found, space, bounds) == []
    assert project(found, space, bounds) == found
    assert project(wish, space, bounds) == found


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_room_is_what_some_group_could_still_use(problem: Problem, data: st.DataObject) -> None:
    space, bounds, wish = problem
    full = project(wish, space, bounds)
    assert not leaves_room(full, space, bounds)
    name = data.draw(st.sampled_from(space.names))
    width = data.draw(st.sampled_from([w for w in space.choices(name) if w <= full[name]]))
    smaller = Widths({**full, name: width})
    grows = growable(smaller, space, bounds) != []
    assert leaves_room(smaller, space, bounds) == (grows and bounds.used(smaller) < 0.98)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), factor=st.sampled_from([2, 4, 16]))
def test_only_the_shape_of_the_wish_counts(problem: Problem, factor: int) -> None:
    space, bounds, wish = problem
    whole = {g.name: max(wish.get(g.name, g.size), 1) for g in space.groups}
    larger = {name: factor * w for name, w in whole.items()}
    assert project(larger, space, bounds) == project(whole, space, bounds)


@settings(max_examples=40, deadline=None)
@given(problem=problems(SMALL))
def test_contains_the_largest_scaled_wish(problem: Problem) -> None:
    """Tries every factor at which some group takes its next choice."""
    space, bounds, wish = problem
    whole = {g.name: max(wish.get(g.name, g.size), 1) for g in space.groups}
    factors = sorted({c / whole[name] for name in space.names for c in space.choices(name)})
    scaled = [
        {name: widest(space.choices(name), w * factor * (1 + 1e-12)) for name, w in whole.items()}
        for factor in [0.0, *factors]
    ]
    fits = bounds.fits_batch(torch.stack([space.encode(w) for w in scaled])).tolist()
    base = scaled[fits.index(False) - 1] if False in fits else scaled[-1]
    found = project(wish, space, bounds)
    assert all(found[name] >= base[name] for name in space.names)


def widest(choices: tuple[int, ...], limit: float) -> int:
    return max((c for c in choices if c <= limit), default=choices[0])


def test_a_wish_inside_the_budget_grows() -> None:
    space, costs = priced("residual", 1)
    assert project({"stem": 3, "a": 2}, space, Budget.parse(1.0).bound(costs)) == space.largest()


def test_a_wish_that_fills_the_budget_stays() -> None:
    space, costs = priced("resnet18", 8)
    wish = space.uniform(0.6)
    bounds = Budget.parse(costs["flops"](wish)).bound(costs)
    assert project(wish, space, bounds) == wish


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_more_budget_gives_more_network(name: str) -> None:
    space, costs = priced(name, 1)
    used = [
        costs["flops"](project(space.largest(), space, Budget.parse(share).bound(costs)))
        for share in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert used == sorted(set(used))
    assert used[-1] == costs["flops"].full


def test_several_limits_bind_together() -> None:
    space, costs = priced("resnet18", 1)
    largest = space.largest()
    both = project(largest, space, Budget.parse({"flops": 0.5, "params": 0.3}).bound(costs))
    assert costs["flops"](both) <= 0.5 * costs["flops"].full
    assert 0.29 * costs["params"].full < costs["params"](both) <= 0.3 * costs["params"].full
    loose = project(largest, space, Budget.parse({"flops": 0.5, "params": 1.0}).bound(costs))
    assert loose == project(largest, space, Budget.parse(0.5).bound(costs))


def test_frozen_groups_stay_whole() -> None:
    model, x = CASES["concat"].build()
    groups = find_channel_groups(model, x, ["a"])
    space = WidthSpace(groups, min_ratio=0, divisor=1)
    costs = {"flops": FlopsCost(model, x, groups)}
    found = project({"a": 1, "b": 6, "c": 5}, space, Budget.parse(0.6).bound(costs))
    assert found["a"] == 4
    assert costs["flops"](found) <= 0.6 * costs["flops"].full


def test_impossible_budget() -> None:
    space, costs = priced("residual", 1)
    least = costs["flops"](space.smallest())
    assert project({}, space, Budget.parse(least).bound(costs)) == space.smallest()
    with pytest.raises(BudgetError, match="below the smallest network"):
        project({}, space, Budget.parse(least - 1).bound(costs))


@pytest.mark.parametrize(
    ("name", "budget"), [("resnet18", 1.04e9), ("mobilenet_v2", 150e6), ("resnet50", 2.0e9)]
)
@pytest.mark.parametrize("divisor", [1, 8])
def test_budgets_that_peers_miss(name: str, budget: float, divisor: int) -> None:
    """Asked naturally, other tools land from 52 % below to 65 % above these."""
    space, costs = priced(name, divisor, size=224)
    bounds = Budget.parse(budget).bound(costs)
    found = project(space.largest(), space, bounds)
    assert bounds.fits(found)
    assert growable(found, space, bounds) == []
    assert all(w % divisor == 0 or w == g.size for g, w in zip(space.groups, found.values(), strict=True))
    if divisor == 1:
        assert 0.98 <= bounds.used(found) <= 1
        ratios = [w / g.size for g, w in zip(space.groups, found.values(), strict=True) if g.size >= 128]
        assert max(ratios) - min(ratios) < 0.03


def test_a_network_without_groups() -> None:
    model, x = nn.Linear(3, 4), torch.zeros(1, 3)
    space = WidthSpace.from_model(model, x)
    bounds = Budget.parse(1.0).bound({"flops": FlopsCost(model, x, ())})
    assert project({}, space, bounds) == {}


# --- many at once ------------------------------------------------------------------------------------


def by_hand(wish: list[float], space: WidthSpace, bounds: Bounds, keep: list[bool]) -> Widths | None:
    """The projection of one wish by trying every factor; None where what is kept breaks the budget."""
    names = space.names
    kept = dict(zip(names, keep, strict=True))
    aim = {name: max(w, 1.0) for name, w in zip(names, wish, strict=True)}

    def scaled(factor: float) -> Widths:
        wide = {name: w if kept[name] else w * factor * (1 + 1e-12) for name, w in aim.items()}
        return Widths({name: widest(space.choices(name), w) for name, w in wide.items()})

    factors = sorted({c / aim[name] for name in names for c in space.choices(name)})
    fitting = [w for w in map(scaled, [0.0, *factors]) if bounds.fits(w)]
    if not fitting:
        return None
    found = fitting[-1]
    while candidates := [name for name in growable(found, space, bounds) if not kept[name]]:
        after = {name: min(c for c in space.choices(name) if c > found[name]) for name in candidates}
        lowest = min(candidates, key=lambda name: after[name] / aim[name])
        found = Widths({**found, lowest: after[lowest]})
    return found


@st.composite
def batches(draw: st.DrawFn) -> tuple[WidthSpace, Bounds, Tensor, Tensor]:
    """Up to six wishes, whole or relaxed, and which of their groups are kept."""
    space, bounds, _ = draw(
        problems([("concat_then_add", 1), ("residual", 1), ("grouped", 1), ("resnet18", 32)])
    )
    n = draw(st.integers(1, 6))
    rows = [
        [
            draw(st.integers(0, 2 * g.size) | st.floats(0.1, 2 * g.size, allow_subnormal=False))
            for g in space.groups
        ]
        for _ in range(n)
    ]
    keep = draw(
        st.lists(
            st.lists(st.booleans(), min_size=len(rows[0]), max_size=len(rows[0])), min_size=n, max_size=n
        )
    )
    return space, bounds, torch.tensor(rows, dtype=torch.float64), torch.tensor(keep)


@settings(max_examples=80, deadline=None)
@given(batch=batches())
def test_a_batch_is_its_rows_and_each_is_the_projection_by_hand(
    batch: tuple[WidthSpace, Bounds, Tensor, Tensor],
) -> None:
    space, bounds, wishes, _ = batch
    found = project_batch(wishes, space, bounds)
    assert found.dtype == torch.float64
    assert bounds.fits_batch(found).all()
    for row, wish in zip(found, wishes, strict=True):
        assert torch.equal(project_batch(wish.unsqueeze(0), space, bounds)[0], row)
        assert by_hand(wish.tolist(), space, bounds, [False] * len(wish)) == space.decode(row)


@settings(max_examples=80, deadline=None)
@given(batch=batches())
def test_kept_groups_stay_and_the_others_fill_the_budget(
    batch: tuple[WidthSpace, Bounds, Tensor, Tensor],
) -> None:
    space, bounds, wishes, keep = batch
    expected = [
        by_hand(wish, space, bounds, kept) for wish, kept in zip(wishes.tolist(), keep.tolist(), strict=True)
    ]
    if None in expected:
        with pytest.raises(BudgetError, match="groups to keep are over the budget"):
            project_batch(wishes, space, bounds, keep)
    possible = [i for i, widths in enumerate(expected) if widths is not None]
    found = project_batch(wishes[possible], space, bounds, keep[possible])
    assert [space.decode(row) for row in found] == [expected[i] for i in possible]


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_a_batch_of_whole_wishes_is_project(problem: Problem) -> None:
    space, bounds, wish = problem
    wishes = [wish, space.smallest(), {}, space.uniform(0.5)]
    found = project_batch(torch.stack([space.encode(w) for w in wishes]), space, bounds)
    assert [space.decode(row) for row in found] == [project(w, space, bounds) for w in wishes]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_three_limits_hold_for_a_thousand_wishes(share: float) -> None:
    space, costs = priced("resnet18", 8)
    space = space.within({space.names[0]: (0.2, 1.0)})
    low_resolution = FlopsCost(get_model("resnet18", weights=None), torch.zeros(1, 3, 32, 32), space.groups)
    bounds = Bounds(
        (
            *Budget.parse({"flops": share, "params": 0.9 * share}).bound(costs).limits,
            *Budget.parse(0.95 * share).bound({"flops": low_resolution}).limits,
        )
    )
    generator = torch.Generator().manual_seed(0)
    wishes = torch.rand(1000, len(space.names), generator=generator) * 600
    found = project_batch(wishes, space, bounds)
    choices, counts = space.padded_choices()
    assert bounds.fits_batch(found).all()
    for column in range(len(space.names)):
        positions = torch.searchsorted(choices[column], found[:, column].contiguous())
        assert torch.equal(choices[column, positions], found[:, column])
        wider = positions + 1 < counts[column]
        grown = found[wider].clone()
        grown[:, column] = choices[column, positions[wider] + 1]
        assert not bounds.fits_batch(grown).any()


def test_arguments_are_left_alone() -> None:
    space, costs = priced("residual", 1)
    bounds = Budget.parse(0.5).bound(costs)
    wishes, keep = torch.tensor([[0.0, 9.0], [2.0, 1.0]]), torch.tensor([[True, False], [False, False]])
    before = wishes.clone(), keep.clone()
    project_batch(wishes, space, bounds, keep)
    assert torch.equal(wishes, before[0])
    assert torch.equal(keep, before[1])


def test_no_wishes_are_no_networks() -> None:
    space, costs = priced("residual", 1)
    bounds = Budget.parse(0.5).bound(costs)
    assert project_batch(torch.empty(0, 2), space, bounds).shape == (0, 2)
    assert project_batch(torch.empty(0, 2), space, bounds, torch.empty(0, 2, dtype=torch.bool)).shape == (
        0,
        2,
    )


def test_everything_kept_is_returned_even_where_it_could_grow() -> None:
    space, costs = priced("residual", 1)
    bounds = Budget.parse(1.0).bound(costs)
    wishes = torch.tensor([[3.0, 2.0], [6.0, 1.0]])
    assert torch.equal(
        project_batch(wishes, space, bounds, torch.ones(2, 2, dtype=torch.bool)), wishes.double()
    )
    assert project_batch(wishes, space, bounds).tolist() == [[6, 4], [6, 4]]


def test_what_cannot_be_kept() -> None:
    space, costs = priced("residual", 1)
    bounds = Budget.parse(0.3).bound(costs)
    wishes = torch.tensor([[1.0, 1.0], [6.0, 4.0]])
    keep = torch.tensor([[True, True], [True, False]])
    assert bounds.fits_batch(project_batch(wishes, space, bounds)).all()
    with pytest.raises(BudgetError, match="groups to keep are over the budget"):
        project_batch(wishes, space, bounds, keep)
