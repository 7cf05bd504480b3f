"""DBS: differentiable budget-aware search of widths.

Starting points near the budget are evaluated; predictors are fitted to them and frozen; the widths are then
optimised by gradient through the predictors, under the budget, from many starts in one batch, and decoded to
networks again. Rounds of evaluating, refitting and searching follow.

Source: the DBS abstract and poster. Known from there are the starting points of similar budget, their
training by the strict path-wise fair sandwich rule, Transformer predictors of accuracy and budget, and that
gradients search on continuous vectors of sub-networks with both frozen, which a decoder maps back. Everything
else is a reconstruction: two variants of the continuous vector, all sizes and steps, projection, rounds and
the final choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nni_dbs.cost import Bounds
from nni_dbs.errors import ConfigError
from nni_dbs.pool import draw, starting_points
from nni_dbs.predict import FEWEST, TransformerPredictor, budget_excess, kendall_tau, posterior
from nni_dbs.projection import project_batch
from nni_dbs.search import Searcher
from nni_dbs.space import Widths, WidthSpace

_POLISH = 3  # rounds of looking around what the gradient found, by the predictor
_AROUND = 8  # networks of such a round


def over_budget(excess: Tensor) -> Tensor:
    """Penalty (N,) of `budget_excess` (N, I): its squares, where positive, summed over the limits."""
    return (F.relu(excess) ** 2).sum(-1)


def _stiffened(penalty: float, networks: Tensor, bounds: Bounds) -> float:
    """The penalty's weight, doubled (up to 100) where most networks (N, G) are over the budget."""
    return min(2 * penalty, 100.0) if bounds.fits_batch(networks).double().mean() < 0.5 else penalty


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


def relaxed_search(
    predictor: TransformerPredictor,
    starts: Tensor,
    bounds: Bounds,
    *,
    steps: int = 60,
    lr: float = 0.2,
    every: int = 5,
    penalty: float = 5.0,
    region: TrustRegion | None = None,
) -> Tensor:
    """Gradient search on relaxed widths: each group's options as the softmax of free logits.

    Its points are mixtures of the tokens of real options, so it stays where the predictor was trained, it
    needs no decoder, and the budget's costs are exact functions of them. The temperature falls from 1 to 0.2;
    every few steps the options of greatest weight are taken down. The penalty doubles (up to 100) whenever
    most of these are over the budget. (Reconstruction; the recommended variant.)

    Args:
        predictor: Fitted.
        starts: Networks (S, G), all optimised in one batch.
        bounds: The budget.
        steps, lr: Of Adam.
        every: Steps between decodings.
        penalty: Weight of `over_budget` at first.
        region: What lies outside costs the square of its excess, of the same weight.

    Returns:
        Different networks (M, G) near the budget, not projected into it.
    """
    options = predictor.options
    logits = (3 * options.encode(starts)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    found = []
    for step in range(1, steps + 1):
        p = torch.softmax((logits / 0.2 ** (step / steps)).masked_fill(~options.valid, -torch.inf), 2)
        excess = budget_excess(options.relaxed(p), bounds)
        price = over_budget(excess)
        if region is not None:
            price = price + region.excess(options.log_ratio(p)) ** 2
        objective = predictor.standardised(p).mean - penalty * price
        (logits.grad,) = torch.autograd.grad(-objective.sum(), logits)
        optimizer.step()
        if step % every == 0:
            decoded = options.nearest(p.detach())
            found.append(decoded)
            penalty = _stiffened(penalty, decoded, bounds)
    return torch.cat(found).unique(dim=0)


def latent_search(
    predictor: TransformerPredictor,
    starts: Tensor,
    bounds: Bounds,
    *,
    rounds: int = 8,
    ladder: int = 50,
    step: float = 0.1,
    penalty: float = 5.0,
) -> Tensor:
    """Gradient search on the encoder's features, as DBS has it, and the decoder from them to networks.

    The features leave what the decoder knows when they move far, and it gives back the network that they
    began with when they do not. So, in each round: from each network one gradient, with respect to its
    features, of the predicted score less the penalty of the budget head; features along it, 1, 2, 3, ...
    steps away, each token at its length, until they decode to another network (NAO's ladder); and that
    network, encoded again, is where the next round begins. (Reconstruction; use it for fidelity to DBS,
    `relaxed_search` for results.)

    Args:
        predictor: Fitted, with the budget head and the decoder (its `bounds`).
        starts: Networks (S, G); each member of the ensemble searches from all of them.
        bounds: The budget.
        rounds: Networks to find from each start.
        ladder: Most steps of a round.
        step: Length of a step, relative to the tokens.
        penalty: As in `relaxed_search`, of what the budget head says.

    Returns:
        Different networks (M, G), not projected into the budget.

    Raises:
        ConfigError: The predictor has no decoder.
    """
    _check_decoder(predictor)
    network, options = predictor.network, predictor.options
    members, (groups, _) = predictor.members, options.shape
    with torch.no_grad():
        chosen = network.decode(network(options.encode(starts).float())).argmax(3)  # (E, S, L)
    scale = torch.arange(1, ladder + 1).reshape(-1, 1, 1, 1, 1) * step  # (R, 1, 1, 1, 1)
    found = []
    for _ in range(rounds):
        h = _encoded_by_member(predictor, chosen).requires_grad_()  # (E, S, L, dim)
        relaxed = torch.softmax(network.decode(h), 3)
        score = network.accuracy(h)
        if predictor.trend is not None:
            trend, _ = predictor.trend(options.log_ratio(relaxed.flatten(0, 1)))
            score = score + trend.reshape(members, -1)
        objective = score - penalty * over_budget(network.budget(h))
        (slope,) = torch.autograd.grad(objective.sum(), h)
        with torch.no_grad():
            length = h.norm(dim=3, keepdim=True)
            slope = slope / (slope.norm(dim=3, keepdim=True).amax(2, keepdim=True) + 1e-12)
            rungs = F.normalize(h + scale * length * slope, dim=4) * length  # (R, E, S, L, dim)
            decoded = network.decode(rungs.transpose(0, 1)).argmax(4)  # (E, R, S, L)
            new = (decoded != chosen.unsqueeze(1)).any(3)  # (E, R, S)
            first = new.float().argmax(1)  # (E, S) the lowest rung that is new, else the first
            index = first.reshape(members, 1, -1, 1).expand(-1, -1, -1, groups)
            chosen = decoded.gather(1, index).squeeze(1)
        networks = options.nearest(options.one_hot(chosen.flatten(0, 1)))
        found.append(networks)
        penalty = _stiffened(penalty, networks, bounds)
    return torch.cat(found).unique(dim=0)


def _check_decoder(predictor: TransformerPredictor) -> None:
    if predictor.bounds is None:
        raise ConfigError("the latent search needs a decoder: make the TransformerPredictor with bounds=")


def _encoded_by_member(predictor: TransformerPredictor, chosen: Tensor) -> Tensor:
    """Features (E, S, L, dim) of each member's own networks, given as options (E, S, L)."""
    members, starts, _ = chosen.shape
    with torch.no_grad():
        h = predictor.network(predictor.options.one_hot(chosen.flatten(0, 1)).float())  # (E, E * S, L, dim)
    h = h.unflatten(1, (members, starts))
    return h[torch.arange(members), torch.arange(members)]


class DBSSearch(Searcher):
    """The search of DBS, in rounds: evaluate, fit the predictor, search by gradient, evaluate again.

    The default of this package. The first networks that it asks for are the starting points; from then on
    each `ask` fits the predictor to all that was told, and returns the networks that the frozen predictor
    promises most of, first those inside of the `TrustRegion`. Its radius is at first the median distance from
    a network to its nearest; it doubles when the next networks score what was predicted, within a standard
    deviation (until the region is the whole space), and is halved when they do not. Ask for few at a time:
    every round learns from the one before. `best` goes by the predictor fitted to all measurements, not by
    the luckiest measurement.

    Args:
        space, bounds, seed: See `Searcher`.
        points: Starting points: networks, or how many to draw (`starting_points`).
        latent: Search by `latent_search`, in place of `relaxed_search`.
        predictor: Default: a `TransformerPredictor` of default sizes; the latent variant needs its `bounds`.
        starts: Known networks, the best by prediction, that the gradient starts from in each round.
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
        latent: bool = False,
        predictor: TransformerPredictor | None = None,
        starts: int = 24,
        fresh: int = 8,
        optimism: float = 1.0,
    ) -> None:
        super().__init__(space, bounds, seed)
        if isinstance(points, int):
            points = starting_points(space, bounds, points, self.generator)
        self.points = [self._checked(widths, "a starting point of DBS") for widths in points]
        if not self.points:
            raise ConfigError("DBS needs starting points: give networks, or how many to draw")
        self._points = set(self.points)
        self.latent = latent
        self.predictor = predictor or TransformerPredictor(space, bounds if latent else None, seed=seed)
        if latent:
            _check_decoder(self.predictor)
        self.starts = starts
        self.fresh = fresh
        self.optimism = optimism
        self.fits: list[dict[str, float]] = []
        self.radius = torch.inf
        self._fitted: dict[Widths, float] = {}
        self.held_out = (torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool))

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
        if self.latent:
            found = latent_search(self.predictor, starts, self.bounds)
        else:
            found = relaxed_search(self.predictor, starts, self.bounds, region=region)
        found = project_batch(found, self.space, self.bounds).unique(dim=0)
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
