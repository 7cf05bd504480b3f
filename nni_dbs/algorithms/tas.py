"""TAS: widths and depths as distributions over candidates, learnt in a network that runs several at once.

Each group has logits over candidate widths, and each stage of residual blocks over candidate depths. In a
step two widths of each group are drawn, by noise that falls with a temperature; every layer of the group
computes both, interpolates them to the same number of channels and adds them up by their weights. A stage
adds up its outputs at all candidate depths. The task's loss then has a gradient with respect to the logits,
and so has the expected cost. Training alternates between steps on the weights and, on the other half of the
training data, steps on the logits; the network of the most probable widths and depths is trained anew, taught
by the unpruned one (`nni_dbs.training.distillation_loss`). An update is

    tau = cosine_temperature(progress)
    with supernet.sampled(widths.sample(tau, generator), depths.sample(tau, generator)):
        loss = criterion(model(x), y)
    loss.backward()                                          # to supernet.parameters()

or, to the logits, of `loss + 2 * cost_loss(*expected_costs(widths, depths, bounds))`. `decode` gives networks
inside of the budget, and `TASSupernet.adopt` hands a network's BatchNorms to the model.

Source: Dong & Yang, Network Pruning via Transformable Architecture Search, NeurIPS 2019 (arXiv 1905.09717),
and its public code. From there are candidates, sampling, interpolation, a BatchNorm for every width, the loss
of the expected cost, and both schedules of the temperature.

A generalisation: the paper has logits for every convolution, sums of different widths add on their common
channels, and the final ResNet gets extra shortcuts where they differ. Here coupled layers share one draw, so
that any network can be searched, its sums and concatenations fit, and nothing has to be inserted. A layer
within one group then costs E[c^2], not E[c]^2. A removed block has width 0 in the groups inside of it.

The paper's way for ResNets, whose blocks narrow their sums freely, is not here.

Reconstructions: candidates spread evenly over any space's choices (the paper's own are `paper_choices`),
several limits at once, projection into the budget, groups with a step of their own, layers
without a BatchNorm of their own (`TASSupernet`), stages of any network (`find_stages`). Quirks of the code
that are not repeated:

- a table of layers x 8 logits, which fails where small layers have fewer than 8 different candidates;
- the cost loss narrows from just above the target, but widens only from a distance measured in the full
  network's cost; the paper's band is symmetric and relative to the target;
- the found network may lie above the target by several per cent;
- the full convolution runs, whatever was drawn: here it runs on the wider of the two widths.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from nni_dbs.algorithms.tas_supernet import Pair, Stage, TASSupernet, single
from nni_dbs.bilevel import (
    ArchitectureSearch,
    ComputeLoss,
    check_architecture,
    cosine,
    entries_below,
    scaled_rate,
)
from nni_dbs.cost import Bounds, expected_cost
from nni_dbs.errors import ConfigError, TrainingError
from nni_dbs.projection import FULL, project_batch
from nni_dbs.space import ROUNDING, Widths, WidthSpace
from torch_pruning_adapters import ChannelGroup
from torch_pruning_adapters.importance import Order

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""The candidates of the public code, relative to the full width."""

_FLOOR = 1e-7  # added to every probability, so that two candidates can always be drawn
_STEPS = 58_800  # of the public code: 600 epochs of CIFAR's first half in batches of 256
_TINY = torch.finfo(torch.float64).tiny


def candidates(channels: int, ratios: Sequence[float] = RATIOS, step: int = 1) -> tuple[int, ...]:
    """The paper's candidate widths, ascending and without repetitions: 16 -> 4, 6, 8, 9, 11, 12, 14, 16.

    For `WidthSpace.among`, to get the paper's own space:
    `{g.name: candidates(g.size, step=g.step) for g in groups if g.frozen is None}`.

    Args:
        channels: Full width.
        ratios: In (0, 1]. Products are rounded down, but not below one step.
        step: Widths are multiples of it (a reconstruction for grouped convolutions).

    Raises:
        ConfigError: No ratio, or one that is not in (0, 1].
    """
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise ConfigError(f"candidate widths need ratios above 0 and up to 1, not {tuple(ratios)}")
    steps = {max(math.floor(ratio * channels / step + ROUNDING), 1) for ratio in ratios}
    return tuple(step * n for n in sorted(steps))


def paper_choices(group: ChannelGroup) -> tuple[int, ...]:
    """The paper's `candidates` of a group; a frozen one keeps its width. For `choices` of a pruner."""
    return (group.size,) if group.frozen is not None else candidates(group.size, step=group.step)


def linear_temperature(progress: float, first: float = 10.0, last: float = 0.1) -> float:
    """The paper's temperature at `progress` in [0, 1]."""
    return first + (last - first) * progress


def cosine_temperature(progress: float, first: float = 5.0, last: float = 0.1) -> float:
    """The public code's temperature at `progress` in [0, 1]."""
    return cosine(progress, first, last)


class WidthLogits(nn.Module):
    """Logits over the candidate widths of each group that has a choice; groups are independent.

    Keep it outside of the model: it has an optimiser of its own (in the public code Adam with a learning rate
    of 0.001, betas 0.5 and 0.999 and a weight decay of 0.001).

    Args:
        space: The allowed widths.
        limit: Most candidates of a group (`WidthSpace.options`); the public code has 8.
        std: Standard deviation of the first logits.
        generator: Draws them.

    Attributes:
        space: As above; G groups.
        candidates: Name of each group -> its candidates, ascending.
        alpha: Parameter (L, K) float64 for the L groups with a choice; entries beyond a group's own
            candidates have no effect and no gradient.
    """

    rows: Tensor  # (L,) which groups have a choice
    widths: Tensor  # (L, K) candidates, 0 in the padding
    fixed: Tensor  # (G,) float64 narrowest candidates

    def __init__(
        self, space: WidthSpace, limit: int = 8, std: float = 0.01, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.space = space
        self.candidates = {name: space.options(name, limit) for name in space.names}
        free = {name: c for name, c in self.candidates.items() if len(c) > 1}
        self._free = list(free)
        rows = [space.names.index(name) for name in free]
        fixed = [c[0] for c in self.candidates.values()]
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.long), persistent=False)
        self.register_buffer("widths", _padded(list(free.values())), persistent=False)
        self.register_buffer("fixed", torch.tensor(fixed, dtype=torch.float64), persistent=False)
        self.alpha = _first_logits(self.widths, std, generator)

    def probabilities(self) -> Tensor:
        """softmax(alpha), (L, K) float64; 0 in the padding. Without noise and temperature."""
        return _softmax(self.alpha, self.widths > 0)

    def mean(self) -> Tensor:
        """E[c] of every group's width, (G,) float64, in the order of `WidthSpace.encode`."""
        return self.fixed.index_copy(0, self.rows, (self.probabilities() * self.widths).sum(1))

    def variance(self) -> Tensor:
        """Var[c] of every group's width, (G,) float64; 0 without a choice. For `PolynomialCost.expected`."""
        p = self.probabilities()
        mean = (p * self.widths).sum(1, keepdim=True)
        variance = (p * (self.widths - mean) ** 2).sum(1)
        return torch.zeros_like(self.fixed).index_copy(0, self.rows, variance)

    def sample(self, tau: float, generator: torch.Generator) -> dict[str, Pair]:
        """Two different candidates of each group, and their weights, through which alpha gets its gradient.

        With Gumbel noise g, the candidates are drawn without replacement from softmax((alpha + g) / tau),
        and their two noisy logits' softmax weighs them. (The paper has log softmax(alpha) for alpha; the
        difference is a constant, which cancels.) So only the logits of drawn candidates get a gradient, equal
        and opposite. At high temperatures all pairs are drawn alike and weigh alike; at low ones the most
        probable candidate is nearly always one of them and weighs nearly everything.

        Args:
            tau: Temperature, see `linear_temperature`.
            generator: Of noise and draws, on any device. Under `DistributedDataParallel` all ranks need equal
                ones.

        Returns:
            Name of every group -> pair; a single candidate comes twice.

        Raises:
            ConfigError: A temperature that is not positive.
            TrainingError: Logits that are not finite.
        """
        pairs = single({name: c[0] for name, c in self.candidates.items()})
        noisy = _noisy(self.alpha, tau, generator)  # (L, K)
        if not self._free:
            return pairs
        p = (_softmax(noisy.detach(), self.widths > 0) + _FLOOR) * (self.widths > 0)
        drawn = torch.multinomial(p.to(generator.device), 2, generator=generator).to(noisy.device)  # (L, 2)
        weights = noisy.gather(1, drawn).softmax(1)  # (L, 2)
        for name, (a, b), w in zip(self._free, self.widths.gather(1, drawn).tolist(), weights, strict=True):
            pairs[name] = Pair((a, b), w)
        return pairs

    @torch.no_grad()
    def most_probable(self) -> Tensor:
        """The network of each group's most probable width, (G,) float64. The paper's result."""
        best = self.widths.gather(1, self.probabilities().argmax(1, keepdim=True))  # (L, 1)
        return self.fixed.index_copy(0, self.rows, best.flatten().double())

    @torch.no_grad()
    def networks(self, n: int, generator: torch.Generator) -> Tensor:
        """Networks (n, G) float64 drawn from softmax(alpha), to evaluate several. (A reconstruction.)"""
        drawn = _draws(self.probabilities(), n, generator)  # (L, n)
        return self.fixed.repeat(n, 1).index_copy(1, self.rows, self.widths.gather(1, drawn).T.double())


class DepthLogits(nn.Module):
    """Logits over the candidate depths of each stage; stages are independent of each other and of widths.

    Keep it outside of the model, with `WidthLogits` in one optimiser. Without stages, widths alone are
    searched.

    Args:
        stages: From `find_stages`; S of them.
        std: Standard deviation of the first logits.
        generator: Draws them.

    Attributes:
        stages: As above.
        beta: Parameter (S, D) float64; entries beyond a stage's own candidates have no effect and no
            gradient.
    """

    depths: Tensor  # (S, D) candidates, 0 in the padding

    def __init__(
        self, stages: Iterable[Stage] = (), std: float = 0.01, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.register_buffer("depths", _padded([stage.depths for stage in self.stages]), persistent=False)
        self.beta = _first_logits(self.depths, std, generator)

    def probabilities(self) -> Tensor:
        """softmax(beta), (S, D) float64; 0 in the padding. Without noise and temperature."""
        return _softmax(self.beta, self.depths > 0)

    def presence(self) -> dict[str, Tensor]:
        """Name of each stage's block -> () probability that it stays. For `PolynomialCost.expected`."""
        tail = self.probabilities().flip(1).cumsum(1).flip(1)  # (S, D) of at least that depth
        return {
            block: row[bisect_left(stage.depths, number)]
            for stage, row in zip(self.stages, tail, strict=True)
            for number, block in enumerate(stage.blocks, 2)
        }

    def sample(self, tau: float, generator: torch.Generator) -> dict[str, Tensor]:
        """Name of each stage -> (D,) weights of all its candidates, adding up to 1; differentiable.

        softmax((beta + g) / tau) with Gumbel noise g. As in the paper, no candidates are drawn: the blocks
        run anyway. Arguments and errors as for `WidthLogits.sample`.
        """
        weights = _softmax(_noisy(self.beta, tau, generator), self.depths > 0)
        return {stage.name: w[: len(stage.depths)] for stage, w in zip(self.stages, weights, strict=True)}

    @torch.no_grad()
    def most_probable(self) -> Tensor:
        """The most probable depth of each stage, (S,) long. The paper's result."""
        return self.depths.gather(1, self.probabilities().argmax(1, keepdim=True)).flatten()

    @torch.no_grad()
    def networks(self, n: int, generator: torch.Generator) -> Tensor:
        """Depths (n, S) long drawn from softmax(beta). (A reconstruction.)"""
        return self.depths.gather(1, _draws(self.probabilities(), n, generator)).T

    def removed(self, depths: Tensor) -> tuple[str, ...]:
        """The blocks that are left out at these depths (S,), as for `WidthSpace.without`."""
        return tuple(
            block for s, depth in zip(self.stages, depths.tolist(), strict=True) for block in s.removed(depth)
        )


def _padded(candidates: Sequence[Sequence[int]]) -> Tensor:
    """(L, K) long, padded by 0."""
    length = max(map(len, candidates), default=1)
    return torch.tensor([[*c, *[0] * (length - len(c))] for c in candidates]).reshape(-1, length).long()


def _first_logits(candidates: Tensor, std: float, generator: torch.Generator) -> nn.Parameter:
    device = generator.device
    noise = torch.randn(candidates.shape, generator=generator, dtype=torch.float64, device=device)
    return nn.Parameter(std * noise.cpu())


def _softmax(logits: Tensor, valid: Tensor) -> Tensor:
    return logits.double().masked_fill(~valid, -torch.inf).softmax(1)


def _noisy(logits: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """(logits + Gumbel noise) / tau, float64."""
    if not tau > 0:
        raise ConfigError(f"the temperature must be positive, not {tau}")
    if not logits.isfinite().all():
        raise TrainingError("the logits of the architecture are no longer finite; lower their learning rate")
    waiting = torch.empty(logits.shape, dtype=torch.float64, device=generator.device)
    gumbel = -waiting.exponential_(generator=generator).clamp(min=_TINY).log()
    return (logits.double() + gumbel.to(logits.device)) / tau


def _draws(p: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Numbers of n candidates of each row of p (L, K), independently drawn: (L, n)."""
    if not n or not len(p):
        return torch.empty(len(p), n, dtype=torch.long, device=p.device)
    return torch.multinomial(p.to(generator.device), n, replacement=True, generator=generator).to(p.device)


def cost_loss(expected: Tensor, found: Tensor, most: Tensor, tolerance: float = 0.05) -> Tensor:
    """What brings the expected cost E to the limit R; the paper adds it twice to the task's loss.

    log E if the found network's cost F is above (1 + tolerance) R, -log E if it is below (1 - tolerance) R,
    else 0. Its gradient, of E / E, does not depend on the distance. (Of E / R in truth: the gradients are the
    same, and the values have no unit.) The public code differs: it takes log E from F > R on, and -log E only
    below R - tolerance times the full network's cost.

    The band is for the search alone: `decode` gives networks that are never above the budget.

    Several limits: the logarithms of all that F exceeds add up; only if F is below the band of every limit,
    that of the tightest widens (a reconstruction; with one limit it makes no difference).

    Args:
        expected, found, most: E, F and R of each limit, (I,) each, from `expected_costs`.
        tolerance: Half the width of the band, relative to R.

    Returns:
        A scalar.
    """
    price, used = (expected / most).log(), found / most
    above = used > 1 + tolerance
    if above.any():
        return price[above].sum()
    if used.max() < 1 - tolerance:
        return -price[used.argmax()]
    return 0 * price.sum()


def expected_costs(widths: WidthLogits, depths: DepthLogits, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """Each limit's expected cost, the cost of the most probable network, and the most that it may be.

    FLOPs and parameters are exact expectations over independent widths and depths, differentiable
    (`PolynomialCost.expected`), and so is what the model of a latency predicts. A user's own cost is taken at
    the mean widths and at full depth, so that depths get no gradient from it.

    Args:
        widths, depths: On the CPU.
        bounds: The budget.

    Returns:
        (I,) float64 each, for `cost_loss`.
    """
    mean, variance = widths.mean().unsqueeze(0), widths.variance().unsqueeze(0)
    present = {block: p.unsqueeze(0) for block, p in depths.presence().items()}
    removed = depths.removed(depths.most_probable())
    gone = torch.tensor([g.block in removed for g in widths.space.groups], dtype=torch.bool)  # (G,)
    best = widths.most_probable().masked_fill(gone, 0).unsqueeze(0)
    costs = [cost for _, cost, _ in bounds.limits]
    expected = [expected_cost(cost, mean, variance, present) for cost in costs]
    found = [cost.batch(best) for cost in costs]
    return torch.cat(expected), torch.cat(found), mean.new_tensor([most for _, _, most in bounds.limits])


def decode(
    widths: WidthLogits,
    depths: DepthLogits,
    bounds: Bounds,
    n: int = 1,
    *,
    generator: torch.Generator,
) -> list[Widths]:
    """Networks inside of the budget, close below it: the most probable one first, then drawn ones.

    What lies above the budget is narrowed, and what lies below it widened, by one factor for all groups
    (`project_batch`). The paper takes the most probable network as it is, within 5 % of the target.

    Depths stay as they are unless widths alone cannot keep and fill the budget: while not even the narrowest
    network of those depths keeps it, the stage that most probably has the next smaller depth gets that; while
    the widest uses less than 98 % of it, the stage that most probably has the next greater one, as far as
    the budget allows.

    Args:
        widths, depths: After the search.
        bounds: The budget.
        n: Networks; fewer if several come out alike.
        generator: Of the draws.

    Returns:
        Different networks; groups of removed blocks have width 0.

    Raises:
        BudgetError: Not even the smallest network of the shallowest depths keeps the budget.
    """
    space = widths.space
    blocks = [block for stage in depths.stages for block in stage.blocks]
    bounds.check_reachable(space.without(blocks).smallest(), space.largest())
    networks = [widths.most_probable(), *widths.networks(n - 1, generator)]
    chosen = [depths.most_probable(), *depths.networks(n - 1, generator)]
    found: dict[Widths, None] = {}
    for network, at in zip(networks, chosen, strict=True):
        fitting = _fitting_space(space, depths, at, bounds)
        (projected,) = project_batch(network.unsqueeze(0), fitting, bounds)
        found[fitting.decode(projected)] = None
    return list(found)


def _fitting_space(space: WidthSpace, depths: DepthLogits, chosen: Tensor, bounds: Bounds) -> WidthSpace:
    """The networks at depths near `chosen` (S,) that can keep the budget, and fill it if any can."""
    p = depths.probabilities().tolist()
    at = [stage.depths.index(d) for stage, d in zip(depths.stages, chosen.tolist(), strict=True)]

    def neighbours(step: int) -> list[list[int]]:
        """Depths where one stage is a step away, the most probable first."""
        stages = [s for s, stage in enumerate(depths.stages) if 0 <= at[s] + step < len(stage.depths)]
        stages.sort(key=lambda s: -p[s][at[s] + step])
        return [[i + step * (s == moved) for s, i in enumerate(at)] for moved in stages]

    def space_at(numbers: Sequence[int]) -> WidthSpace:
        kept = [stage.depths[i] for stage, i in zip(depths.stages, numbers, strict=True)]
        return space.without(depths.removed(torch.tensor(kept)))

    while not bounds.fits(space_at(at).smallest()) and (shallower := neighbours(-1)):
        at = shallower[0]
    while bounds.used(space_at(at).largest()) < FULL:
        deeper = [numbers for numbers in neighbours(1) if bounds.fits(space_at(numbers).smallest())]
        if not deeper:
            break
        at = deeper[0]
    return space_at(at)


class TASSearch(ArchitectureSearch):
    """TAS's training: weights in a network of two drawn widths, logits on the other half of the data.

    In each step widths and depths are drawn anew for a step on the logits, whose loss is the task's and twice
    the budget's, and for the step on the weights. The temperature falls from 5 to 0.1 along a cosine, as in
    the public code.

    Args:
        supernet: Of the model; its stages are searched for their depth.
        space, bounds: Allowed widths and budget; the logits' candidates must be the supernet's.
        steps: On the weights, altogether.
        seed: Of first logits and draws.
        limit: Most candidates of a group, as for the supernet's.
        weight: Of the budget's loss.
        tolerance: See `cost_loss`.
        lr: Of Adam on the logits. Default: the public code's 0.001 for its 58,800 steps on CIFAR, and more
            for shorter searches (`scaled_rate`), up to 0.1.
        temperature: Of the draws at a progress in [0, 1].
    """

    bilevel = True
    supernet: TASSupernet

    def __init__(
        self,
        supernet: TASSupernet,
        space: WidthSpace,
        bounds: Bounds,
        *,
        steps: int,
        seed: int = 0,
        limit: int = 8,
        weight: float = 2.0,
        tolerance: float = 0.05,
        lr: float | None = None,
        temperature: Callable[[float], float] = cosine_temperature,
    ) -> None:
        check_architecture(limit=limit, lr=lr)
        generator = torch.Generator().manual_seed(seed)
        self.widths = WidthLogits(space, limit, generator=generator)
        self.depths = DepthLogits(supernet.stages, generator=generator)
        architecture = nn.ModuleDict({"widths": self.widths, "depths": self.depths})
        rate = scaled_rate(0.001, steps, _STEPS, most=0.1) if lr is None else lr
        optimizer = torch.optim.Adam(architecture.parameters(), rate, betas=(0.5, 0.999), weight_decay=0.001)
        super().__init__(supernet, architecture, optimizer, generator)
        self.bounds = bounds
        self.weight = weight
        self.tolerance = tolerance
        self.temperature = temperature

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self.supernet.norms.named_parameters())

    def due(self, taken: int, progress: float) -> bool:
        return True

    def weights_pass(self, progress: float) -> AbstractContextManager[Any]:
        with torch.no_grad():
            return self._drawn(progress)

    def architecture_step(self, compute_loss: ComputeLoss, progress: float) -> None:
        expected, found, most = expected_costs(self.widths, self.depths, self.bounds)
        with self._drawn(progress):
            task = compute_loss()
            self._descend(
                task + self.weight * cost_loss(expected, found, most, self.tolerance).to(task), task
            )
        self._record(progress, task, (expected / most).max())

    def networks(self, n: int) -> list[Widths]:
        """The most probable network; of several, the others are drawn from the logits."""
        return decode(self.widths, self.depths, self.bounds, n, generator=self.generator)

    def settle(self, widths: Widths) -> Order:
        """Gives the model the BatchNorm copies of these widths."""
        self._follow()
        self.supernet.adopt(widths)
        return super().settle(widths)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.supernet.norms.state_dict(prefix="norms.")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.supernet.norms.load_state_dict(entries_below("norms.", state))

    def _follow(self) -> None:
        """Moves the copies of BatchNorm to where the model is: Lightning moves it as it starts and ends."""
        device = next(self.supernet.model.parameters()).device
        if any(p.device != device for p in self.supernet.norms.parameters()):
            self.supernet.norms.to(device)

    def _drawn(self, progress: float) -> AbstractContextManager[Any]:
        self._follow()
        tau = self.temperature(progress)
        pairs = self.widths.sample(tau, self.generator)
        return self.supernet.sampled(pairs, self.depths.sample(tau, self.generator))
