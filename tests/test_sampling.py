"""Which sub-networks a step trains: fairness of the rules, and that a seed fixes them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, conv, head
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nni_dbs.cost import FlopsCost
from nni_dbs.errors import ConfigError
from nni_dbs.sampling import (
    Draws,
    Step,
    balance,
    bcnet,
    draw_options,
    draw_paths,
    in_parallel,
    path_fair,
    sandwich,
    single,
    spfs,
    uniform,
)
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.supernet import Cut, Supernet
from torch_pruning_adapters import ChannelGroup, Member, Span, find_channel_groups

SEEDS = st.integers(0, 2**32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def space_of(*sizes: int) -> WidthSpace:
    """A space with groups g0, g1, ... of the given sizes, every width of which is an option."""
    groups = []
    for i, size in enumerate(sizes):
        member = Member(f"g{i}", "producer", "conv", (("weight", 0),), size, (Span(0, 0, size),))
        groups.append(ChannelGroup(f"g{i}", size, 1, (member,)))
    return WidthSpace(groups, min_ratio=0.0, divisor=1)


def points(count: int) -> list[Widths]:
    return [Widths({"g0": i + 1}) for i in range(count)]


@functools.cache
def costly() -> tuple[WidthSpace, FlopsCost]:
    """Five groups with four options each, and the FLOPs of a real network with these groups."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.b(net.a(x).relu()).relu()
        return head(net, net.e(net.d(net.c(x).relu()).relu()).relu())

    net = Net(
        forward,
        a=conv(3, 16),
        b=conv(16, 16, stride=2),
        c=conv(16, 16, 1),
        d=conv(16, 16, stride=2),
        e=conv(16, 16),
        fc=nn.Linear(16, 10),
    )
    x = torch.zeros(1, 3, 16, 16)
    groups = find_channel_groups(net, x)
    return WidthSpace(groups, min_ratio=0.25, divisor=4), FlopsCost(net, x, groups)


def squared_error(space: WidthSpace, cost: FlopsCost, target: float, table: Tensor) -> float:
    return sum((cost(space.decode(path)) / target - 1) ** 2 for path in table)


def paths_of(draws: Draws, count: int) -> list[Widths]:
    """The first `count` paths, draw after draw."""
    return list(islice((path for drawn in draws for path in drawn), count))


def option_counts(space: WidthSpace, paths: list[Widths]) -> dict[str, Counter[int]]:
    counts = {name: Counter(dict.fromkeys(space.choices(name), 0)) for name in space.names}
    for path in paths:
        for name, width in path.items():
            counts[name][width] += 1
    return counts


# --- reading A ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data(), size=st.integers(1, 12), seed=SEEDS)
def test_every_starting_point_comes_equally_often(data: st.DataObject, size: int, seed: int) -> None:
    per_step = data.draw(st.integers(1, size))
    pool = points(size)
    counts = Counter(dict.fromkeys(pool, 0))
    drawn_so_far = 0
    for drawn in islice(draw_paths(pool, seeded(seed), per_step), 3 * size):
        assert len(drawn) == per_step == len(set(drawn))
        for path in drawn:
            counts[path] += 1
            drawn_so_far += 1
            if drawn_so_far % size == 0:
                assert set(counts.values()) == {drawn_so_far // size}
        assert counts.keys() == set(pool)
        assert max(counts.values()) - min(counts.values()) <= 1


@settings(deadline=None, max_examples=30)
@given(data=st.data(), size=st.integers(2, 9), seed=SEEDS)
def test_equal_starting_points_count_once(data: st.DataObject, size: int, seed: int) -> None:
    pool = points(size)
    copies = [Widths(dict(p)) for p in pool]
    doubled = data.draw(st.permutations([*pool, *copies]))
    counts = Counter(paths_of(draw_paths(doubled, seeded(seed), 2), 4 * size))
    assert counts == dict.fromkeys(pool, 4)


def test_successive_cycles_are_different_permutations() -> None:
    drawn = paths_of(draw_paths(points(30), seeded(0), 1), 90)
    assert len({tuple(drawn[i : i + 30]) for i in (0, 30, 60)}) == 3


@pytest.mark.parametrize("per_step", [-1, 0, 4])
def test_more_paths_a_step_than_starting_points_are_refused(per_step: int) -> None:
    pool = [*points(3), *points(3)]
    with pytest.raises(ValueError, match=f"cannot draw {per_step} different paths a step from 3"):
        next(draw_paths(pool, seeded(0), per_step))


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="give more starting points"):
        next(draw_paths([], seeded(0), 1))


def test_path_fair_trains_the_draws_and_nothing_else() -> None:
    pool = points(7)
    steps = list(islice(path_fair(draw_paths(pool, seeded(3), 3)), 20))
    assert [s.networks for s in steps] == list(islice(draw_paths(pool, seeded(3), 3), 20))
    assert not any(s.distilled or s.parallel for s in steps)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), seed=SEEDS)
def test_spfs_trains_the_extremes_around_the_draws(data: st.DataObject, seed: int) -> None:
    """Also where the pool holds the extremes."""
    space = space_of(3, 2)
    everything = [Widths({"g0": a, "g1": b}) for a in (1, 2, 3) for b in (1, 2)]
    pool = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=6, unique=True))
    per_step = data.draw(st.integers(1, len(pool)))
    steps = list(islice(spfs(space, draw_paths(pool, seeded(seed), per_step)), 12))
    draws = list(islice(draw_paths(pool, seeded(seed), per_step), 12))
    for step, drawn in zip(steps, draws, strict=True):
        assert step.distilled and not step.parallel
        assert step.networks == (space.largest(), *drawn, space.smallest())


# --- both sides --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=SEEDS)
def test_a_width_is_followed_by_its_complement(sizes: list[int], seed: int) -> None:
    space = space_of(*sizes)
    steps = list(islice(bcnet(space, seeded(seed)), 8))
    assert all(s.mirrored and not s.distilled and not s.parallel and len(s.networks) == 1 for s in steps)
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        drawn, complement = first.networks[0], second.networks[0]
        assert drawn.keys() == complement.keys() == {f"g{i}" for i, size in enumerate(sizes) if size > 1}
        assert all(drawn[g.name] + complement[g.name] == g.size for g in space.groups if g.size > 1)
        assert all(width in space.choices(name) for name, width in drawn.items())


def test_every_width_below_the_full_one_is_drawn() -> None:
    space = space_of(5, 8)
    drawn = [step.networks[0] for step in islice(bcnet(space, seeded(0)), 0, 200, 2)]
    for group in space.groups:
        counts = Counter(widths[group.name] for widths in drawn)
        assert counts.keys() == set(range(1, group.size))
        assert max(counts.values()) < 3 * min(counts.values())


@pytest.mark.parametrize("seed", range(3))
def test_over_a_width_and_its_complement_each_channel_is_trained_twice(seed: int) -> None:
    """Counted in the layers: which rows of their weights compute."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 16), conv(16, 16, groups=4), conv(16, 8))
    groups = find_channel_groups(model, torch.zeros(1, 3, 4, 4))
    space = WidthSpace(groups, min_ratio=0.0, divisor=1)
    supernet = Supernet(model, groups)
    trained = {name: torch.zeros(p.shape[0]) for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for step in islice(bcnet(space, seeded(seed)), 2):
        for last in (False, True):
            cuts: list[Cut] = []
            with supernet.at(step.networks[0], cuts, last=last):
                model(torch.zeros(1, 3, 4, 4))
            for cut in cuts:
                rows = torch.arange(len(cut.parameter))
                if cut.index:
                    rows = rows[cut.index[0]].flatten()
                trained[names[id(cut.parameter)]][rows] += 1
    for name, counts in trained.items():
        assert counts.tolist() == [4.0 if name.startswith("2") else 2.0] * len(counts), name


def test_what_cannot_be_mirrored_is_refused() -> None:
    step = Step((Widths({"g0": 1}),), mirrored=True)
    with pytest.raises(ConfigError, match="one after another"):
        next(in_parallel(iter([step])))


# --- reading B ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data(), options=st.integers(1, 7), groups=st.integers(1, 5), seed=SEEDS)
def test_every_option_of_every_group_comes_once_a_cycle(
    data: st.DataObject, options: int, groups: int, seed: int
) -> None:
    space = space_of(*[options] * groups)
    per_step = data.draw(st.integers(1, options))
    cycles = data.draw(st.integers(1, 5))
    paths = paths_of(draw_options(space, seeded(seed), per_step), cycles * options)
    for counts in option_counts(space, paths).values():
        assert set(counts.values()) == {cycles}


@settings(deadline=None, max_examples=20)
@given(per_step=st.integers(1, 4), cycles=st.integers(1, 4), share=st.floats(0.1, 0.9), seed=SEEDS)
def test_the_counts_stay_equal_when_paths_are_moved_to_a_target_cost(
    per_step: int, cycles: int, share: float, seed: int
) -> None:
    space, cost = costly()
    draws = draw_options(space, seeded(seed), per_step, cost, share * cost.full)
    for counts in option_counts(space, paths_of(draws, cycles * 4)).values():
        assert set(counts.values()) == {cycles}


@settings(deadline=None)
@given(
    data=st.data(), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), swaps=st.booleans(), seed=SEEDS
)
def test_counts_of_unequal_options_differ_by_at_most_one_at_each_cycle_end(
    data: st.DataObject, sizes: list[int], swaps: bool, seed: int
) -> None:
    space = space_of(*sizes)
    length = max(sizes)
    per_step = data.draw(st.integers(1, length))
    budget: dict[str, Any] = {}
    if swaps:
        budget = {"cost": SumOfWidths(), "target": 0.7 * sum(sizes)}
    paths = paths_of(draw_options(space, seeded(seed), per_step, **budget), 6 * length)
    for cycles in range(1, 7):
        counts = option_counts(space, paths[: cycles * length])
        for name, size in zip(space.names, sizes, strict=True):
            spread = max(counts[name].values()) - min(counts[name].values())
            assert spread <= 1
            if cycles * length % size == 0:
                assert spread == 0


class SumOfWidths:
    """A cost for spaces without a network."""

    def batch(self, widths: Tensor) -> Tensor:
        return widths.sum(1)


@settings(deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), seed=SEEDS)
def test_no_path_comes_twice_in_a_draw_of_options(data: st.DataObject, sizes: list[int], seed: int) -> None:
    per_step = data.draw(st.integers(1, max(sizes)))
    for drawn in islice(draw_options(space_of(*sizes), seeded(seed), per_step), 15):
        assert len(set(drawn)) == len(drawn) == per_step


def test_drawn_options_are_networks_of_the_space() -> None:
    space, cost = costly()
    for path in paths_of(draw_options(space, seeded(0), 3, cost, 0.4 * cost.full), 40):
        assert path in space and tuple(path) == space.names


def test_moved_paths_are_nearer_to_the_target() -> None:
    space, cost = costly()
    target = 0.35 * cost.full
    free = paths_of(draw_options(space, seeded(0), 2), 80)
    moved = paths_of(draw_options(space, seeded(0), 2, cost, target), 80)
    errors = [sum((cost(p) / target - 1) ** 2 for p in paths) for paths in (free, moved)]
    assert errors[1] < 0.5 * errors[0]


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 9), share=st.floats(0.05, 1.0), sweeps=st.integers(0, 5), seed=SEEDS)
def test_balance_keeps_every_column_and_never_adds_error(
    rows: int, share: float, sweeps: int, seed: int
) -> None:
    space, cost = costly()
    generator = seeded(seed)
    table = torch.stack([space.encode(space.sample(generator)) for _ in range(rows)])
    before = table.clone()
    target = share * cost.full
    moved = balance(table, cost, target, generator, sweeps)
    assert torch.equal(table, before)
    assert torch.equal(moved.sort(0).values, before.sort(0).values)
    old, new = (squared_error(space, cost, target, t) for t in (before, moved))
    assert new <= old * (1 + 1e-12)
    if not torch.equal(moved, before):
        assert new < old


def test_balance_lowers_the_error_of_a_real_cost() -> None:
    space, cost = costly()
    table = torch.tensor([[w] * 5 for w in (4, 8, 12, 16)], dtype=torch.float64)
    target = float(cost.batch(table).mean()) / 2
    moved = balance(table, cost, target, seeded(0))
    assert squared_error(space, cost, target, moved) < 0.2 * squared_error(space, cost, target, table)


def test_balance_leaves_what_is_on_target() -> None:
    space, cost = costly()
    table = space.encode(space.uniform(0.5)).repeat(4, 1)
    assert torch.equal(balance(table, cost, float(cost.batch(table)[0]), seeded(0)), table)


def test_a_single_path_has_nothing_to_swap() -> None:
    space, cost = costly()
    table = space.encode(space.smallest())[None]
    assert torch.equal(balance(table, cost, cost.full / 2, seeded(0)), table)


def test_cost_and_target_are_given_together_or_not_at_all() -> None:
    space, cost = costly()
    with pytest.raises(ValueError, match="cost and target together"):
        next(draw_options(space, seeded(0), cost=cost))
    with pytest.raises(ValueError, match="cost and target together"):
        next(draw_options(space, seeded(0), target=1e6))


@pytest.mark.parametrize(("sizes", "per_step"), [((3, 2), 4), ((3, 2), 0), ((3,), -1), ((), 1)])
def test_more_paths_a_step_than_options_are_refused(sizes: tuple[int, ...], per_step: int) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {per_step} paths a step"):
        next(draw_options(space_of(*sizes), seeded(0), per_step))


# --- the other rules ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), networks=st.integers(2, 6), seed=SEEDS)
def test_a_sandwich_has_the_extremes_around_random_networks(
    sizes: list[int], networks: int, seed: int
) -> None:
    space = space_of(*sizes)
    generator = seeded(seed)
    for step in islice(sandwich(space, seeded(seed), networks), 10):
        drawn = [space.sample(generator) for _ in range(networks - 2)]
        assert step.distilled and not step.parallel
        assert step.networks == (space.largest(), *drawn, space.smallest())


def test_a_sandwich_has_four_networks_unless_told() -> None:
    assert len(next(sandwich(space_of(3), seeded(0))).networks) == 4


@pytest.mark.parametrize("networks", [1, 0, -3])
def test_a_sandwich_needs_two_networks(networks: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 networks, not {networks}"):
        next(sandwich(space_of(3), seeded(0), networks))


def test_uniform_draws_all_options_alike_and_groups_independently() -> None:
    """Chi-square of 4000 draws; 40 is beyond the 0.999 quantile at 11 degrees of freedom (31.3)."""
    space = space_of(4, 3)
    counts: Counter[Widths] = Counter()
    for step in islice(uniform(space, seeded(0)), 4000):
        assert not step.distilled and not step.parallel
        counts.update(step.networks)
    assert len(counts) == 12 and counts.total() == 4000
    expected = 4000 / 12
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 40


def test_single_repeats_one_network() -> None:
    widths = Widths({"g0": 2})
    assert list(islice(single(widths), 3)) == [Step((widths,))] * 3


@pytest.mark.parametrize("distilled", [False, True])
def test_in_parallel_keeps_the_networks(distilled: bool) -> None:
    space = space_of(5, 5)
    serial = list(islice(sandwich(space, seeded(0)), 5))
    steps = list(islice(in_parallel(sandwich(space, seeded(0)), distilled), 5))
    assert [s.networks for s in steps] == [s.networks for s in serial]
    assert all(s.parallel and s.distilled is distilled for s in steps)


def test_a_step_needs_a_network() -> None:
    with pytest.raises(ValueError, match="at least one network"):
        Step(())


# --- determinism -------------------------------------------------------------------------------------


def sequences(seed: int = 5, skipped: int = 0, taken: int = 12) -> dict[str, list[Any]]:
    """Steps of every rule, as nested lists."""
    space, cost = costly()
    drawing = seeded(seed)
    pool = [space.sample(drawing) for _ in range(7)]

    def options() -> Draws:
        return draw_options(space, seeded(seed), 3, cost, 0.4 * cost.full)

    rules = {
        "uniform": uniform(space, seeded(seed)),
        "sandwich": sandwich(space, seeded(seed)),
        "path_fair": path_fair(options()),
        "spfs": spfs(space, draw_paths(pool, seeded(seed), 3)),
        "spfs_options": spfs(space, options()),
        "parallel": in_parallel(sandwich(space, seeded(seed)), distilled=True),
    }
    return {
        name: [
            [step.distilled, step.parallel, *(list(w.items()) for w in step.networks)]
            for step in islice(steps, skipped, skipped + taken)
        ]
        for name, steps in rules.items()
    }


def test_a_seed_gives_the_same_steps_in_every_process() -> None:
    code = "import json, test_sampling; print(json.dumps(test_sampling.sequences()))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    here = json.loads(json.dumps(sequences()))
    assert [json.loads(answer) for answer in answers] == [here, here]
    other = sequences(seed=6)
    assert all(other[name] != here[name] for name in here)


def test_skipped_steps_change_nothing_of_those_that_follow() -> None:
    whole = sequences(taken=17)
    rest = sequences(skipped=9, taken=8)
    assert rest == {name: steps[9:] for name, steps in whole.items()}


def test_rules_leave_the_global_generator_alone() -> None:
    first = sequences()
    state = torch.get_rng_state()
    assert sequences() == first
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert sequences() == first
