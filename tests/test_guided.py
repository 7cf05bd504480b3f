"""Evolution on a predictor; what it shares with the search of DBS is tested there and in test_search.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import bound, chain, truth
from torch import Tensor

from nni_dbs import Widths, WidthSpace
from nni_dbs.cost import Bounds
from nni_dbs.errors import ConfigError
from nni_dbs.guided import GuidedEvolution, TrustRegion
from nni_dbs.predict import Prediction, TransformerPredictor, gaussian_process, ridge
from nni_dbs.projection import project_batch
from nni_dbs.search import EvolutionSearch, Searcher


class Oracle:
    """Predicts the truth, or any function of widths (N, G), and how far it may be off."""

    def __init__(self, space: WidthSpace, mean: Any = None, std: Any = None) -> None:
        self.options = ridge(space).options
        self.mean = mean or (lambda widths: truth(space, widths))
        self.std = std or (lambda widths: torch.zeros(len(widths), dtype=torch.float64))

    def fit(self, widths: Tensor, scores: Tensor) -> Tensor:
        return scores.clone()

    def predict(self, widths: Tensor) -> Prediction:
        return Prediction(self.mean(widths), self.std(widths))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def score(space: WidthSpace, widths: Widths, seed: int = 0) -> float:
    return float(truth(space, space.encode(widths).unsqueeze(0), seed))


def run(search: Searcher, evaluations: int, seed: int = 0) -> Any:
    """Evaluates on the synthetic truth, eight at a time."""
    while len(search.told) < evaluations:
        for widths in search.ask(min(8, evaluations - len(search.told))):
            search.tell(widths, score(search.space, widths, seed))
    return search


def guided(space: WidthSpace, bounds: Bounds, seed: int = 0, **kwargs: Any) -> GuidedEvolution:
    return GuidedEvolution(
        space, bounds, seed, **{"points": 8, "predictor": Oracle(space), "population": 20, **kwargs}
    )


def everywhere(search: GuidedEvolution) -> TrustRegion:
    return search._region()._replace(radius=torch.inf)


def found(search: GuidedEvolution) -> Tensor:
    """What a round of evolution finds, from the same random state each time."""
    search.generator.manual_seed(0)
    return search._find(search._starts(), everywhere(search))


def full_networks(space: WidthSpace, bounds: Bounds) -> Tensor:
    """All networks (N, G) of a small space, projected into the budget."""
    every = torch.tensor(list(itertools.product(*map(space.choices, space.names))), dtype=torch.float64)
    return project_batch(every, space, bounds).unique(dim=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_the_best_of_all_unknown_networks_by_the_predictor(seed: int) -> None:
    space, cost, _ = chain(4, 32, 4)
    bounds = bound(0.5, cost)
    search = run(guided(space, bounds, seed, population=40, generations=15), 12)
    (asked,) = search.ask(1)
    every = {space.decode(row): row for row in full_networks(space, bounds)}
    unknown = [widths for widths in every if widths not in search.told or widths == asked]
    search.radius = torch.inf
    assert score(space, asked) <= max(score(space, w) for w in unknown)
    first = space.decode(found(search)[0])
    assert score(space, first) == max(score(space, w) for w in unknown if w != asked)


def test_what_a_round_finds_is_new_different_and_inside_of_the_budget() -> None:
    space, cost, _ = chain(6, 40, 4)
    bounds = bound(0.3, cost)
    search = run(guided(space, bounds, population=30, generations=3), 16)
    waiting = search.ask(3)
    networks = found(search)
    assert len(networks) == len(networks.unique(dim=0)) == 30
    assert bounds.fits_batch(networks).all()
    decoded = {space.decode(row) for row in networks}
    assert all(widths in space for widths in decoded)
    assert not decoded & {*search.told, *waiting}


def test_the_best_that_evolution_knows_is_never_lost() -> None:
    """The same random numbers, so that more generations go on from fewer."""
    space, cost, _ = chain(10, 40, 4)
    search = run(guided(space, bound(0.5, cost)), 8)
    best = []
    for generations in range(1, 12):
        search.generations = generations
        best.append(score(space, space.decode(found(search)[0])))
    assert best == sorted(best)
    assert best[-1] > best[0] + 0.1


def test_a_quarter_breeds_half_by_mutation(monkeypatch: pytest.MonkeyPatch) -> None:
    import nni_dbs.guided

    calls = []
    real = nni_dbs.guided.bred

    def watched(parents: Tensor, n: int, *args: Any) -> Tensor:
        calls.append((parents, n))
        return real(parents, n, *args)

    space, cost, _ = chain(6, 16, 4)
    search = run(guided(space, bound(0.5, cost), population=40, generations=5), 8)
    monkeypatch.setattr(nni_dbs.guided, "bred", watched)
    found(search)
    assert [(len(parents), n) for parents, n in calls] == 5 * [(10, 30)]
    means = [truth(space, parents) for parents, _ in calls]
    assert all(torch.equal(mean, mean.sort(descending=True).values) for mean in means)
    assert float(means[-1].min()) > float(means[0].min())


def test_known_networks_breed_too() -> None:
    """The best known network is the only one that scores; all that is found is next to it."""
    space, cost, _ = chain(6, 16, 4)
    bounds = bound(0.5, cost)
    search = run(guided(space, bounds), 8)
    best = space.encode(search.points[3])

    def likeness(widths: Tensor) -> Tensor:
        return (widths == best).double().sum(1)

    search.predictor = Oracle(space, likeness)
    first = found(search)[0]
    assert 4 <= likeness(first.unsqueeze(0)) < 6


def test_networks_are_asked_for_with_caution_and_with_optimism_in_turns() -> None:
    space, cost, _ = chain(6, 40, 4)
    bounds = bound(0.5, cost)
    ratio = space.encode({})

    def doubt(widths: Tensor) -> Tensor:
        return 3 * widths[:, 0] / ratio[0]

    search = guided(space, bounds, points=40, predictor=Oracle(space, std=doubt), generations=10)
    run(search, 40)
    search.radius = torch.inf
    search._fitted = dict(search.told)
    asked = torch.stack([space.encode(w) for w in search.ask(8)])
    assert doubt(asked[1::2]).min() > doubt(asked[::2]).max()


def test_networks_inside_of_the_region_are_asked_for_first() -> None:
    space, cost, _ = chain(6, 40, 4)
    search = run(guided(space, bound(0.5, cost), points=24, population=60), 24)
    known = torch.stack([space.encode(w) for w in search.told])
    asked = torch.stack([space.encode(w) for w in search.ask(40)])
    apart = torch.cdist((asked / space.encode({})).log(), (known / space.encode({})).log()).amin(1)
    inside = (apart <= search.radius * (1 + 1e-9)).tolist()
    assert 4 <= sum(inside)
    assert inside == sorted(inside, reverse=True)


@pytest.mark.parametrize("make", [ridge, gaussian_process])
def test_any_predictor_guides_it_and_is_resumed(make: Any) -> None:
    space, cost, _ = chain(4, 32, 8)
    bounds = bound(0.5, cost)
    search = run(guided(space, bounds, predictor=make(space), generations=3), 12)
    again = guided(space, bounds, seed=5, predictor=make(space), generations=3)
    again.load_state_dict(search.state_dict())
    assert search.ask(4) == again.ask(4)
    assert [fit["evaluations"] for fit in again.fits] == [8, 12]


@pytest.mark.parametrize(
    "options", [{"population": 3}, {"generations": 0}, {"mutation": -0.1}, {"mutation": 1.1}]
)
def test_options_out_of_their_range_are_refused(options: dict[str, Any]) -> None:
    space, cost, _ = chain(4, 32, 8)
    with pytest.raises(ConfigError, match=r"population must be at least 4, .* mutation lie in \[0, 1\]"):
        guided(space, bound(0.5, cost), **options)


def compared(
    space: WidthSpace, bounds: Bounds, seeds: int, evaluations: int, generations: int = 20, **sizes: Any
) -> int:
    """In how many seeds it chooses a better network than evolution without a predictor."""
    wins = 0
    for seed in range(seeds):
        predictor = TransformerPredictor(space, seed=seed, **sizes)
        search = GuidedEvolution(space, bounds, seed, predictor=predictor, generations=generations)
        mine = score(space, run(search, evaluations, seed).best(), seed)
        plain = run(EvolutionSearch(space, bounds, seed), evaluations, seed)
        print(f"seed {seed}: {mine:.3f}, evolution {max(plain.told.values()):.3f}")
        wins += mine > max(plain.told.values())
    return wins


def test_a_predictor_helps_in_small() -> None:
    space, cost, _ = chain(10, 40, 4)
    sizes = {"members": 2, "depth": 1, "steps": 20}
    assert compared(space, bound(0.5, cost), 3, 40, 6, **sizes) >= 2


@pytest.mark.slow
def test_a_predictor_helps() -> None:
    """At 64 evaluations without noise, in 15 of 20 seeds."""
    space, cost, _ = chain(10, 40, 4)
    assert compared(space, bound(0.5, cost), 20, 64) >= 15
