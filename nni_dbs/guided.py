"""Searches that a predictor guides: evaluate, fit, search by the frozen predictor, evaluate again.

`GuidedSearch` is what they share. `nni_dbs.algorithms.dbs.DBSSearch` searches by gradient; `GuidedEvolution`
by mutation and crossover, which needs no gradient and so takes any predictor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nni_dbs.cost import Bounds
from nni_dbs.errors import ConfigError
from nni_dbs.pool import draw, starting_points
from nni_dbs.predict import FEWEST, Predictor, TransformerPredictor, kendall_tau, posterior
from nni_dbs.projection import project_batch
from nni_dbs.search import Searcher, bred
from nni_dbs.space import Widths, WidthSpace

_POLISH = 3  # rounds of looking around what was found, by the predictor
_AROUND = 8  # networks of such a round


class TrustRegion(NamedTuple):
    """What lies within a radius of evaluated networks: as far as a predictor of few networks can be believed.

    Without it a search by gradient ends in the corners of the space, where the predictor knows least, and
    where a supernet of the starting points was never trained. (Not known from DBS.)

    Attributes:
        centers: (M, L) logarithms of the evaluated networks' ratios, as `Options.log_ratio`.
        radius: Euclidean.
    """

    centers: Tensor
    radius: float

    def excess(self, x: Tensor) -> Tensor:
        """How many radii points x (N, L) lie outside, (N,); 0 inside; differentiable."""
        return F.relu(torch.cdist(x, self.centers).amin(1) / self.radius - 1)


class GuidedSearch(Searcher):
    """A search in rounds that a predictor guides; how it finds networks by the predictor is the subclass's.

    The first networks that it asks for are the starting points; from then on each `ask` fits the predictor to
    all that was told, and returns the networks that the frozen predictor promises most of, first those inside
    of the `TrustRegion`. Its radius is at first the median distance from a network to its nearest; it doubles
    when the next networks score what was predicted, within a standard deviation (until the region is the
    whole space), and is halved when they do not. Ask for few at a time: every round learns from the one
    before. `best` goes by the predictor fitted to all measurements, not by the luckiest measurement.

    Args:
        space, bounds, seed: See `Searcher`.
        points: Starting points: networks, or how many to draw (`starting_points`).
        predictor: Default: a `TransformerPredictor` of default sizes.
        starts: Known networks, the best by prediction, that each round's search starts from.
        fresh: New random networks that it starts from too.
        optimism: Networks are asked for in turns by the predicted mean less and plus so many standard
            deviations: where the prediction is safe, and where it may surprise.

    Attributes:
        points: The starting points.
        fits: Of each fit: number of `evaluations`, held-out Kendall `tau` and `tau_in_band` (of networks that
            use at least 80 % of the budget), and the trust region's `radius`.
        held_out: Of the last fit: predicted and measured scores (N,), and which are in the band (N,) bool.
    """

    BAND = 0.8

    def __init__(
        self,
        space: WidthSpace,
        bounds: Bounds,
        seed: int = 0,
        *,
        points: int | Sequence[Widths] = 16,
        predictor: Predictor | None = None,
        starts: int = 24,
        fresh: int = 8,
        optimism: float = 1.0,
    ) -> None:
        super().__init__(space, bounds, seed)
        if isinstance(points, int):
            points = starting_points(space, bounds, points, self.generator)
        self.points = [self._checked(widths, "a starting point") for widths in points]
        if not self.points:
            raise ConfigError("the search needs starting points: give networks, or how many to draw")
        self._points = set(self.points)
        self.predictor = predictor or TransformerPredictor(space, seed=seed)
        self.starts = starts
        self.fresh = fresh
        self.optimism = optimism
        self.fits: list[dict[str, float]] = []
        self.radius = torch.inf
        self._fitted: dict[Widths, float] = {}
        self.held_out = (torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool))

    @abstractmethod
    def _find(self, starts: Tensor, region: TrustRegion) -> Tensor:
        """Networks (M, G) near the budget that the frozen predictor promises much of, from starts (S, G).

        None where all are known.
        """

    def _by_quality(self) -> list[Widths]:
        """All networks that were told, by the `posterior` of predictions and measurements."""
        known = super()._by_quality()
        if not self._can_fit():
            return known
        if self._fitted == self.told:
            return self._by_posterior(known)
        before = self.predictor.state_dict()
        self.predictor.fit(self._encoded(self.told), self._scores(self.told))
        found = self._by_posterior(known)
        self.predictor.load_state_dict(before)  # to look changes nothing
        return found

    def _by_posterior(self, known: list[Widths]) -> list[Widths]:
        encoded, scores = self._encoded(known), self._scores(known)
        worth = posterior(self._features(encoded), self.predictor.predict(encoded).mean, scores)
        return [known[i] for i in worth.argsort(descending=True, stable=True)]

    def _can_fit(self) -> bool:
        return len(self.told) >= FEWEST and self.predictor.options.shape[0] > 0

    def fit(self) -> None:
        """Fits the predictor to all that was told, unless it is, or fewer than 4 networks are known.

        `ask` does it by itself; after the last round, call it for `fits` and `held_out`. Without it `best`
        fits for itself alone, each time.
        """
        if self._fitted == self.told or not self._can_fit():
            return
        self.radius = self._trusted_radius()
        self._fitted = dict(self.told)
        widths, scores = self._encoded(self.told), self._scores(self.told)
        held_out = self.predictor.fit(widths, scores)
        band = torch.tensor([self.bounds.used(w) >= self.BAND for w in self.told])
        self.held_out = held_out, scores, band
        self.fits.append(
            {
                "evaluations": len(scores),
                "tau": kendall_tau(held_out, scores),
                "tau_in_band": kendall_tau(held_out[band], scores[band]),
                "radius": self.radius,
            }
        )

    def _trusted_radius(self) -> float:
        """The trust region's next radius, by what the last fit said of the networks that were told since."""
        if not self._fitted:
            x = self._features(self._encoded(self.told))
            return float(torch.cdist(x, x).fill_diagonal_(torch.inf).amin(1).median())
        new = [widths for widths in self.told if widths not in self._fitted]
        if not new:
            return self.radius
        mean, std = self.predictor.predict(self._encoded(new))
        if self._scores(new).mean() < (mean - std).mean():
            return self.radius / 2
        ends = self._features(self._encoded([self.space.smallest(), self.space.largest()]))
        return min(2 * self.radius, float((ends[0] - ends[1]).norm()))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "points": [dict(widths) for widths in self.points],
            "predictor": self.predictor.state_dict(),
            "fits": list(self.fits),
            "radius": self.radius,
            "fitted": [(dict(widths), score) for widths, score in self._fitted.items()],
            "held_out": self.held_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.points = [Widths(widths) for widths in state["points"]]
        self._points = set(self.points)
        self.predictor.load_state_dict(state["predictor"])
        self.fits = list(state["fits"])
        self.radius = state["radius"]
        self._fitted = {Widths(widths): score for widths, score in state["fitted"]}
        self.held_out = state["held_out"]

    def _propose(self, n: int) -> Sequence[Widths]:
        waiting = [w for w in self.points if w not in self._asked and w not in self.told][:n]
        if waiting or not self._can_fit():
            return waiting
        self.fit()
        starts, region = self._starts(), self._region()
        found = project_batch(self._find(starts, region), self.space, self.bounds).unique(dim=0)
        if not len(found):
            return []
        for _ in range(_POLISH):
            around = self._around(self._promising(found, region)[:_AROUND])
            found = torch.cat([found, around]).unique(dim=0)
        return self._decoded(self._promising(found, region))

    def _promising(self, networks: Tensor, region: TrustRegion) -> Tensor:
        """Networks (N, G): trusted ones first, in turns the best with caution and with optimism."""
        mean, std = self.predictor.predict(networks)
        orders = [
            (mean + sign * self.optimism * std).argsort(descending=True, stable=True) for sign in (-1, 1)
        ]
        order = torch.tensor(list(dict.fromkeys(torch.stack(orders, 1).flatten().tolist())))
        networks = networks[order]
        return networks[region.excess(self._features(networks)).argsort(stable=True)]

    def _region(self) -> TrustRegion:
        return TrustRegion(self._features(self._encoded(self.told)), self.radius)

    def _features(self, networks: Tensor) -> Tensor:
        """Logarithms (N, L) of the ratios of networks (N, G)."""
        return self.predictor.options.log_ratio(self.predictor.options.encode(networks))

    def _scores(self, networks: Iterable[Widths]) -> Tensor:
        return torch.tensor([self.told[widths] for widths in networks], dtype=torch.float64)

    def _stage(self, widths: Widths) -> str:
        return "points" if widths in self._points else f"round {len(self.fits)}"

    def _starts(self) -> Tensor:
        """Networks (S, G): those known that the predictor thinks best of, and random ones."""
        known = self._encoded(self.told)
        best = self.predictor.predict(known).mean.argsort(descending=True, stable=True)[: self.starts]
        return torch.cat([known[best], draw(self.space, self.chances, self.fresh, self.generator)])


class GuidedEvolution(GuidedSearch):
    """Evolution on the frozen predictor, in rounds: as Once-for-All searches, with evaluations between.

    A peer of DBS that needs no gradient, so that it takes any predictor, and that can leave the
    neighbourhood of its starts. In each round the known networks of the best predictions and random ones
    found a population, whose best quarter breeds by `bred`, half mutants and half crossovers; children are
    projected into the budget. The best are those that would be asked for first: inside of the `TrustRegion`,
    with caution and with optimism in turns. Networks that were asked for breed on, but make room for others.

    Once-for-All has 500 generations, once, on a predictor that never learns again. Here a round's 20 cost
    about what DBS's gradient search does (0.6 to 2 s for 6 to 30 groups), and every round adds as many.

    Args:
        space, bounds, seed: See `Searcher`.
        predictor: Any. Default: a `TransformerPredictor` of default sizes.
        population: Networks that a generation keeps; a quarter of them are parents, so at least 4.
        generations: In each round.
        mutation: Chance that a group of a mutant is drawn anew (at least one is).
        points, starts, fresh, optimism: See `GuidedSearch`.

    Raises:
        ConfigError: An option out of its range.
    """

    PARENTS = 0.25

    def __init__(
        self,
        space: WidthSpace,
        bounds: Bounds,
        seed: int = 0,
        *,
        points: int | Sequence[Widths] = 16,
        predictor: Predictor | None = None,
        population: int = 100,
        generations: int = 20,
        mutation: float = 0.1,
        starts: int = 24,
        fresh: int = 8,
        optimism: float = 1.0,
    ) -> None:
        if population < 4 or generations < 1 or not 0 <= mutation <= 1:
            raise ConfigError(
                "population must be at least 4, generations at least 1, and mutation lie in [0, 1]"
            )
        super().__init__(
            space,
            bounds,
            seed,
            points=points,
            predictor=predictor,
            starts=starts,
            fresh=fresh,
            optimism=optimism,
        )
        self.population = population
        self.generations = generations
        self.mutation = mutation

    def _find(self, starts: Tensor, region: TrustRegion) -> Tensor:
        known = self._encoded(self.told.keys() | self._asked.keys())
        parents = int(self.PARENTS * self.population)
        drawn = draw(self.space, self.chances, max(self.population - len(starts), 0), self.generator)
        starts, population = (project_batch(wishes, self.space, self.bounds) for wishes in (starts, drawn))
        ranked = self._promising(torch.cat([starts, population]).unique(dim=0), region)
        for _ in range(self.generations):
            wishes = bred(
                ranked[:parents], self.population - parents, self.space, self.mutation, self.generator
            )
            children = project_batch(wishes, self.space, self.bounds)
            ranked = self._promising(torch.cat([starts, population, children]).unique(dim=0), region)
            new = ~(ranked.unsqueeze(1) == known).all(2).any(1)
            population = ranked[new][: self.population]
        return population
