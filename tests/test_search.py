"""Searchers: one contract for all of them, and what is special about each."""

from __future__ import annotations

import functools
import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import CASES, conv
from test_projection import growable
from torch import Tensor, nn

from nni_dbs import Budget, FlopsCost, ParamsCost, Widths, WidthSpace
from nni_dbs.algorithms.dbs import DBSSearch
from nni_dbs.cost import Bounds, Limit
from nni_dbs.errors import BudgetError, ConfigError, TrainingError
from nni_dbs.guided import GuidedEvolution
from nni_dbs.pool import draw, draw_evenly, starting_points, tilted
from nni_dbs.predict import TransformerPredictor
from nni_dbs.projection import project, project_batch
from nni_dbs.search import EvolutionSearch, GreedySearch, PriorSearch, RandomSearch, Searcher, neighbours
from torch_pruning_adapters import find_channel_groups

Costs = dict[str, Any]
Score = Callable[[Mapping[str, int]], float]


def priced(model: nn.Module, x: Tensor, ignore: tuple[str, ...] = ()) -> tuple[WidthSpace, Costs]:
    groups = find_channel_groups(model, x, ignore, verify=False)
    costs = {"flops": FlopsCost(model, x, groups), "params": ParamsCost(model, groups)}
    return WidthSpace(groups, min_ratio=0.1, divisor=1), costs


@functools.cache
def net() -> tuple[WidthSpace, Costs]:
    """Groups "0", "1", "3" and "4" of 11 to 15 choices, and "2", which is frozen."""
    widths = (3, 12, 12, 8, 16, 16, 8)
    model = nn.Sequential(*[conv(a, b) for a, b in itertools.pairwise(widths)])
    return priced(model, torch.zeros(1, 3, 8, 8), ignore=("2",))


@functools.cache
def tiny() -> tuple[WidthSpace, Costs]:
    """Three groups of six choices."""
    model = nn.Sequential(conv(3, 6), conv(6, 6), conv(6, 6), conv(6, 4))
    return priced(model, torch.zeros(1, 3, 8, 8))


def within(problem: tuple[WidthSpace, Costs], budget: Any) -> tuple[WidthSpace, Bounds]:
    space, costs = problem
    return space, Budget.parse(budget).bound(costs)


@functools.cache
def points(space: WidthSpace, limits: tuple[tuple[Any, float], ...], seed: int) -> list[Widths]:
    """Starting points, drawn once for all tests."""
    bounds = Bounds(tuple((Limit("flops", most, False), cost, most) for cost, most in limits))
    return starting_points(space, bounds, 12, torch.Generator().manual_seed(seed))


def score(widths: Mapping[str, int]) -> float:
    """A chain's sum of weighted logarithms, less what uneven neighbours cost."""
    logs = [math.log(w) for w in widths.values()]
    gain = sum((1 + i % 3) * x for i, x in enumerate(logs))
    return gain - 0.5 * sum((a - b) ** 2 for a, b in itertools.pairwise(logs))


def played(searcher: Searcher, rounds: int, n: int, score: Score = score) -> list[list[Widths]]:
    """Asks for n networks so many times, and tells the score of each."""
    asked = []
    for _ in range(rounds):
        asked.append(searcher.ask(n))
        for widths in asked[-1]:
            searcher.tell(widths, score(widths))
    return asked


@functools.cache
def full_networks(budget: float) -> frozenset[Widths]:
    """Every network of the tiny space inside the budget of which no group can grow: by trying all."""
    space, bounds = within(tiny(), budget)
    every = itertools.product(*map(space.choices, space.names))
    networks = [Widths(zip(space.names, w, strict=True)) for w in every]
    return frozenset(w for w in networks if bounds.fits(w) and growable(w, space, bounds) == [])


def networks_next_to(widths: Mapping[str, int], space: WidthSpace, bounds: Bounds) -> set[Widths]:
    """One option of one group away, the other groups scaled to the budget."""
    wishes = []
    for column, name in enumerate(space.names):
        below = [o for o in space.options(name) if o < widths[name]]
        above = [o for o in space.options(name) if o > widths[name]]
        for option in below[-1:] + above[:1]:
            if bounds.fits({**space.smallest(), name: option}):
                wishes.append((column, space.encode({**widths, name: option})))
    keep = torch.arange(len(space.names)) == torch.tensor([c for c, _ in wishes]).unsqueeze(1)
    rows = project_batch(torch.stack([w for _, w in wishes]), space, bounds, keep)
    return {space.decode(row) for row in rows}


LEAST = net()[1]["flops"](net()[0].smallest())
BUDGETS = [LEAST + 1, 0.1, 0.5, 0.9, 1.0, {"flops": 0.5, "params": 0.3}, {"flops": 0.95, "params": 0.1}]


class SearcherContract:
    """What every searcher keeps; subclasses make theirs."""

    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        raise NotImplementedError

    @pytest.mark.parametrize("budget", BUDGETS, ids=str)
    def test_what_is_asked_is_new_and_inside_of_the_budget(self, budget: Any) -> None:
        space, bounds = within(net(), budget)
        searcher = self.make(space, bounds)
        asked: list[Widths] = []
        for n in (1, 12, 3):
            (new,) = played(searcher, 1, n)
            assert len(new) <= n
            asked += new
        assert asked
        assert len(set(asked)) == len(asked)
        assert all(w in space and bounds.fits(w) for w in asked)
        assert all(list(w) == list(space.names) for w in asked)
        assert set(searcher.told) == set(asked)

    @pytest.mark.parametrize("budget", [0.2, {"flops": 0.5, "params": 0.3}], ids=str)
    def test_as_many_as_are_asked_for(self, budget: Any) -> None:
        searcher = self.make(*within(net(), budget))
        assert [len(searcher.ask(n)) for n in (1, 3)] == [1, 3]
        assert [len(played(searcher, 1, n)[0]) for n in (9, 1, 20)] == [9, 1, 20]

    def test_asking_for_none(self) -> None:
        searcher = self.make(*within(net(), 0.5))
        assert searcher.ask(0) == []
        played(searcher, 1, 6)
        assert searcher.ask(0) == []

    def test_nothing_is_repeated_when_it_was_not_told_yet(self) -> None:
        searcher = self.make(*within(net(), 0.5))
        asked = [w for _ in range(6) for w in searcher.ask(4)]
        assert len(set(asked)) == len(asked) == 24

    @pytest.mark.parametrize(("budget", "n"), [(0.6, 1), (0.3, 4), (0.6, 30)])
    def test_a_tiny_space_is_exhausted_before_nothing_is_offered(self, budget: float, n: int) -> None:
        space, bounds = within(tiny(), budget)
        searcher = self.make(space, bounds)
        asked: list[Widths] = []
        while new := searcher.ask(n):
            asked += new
            for widths in new:
                searcher.tell(widths, score(widths))
        assert len(set(asked)) == len(asked)
        found = full_networks(budget) & set(asked)
        assert len(found) >= 0.9 * len(full_networks(budget))
        assert searcher.best() in asked

    def test_networks_that_were_told_are_known(self) -> None:
        space, bounds = within(tiny(), 0.3)
        searcher = self.make(space, bounds)
        told = sorted(full_networks(0.3), key=str)[:9]
        for widths in told:
            searcher.tell(dict(widths), score(widths))
        assert list(searcher.told.items()) == [(w, score(w)) for w in told]
        assert searcher.best() in told
        asked = [w for new in played(searcher, 3, 4) for w in new]
        assert asked
        assert not set(asked) & set(told)

    def test_missing_groups_are_told_at_full_width(self) -> None:
        space, bounds = within(net(), 1.0)
        searcher = self.make(space, bounds)
        searcher.tell({"0": 5}, 1.0)
        assert list(searcher.told) == [{**space.largest(), "0": 5}]
        assert searcher.best() == {**space.largest(), "0": 5}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_scores_that_are_not_finite_are_refused(self, bad: float) -> None:
        searcher = self.make(*within(net(), 0.5))
        (widths,) = searcher.ask(1)
        with pytest.raises(TrainingError, match=f"scored {bad}"):
            searcher.tell(widths, bad)
        assert searcher.told == {}

    def test_networks_over_the_budget_are_refused(self) -> None:
        space, bounds = within(net(), {"flops": 1.0, "params": 0.5})
        searcher = self.make(space, bounds)
        with pytest.raises(BudgetError, match="over the budget"):
            searcher.tell(space.largest(), 1.0)
        assert searcher.told == {}

    def test_there_is_no_best_before_anything_was_told(self) -> None:
        searcher = self.make(*within(net(), 0.5))
        with pytest.raises(TrainingError, match="no network was evaluated"):
            searcher.best()
        searcher.ask(3)
        with pytest.raises(TrainingError, match="no network was evaluated"):
            searcher.best()

    def test_the_best_of_two_is_that_of_the_higher_score(self) -> None:
        searcher = self.make(*within(net(), 0.5))
        first, second, *_ = (w for w in searcher.ask(12) if searcher.bounds.used(w) >= 0.98)
        searcher.tell(first, -3.0)
        assert searcher.best() == first
        searcher.tell(second, -2.0)
        assert searcher.best() == second

    def test_a_score_that_is_told_again_replaces_the_first(self) -> None:
        searcher = self.make(*within(net(), 0.5))
        ((*networks,),) = played(searcher, 1, 12)
        assert score(searcher.best()) == max(map(score, networks))
        for widths in networks:
            searcher.tell(widths, -score(widths))
        assert score(searcher.best()) == min(map(score, networks))

    def test_all_that_was_told_is_ranked(self) -> None:
        searcher = self.make(*within(net(), 0.5))
        played(searcher, 2, 7)
        ranked = searcher.ranked()
        assert len(ranked) == 14
        assert set(ranked) == set(searcher.told)
        assert ranked[0] == searcher.best()

    def test_records_say_what_a_network_was_asked_for_as(self) -> None:
        space, bounds = within(net(), 0.5)
        searcher = self.make(space, bounds)
        rounds = played(searcher, 3, 12)
        stages = [{searcher.stage(w) for w in new} for new in rounds]
        assert all(len(s) == 1 for s in stages)
        assert len(set().union(*stages)) == 3
        searcher.tell(space.smallest(), 0.0)
        assert searcher.stage(space.smallest()) == "told"
        again = self.make(space, bounds)
        again.load_state_dict(searcher.state_dict())
        assert [{again.stage(w) for w in new} for new in rounds] == stages

    def test_equal_scores_are_no_obstacle(self) -> None:
        space, bounds = within(net(), 0.5)
        searcher = self.make(space, bounds)
        asked = [w for new in played(searcher, 3, 6, lambda widths: 1.5) for w in new]
        assert len(set(asked)) == 18
        assert searcher.best() in asked

    def test_the_seed_decides(self) -> None:
        problem = within(net(), 0.5)
        first = played(self.make(*problem, seed=3), 3, 6)
        torch.manual_seed(99)
        assert played(self.make(*problem, seed=3), 3, 6) == first
        assert played(self.make(*problem, seed=4), 3, 6) != first

    def test_the_global_random_state_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        searcher = self.make(*within(net(), 0.5))
        played(searcher, 4, 5)
        searcher.best()
        assert torch.equal(torch.get_rng_state(), before)

    def test_looking_at_the_best_changes_nothing(self) -> None:
        problem = within(net(), 0.5)
        looking, not_looking = self.make(*problem), self.make(*problem)
        asked = []
        for _ in range(5):
            asked += [w for new in played(looking, 1, 4) for w in new]
            looking.best()
        together = [w for new in played(not_looking, 5, 4) for w in new]
        assert asked == together
        assert looking.best() == not_looking.best()

    @pytest.mark.parametrize("rounds", [0, 2])
    def test_a_search_goes_on_from_its_state(self, rounds: int) -> None:
        """The state goes through a file of plain values; two networks wait for their scores meanwhile."""
        space, bounds = within(net(), 0.5)
        searcher = self.make(space, bounds, seed=1)
        played(searcher, rounds, 6)
        waiting = searcher.ask(2)
        file = io.BytesIO()
        torch.save(searcher.state_dict(), file)
        other = self.make(space, bounds, seed=2)
        played(other, 1, 3)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert list(other.told.items()) == list(searcher.told.items())
        for widths in waiting:
            searcher.tell(widths, score(widths))
            other.tell(widths, score(widths))
        assert played(other, 2, 5) == played(searcher, 2, 5)
        assert other.best() == searcher.best()

    def test_a_state_does_not_follow_its_searcher(self) -> None:
        space, bounds = within(net(), 0.5)
        searcher = self.make(space, bounds, seed=1)
        played(searcher, 2, 6)
        state = searcher.state_dict()
        later = played(searcher, 2, 6)
        again = self.make(space, bounds)
        again.load_state_dict(state)
        assert played(again, 2, 6) == later

    def test_impossible_budgets_are_refused_at_once(self) -> None:
        space, costs = net()
        with pytest.raises(BudgetError, match=r"below the smallest network .*reachable are"):
            self.make(space, Budget.parse(LEAST - 1).bound(costs))

    def test_the_smallest_network_alone(self) -> None:
        space, costs = net()
        searcher = self.make(space, Budget.parse(LEAST).bound(costs))
        assert played(searcher, 2, 4) == [[space.smallest()], []]
        assert searcher.best() == space.smallest()

    def test_spaces_without_a_choice(self) -> None:
        model, x = CASES["plain"].build()
        space, bounds = within(priced(model, x, ignore=("a", "b")), 1.0)
        searcher = self.make(space, bounds)
        assert played(searcher, 3, 2) == [[space.largest()], [], []]
        assert searcher.best() == space.largest()

    def test_networks_without_groups(self) -> None:
        space, bounds = within(priced(nn.Linear(3, 4), torch.zeros(1, 3)), 1.0)
        searcher = self.make(space, bounds)
        assert played(searcher, 3, 2) == [[{}], [], []]
        assert searcher.best() == {}

    def test_the_score_improves(self) -> None:
        searcher = self.make(*within(net(), 0.4))
        ((first,),) = played(searcher, 1, 1)
        best = [score(first)]
        for _ in range(4):
            played(searcher, 1, 8)
            best.append(max(searcher.told.values()))
        assert best[-1] > best[0]
        assert score(searcher.best()) > best[0]

    def test_a_useless_group_is_narrowed(self) -> None:
        """The score does not depend on group "1", which costs as much as others."""
        space, bounds = within(net(), 0.5)
        searcher = self.make(space, bounds)
        useful = ("0", "3", "4")
        played(searcher, 10, 6, lambda widths: sum(math.log(widths[name]) for name in useful))
        assert len(searcher.told) == 60
        ratio = {name: w / space.largest()[name] for name, w in searcher.best().items()}
        assert ratio["1"] < 0.5 * sum(ratio[name] for name in useful) / 3


def searched(kind: Callable[..., Searcher]) -> str:
    """What is asked in a few rounds, and the best of it."""
    searcher = kind(*within(net(), 0.5), seed=5)
    asked = [dict(w) for new in played(searcher, 4, 8) for w in new]
    return f"{asked} {dict(searcher.best())}"


FRESH = """
import torch
torch.set_num_threads(1)
import test_search
print(test_search.searched(test_search.{kind}))
"""


def in_a_fresh_process(kind: str) -> str:
    """What `searched` gives there."""
    code = f"import sys; sys.path[:] = {sys.path}\n" + FRESH.format(kind=kind)
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class TestRandomSearch(SearcherContract):
    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        return RandomSearch(space, bounds, seed)

    def test_nothing_that_it_asks_can_grow(self) -> None:
        space, bounds = within(net(), 0.5)
        assert all(growable(w, space, bounds) == [] for w in RandomSearch(space, bounds).ask(40))

    def test_scores_do_not_matter(self) -> None:
        problem = within(net(), 0.5)
        told = [w for new in played(RandomSearch(*problem), 4, 5) for w in new]
        untold = RandomSearch(*problem)
        assert [w for _ in range(4) for w in untold.ask(5)] == told


class TestPriorSearch(SearcherContract):
    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        return PriorSearch(space, bounds, seed)

    @pytest.mark.parametrize("budget", [0.15, 0.8])
    def test_what_it_draws_is_near_the_budget_before_it_is_projected(self, budget: float) -> None:
        space, bounds = within(net(), budget)
        searcher = PriorSearch(space, bounds)
        drawn = draw(space, searcher.chances, 500, torch.Generator().manual_seed(0))
        used = bounds.used_batch(drawn).mean()
        anything = bounds.used_batch(draw_evenly(space, 500, searcher.generator)).mean()
        assert abs(float(used) - 1) < 0.15 < abs(float(anything) - 1)


class TestGreedySearch(SearcherContract):
    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        return GreedySearch(space, bounds, seed)

    def test_begins_at_the_uniform_network_and_goes_on_to_its_neighbours(self) -> None:
        space, bounds = within(net(), 0.5)
        searcher = GreedySearch(space, bounds)
        uniform = project(space.largest(), space, bounds)
        assert searcher.ask(1) == [uniform]
        assert set(searcher.ask(3)) <= networks_next_to(uniform, space, bounds)
        assert GreedySearch(space, bounds).ask(4)[0] == uniform

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_the_neighbours_of_the_best_network_come_first(self, seed: int) -> None:
        space, bounds = within(tiny(), 0.6)
        searcher = GreedySearch(space, bounds, seed)
        played(searcher, 1, 1)
        for _ in range(12):
            (best,) = {searcher.best()}
            unknown = networks_next_to(best, space, bounds) - set(searcher.told)
            ((asked,),) = played(searcher, 1, 1)
            if unknown:
                assert asked in unknown

    @pytest.mark.parametrize("seed", [0, 1])
    def test_reaches_a_network_that_no_neighbour_beats(self, seed: int) -> None:
        space, bounds = within(net(), 0.5)
        searcher = GreedySearch(space, bounds, seed)
        while len(searcher.told) < 100:
            played(searcher, 1, 3)
            if networks_next_to(searcher.best(), space, bounds) <= set(searcher.told):
                break
        assert len(searcher.told) < 100
        best = searcher.best()
        assert all(score(w) <= score(best) for w in networks_next_to(best, space, bounds))
        assert score(best) > score(project(space.largest(), space, bounds))

    def test_after_the_neighbours_of_the_best_come_those_of_the_next_best(self) -> None:
        """Ten at a time, more than any network has neighbours that are new."""
        space, bounds = within(net(), 0.5)
        searcher = GreedySearch(space, bounds)
        played(searcher, 1, 4)
        for _ in range(4):
            near = set().union(*(networks_next_to(w, space, bounds) for w in searcher.told))
            ((*asked,),) = played(searcher, 1, 10)
            assert len(asked) == 10
            assert len(set(asked) & near) == min(10, len(near - (set(searcher.told) - set(asked))))


def test_neighbours_are_one_option_of_one_group_away() -> None:
    space, _ = net()
    widths = Widths({"0": 2, "1": 12, "2": 8, "3": 7, "4": 16})
    wishes, keep = neighbours(space.encode(widths), space)
    assert space.choices("0") == tuple(range(2, 13))
    assert space.options("0") == (2, 3, 4, 5, 6, 8, 9, 10, 11, 12)
    assert space.options("3")[3:6] == (7, 8, 10)
    expected = {"0": [3], "1": [11], "3": [5, 8], "4": [space.options("4")[-2]]}
    found: dict[str, list[int]] = {}
    for wish, kept in zip(wishes.tolist(), keep, strict=True):
        ((column,),) = kept.nonzero().tolist()
        name = space.names[column]
        found.setdefault(name, []).append(wish[column])
        assert {**space.decode(torch.tensor(wish)), name: widths[name]} == widths
    assert found == expected


def test_neighbours_of_widths_between_two_options() -> None:
    space, _ = net()
    wishes, keep = neighbours(space.encode({**space.smallest(), "0": 7}), space)
    assert wishes[keep[:, 0], 0].tolist() == [6, 8]


def test_networks_without_a_choice_have_no_neighbours() -> None:
    model, x = CASES["plain"].build()
    space, _ = priced(model, x, ignore=("a", "b"))
    wishes, keep = neighbours(space.encode({}), space)
    assert wishes.shape == keep.shape == (0, 2)
    assert keep.dtype == torch.bool


class Unprojected(EvolutionSearch):
    """Keeps the wishes for children as they are bred."""

    def _projected(self, wishes: Tensor) -> list[Widths]:
        self.wishes = wishes
        return []


class TestEvolutionSearch(SearcherContract):
    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        return EvolutionSearch(space, bounds, seed)

    @staticmethod
    def bred(mutation: float, n: int = 400) -> tuple[WidthSpace, Tensor, Tensor, Tensor]:
        """The space, parents (4, G), mutants and crossovers."""
        space, bounds = within(net(), 1.0)
        searcher = Unprojected(space, bounds, mutation=mutation)
        generator = torch.Generator().manual_seed(0)
        parents = torch.stack([space.encode(space.sample(generator)) for _ in range(4)])
        searcher._bred(parents, n)
        return space, parents, searcher.wishes[::2], searcher.wishes[1::2]

    @pytest.mark.parametrize("mutation", [0.0, 0.3])
    def test_mutants_are_a_parent_but_for_some_groups(self, mutation: float) -> None:
        space, parents, mutants, _ = self.bred(mutation)
        assert all(space.decode(m) in space for m in mutants)
        changed = (
            (mutants.unsqueeze(1) != parents).sum(2).amin(1).double()
        )  # (N,) groups off the nearest parent
        if mutation == 0:
            assert changed.max() == 1
        else:
            assert 1 < float(changed.mean()) < 2.5

    def test_every_group_that_has_a_choice_mutates_to_every_choice(self) -> None:
        space, _, mutants, _ = self.bred(0.5, n=2000)
        for column, name in enumerate(space.names):
            assert set(mutants[:, column].tolist()) == set(space.choices(name))

    def test_crossovers_have_each_width_from_one_of_two_parents(self) -> None:
        _, parents, _, crossed = self.bred(0.1)
        pairs = list(itertools.combinations_with_replacement(range(4), 2))
        of_pair = [((crossed == parents[a]) | (crossed == parents[b])).all(1) for a, b in pairs]  # each (N,)
        assert torch.stack(of_pair).any(0).all()
        alone = torch.stack([(crossed == p).all(1) for p in parents]).any(0)
        assert 0.2 < float(alone.double().mean()) < 0.6

    def test_only_the_best_breed(self) -> None:
        space, bounds = within(net(), 1.0)
        searcher = Unprojected(space, bounds, initial=0, parents=2, mutation=0.0)
        told = [Widths({**space.largest(), "0": 2 + i, "4": 16 - i}) for i in range(6)]
        for i, widths in enumerate(told):
            searcher.tell(widths, -abs(i - 3.4))
        searcher._propose(200)
        crossed = {space.decode(w) for w in searcher.wishes[1::2]}
        assert {told[3], told[4]} <= crossed
        assert all(w["0"] in (5, 6) and w["4"] in (12, 13) for w in crossed)

    def test_the_first_generation_does_not_depend_on_scores(self) -> None:
        problem = within(net(), 0.5)
        up, down = (EvolutionSearch(*problem, initial=12) for _ in range(2))
        assert played(up, 1, 12) == played(down, 1, 12, lambda widths: -score(widths))
        assert played(up, 1, 12) != played(down, 1, 12)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_the_best_is_a_parent_of_every_generation_and_never_forgotten(self, seed: int) -> None:
        searcher = Recorded(*within(net(), 0.4), seed=seed, initial=6, parents=3)
        best = -math.inf
        for _ in range(8):
            asked = searcher.ask(6)
            if searcher.told:
                ranked = sorted(searcher.told.values(), reverse=True)
                assert [score(searcher.space.decode(p)) for p in searcher.bred_from] == ranked[:3]
            for widths in asked:
                searcher.tell(widths, score(widths))
            assert score(searcher.best()) == max(searcher.told.values()) >= best
            best = score(searcher.best())
        assert len(searcher.told) == 48

    def test_a_fresh_process_searches_alike(self) -> None:
        """Hashes of texts, and with them the order of sets, differ between processes."""
        assert in_a_fresh_process("EvolutionSearch") == searched(EvolutionSearch)

    def test_finds_better_networks_than_chance(self) -> None:
        """At 48 evaluations each, on the mean of four seeds."""
        problem = within(net(), 0.5)
        reached = {}
        for kind in (RandomSearch, EvolutionSearch):
            searchers = [kind(*problem, seed=seed) for seed in range(4)]
            for searcher in searchers:
                played(searcher, 6, 8)
            reached[kind] = sum(max(searcher.told.values()) for searcher in searchers)
        assert reached[EvolutionSearch] > reached[RandomSearch]


class Recorded(EvolutionSearch):
    """Remembers who bred last."""

    def _bred(self, parents: Tensor, n: int) -> list[Widths]:
        self.bred_from = parents
        return super()._bred(parents, n)


def uneven_chances(space: WidthSpace, seed: int = 0) -> Tensor:
    """Random chances (G, K), of which some are 0."""
    choices, counts = space.padded_choices()
    there = torch.arange(choices.shape[1]) < counts.unsqueeze(1)
    weights = torch.rand(choices.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights[:, 1::3] = 0
    weights = weights.where(there, 0)
    return weights / weights.sum(1, keepdim=True)


class TestEvolutionSearchWithAPrior(SearcherContract):
    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        return EvolutionSearch(space, bounds, seed, prior=tilted(space, bounds))

    @staticmethod
    def assert_drawn(wishes: Tensor, space: WidthSpace, chances: Tensor) -> None:
        """Four standard errors around each chance; never what has none."""
        choices, _ = space.padded_choices()
        shares = (wishes.unsqueeze(2) == choices).double().mean(0)  # (G, K)
        error = (chances * (1 - chances) / len(wishes)).sqrt()
        assert ((shares - chances).abs() <= 4 * error).all()

    def test_the_first_generation_has_the_given_chances(self) -> None:
        space, bounds = within(net(), 0.5)
        chances = uneven_chances(space)
        searcher = Unprojected(space, bounds, prior=chances)
        searcher._propose(2000)
        self.assert_drawn(searcher.wishes, space, chances)

    def test_random_networks_among_children_have_the_given_chances(self) -> None:
        """One network was told, so that `initial` is not reached, and 2000 random ones come first."""
        space, bounds = within(net(), 1.0)
        chances = uneven_chances(space)
        searcher = Wishes(space, bounds, prior=chances, initial=2001)
        searcher.tell(space.largest(), 0.0)
        searcher._propose(2000)
        self.assert_drawn(searcher.all[-1], space, chances)

    def test_what_mutates_has_the_given_chances(self) -> None:
        space, bounds = within(net(), 1.0)
        chances = uneven_chances(space)
        searcher = Unprojected(space, bounds, mutation=1.0, prior=chances)
        searcher._bred(space.encode(space.largest()).unsqueeze(0), 4000)
        self.assert_drawn(searcher.wishes[::2], space, chances)

    def test_what_has_no_chance_comes_from_a_parent_or_the_projection_alone(self) -> None:
        space, bounds = within(net(), 0.5)
        chances = uneven_chances(space)
        choices, _ = space.padded_choices()
        offered = choices.where(chances > 0, torch.inf)  # (G, K)
        searcher = Wishes(space, bounds, prior=chances, initial=8, mutation=0.3)
        while len(searcher.told) < 8:
            played(searcher, 1, 4)
        drawn = torch.cat(searcher.all)
        assert (drawn.unsqueeze(2) == offered).any(2).all()
        assert set(searcher.told) <= set(searcher._decoded(project_batch(drawn, space, bounds)))
        searcher.all.clear()
        parents = torch.stack([space.encode(w) for w in searcher.told])
        searcher.ask(8)
        children = searcher.all[0]
        inherited = (children.unsqueeze(1) == parents).any(1)  # (N, G)
        assert (inherited | (children.unsqueeze(2) == offered).any(2)).all()
        assert not inherited.all()

    def test_where_few_networks_have_a_chance_others_follow(self) -> None:
        space, bounds = within(net(), 0.5)
        choices, _ = space.padded_choices()
        chances = torch.zeros(choices.shape, dtype=torch.float64)
        chances[:, 0] = 1
        searcher = EvolutionSearch(space, bounds, prior=chances)
        first = project(space.smallest(), space, bounds)
        asked = searcher.ask(12)
        assert asked[0] == first and len(asked) == 12

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p[:-1], r"expected chances of shape \(5, 15\) .*, not \(4, 15\)"),
            (lambda p: p[0], r"shape .*, not \(15,\)"),
            (lambda p: -p, "not negative"),
            (lambda p: p * math.nan, "finite"),
            (lambda p: p + 0.1, "0 where a group has no choice"),
            (lambda p: p * (torch.arange(5) != 3).unsqueeze(1), "every group needs a choice"),
        ],
    )
    def test_chances_that_are_none_are_refused(
        self, change: Callable[[Tensor], Tensor], message: str
    ) -> None:
        space, bounds = within(net(), 0.5)
        with pytest.raises(ConfigError, match=message):
            EvolutionSearch(space, bounds, prior=change(tilted(space, bounds)))


class Wishes(EvolutionSearch):
    """Remembers all wishes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.all: list[Tensor] = []

    def _projected(self, wishes: Tensor) -> list[Widths]:
        self.all.append(wishes)
        return super()._projected(wishes)


class TestGuidedEvolution(SearcherContract):
    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        predictor = TransformerPredictor(space, members=3, dim=16, depth=1, steps=20, seed=seed)
        drawn = points(space, tuple((cost, most) for _, cost, most in bounds.limits), seed)
        sizes = {"population": 24, "generations": 2}
        return GuidedEvolution(space, bounds, seed, points=drawn, predictor=predictor, **sizes)

    @pytest.mark.slow
    def test_a_fresh_process_searches_alike(self) -> None:
        assert in_a_fresh_process("GuidedEvolution") == searched(GuidedEvolution)


class TestDBSSearch(SearcherContract):
    def make(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> Searcher:
        predictor = TransformerPredictor(space, members=3, dim=16, depth=1, steps=20, seed=seed)
        drawn = points(space, tuple((cost, most) for _, cost, most in bounds.limits), seed)
        return DBSSearch(space, bounds, seed, points=drawn, predictor=predictor)

    @pytest.mark.slow
    def test_a_fresh_process_searches_alike(self) -> None:
        assert in_a_fresh_process("DBSSearch") == searched(DBSSearch)

    def test_begins_with_the_starting_points(self) -> None:
        space, bounds = within(net(), 0.5)
        searcher = DBSSearch(space, bounds, points=7)
        assert searcher.ask(5) + searcher.ask(2) == searcher.points
        assert searcher.points[0] == project(space.largest(), space, bounds)

    def test_looking_at_the_best_does_not_rename_starting_points(self) -> None:
        searcher = self.make(*within(net(), 0.5))
        for _ in range(2):
            for widths in played(searcher, 1, 6)[0]:
                assert searcher.stage(widths) == "points"
            searcher.best()

    def test_points_that_are_known_are_not_asked_for(self) -> None:
        space, bounds = within(net(), 0.5)
        points = RandomSearch(space, bounds, seed=9).ask(6)
        searcher = DBSSearch(space, bounds, points=points)
        for widths in points[:2]:
            searcher.tell(widths, score(widths))
        assert searcher.ask(4) == points[2:]

    def test_points_over_the_budget_are_refused(self) -> None:
        space, bounds = within(net(), 0.5)
        with pytest.raises(BudgetError, match="budget"):
            DBSSearch(space, bounds, points=[space.smallest(), space.largest()])

    def test_a_lucky_measurement_is_not_chosen(self) -> None:
        """One bad network measures a little more than the best one; the fit to all knows better."""
        space, bounds = within(net(), 0.5)
        searcher = self.make(space, bounds)
        networks = RandomSearch(space, bounds, seed=1).ask(40)
        ranked = sorted(networks, key=score)
        lucky = ranked[4]
        for widths in networks:
            searcher.tell(widths, score(ranked[-1]) + 0.1 if widths == lucky else score(widths))
        assert max(searcher.told, key=searcher.told.__getitem__) == lucky
        assert searcher.best() in ranked[-5:]
