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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nni_dbs.cost import Bounds
from nni_dbs.errors import ConfigError
from nni_dbs.guided import GuidedSearch, TrustRegion
from nni_dbs.predict import TransformerPredictor, budget_excess
from nni_dbs.space import Widths, WidthSpace


def over_budget(excess: Tensor) -> Tensor:
    """Penalty (N,) of `budget_excess` (N, I): its squares, where positive, summed over the limits."""
    return (F.relu(excess) ** 2).sum(-1)


def _stiffened(penalty: float, networks: Tensor, bounds: Bounds) -> float:
    """The penalty's weight, doubled (up to 100) where most networks (N, G) are over the budget."""
    return min(2 * penalty, 100.0) if bounds.fits_batch(networks).double().mean() < 0.5 else penalty


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


class DBSSearch(GuidedSearch):
    """The search of DBS, in rounds: evaluate, fit the predictor, search by gradient, evaluate again.

    The default of this package. Rounds, starting points, trust region and choice: see `GuidedSearch`.

    Args:
        space, bounds, seed: See `Searcher`.
        latent: Search by `latent_search`, in place of `relaxed_search`.
        predictor: Default: a `TransformerPredictor` of default sizes; the latent variant needs its `bounds`.
        points, starts, fresh, optimism: See `GuidedSearch`.
    """

    predictor: TransformerPredictor

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
        super().__init__(
            space,
            bounds,
            seed,
            points=points,
            predictor=predictor or TransformerPredictor(space, bounds if latent else None, seed=seed),
            starts=starts,
            fresh=fresh,
            optimism=optimism,
        )
        self.latent = latent
        if latent:
            _check_decoder(self.predictor)

    def _find(self, starts: Tensor, region: TrustRegion) -> Tensor:
        if self.latent:
            return latent_search(self.predictor, starts, self.bounds)
        return relaxed_search(self.predictor, starts, self.bounds, region=region)
