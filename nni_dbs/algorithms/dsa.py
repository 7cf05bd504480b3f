"""DSA: differentiable sparsity allocation.

Every channel group has one keep ratio, the share of its channels that stay. Channels are kept at random, the
important ones with greater probability, such that the mean probability is the keep ratio; so the gradient of
the loss with respect to the masks arrives, through that equation, at the keep ratios. The budget is kept by
splitting: a second copy of the ratios lies inside of it, and the two are pulled together. An update is

    a = ratios()                                                       # (K,) keep ratios
    log_b, valid = log_importance(model, ratios.groups)                # (K, U)
    p = keep_probabilities(log_b, valid, a, beta)
    gates = gates_of(draw_masks(p, generator).to(device), ratios.groups)
    with supernet.gated(gates):
        (loss(model(x)) + splitting.penalty(a)).backward()             # to the weights, or to ratios.theta

and every few updates `splitting.update(a.detach(), projection)`. `harden` decodes the ratios to a network.
Vectors here are small, in float64, and on the CPU whatever the model's device is. A unit is a channel, or
`step` channels at one position of the blocks where a group has grouped convolutions; K counts the groups with
a choice, U the units of the largest one.

Source: Ning et al., "DSA: More Efficient Budgeted Pruning via Differentiable Sparsity Allocation", ECCV 2020
(arXiv 2004.02164). Its public code covers test time and the masks only. Known from there are the
probabilities with their gradient, the straight-through masks, theta = 5 at first, and the importance of a
group's first layer. A reconstruction are the schedule of the steepness, everything about the splitting beside
that it is like ADMM (its metric, its stiffness, when it is updated), the importance of whole groups, the
whole training (`DSASearch`), and the repair when hardening.

The budget here is one of this library: in multiply-adds, the classifier included, where that code counts two
operations for each and leaves the classifier out; and the first layer's importance alone is not offered.

Three habits of that code are not repeated. It solves for the threshold up to 0.02 in its logarithm, which at
steepness 100 is two logits; here the tolerance is on the mean probability. It adds 0.01 to all probabilities,
which moves their mean off the keep ratio. It calls SciPy for each group and step; here all groups are solved
at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nni_dbs.bilevel import (
    ArchitectureSearch,
    ComputeLoss,
    check_architecture,
    mean_over_ranks,
    scaled_rate,
)
from nni_dbs.cost import Bounds, Cost
from nni_dbs.errors import ConfigError
from nni_dbs.projection import project
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import ChannelGroup, WidthError, bn_scale, channel_order, l1_norm
from torch_pruning_adapters.importance import Order

_RESIDUAL = 1e-12  # of the mean keep probability
_BISECTIONS = 100
_REACH = 40.0  # logits beyond all channels: there every probability is 0 or 1, up to 1e-17
_DEAD = 1e-3  # of the mean importance: channels far below it are alike
_SWEEPS = 500  # of coordinate updates at one multiplier
_SETTLED = 1e-11  # change of the ratios in a sweep
_FAR = 2.0**60  # of a multiplier: as good as infinite
_HALVINGS = 25  # of multipliers; the line between the last two is nearly the path itself
_LINE_HALVINGS = 50
_CHEAPEST = 0.01  # of a group in `cost_metric`
_NOTHING = 1e-12  # in place of a zero that divides


class KeepRatios(nn.Module):
    """One keep ratio in (0, 1) for each channel group that has a choice: a = sigmoid(theta).

    It is not part of the model, so that the weights' optimizer, weight decay and averaging never see it. At
    first the slope da/dtheta is 0.007: give theta an optimizer that adapts its steps (Adam).

    Args:
        space: The allowed widths; groups with one choice have no ratio.
        theta: Of all groups at first; DSA's 5 keeps 99.3 %.

    Attributes:
        groups: Those with a choice, in the order of the space; K of them.
        theta: (K,) float64 Parameter.

    Raises:
        WidthError: No group has a choice.
    """

    def __init__(self, space: WidthSpace, theta: float = 5.0) -> None:
        super().__init__()
        self.groups = groups_with_choice(space)
        self.theta = nn.Parameter(torch.full((len(self.groups),), theta, dtype=torch.float64))

    def forward(self) -> Tensor:
        """The keep ratios (K,)."""
        return self.theta.sigmoid()


def groups_with_choice(space: WidthSpace) -> tuple[ChannelGroup, ...]:
    """The groups that have more than one width, in the order of the space.

    Raises:
        WidthError: There is none.
    """
    groups = tuple(g for g in space.groups if len(space.choices(g.name)) > 1)
    if not groups:
        raise WidthError("no group of this space has a choice; lower min_ratio or divisor")
    return groups


def group_importance(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Positive importance (C,) of a group's channels, 1 at the median; no gradient.

    The mean over the group's BatchNorms of |gamma|, each divided by its own mean; without BatchNorm, the same
    of the L1 norms of the producers' filters. DSA takes the first layer of a group alone; all layers are a
    reconstruction, and a BatchNorm whose gammas are all zero (a residual branch at initialisation) has no
    say. A thousandth of the mean is added, so that dead channels have a logarithm.

    Use it as the `importance` of `channel_order` too, so that those channels are kept that were likely.
    """
    parts = [dataclasses.replace(group, members=(member,)) for member in group.members]
    scores = [bn_scale(model, part) for part in parts if part.members[0].kind == "norm"]
    if not any(bool(score.any()) for score in scores):
        scores = [l1_norm(model, part) for part in parts if part.members[0].role == "producer"]
    shares = [score / score.mean() for score in scores if bool(score.any())] or [torch.ones_like(scores[0])]
    importance = torch.stack(shares).mean(0) + _DEAD  # (C,)
    return importance / importance.median()


def log_importance(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[Tensor, Tensor]:
    """Logarithms of the importance of units (K, U) float64, padded by 0; which entries are units, (K, U).

    Args:
        model: With its present weights; compute it anew in each step.
        groups: Of `KeepRatios`.
    """
    units = [g.size // g.step for g in groups]
    valid = torch.arange(max(units)) < torch.tensor(units).unsqueeze(1)  # (K, U)
    padded = torch.zeros(valid.shape, dtype=torch.float64)
    for row, g, n in zip(padded, groups, units, strict=True):
        row[:n] = group_importance(model, g).reshape(g.step, n).mean(0).log()
    return padded, valid


def keep_probabilities(
    log_importance: Tensor, valid: Tensor, keep: Tensor, steepness: float | Tensor
) -> Tensor:
    """Probabilities of keeping each unit whose mean over a group is its keep ratio.

    p_i = sigmoid(beta2 (log b_i - log beta1)), that is 1 / (1 + (b_i / beta1) ** -beta2), where beta2 is the
    steepness and the soft threshold beta1 is solved for. The gradient is that of the solution, dp_i / da =
    U_k q_i / sum_j q_j with q = p (1 - p); none reaches the importance or the steepness.

    A ratio above 1 - 1 / (4 U_k), less than a quarter of a unit from full, means that all are kept; its
    gradient is zero.

    Args:
        log_importance, valid: (K, U), from `log_importance`.
        keep: (K,) keep ratios in (0, 1].
        steepness: Of all groups, or of each (K,); positive.

    Returns:
        (K, U) float64; 0 where there is no unit.
    """
    beta = torch.as_tensor(steepness, dtype=torch.float64).expand(len(keep))
    return _KeepProbabilities.apply(keep.to(torch.float64), log_importance.detach(), valid, beta.detach())


class _KeepProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: Tensor, log_importance: Tensor, valid: Tensor, beta: Tensor) -> Tensor:
        units = valid.sum(1)  # (K,)
        most = 1 - 1 / (4 * units.to(torch.float64))
        scaled = log_importance.to(torch.float64) * beta.unsqueeze(1)  # (K, U)
        logits = _logits(scaled, valid, keep.minimum(most))
        full = keep >= most
        ctx.save_for_backward(logits, units, full)
        return torch.where(full.unsqueeze(1), valid.to(torch.float64), logits.sigmoid())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, units, full = ctx.saved_tensors
        log_q = F.logsigmoid(logits) + F.logsigmoid(-logits)  # (K, U) of p (1 - p), stable for any logit
        slope = units * (log_q.softmax(1) * gradient).sum(1)
        return slope.masked_fill(full, 0), None, None, None


def _logits(scaled: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
    """`scaled` (K, U) less a shift of each row, such that the mean of its sigmoids is `keep` (K,)."""
    scaled = scaled.masked_fill(~valid, -torch.inf)
    low = scaled.masked_fill(~valid, torch.inf).amin(1) - _REACH  # (K,)
    high = scaled.amax(1) + _REACH
    for _ in range(_BISECTIONS):
        shift = (low + high) / 2
        logits = scaled - shift.unsqueeze(1)
        excess = logits.sigmoid().sum(1) / valid.sum(1) - keep
        if bool((excess.abs() < _RESIDUAL).all()):
            break
        low, high = torch.where(excess > 0, shift, low), torch.where(excess > 0, high, shift)
    return logits


def draw_masks(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Bernoulli masks of 0 and 1 with the gradient of their probabilities (straight through).

    Draw once in each step and give the mask to all layers of a group (`gates_of`); another draw for each
    layer would break the sums of residual networks. A whole group may come out as zero. Score a network with
    its hardened widths, not with a draw.

    Args:
        probabilities: (K, U).
        generator: On any device.

    Returns:
        (K, U), like the probabilities.
    """
    u = torch.rand(
        probabilities.shape, generator=generator, device=generator.device, dtype=probabilities.dtype
    )
    hard = (u.to(probabilities.device) < probabilities).to(probabilities.dtype)
    return hard + (probabilities - probabilities.detach())


def gates_of(masks: Tensor, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Masks of units (K, U) as gates for `Supernet.gated`: group name -> (C,), on the masks' device."""
    return {g.name: row[: g.size // g.step].repeat(g.step) for g, row in zip(groups, masks, strict=True)}


def steepness(progress: float, last: float = 50.0) -> float:
    """Steepness beta2 of the probabilities: from 1 to `last`, by equal factors.

    DSA's schedule is not public; this is a reconstruction, for a `last` of 50 to 100. The steeper, the less
    the masks vary, and the fewer the channels (those at the threshold) that the gradient is about: see
    `sharpened`.

    Args:
        progress: Of the search, 0 to 1.
        last: At its end.
    """
    return last**progress


def sharpened(
    current: Tensor, progress: float, keep: Tensor, masks: Tensor, valid: Tensor, last: float = 50.0
) -> Tensor:
    """The schedule's steepness for groups whose masks still stray; the others stay as they are.

    A group is steep enough while its mask keeps round(a U_k) units, give or take one. (Reconstruction.)

    Args:
        current: (K,) steepness so far.
        progress, last: As for `steepness`.
        keep: (K,) keep ratios.
        masks, valid: (K, U) the masks drawn last.

    Returns:
        (K,), nowhere below `current`.
    """
    wanted = (keep.detach() * valid.sum(1)).round()
    strays = (masks.detach().sum(1) - wanted).abs() > 1
    return torch.where(strays, current.clamp(min=steepness(progress, last)), current)


def balancing(gradient: Tensor) -> float:
    """The rho at which a distance of 0.05 between a and z balances a gradient dL/da (K,), over the metric.

    That of the median group; nearly full ones, which have no gradient, are left out. 1 if all are full.
    """
    sizes = gradient.detach().abs()
    return float(sizes[sizes > 0].median()) / 0.05 if bool(sizes.any()) else 1.0


Projection = Callable[[Tensor], Tensor]
"""Keep ratios (K,) to the nearest ones inside of a budget (K,)."""


@dataclass
class Splitting:
    """The budget by splitting, as in ADMM: the ratios `a` follow the loss, their copy `z` keeps the budget.

    Minimises L(a) subject to a = z, z inside of the budget, with the scaled dual `u`: steps on
    L(a) + `penalty(a)`, and every 10 to 50 of them an `update`. That DSA joins the gradients of the loss and
    of the budget like ADMM is known; the rest is a reconstruction.

    Attributes:
        z: (K,) keep ratios inside of the budget.
        u: (K,) scaled dual.
        rho: Weight of the pull; such that a distance of 0.05 balances the loss, see `begin`.
        most: The greatest rho that `stiffen` goes to.
        metric: (K,) in which distances are measured: sum metric (a - z)^2. That of the projection.
    """

    z: Tensor
    u: Tensor
    rho: float
    most: float = math.inf
    metric: Tensor | float = 1.0

    @classmethod
    def begin(
        cls, a: Tensor, gradient: Tensor, projection: Projection, metric: Tensor | float = 1.0
    ) -> Splitting:
        """At ratios a (K,), with the loss's gradient dL/da (K,) there: rho is `balancing`."""
        rho = balancing(gradient / metric)
        a = a.detach()
        return cls(projection(a), torch.zeros_like(a), rho, 100 * rho, metric)

    def penalty(self, a: Tensor) -> Tensor:
        """rho / 2 |a - z + u|^2, whose gradient is rho metric (a - z + u); add it to the loss."""
        return self.rho / 2 * (self.metric * (a - self.z + self.u) ** 2).sum()

    def update(self, a: Tensor, projection: Projection) -> float:
        """The steps on z and u; returns how far a and z are apart, at most over the groups."""
        a = a.detach()
        self.z = projection(a + self.u)
        self.u = self.u + a - self.z
        return float((a - self.z).abs().max())

    def stiffen(self, factor: float = 1.5) -> None:
        """Raises rho, and lowers u alike, so that the multiplier rho u stays; when a and z do not approach.

        Args:
            factor: Of rho, up to `most`.
        """
        factor = min(factor, self.most / self.rho)
        self.rho *= factor
        self.u = self.u / factor


class BudgetProjection:
    """Keep ratios to the nearest ones inside of a budget.

    All costs of this library are quadratic in the widths, with coefficients that are not negative. With one
    limit the result minimises |z - v|^2 / 2 + mu F(z) over lo <= z <= hi, by exact updates of one ratio after
    another, at the multiplier mu where F meets the limit; ratios inside of the budget come back as they are,
    and no ratio rises. F is not convex: far below the full network its value may jump over the limit at some
    mu. Then the result lies between the two sides of the jump, on the limit.

    With several limits, the ratios are projected onto the one exceeded most, then onto what is still
    exceeded. As that lowers ratios only, all limits hold in the end. It is the nearest point if one limit
    decides; otherwise near it.

    A user's own cost that is not quadratic is met along its gradient at v: v less as little of it as meets
    the limit. That is the nearest point to first order.

    Args:
        space: Gives lo and hi: the smallest and largest widths.
        bounds: The budget; the costs' `batch` must be differentiable.
        metric: (K,) positive: |z - v|^2 stands for sum metric (z - v)^2. Default: 1 everywhere.

    Raises:
        BudgetError: Not even the smallest network keeps the budget.
        WidthError: No group has a choice.
    """

    def __init__(self, space: WidthSpace, bounds: Bounds, metric: Tensor | None = None) -> None:
        bounds.check_reachable(space.smallest(), space.largest())
        groups = groups_with_choice(space)
        self.metric = torch.ones(len(groups), dtype=torch.float64) if metric is None else metric
        position = {name: i for i, name in enumerate(space.names)}
        self._columns = torch.tensor([position[g.name] for g in groups])
        self._sizes = torch.tensor([g.size for g in groups], dtype=torch.float64)
        self._full = space.encode(space.largest())  # (G,)
        self.lo = space.encode(space.smallest())[self._columns] / self._sizes  # (K,)
        self.hi = self._full[self._columns] / self._sizes
        shares = [self._share(cost, most) for _, cost, most in bounds.limits]
        self._limits = [(share, self._path(share)) for share in shares]

    def widths(self, ratios: Tensor) -> Tensor:
        """Ratios (K,) as real widths of all groups (G,); differentiable."""
        return self._full.index_put((self._columns,), ratios * self._sizes)

    def __call__(self, ratios: Tensor) -> Tensor:
        """Ratios v (K,), any real numbers, to z (K,) float64 inside of the budget."""
        v = ratios.detach().to("cpu", torch.float64)
        z = v.clamp(self.lo, self.hi)
        for _ in self._limits:
            used = [float(share(z)) for share, _ in self._limits]
            if max(used) <= 1:
                break
            share, path = self._limits[used.index(max(used))]
            z = v = _meet(share, partial(path, v), z, self.lo)
        return z

    def _share(self, cost: Cost, most: float) -> Share:
        return lambda z: cost.batch(self.widths(z).unsqueeze(0))[0] / most

    def _path(self, share: Share) -> Path:
        """How ratios leave v as the multiplier of one limit grows from 0."""
        form = _Quadratic.of(share, self.hi)
        lo, hi = self.lo, self.hi
        if all(math.isclose(float(share(z)), form(z), rel_tol=1e-9) for z in (lo, (lo + hi) / 2)):
            return lambda v, mu: form.minimiser(v, mu, lo, hi, self.metric)
        return lambda v, mu: (v - mu * _slope(share, v.clamp(lo, hi)) / self.metric).clamp(lo, hi)


Share = Callable[[Tensor], Tensor]
"""Ratios (K,) to the share of a limit that they use, a scalar; differentiable."""

Path = Callable[[Tensor, float], Tensor]


def cost_metric(space: WidthSpace, bounds: Bounds) -> Tensor:
    """The metric (K,) in which a step from the full network to the budget narrows all groups alike.

    The slope of the tightest limit's cost at full width, 1 on the average. A group that many layers share
    costs more for each of its channels, and is worth more; in the plain metric the projection would narrow
    it first and most. (A reconstruction: what DSA measures distances in is not known.)
    """
    groups = groups_with_choice(space)
    columns = [space.names.index(g.name) for g in groups]
    widths = space.encode(space.largest()).requires_grad_()  # (G,)
    (slope,) = torch.autograd.grad(bounds.used_batch(widths.unsqueeze(0)).sum(), widths)
    per_ratio = (slope * widths.detach())[columns]  # (K,)
    return (per_ratio / per_ratio.mean()).clamp(min=_CHEAPEST)


def _slope(share: Share, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(share(z), z)[0]


class _Quadratic(NamedTuple):
    """`constant + slope @ z + z @ curvature @ z / 2` of ratios z (K,)."""

    constant: float
    slope: np.ndarray  # (K,)
    curvature: np.ndarray  # (K, K)

    @classmethod
    def of(cls, share: Share, z: Tensor) -> _Quadratic:
        """The expansion at z, which is the function itself if that is quadratic."""
        curvature = torch.autograd.functional.hessian(share, z)
        slope = _slope(share, z) - curvature @ z
        constant = share(z) - slope @ z - z @ curvature @ z / 2
        return cls(float(constant), slope.numpy(), curvature.numpy())

    def __call__(self, z: Tensor) -> float:
        x = z.numpy()
        return float(self.constant + self.slope @ x + x @ self.curvature @ x / 2)

    def minimiser(self, v: Tensor, mu: float, lo: Tensor, hi: Tensor, metric: Tensor) -> Tensor:
        """Minimises |z - v|^2 / 2 + mu times this over lo <= z <= hi, one coordinate after another.

        Where that is not convex it depends on the order which of several minima is found. So the coordinates
        are taken from both ends, and the lower minimum counts.
        """
        own = self.curvature.diagonal()
        limits = list(zip(v.tolist(), lo.tolist(), hi.tolist(), metric.tolist(), strict=True))

        def descend(order: range) -> np.ndarray:
            z = v.clamp(lo, hi).numpy().copy()
            for _ in range(_SWEEPS):
                before = z.copy()
                for i in order:
                    wish, least, most, spring = limits[i]
                    others = self.slope[i] + self.curvature[i] @ z - own[i] * z[i]
                    z[i] = min(max((spring * wish - mu * others) / (spring + mu * own[i]), least), most)
                if np.abs(z - before).max() < _SETTLED:
                    break
            return z

        def height(z: np.ndarray) -> float:
            return float(metric.numpy() @ (z - v.numpy()) ** 2 / 2 + mu * self(torch.from_numpy(z)))

        count = len(limits)
        return torch.from_numpy(min(map(descend, (range(count), range(count)[::-1])), key=height))


def _meet(share: Share, path: Callable[[float], Tensor], outside: Tensor, inside: Tensor) -> Tensor:
    """The point where a path from `outside` first meets the limit; never over it.

    If the path jumps over the limit, the point on the line between the ends of the jump; if it does not get
    there, on the line from its last point to `inside`.
    """
    low, high = 0.0, 1.0
    while high < _FAR and float(share(point := path(high))) > 1:
        low, high, outside = high, 2 * high, point
    if high < _FAR:
        inside = point
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            point = path(middle)
            if float(share(point)) > 1:
                low, outside = middle, point
            else:
                high, inside = middle, point
    near, far = 0.0, 1.0  # on the line from `inside` to `outside`
    for _ in range(_LINE_HALVINGS):
        middle = (near + far) / 2
        over = float(share(inside + middle * (outside - inside))) > 1
        near, far = (near, middle) if over else (middle, far)
    return inside + near * (outside - inside)


def harden(keep: Tensor, probabilities: Tensor, space: WidthSpace, bounds: Bounds) -> Widths:
    """The network that the keep ratios stand for: inside of the budget, and filling it.

    Each group takes the choice nearest to max(1, round(a_k U_k)) units. While that is over the budget, the
    group narrows by one choice that saves most of the tightest limit for each unit of keep probability that
    it loses; what is left of the budget is filled by `project`. (DSA keeps the most important channels; the
    repair is a reconstruction.) The channels that stay are the first of
    `channel_order(model, groups, group_importance)`.

    Args:
        keep: (K,) keep ratios.
        probabilities: (K, U) of `keep_probabilities`; any scores that rank the units do.
        space, bounds: As in `project`.

    Raises:
        BudgetError: Not even the smallest network keeps the budget.
    """
    bounds.check_reachable(space.smallest(), space.largest())
    groups = groups_with_choice(space)
    likely = probabilities.detach().sort(1, descending=True)[0]  # (K, U)
    widths = dict(space.largest())
    for g, a in zip(groups, keep.tolist(), strict=True):
        wanted = max(1, round(a * (g.size // g.step))) * g.step
        widths[g.name] = _nearest(wanted, space.choices(g.name))
    while not bounds.fits(widths):
        worth: dict[tuple[str, int], float] = {}
        for g, p in zip(groups, likely, strict=True):
            narrower = [w for w in space.choices(g.name) if w < widths[g.name]]
            if narrower:
                saved = bounds.used(widths) - bounds.used({**widths, g.name: narrower[-1]})
                lost = float(p[narrower[-1] // g.step : widths[g.name] // g.step].sum())
                worth[g.name, narrower[-1]] = saved / (lost + _NOTHING)
        name, width = max(worth, key=worth.__getitem__)
        widths[name] = width
    return project(widths, space, bounds)


def _nearest(wanted: int, choices: Sequence[int]) -> int:
    """The choice nearest to a width, the narrower of two."""
    return min(choices, key=lambda width: abs(width - wanted))


class DSASearch(ArchitectureSearch):
    """DSA's training: weights under random masks, keep ratios on other data, the budget by splitting.

    After a warm-up of the whole network, every step on the weights draws masks from the present importance
    and ratios, and every `every`-th one goes after a step on the ratios. All of the schedule is a
    reconstruction: the public code has none.

    Args:
        supernet: Of the model.
        space, bounds: Allowed widths and budget.
        steps: On the weights, altogether.
        seed: Of the masks.
        warmup: Share of the steps before the ratios move; 0 for a pretrained model.
        every: Steps on the weights for each on the ratios.
        interval: Steps on the ratios for each update of the splitting. Default: 10, and fewer where there
            would be fewer than 30 updates.
        lr: Of Adam on theta. Default: 0.01 for 3000 steps, and more for shorter searches (`scaled_rate`), up
            to 0.2.
        last: Steepness of the probabilities at the end.
    """

    bilevel = True

    def __init__(
        self,
        supernet: Supernet,
        space: WidthSpace,
        bounds: Bounds,
        *,
        steps: int,
        seed: int = 0,
        warmup: float = 0.1,
        every: int = 2,
        interval: int | None = None,
        lr: float | None = None,
        last: float = 50.0,
    ) -> None:
        check_architecture(lr=lr)
        self.check(warmup, every)
        if last < 1 or (interval is not None and interval < 1):
            raise ConfigError(f"last and interval must be at least 1, not {last} and {interval}")
        self.ratios = KeepRatios(space)
        own_steps = int(steps * (1 - warmup)) // every
        rate = scaled_rate(0.01, own_steps, 3000, most=0.2) if lr is None else lr
        optimizer = torch.optim.Adam(self.ratios.parameters(), rate)
        super().__init__(supernet, self.ratios, optimizer, torch.Generator().manual_seed(seed))
        self.space = space
        self.bounds = bounds
        self.warmup = warmup
        self.every = every
        self.interval = min(10, max(1, own_steps // 30)) if interval is None else interval
        self.last = last
        self.beta = torch.ones(len(self.ratios.groups), dtype=torch.float64)  # (K,) steepness
        self.splitting: Splitting | None = None
        self._projection = BudgetProjection(space, bounds, cost_metric(space, bounds))
        self._apart = math.inf
        self._slopes = torch.zeros_like(self.beta)

    @staticmethod
    def check(warmup: float, every: int) -> None:
        """Raises `ConfigError` for values that make no schedule."""
        if not 0 <= warmup < 1:
            raise ConfigError(f"warmup must lie in [0, 1), not {warmup}")
        if every < 1:
            raise ConfigError(f"every must be at least 1, not {every}")

    def due(self, taken: int, progress: float) -> bool:
        return progress >= self.warmup and taken % self.every == 0

    def weights_pass(self, progress: float) -> AbstractContextManager[Any]:
        if progress < self.warmup:
            return nullcontext()
        with torch.no_grad():
            return self._masked(draw_masks(self._probabilities(self.ratios()), self.generator))

    def architecture_step(self, compute_loss: ComputeLoss, progress: float) -> None:
        a = self.ratios()  # (K,)
        log_b, valid = log_importance(self.supernet.model, self.ratios.groups)
        masks = draw_masks(keep_probabilities(log_b, valid, a, self.beta), self.generator)
        with self._masked(masks):
            task = compute_loss()
            (gradient,) = self._gradients(task, [a])
        assert gradient is not None
        gradient = mean_over_ranks(gradient, task.device)
        self._slopes += gradient.abs()
        penalty = 0.0 if self.splitting is None else self.splitting.penalty(a)
        self._descend((gradient * a).sum() + penalty, task)
        since = (progress - self.warmup) / (1 - self.warmup)
        self.beta = sharpened(self.beta, since, a, masks, valid, self.last)
        self._record(progress, task, self._used(a))
        if len(self.log) % self.interval == 0:
            self._update(self._slopes / self.interval)

    def _update(self, slopes: Tensor) -> None:
        """Updates the splitting; `slopes` (K,) are the mean sizes of dL/da since the last time.

        While the ratios are full the loss hardly feels them, so the pull grows with their slopes later on.
        Once the budget holds by itself (u is zero) the pull is balanced anew, and may fall: a stiff one
        would hold the ratios where they are.
        """
        a = self.ratios().detach()
        if self.splitting is None:
            metric = self._projection.metric
            self.splitting = Splitting.begin(a, slopes, self._projection, metric)
        else:
            apart = self.splitting.update(a, self._projection)
            wanted = balancing(slopes / self._projection.metric) / self.splitting.rho
            stiffer = max(wanted, 1.5 if apart >= self._apart else 1.0)
            self.splitting.stiffen(stiffer if bool(self.splitting.u.any()) else wanted)
            self._apart = apart
        self._slopes = torch.zeros_like(slopes)

    def networks(self, n: int) -> list[Widths]:
        """The hardened network, the only one."""
        with torch.no_grad():
            a = self.ratios()
            return [harden(a, self._probabilities(a), self.space, self.bounds)]

    def settle(self, widths: Widths) -> Order:
        """The channels that the weights deem important by now come first."""
        return channel_order(self.supernet.model, self.space.groups, group_importance)

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "beta": self.beta, "slopes": self._slopes, "apart": self._apart}
        if self.splitting is not None:
            s = self.splitting
            state |= {"z": s.z, "u": s.u, "rho": s.rho, "most": s.most}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.beta, self._slopes, self._apart = state["beta"], state["slopes"], state["apart"]
        if "z" in state:
            metric = self._projection.metric
            self.splitting = Splitting(state["z"], state["u"], state["rho"], state["most"], metric)

    def _masked(self, masks: Tensor) -> AbstractContextManager[Any]:
        device = next(self.supernet.parameters()).device
        return self.supernet.gated(gates_of(masks.to(device), self.ratios.groups))

    def _probabilities(self, a: Tensor) -> Tensor:
        log_b, valid = log_importance(self.supernet.model, self.ratios.groups)
        return keep_probabilities(log_b, valid, a, self.beta)

    def _used(self, a: Tensor) -> Tensor:
        return self.bounds.used_batch(self._projection.widths(a.detach()).unsqueeze(0))
