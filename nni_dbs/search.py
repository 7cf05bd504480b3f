"""Searchers: they are asked for networks inside of a budget, and told what these score.

    searcher = EvolutionSearch(space, bounds, seed=0)
    for widths in searcher.ask(8):
        searcher.tell(widths, evaluate(widths))
    searcher.best()

All have this interface, so that a pruner, an NNI tuner or a plain loop drives any of them; that of DBS is in
`nni_dbs.algorithms.dbs`, and those here are its peers. What is asked lies inside of the budget by projection,
never by a rejection loop, and nothing is asked twice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nni_dbs.cost import Bounds
from nni_dbs.errors import BudgetError, ConfigError, TrainingError
from nni_dbs.pool import draw, draw_evenly, tilted
from nni_dbs.projection import project_batch
from nni_dbs.space import Widths, WidthSpace
from torch_pruning_adapters import WidthError, check_widths

_TRIES = 4
_FEW = 32


class Searcher(ABC):
    """Proposes networks and learns from their scores (higher is better).

    Args:
        space: Of all that is proposed.
        bounds: The budget.
        seed: The same seed and the same scores give the same proposals.

    Attributes:
        told: Network -> score, in the order of telling.

    Raises:
        BudgetError: Not even the smallest network keeps the budget.
    """

    def __init__(self, space: WidthSpace, bounds: Bounds, seed: int = 0) -> None:
        bounds.check_reachable(space.smallest(), space.largest())
        self.space = space
        self.bounds = bounds
        self.generator = torch.Generator().manual_seed(seed)
        self.told: dict[Widths, float] = {}
        self._asked: dict[Widths, str] = {}
        self._rounds = 0

    @cached_property
    def chances(self) -> Tensor:
        """Of each group's choices (G, K), tilted towards the budget."""
        return tilted(self.space, self.bounds)

    def ask(self, n: int = 1) -> list[Widths]:
        """Up to n new networks, to be evaluated; fewer, or none, where the budget has no more to offer."""
        if n < 1:
            return []
        found: dict[Widths, None] = {}
        for source in (self._propose, *[self._anything] * _TRIES):
            for widths in source(n - len(found)):
                if widths not in self._asked and widths not in self.told and len(found) < n:
                    found[widths] = None
            if len(found) == n:
                break
        self._rounds += 1
        self._asked |= {widths: self._stage(widths) for widths in found}
        return list(found)

    def tell(self, widths: Mapping[str, int], score: float) -> None:
        """Learns a score; also of networks that were never asked for, such as those of an earlier run.

        Raises:
            TrainingError: The score is NaN or infinite.
            BudgetError: The network is over the budget.
            WidthError: The network is not one of the space.
        """
        if not math.isfinite(score):
            raise TrainingError(
                f"a network scored {score}; look at the loss, and leave out what cannot be evaluated"
            )
        self.told[self._checked(widths, "a network that was told")] = float(score)

    def fit(self) -> None:  # noqa: B027  # not abstract: only a searcher with a predictor has use for it
        """Learns from all that was told, where that takes time; ends a round."""

    def best(self) -> Widths:
        """The network to keep: the first of `ranked`."""
        return self.ranked()[0]

    def ranked(self) -> list[Widths]:
        """All networks that were told, the best first.

        Raises:
            TrainingError: Nothing was told.
        """
        if not self.told:
            raise TrainingError("no network was evaluated yet, so none can be chosen")
        return self._by_quality()

    def _by_quality(self) -> list[Widths]:
        """All networks that were told, the best first: by their scores."""
        return sorted(self.told, key=self.told.__getitem__, reverse=True)

    def stage(self, widths: Widths) -> str:
        """What a network was asked for as, for records and pictures."""
        return self._asked.get(widths, "told")

    def state_dict(self) -> dict[str, Any]:
        """All that proposals depend on."""
        return {
            "told": [(dict(widths), score) for widths, score in self.told.items()],
            "asked": [(dict(widths), stage) for widths, stage in self._asked.items()],
            "rounds": self._rounds,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of a searcher that was made alike."""
        self.told = {Widths(widths): score for widths, score in state["told"]}
        self._asked = {Widths(widths): stage for widths, stage in state["asked"]}
        self._rounds = state["rounds"]
        self.generator.set_state(state["generator"])

    @abstractmethod
    def _propose(self, n: int) -> Sequence[Widths]:
        """About n networks inside of the budget; `ask` leaves out those that are known."""

    def _stage(self, widths: Widths) -> str:
        return f"round {self._rounds}"

    def _anything(self, n: int) -> list[Widths]:
        """Where a searcher has no new ideas: networks near the budget, at random."""
        near = draw(self.space, self.chances, max(2 * n, _FEW), self.generator)
        anywhere = draw_evenly(self.space, len(near), self.generator)
        return self._projected(torch.cat([near, anywhere]))

    def _checked(self, widths: Mapping[str, int], what: str) -> Widths:
        """A user's network of the space and inside of the budget, with all its groups."""
        check_widths(self.space.groups, widths)
        network = self.space.decode(self.space.encode(widths))
        if network not in self.space:
            raise WidthError(f"{what} is not of the space; its widths must be choices")
        if not self.bounds.fits(network):
            raise BudgetError(f"{what} is over the budget; only networks inside of it can be chosen")
        return network

    def _projected(self, wishes: Tensor) -> list[Widths]:
        """Wishes (N, G) as networks, without repetitions."""
        return self._decoded(project_batch(wishes, self.space, self.bounds))

    def _around(self, networks: Tensor) -> Tensor:
        """Networks (M, G) inside of the budget that differ from given ones (N, G) by an option of a group."""
        parts = [neighbours(network, self.space) for network in networks]
        wishes, keep = (torch.cat(columns) for columns in zip(*parts, strict=True))
        possible = self.bounds.fits_batch(wishes.where(keep, self.space.encode(self.space.smallest())))
        return project_batch(wishes[possible], self.space, self.bounds, keep[possible])

    def _encoded(self, networks: Iterable[Mapping[str, int]]) -> Tensor:
        """(N, G) as `WidthSpace.encode`."""
        return torch.stack([self.space.encode(widths) for widths in networks])

    def _decoded(self, networks: Tensor) -> list[Widths]:
        """Networks (N, G) in their order, without repetitions."""
        return list(dict.fromkeys(self.space.decode(row) for row in networks))


class RandomSearch(Searcher):
    """Random shapes, each as large as the budget allows.

    The search that others have to beat at equal numbers of evaluations.
    """

    def _propose(self, n: int) -> Sequence[Widths]:
        return self._projected(self._encoded(self.space.sample(self.generator) for _ in range(n)))


class PriorSearch(Searcher):
    """Networks near the budget: each group's choices with the chances that `tilted` gives them.

    The prior distribution of PSE-Net (arXiv 2408.16233), projected to fill the budget; it learns nothing.
    """

    def _propose(self, n: int) -> Sequence[Widths]:
        return self._projected(draw(self.space, self.chances, n, self.generator))


class EvolutionSearch(Searcher):
    """Mutation and crossover of the best networks, after a random generation.

    As MetaPruning and Once-for-All search, with projection in place of rejection. Needs no model of the
    scores; good within a few dozen evaluations, then it improves slowly.

    Args:
        space, bounds, seed: See `Searcher`.
        initial: Networks before evolution begins.
        parents: The best so many breed.
        mutation: Chance that a group of a mutant is drawn anew (at least one is).
        prior: Chances (G, K) of each group's choices, as `nni_dbs.pool.tilted` gives them: the first
            generation, and what is drawn anew, have these, as PSE-Net's prior-distribution sampling (arXiv
            2408.16233; a reconstruction). Use it where something is known of the choices before the search,
            such as their losses in the training of the supernet. Default: the first generation lies near the
            budget, and all choices are drawn with the same chance.

    Raises:
        ConfigError: An option out of its range, or chances that are not of the space.
    """

    def __init__(
        self,
        space: WidthSpace,
        bounds: Bounds,
        seed: int = 0,
        *,
        initial: int = 16,
        parents: int = 8,
        mutation: float = 0.1,
        prior: Tensor | None = None,
    ) -> None:
        if initial < 0 or parents < 1 or not 0 <= mutation <= 1:
            raise ConfigError("initial must be at least 0, parents at least 1, and mutation lie in [0, 1]")
        if prior is not None:
            _check_chances(prior, space)
        super().__init__(space, bounds, seed)
        self.initial = initial
        self.parents = parents
        self.mutation = mutation
        self.prior = prior

    def _propose(self, n: int) -> Sequence[Widths]:
        if not self.told:
            return self._first(n)
        known = len(self.told.keys() | self._asked.keys())
        random = min(max(self.initial - known, 0), n)
        best = self._by_quality()[: self.parents]
        children = self._bred(self._encoded(best), 2 * (n - random))
        return [*(self._first(random)[:random] if random else []), *children]

    def _first(self, n: int) -> list[Widths]:
        """n or more networks of the first generation."""
        if self.prior is None:
            return self._anything(n)
        return self._projected(draw(self.space, self.prior, max(2 * n, _FEW), self.generator))

    def _bred(self, parents: Tensor, n: int) -> list[Widths]:
        """n children of parents (P, G), fewer if some are alike."""
        return self._projected(bred(parents, n, self.space, self.mutation, self.generator, self.prior))


class GreedySearch(Searcher):
    """Hill climbing from the uniform network: the neighbours of the best network, then of the next best.

    A neighbour has one group one option wider or narrower, and the others scaled to fill the budget. Cheap
    steps and a local optimum; for spaces of few groups.
    """

    def _propose(self, n: int) -> Sequence[Widths]:
        uniform = self._projected(self.space.encode(self.space.largest()).unsqueeze(0))
        if not self.told:
            return [*uniform, *self._neighbours(uniform[0])]
        proposals: dict[Widths, None] = {}
        for widths in self._by_quality():
            new = (w for w in self._neighbours(widths) if w not in self._asked and w not in self.told)
            proposals |= dict.fromkeys(new)
            if len(proposals) >= n:
                break
        return list(proposals)

    def _neighbours(self, widths: Widths) -> list[Widths]:
        around = self._around(self._encoded([widths]))
        return self._decoded(around[torch.randperm(len(around), generator=self.generator)])


def bred(
    parents: Tensor,
    n: int,
    space: WidthSpace,
    mutation: float,
    generator: torch.Generator,
    prior: Tensor | None = None,
) -> Tensor:
    """Children (n, G) of networks (P, G), in turns by mutation and by crossover; not projected.

    Args:
        parents: Of a mutant any one, of a crossover any two; each width of it is that of either.
        n: Children.
        space: Of the widths.
        mutation: Chance that a group of a mutant is drawn anew; one that has a choice always is.
        generator: Of all that is drawn.
        prior: Chances (G, K) of the choices that are drawn, as `tilted` gives them. Default: all alike.
    """
    if n == 0:
        return parents[:0]
    free = space.padded_choices()[1] > 1
    first = parents[torch.randint(len(parents), (n,), generator=generator)]
    second = parents[torch.randint(len(parents), (n,), generator=generator)]
    changed = torch.rand(first.shape, generator=generator) < mutation
    if free.any():
        one = torch.multinomial(free.float(), n, replacement=True, generator=generator)
        changed[torch.arange(n), one] = True
    genes = draw_evenly(space, n, generator) if prior is None else draw(space, prior, n, generator)
    mutants = first.where(~changed, genes)
    crossed = first.where(torch.rand(first.shape, generator=generator) < 0.5, second)
    alternate = (torch.arange(n) % 2 == 0).unsqueeze(1)
    return mutants.where(alternate, crossed)


def neighbours(network: Tensor, space: WidthSpace) -> tuple[Tensor, Tensor]:
    """Wishes (N, G) one option of one group away from a network (G,), and which group that is, (N, G)."""
    wishes, columns = [], []
    for column, name in enumerate(space.names):
        width = float(network[column])
        options = space.options(name)
        below = [w for w in options if w < width][-1:]
        above = [w for w in options if w > width][:1]
        for option in (*below, *above):
            wish = network.clone()
            wish[column] = option
            wishes.append(wish)
            columns.append(column)
    if not wishes:
        return network.new_empty(0, len(network)), torch.empty(0, len(network), dtype=torch.bool)
    keep = torch.zeros(len(wishes), len(network), dtype=torch.bool)
    keep[torch.arange(len(wishes)), columns] = True
    return torch.stack(wishes), keep


def _check_chances(chances: Tensor, space: WidthSpace) -> None:
    choices, _ = space.padded_choices()
    expected = tuple(choices.shape)
    if tuple(chances.shape) != expected:
        raise ConfigError(
            f"prior: expected chances of shape {expected} (groups, choices), not {tuple(chances.shape)}"
        )
    there = choices.isfinite()
    if not (torch.isfinite(chances) & (chances >= 0)).all() or (chances[~there] != 0).any():
        raise ConfigError("prior: chances must be finite and not negative, and 0 where a group has no choice")
    if not (chances.sum(1) > 0).all():
        raise ConfigError("prior: every group needs a choice with a chance above 0")
