"""DMCP: channel pruning as differentiable Markov chains over the widths of the groups.

A group's channels are kept bin by bin: each bin with a learned probability, given that the one before was.
The output of every channel is multiplied by the probability that it is kept, so the task's loss and the
expected cost are differentiable functions of these probabilities. Here are the chains, their moments, the
gates, the budget's loss, and how networks are derived; training alternates between steps on the weights and
steps on the chains.

Source: Guo et al., DMCP: Differentiable Markov Channel Pruning for Neural Networks, CVPR 2020 (arXiv
2005.03354), and its reference code. From there are the chains, the bins, the expected cost, the shape and
weight of the budget's loss, and both ways to derive a network. Reconstructions: chains over any ascending
choices, the variance (the reference has no layer whose input and output are one group), several limits at
once, one-sided budgets, and the clamp of the logits. Bugs of the reference that are not repeated:

- the gradient of a depthwise layer's expected cost is counted twice;
- sampling a bottleneck draws the width of its 3x3 convolution from another group's chain;
- direct sampling draws until enough networks hit the budget, for ever if none does;
- the expected network is never compared with the budget;
- steps on the chains leave the statistics of their scaled activations in BatchNorm (`nni_dbs.bilevel`).

Here the step on the chains goes before that on the weights, where the reference has it after; and random
widths are drawn from the space's choices, where it rounds to multiples of 8.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_dbs.bilevel import ArchitectureSearch, ComputeLoss, check_architecture, cosine, scaled_rate
from nni_dbs.cost import Bounds, expected_cost
from nni_dbs.errors import ConfigError
from nni_dbs.projection import project_batch
from nni_dbs.sampling import Step
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import ChannelGroup

_CLAMP = 8.0  # sigmoid(8) = 0.9997: near enough to 1, and the gradient is not yet lost
_SLACK = 0.05  # of the budget, below it: where `budget_loss` is at rest
_STEPS = 25_000  # on the chains, in the reference's ImageNet training
_SPARE = 10  # samples to project for each network that is missing, as projections may coincide


def bins(channels: int, low: float, high: float, step: float) -> tuple[int, int]:
    """The paper's bins: channels of each bin, and channels that are always kept.

    Args:
        channels: Of the supernet's group, which is `high` times as wide as the base network's.
        low, high: Least and greatest width, relative to the base network: 0.1 and 1.0 for the paper's
            ResNets, 0.1 and 1.5 for its MobileNetV2.
        step: Width of a bin, relative to the base network: 0.1.

    Raises:
        ConfigError: Not 0 < low <= high, a step that is not positive, or no channel would always be kept.
    """
    if not (0 < low <= high and step > 0):
        raise ConfigError(f"DMCP's bins need 0 < low <= high and step > 0, not {low}, {high} and {step}")
    size = math.floor(step * channels / high)
    kept = channels - size * _number_of_bins(low, high, step)
    if kept < 1:
        raise ConfigError(f"DMCP's bins of {size} leave none of {channels} channels for good; raise low")
    return size, kept


def _number_of_bins(low: float, high: float, step: float) -> int:
    return math.floor((high - low) / step + 1e-4)


def paper_choices(
    group: ChannelGroup, low: float = 0.1, high: float = 1.0, step: float = 0.1
) -> tuple[int, ...]:
    """The widths that the paper's `bins` allow a group, ascending; a frozen group keeps its own.

    For `WidthSpace.among`, to get the paper's own space: `{g.name: paper_choices(g) for g in groups}`, and
    chains as long as it has choices. Groups with a step of their own (grouped convolutions) have their bins
    in units of it (a reconstruction).

    Args:
        group: The channel group.
        low, high, step: As in `bins`.

    Raises:
        ConfigError: As for `bins`.
    """
    size, kept = bins(group.size // group.step, low, high, step)
    if group.frozen is not None or not size:
        return (group.size,)
    return tuple(group.step * w for w in range(kept, group.size // group.step + 1, size))


class MarkovWidths(nn.Module):
    """A Markov chain over the widths of each group that has a choice; groups are independent.

    With a group's choices c_0 < ... < c_n, its first c_0 channels are always kept, and transition k = 1..n
    adds c_k - c_{k-1} channels with probability p_k = sigmoid(alpha_k), given that k - 1 took place. The
    marginal probability is pi_k = p_1 ... p_k. The paper's bins (`paper_choices`) have equal steps; unequal
    ones are a reconstruction. All logits begin at 0 as in the reference: with about one transition, so that
    the search starts near the narrowest network and grows. One small p_1 holds a whole group back, as later
    logits get their gradient through it.

    Keep it outside of the model: weight decay and the optimiser of the weights should not see it.

    Args:
        space: The allowed widths.
        limit: Most choices of a group that its chain visits (`WidthSpace.options`). The paper has at least
            10, its MobileNetV2 has 15.

    Attributes:
        alpha: Parameter (L, n) float64 for the L groups with a choice; entries beyond a group's own
            transitions have no effect and no gradient.
    """

    alpha: Tensor
    rows: Tensor  # (L,) which groups have a choice
    first: Tensor  # (G,) narrowest width
    growth: Tensor  # (L, n) channels that a transition adds, 0 in the padding
    channel: Tensor  # (sum C,) of each channel of the gated groups: its entry in `_bin_gates`

    def __init__(self, space: WidthSpace, limit: int = 10) -> None:
        super().__init__()
        self.space = space
        options = [space.options(name, limit) for name in space.names]
        length = max(map(len, options), default=1)
        padded = torch.tensor([[*o, *[o[-1]] * (length - len(o))] for o in options], dtype=torch.long)
        padded = padded.reshape(len(options), length)
        rows = torch.tensor([i for i, o in enumerate(options) if len(o) > 1], dtype=torch.long)
        self._gated = {g.name: g.size for g, o in zip(space.groups, options, strict=True) if o[0] < g.size}
        channel = [
            row * (length + 1) + torch.searchsorted(torch.tensor(o), torch.arange(g.size), right=True)
            for row, (g, o) in enumerate(zip(space.groups, options, strict=True))
            if g.name in self._gated
        ]
        for name, buffer in (
            ("rows", rows),
            ("first", padded[:, 0].clone()),
            ("growth", padded.diff(dim=1)[rows]),
            ("channel", torch.cat([torch.empty(0, dtype=torch.long), *channel])),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.alpha = nn.Parameter(torch.zeros(self.growth.shape, dtype=torch.float64))

    def marginals(self) -> Tensor:
        """pi (L, n) float64: the probability that each transition takes place; 0 in the padding.

        Added up as logarithms, so that long chains of small probabilities neither underflow early nor lose
        their gradients.
        """
        return F.logsigmoid(self.alpha.double()).cumsum(1).exp() * (self.growth > 0)

    def mean(self) -> Tensor:
        """E[c] = c_0 + sum_k pi_k (c_k - c_{k-1}) of every group's width, (G,) float64."""
        return self.first.double().index_add(0, self.rows, (self.marginals() * self.growth).sum(1))

    def variance(self) -> Tensor:
        """Var[c] of every group's width, (G,) float64; 0 without a choice.

        E[c^2] - E[c]^2 with E[c^2] = c_0^2 + sum_k pi_k (c_k^2 - c_{k-1}^2), which for equal steps is the
        E[N^2] = sum_k (2 k - 1) pi_k of N kept bins; computed about c_0, where less cancels.
        """
        pi = self.marginals()
        beyond = self.growth.cumsum(1)  # (L, n) c_k - c_0
        squares = beyond**2 - (beyond - self.growth) ** 2
        variance = (pi * squares).sum(1) - (pi * self.growth).sum(1) ** 2
        return torch.zeros_like(self.first, dtype=torch.float64).index_add(0, self.rows, variance)

    def gates(self, supernet: Supernet) -> dict[str, Tensor]:
        """Factors for `Supernet.gated`: the probability that each channel is kept; differentiable.

        1 for the c_0 channels that are always kept, pi_k for those of transition k, 0 beyond the widest
        choice. No sampling and no noise, as in the reference. The most important channels come first, by the
        supernet's order (the paper's nested widths: `prefix_order`).

        Returns:
            Group name -> (C,) float64 on the model's device; not for groups that are always at full width.
        """
        device = next(supernet.parameters()).device
        factors = self._bin_gates().flatten()[self.channel].to(device).split(list(self._gated.values()))
        return {name: supernet.by_rank(name, f) for name, f in zip(self._gated, factors, strict=True)}

    def _bin_gates(self) -> Tensor:
        """(G, n + 2): 1, pi_1 ... pi_n, 0."""
        pi = self.marginals()
        everywhere = pi.new_zeros(len(self.first), pi.shape[1]).index_copy(0, self.rows, pi)
        return F.pad(F.pad(everywhere, (1, 0), value=1.0), (0, 1))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Networks (n, G) float64, drawn from the chains, in the order of `WidthSpace.encode`.

        On the generator's device. Each group has one chain, which all its layers share.
        """
        device = generator.device
        p = torch.sigmoid(self.alpha.double()).to(device)
        drawn = torch.rand(n, *p.shape, generator=generator, dtype=torch.float64, device=device)
        kept = (drawn < p).long().cumprod(2)  # (n, L, n)
        networks = self.first.to(device).expand(n, -1)
        networks = networks.index_add(1, self.rows.to(device), (kept * self.growth.to(device)).sum(2))
        return networks.double()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Holds the logits within [-8, 8]; call it after every step on them.

        Where p_k saturates, its gradient pi_k (1 - p_k) vanishes and momentum carries the logit ever
        further. (Not in the reference.)
        """
        self.alpha.clamp_(-_CLAMP, _CLAMP)


def expected_costs(mean: Tensor, variance: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Each limit's expected cost and the most that it may be, (I,) float64 both; differentiable.

    FLOPs and parameters are exact expectations over independent groups (`PolynomialCost.expected`): a dense
    layer costs a E[c_in] E[c_out], a depthwise one a E[c], one within a group a E[c^2]. A user's own
    cost may be taken at the mean widths (`expected_cost`).

    Args:
        mean, variance: Of the widths (G,), in the order of `WidthSpace.encode`, as of `MarkovWidths`.
        bounds: The budget.
    """
    one = mean.unsqueeze(0)
    costs = [expected_cost(cost, one, variance.unsqueeze(0)) for _, cost, _ in bounds.limits]
    return torch.cat(costs), mean.new_tensor([most for _, _, most in bounds.limits])


def budget_loss(expected: Tensor, most: Tensor | float, weight: float = 0.1) -> Tensor:
    """What brings expected costs E just below their limits T: to be added to the task's loss.

    For E below 0.95 T: weight * log((T - E) / 0.05 T). It falls as E grows, so a step down the gradient
    1 / (E - T) < 0 widens the network. From 0.95 T up to T: 0. From T: weight * log((E - 0.95 T) / 0.05 T),
    with a gradient 1 / (E - 0.95 T) > 0 that narrows it. In any unit of cost, no gradient exceeds
    20 weight / T.

    This is `log_l1` of the reference code, whose gradients it has everywhere (the paper's log |E - T| is not
    bounded at T), up to a constant in each of its three parts, which makes it continuous and not negative.

    Several limits add up. Only the tightest one widens, as a network that uses one limit in full has reached
    its budget however far the others are (a reconstruction; with one limit it makes no difference).

    Args:
        expected, most: E and T, (I,) or scalars, as from `expected_costs`.
        weight: Of the loss, beside a mean cross-entropy; the reference's default.

    Returns:
        A scalar.
    """
    used = expected / most
    below = (used < 1 - _SLACK) & (used == used.max())
    above = used >= 1
    distance = torch.where(below, 1 - used, torch.where(above, used - (1 - _SLACK), _SLACK))
    return weight * (distance / _SLACK).log().sum()


def expected_widths(chains: MarkovWidths, bounds: Bounds) -> Widths:
    """The network of the expected widths ("expected sampling"): the paper's default, one for each search.

    Each mean goes to the space's nearest choice; projection repairs what is over the budget, and fills it.
    (The reference rounds to any width, and does not look at the budget again.)

    Raises:
        BudgetError: Not even the smallest network keeps the budget.
    """
    choices, _ = chains.space.padded_choices()
    nearest = (choices - chains.mean().detach().cpu().unsqueeze(1)).abs().argmin(1, keepdim=True)  # (G, 1)
    return chains.space.decode(project_batch(choices.gather(1, nearest).T, chains.space, bounds)[0])


def direct_samples(
    chains: MarkovWidths,
    bounds: Bounds,
    n: int = 5,
    *,
    generator: torch.Generator,
    tolerance: float = 0.02,
    batch: int = 1000,
    tries: int = 10,
) -> list[Widths]:
    """Different networks drawn from the chains, inside of the budget and close below it ("direct sampling").

    Use it in place of `expected_widths` where several networks can be evaluated, of which the best is a
    little better. The reference draws one network at a time and accepts those within 1 % of the budget, on
    both sides, without end. Here the window is as wide but ends at the budget, and after `tries` batches the
    samples that came closest to the budget are projected into it.

    Args:
        chains: After the search.
        bounds: The budget.
        n: Networks; fewer only if the samples lead to no more different ones.
        generator: Of the draws, on the CPU.
        tolerance: A sample is accepted if it uses at least 1 - tolerance of the budget.
        batch: Samples to draw at once.
        tries: Batches to draw at most.

    Returns:
        At least one network: accepted samples first, in the order in which they were drawn, then projected
        ones.

    Raises:
        BudgetError: Not even the smallest network keeps the budget.
        ConfigError: No network, sample or try is asked for, or a tolerance that is no share.
    """
    if min(n, batch, tries) < 1 or not 0 <= tolerance <= 1:
        raise ConfigError(
            "direct sampling needs at least 1 network, batch and try and a tolerance from 0 to 1, not "
            f"n={n}, batch={batch}, tries={tries}, tolerance={tolerance}"
        )
    space = chains.space
    found: dict[tuple[float, ...], None] = {}
    missed = []
    for _ in range(tries):
        networks = chains.sample(batch, generator)
        close = bounds.fits_batch(networks) & (bounds.used_batch(networks) >= 1 - tolerance)
        found |= _distinct(networks[close])
        missed.append(networks[~close])
        if len(found) >= n:
            break
    else:
        rest = torch.cat(missed)
        rest = rest[(bounds.used_batch(rest) - 1).abs().argsort(stable=True)]
        nearest = list(_distinct(rest))[: _SPARE * (n - len(found))]
        wishes = torch.tensor(nearest, dtype=torch.float64).reshape(len(nearest), len(space.groups))
        found |= _distinct(project_batch(wishes, space, bounds))
    return [space.decode(torch.tensor(widths)) for widths in list(found)[:n]]


def _distinct(networks: Tensor) -> dict[tuple[float, ...], None]:
    """Networks (N, G) without repetitions, in their order."""
    return dict.fromkeys(map(tuple, networks.tolist()))


class DMCPSearch(ArchitectureSearch):
    """DMCP's training: a sandwich of sub-networks for the weights; in the second half, steps on the chains.

    Each step trains the widest network on the labels, and by it the narrowest and two random ones. In the
    second half a step on the chains, on the same batch, goes before it; from then on a random network is
    drawn uniformly with probability exp(-t / 2), where t rises from 0 to 1 (the reference's decay over its
    ImageNet training), else from the chains. The chains' learning rate falls from `lr` to a fifth of it.

    Args:
        supernet: Of the model; `prefix_order` is the paper's, which trains from scratch.
        space, bounds: Allowed widths and budget.
        steps: On the weights, altogether.
        seed: Of the random networks.
        limit: See `MarkovWidths`.
        weight: Of the budget's loss.
        lr: Of the chains. Default: the reference's 0.5 for its 25,000 steps, and more for shorter searches
            (`scaled_rate`), up to 5.
    """

    bilevel = False

    def __init__(
        self,
        supernet: Supernet,
        space: WidthSpace,
        bounds: Bounds,
        *,
        steps: int,
        seed: int = 0,
        limit: int = 10,
        weight: float = 0.1,
        lr: float | None = None,
    ) -> None:
        check_architecture(limit=limit, lr=lr)
        self.chains = MarkovWidths(space, limit)
        self.lr = scaled_rate(0.5, steps // 2, _STEPS, most=5.0) if lr is None else lr
        optimizer = torch.optim.SGD(self.chains.parameters(), self.lr, momentum=0.9, nesterov=True)
        super().__init__(supernet, self.chains, optimizer, torch.Generator().manual_seed(seed))
        self.space = space
        self.bounds = bounds
        self.weight = weight

    def due(self, taken: int, progress: float) -> bool:
        return progress >= 0.5

    def weights_pass(self, progress: float) -> Step:
        random = self._random(progress), self._random(progress)
        return Step((self.space.largest(), self.space.smallest(), *random), distilled=True)

    def architecture_step(self, compute_loss: ComputeLoss, progress: float) -> None:
        self._set_rate(cosine(2 * progress - 1, self.lr, self.lr / 5))
        expected, most = expected_costs(self.chains.mean(), self.chains.variance(), self.bounds)
        with self.supernet.gated(self.chains.gates(self.supernet)):
            task = compute_loss()
            self._descend(task + budget_loss(expected, most, self.weight).to(task), task)
        self.chains.clamp_()
        self._record(progress, task, (expected / most).max())

    def networks(self, n: int) -> list[Widths]:
        """The expected network; of several, the others are drawn from the chains."""
        expected = expected_widths(self.chains, self.bounds)
        drawn = direct_samples(self.chains, self.bounds, n, generator=self.generator) if n > 1 else []
        return list(dict.fromkeys([expected, *drawn]))[:n]

    def _random(self, progress: float) -> Widths:
        uniform = math.exp(-max(2 * progress - 1, 0) / 2)
        if float(torch.rand((), generator=self.generator)) < uniform:
            return self.space.sample(self.generator)
        return self.space.decode(self.chains.sample(1, self.generator)[0])
