"""Greedy slimming: the way down, where a budget leaves it, and that one run serves all budgets."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from nni_dbs import Budget, FlopsCost, ParamsCost, WidthSpace
from nni_dbs.algorithms.autoslim import narrower, slimmed, within
from nni_dbs.cost import Bounds
from nni_dbs.errors import BudgetError
from nni_dbs.space import Widths
from tests.helpers import chain, truth

Score = Callable[[Widths], float]


def scored_by(space: WidthSpace, seed: int = 0) -> Score:
    """Smooth, and narrower networks score lower."""
    return lambda widths: float(truth(space, space.encode(widths).unsqueeze(0), seed))


def small_space() -> tuple[WidthSpace, FlopsCost, ParamsCost]:
    space, flops, params = chain(4, 20, 1)
    a, b, c, d = space.names
    return space.among({a: (4, 8, 20), b: (2, 20), c: (10, 12, 14, 20), d: (20,)}), flops, params


# --- the way down ------------------------------------------------------------------------------------


def test_narrower_networks_differ_by_one_option_of_one_group() -> None:
    space, _, _ = small_space()
    a, b, c, d = space.names
    full = {a: 20, b: 20, c: 20, d: 20}
    assert space.largest() == full
    assert narrower(full, space) == [full | {a: 8}, full | {b: 2}, full | {c: 14}]
    assert narrower(full, space, 2) == [full | {a: 4}, full | {b: 2}, full | {c: 10}]
    low = full | {a: 4, b: 2}
    assert narrower(low, space) == [low | {c: 14}]
    assert narrower(low | {c: 13}, space) == [low | {c: 12}]
    assert narrower(space.smallest(), space) == []


def test_a_way_that_was_found_by_hand() -> None:
    """a + 3 b + c, but 100 less where c is narrow and b still wide."""
    space, _, _ = small_space()
    a, b, c, d = space.names

    def score(w: Widths) -> float:
        return w[a] + 3 * w[b] + w[c] - (100 if w[c] < 12 and w[b] == 20 else 0)

    way = [[w[a], w[b], w[c], w[d]] for w in slimmed(space, score)]
    assert way == [
        [20, 20, 20, 20],
        [20, 20, 14, 20],  # 6 less for c, 12 for a, 54 for b
        [20, 20, 12, 20],
        [8, 20, 12, 20],  # 12 less for a, 54 for b, 102 for c
        [4, 20, 12, 20],
        [4, 2, 12, 20],  # 54 less for b, 102 for c
        [4, 2, 10, 20],
    ]


def by_brute_force(space: WidthSpace, score: Score, limit: int) -> list[Widths]:
    """Each time the best of all networks whose positions sum to one less and that are nowhere wider."""
    options = [space.options(name, limit) for name in space.names]
    every = list(itertools.product(*(range(len(o)) for o in options)))

    def network(place: tuple[int, ...]) -> Widths:
        return Widths({n: o[i] for n, o, i in zip(space.names, options, place, strict=True)})

    place = tuple(len(o) - 1 for o in options)
    way = [network(place)]
    while sum(place):
        below = [
            p
            for p in every
            if sum(p) == sum(place) - 1 and all(i <= j for i, j in zip(p, place, strict=True))
        ]
        place = max(below, key=lambda p: score(network(p)))
        way.append(network(place))
    return way


@pytest.mark.parametrize("limit", [2, 4, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_way_is_that_of_brute_force(limit: int, seed: int) -> None:
    space, _, _ = chain(3, 6, 1) if limit == 12 else chain(3, 16, 1)
    generator = torch.Generator().manual_seed(seed)
    luck: dict[Widths, float] = {}

    def score(widths: Widths) -> float:  # of no shape at all
        return luck.setdefault(widths, float(torch.rand((), generator=generator, dtype=torch.float64)))

    assert list(slimmed(space, score, limit)) == by_brute_force(space, score, limit)


def test_the_first_of_equal_scores_counts() -> None:
    space, _, _ = small_space()
    a, b, c, _ = space.names
    way = list(slimmed(space, lambda widths: 1.0))
    narrowed = [next(n for n in space.names if w[n] < v[n]) for v, w in itertools.pairwise(way)]
    assert narrowed == [a, a, b, c, c, c]


def test_a_group_that_never_matters_is_narrowed_first() -> None:
    space, _, _ = chain(5, 32, 1)
    useless = space.names[3]
    rest = scored_by(space)
    way = list(slimmed(space, lambda widths: rest(Widths({**widths, useless: 32}))))
    steps = len(space.options(useless, 12)) - 1
    largest = space.largest()
    for widths in way[: steps + 1]:
        assert {**widths, useless: 32} == largest
    assert way[steps][useless] == space.smallest()[useless]


NETS = ("resnet18", "mobilenet_v2", "squeezenet1_1")  # the last one has concatenations


@functools.cache
def network(name: str) -> tuple[WidthSpace, FlopsCost, ParamsCost]:
    model = torchvision.models.get_model(name, num_classes=10).eval()
    image = torch.zeros(1, 3, 32, 32)
    space = WidthSpace.from_model(model, image)
    return space, FlopsCost(model, image, space.groups), ParamsCost(model, space.groups)


@functools.cache
def way_of(name: str, limit: int = 6) -> tuple[Widths, ...]:
    space, _, _ = network(name)
    return tuple(slimmed(space, scored_by(space), limit))


@pytest.mark.parametrize("name", NETS)
def test_costs_fall_with_every_network_from_the_largest_to_the_smallest(name: str) -> None:
    space, flops, params = network(name)
    way = way_of(name)
    assert (way[0], way[-1]) == (space.largest(), space.smallest())
    assert len(way) == 1 + sum(len(space.options(group, 6)) - 1 for group in space.names)
    assert all(widths in space for widths in way)
    for cost in (flops, params):
        costs = [cost(widths) for widths in way]
        assert all(after < before for before, after in itertools.pairwise(costs))


def test_nothing_is_scored_twice_or_ahead() -> None:
    space, _, _ = small_space()
    asked: list[Widths] = []

    def score(widths: Widths) -> float:
        asked.append(widths)
        return scored_by(space)(widths)

    way = slimmed(space, score)
    next(way)
    assert not asked
    second = next(way)
    assert asked == narrower(space.largest(), space)
    next(way)
    assert asked == narrower(space.largest(), space) + narrower(second, space)
    list(way)
    assert len(set(asked)) == len(asked)


# --- budgets -----------------------------------------------------------------------------------------


def can_grow(widths: Widths, space: WidthSpace, bounds: Bounds) -> bool:
    for name in space.names:
        wider = [w for w in space.choices(name) if w > widths[name]]
        if wider and bounds.fits({**widths, name: wider[0]}):
            return True
    return False


def bounds_of(budget: Any, flops: FlopsCost, params: ParamsCost) -> Bounds:
    return Budget.parse(budget).bound({"flops": flops, "params": params})


BUDGETS: tuple[Any, ...] = (
    0.25,
    0.5,
    0.75,
    1.0,
    {"params": 0.5},
    {"flops": 0.6, "params": 0.5},
    {"flops": 0.35, "params": 0.9},
)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_the_first_network_inside_of_the_budget_grows_to_fill_it(name: str, budget: Any) -> None:
    space, flops, params = network(name)
    bounds = bounds_of(budget, flops, params)
    way = way_of(name)
    widths = within(way, space, bounds)
    assert widths in space
    assert bounds.fits(widths)
    assert bounds.used(widths) >= 0.98 or not can_grow(widths, space, bounds)
    first = next(i for i, w in enumerate(way) if all(cost(w) <= most for _, cost, most in bounds.limits))
    assert all(widths[group] >= way[first][group] for group in space.names)
    if budget == 1.0:
        assert first == 0 and widths == space.largest()
    else:
        assert first > 0
        assert any(widths[group] < way[first - 1][group] for group in space.names)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_single_run_equals_separate_runs(budget: Any) -> None:
    space, flops, params = chain(4, 24, 1)
    single = Recorded(scored_by(space, 3))
    way = list(slimmed(space, single))
    bounds = bounds_of(budget, flops, params)
    separate = Recorded(scored_by(space, 3))
    assert within(slimmed(space, separate), space, bounds) == within(way, space, bounds)
    assert separate.asked == single.asked[: len(separate.asked)]
    assert len(separate.asked) < len(single.asked)
    cut = next(i for i, widths in enumerate(way) if bounds.fits(widths)) + 1
    for larger in (0.8, {"flops": 0.95, "params": 0.92}):
        if budget != 1.0:
            more = bounds_of(larger, flops, params)
            assert within(way[:cut], space, more) == within(slimmed(space, separate), space, more)


class Recorded:
    """A score that keeps what it was asked for."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.asked: list[Widths] = []

    def __call__(self, widths: Widths) -> float:
        self.asked.append(widths)
        return self.score(widths)


def test_the_trajectory_is_read_no_further_than_needed() -> None:
    space, flops, params = chain(3, 16, 1)

    def way() -> Iterator[Widths]:
        yield space.largest()
        yield space.smallest()
        pytest.fail("read on")

    bounds = bounds_of(0.5, flops, params)
    found = within(way(), space, bounds)
    assert bounds.fits(found) and not can_grow(found, space, bounds)


def test_an_impossible_budget_is_refused_before_anything_is_scored() -> None:
    space, flops, params = small_space()
    with pytest.raises(BudgetError, match=r"below the smallest network .* reachable are"):
        within(slimmed(space, lambda _: pytest.fail("scored")), space, bounds_of("1K", flops, params))


def test_a_run_that_ended_above_the_budget_is_told() -> None:
    space, flops, params = chain(3, 16, 1)
    way = list(slimmed(space, scored_by(space)))[:3]
    bounds = bounds_of(0.4, flops, params)
    with pytest.raises(BudgetError, match=rf"at {bounds.used(way[-1]):.2f} times .*smallest budget that you"):
        within(way, space, bounds)


# --- the same in a fresh process ---------------------------------------------------------------------


def found() -> dict[str, Any]:
    space, flops, params = chain(4, 24, 1)
    way = list(slimmed(space, scored_by(space, 5), 8))
    chosen = [within(way, space, bounds_of(budget, flops, params)) for budget in BUDGETS]
    return {"way": [dict(w) for w in way], "chosen": [dict(w) for w in chosen]}


def test_a_fresh_process_finds_the_same() -> None:
    root = str(Path(__file__).parents[2])
    code = "import json; from tests.algorithms.test_autoslim import found; print(json.dumps(found()))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=root,
        timeout=120,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == found()
