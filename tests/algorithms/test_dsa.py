"""DSA's keep probabilities, masks, projection, splitting and hardening."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.cifar_resnet import resnet20
from nni_dbs import Budget, FlopsCost, ParamsCost, Supernet, WidthSpace
from nni_dbs.algorithms.dsa import (
    BudgetProjection,
    KeepRatios,
    Splitting,
    cost_metric,
    draw_masks,
    gates_of,
    group_importance,
    groups_with_choice,
    harden,
    keep_probabilities,
    log_importance,
    sharpened,
    steepness,
)
from nni_dbs.cost import Bounds, Limit, count_flops, weighted_sum, width_costs
from nni_dbs.errors import BudgetError
from tests.helpers import CASES, Net, bound, chain, conv, head, randomised
from torch_pruning_adapters import WidthError, channel_order, find_channel_groups, l1_norm, shrink

X = torch.zeros(1, 3, 32, 32)
DOUBLE = torch.float64


def rows(*sizes: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random logarithms of importance of groups of these sizes, padded; and which entries count."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)
    log_b = spread * torch.randn(valid.shape, generator=generator, dtype=DOUBLE)
    return log_b.masked_fill(~valid, 0), valid


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=DOUBLE)


@functools.cache
def resnet() -> tuple[nn.Module, WidthSpace, FlopsCost]:
    model = resnet20()
    space = WidthSpace.from_model(model, X, min_ratio=0.05, divisor=1)
    return model, space, FlopsCost(model, X, space.groups)


# --- keep probabilities ------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    beta=st.floats(1, 100),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_mean_probability_is_the_keep_ratio(
    sizes: list[int], beta: float, ratio: float, seed: int, spread: float
) -> None:
    log_b, valid = rows(*sizes, seed=seed, spread=spread)
    keep = torch.linspace(ratio, 0.05, len(sizes), dtype=DOUBLE)
    p = keep_probabilities(log_b, valid, keep, beta)
    n = valid.sum(1)
    wanted = torch.where(keep >= 1 - 1 / (4 * n), 1, keep)
    assert ((p.sum(1) / n - wanted).abs() < 1e-11).all()
    assert (p[~valid] == 0).all()
    assert ((0 <= p) & (p <= 1)).all()
    for b, q, number in zip(log_b, p, n, strict=True):
        assert (q[:number][b[:number].argsort()].diff() >= -1e-15).all()


def test_probabilities_of_two_channels_have_a_closed_form() -> None:
    """At a = 1/2 the threshold lies midway, so p = sigmoid(+-beta (log 4 - log 1) / 2) = 2^+-beta / (...)."""
    p = keep_probabilities(row(0, math.log(4)), row(1, 1).bool(), row(0.5)[0], 3.0)
    torch.testing.assert_close(p, row(1 / 9, 8 / 9), rtol=0, atol=1e-12)


def test_the_scale_of_the_importance_does_not_matter() -> None:
    log_b, valid = rows(16, 5)
    keep = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    p = keep_probabilities(log_b, valid, keep, 20.0)
    scaled = keep_probabilities(log_b + math.log(1e-6), valid, keep, 20.0)
    torch.testing.assert_close(p, scaled, rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [1.0, 5.0, 20.0, 100.0])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.93])
def test_the_implicit_gradient_is_that_of_finite_differences(beta: float, ratio: float) -> None:
    log_b, valid = rows(64, 7, 30)
    keep = torch.full((3,), ratio - 0.03, dtype=DOUBLE)
    keep[0] = ratio
    probabilities = partial(keep_probabilities, log_b, valid, steepness=beta)
    jacobian = torch.autograd.functional.jacobian(lambda a: probabilities(keep=a), keep)  # (3, 64, 3)
    h = 5e-6
    for k in range(3):
        step = h * torch.eye(3, dtype=DOUBLE)[k]
        found = (probabilities(keep=keep + step) - probabilities(keep=keep - step)) / (2 * h)
        torch.testing.assert_close(jacobian[..., k], found, rtol=0, atol=1e-5 * float(found.abs().max()))
        sums = jacobian[..., k].sum(1)
        torch.testing.assert_close(sums, valid.sum(1) * torch.eye(3, dtype=DOUBLE)[k], rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [1.0, 100.0, 1e4])
def test_the_gradient_of_equal_channels_is_one_each(beta: float) -> None:
    """q is the same for all, so dp_i / da = C / C."""
    valid = torch.ones(1, 8, dtype=torch.bool)
    keep = row(0.9)[0].requires_grad_()
    p = keep_probabilities(torch.zeros(1, 8, dtype=DOUBLE), valid, keep, beta)
    weights = torch.arange(8, dtype=DOUBLE)
    (p * weights).sum().backward()
    torch.testing.assert_close(keep.grad, row(0 + 1 + 2 + 3 + 4 + 5 + 6 + 7)[0], rtol=1e-12, atol=0)


def test_saturated_probabilities_have_a_finite_gradient() -> None:
    """All p are 0 or 1 up to rounding, but their log q are not lost."""
    keep = row(0.5)[0].requires_grad_()
    p = keep_probabilities(row(0, 1, 100, 101), row(1, 1, 1, 1).bool(), keep, 1000.0)
    p[0, 2].backward()
    assert p.tolist() == [[0, 0, 1, 1]]
    assert keep.grad.isfinite().all()


def test_importance_and_steepness_get_no_gradient() -> None:
    log_b, valid = rows(9)
    beta = torch.tensor([4.0], requires_grad=True)
    keep = row(0.4)[0].requires_grad_()
    p = keep_probabilities(log_b.requires_grad_(), valid, keep, beta)
    p[0, 0].backward()
    assert log_b.grad is None
    assert beta.grad is None
    assert float(keep.grad) > 0


def test_less_than_a_quarter_of_a_channel_from_full_is_full() -> None:
    log_b, valid = rows(10, 10, 4)
    keep = torch.tensor([1 - 1 / 40, 1 - 1 / 40 - 1e-9, 1.0], dtype=DOUBLE, requires_grad=True)
    p = keep_probabilities(log_b, valid, keep, 5.0)
    assert torch.equal(p[0], valid[0].double())
    assert torch.equal(p[2], valid[2].double())
    assert float(p[1].detach().sum()) == pytest.approx(10 - 1 / 4, abs=1e-7)
    p[:, 0].sum().backward()
    assert keep.grad.tolist()[::2] == [0, 0]
    assert keep.grad[1] > 0


def test_each_group_has_its_own_steepness() -> None:
    log_b, valid = rows(12, 12)
    keep = torch.tensor([0.4, 0.4], dtype=DOUBLE)
    both = keep_probabilities(log_b, valid, keep, torch.tensor([2.0, 70.0]))
    for k, beta in enumerate((2.0, 70.0)):
        alone = keep_probabilities(log_b, valid, keep, beta)
        torch.testing.assert_close(both[k], alone[k], rtol=0, atol=1e-9)


# --- masks -------------------------------------------------------------------------------------------


def test_masks_keep_the_ratio_on_average() -> None:
    log_b, valid = rows(16, 64, 5)
    keep = torch.tensor([0.3, 0.8, 0.55], dtype=DOUBLE)
    p = keep_probabilities(log_b, valid, keep, 3.0)
    generator = torch.Generator().manual_seed(0)
    draws = 10_000
    mean = torch.stack([draw_masks(p, generator) for _ in range(draws)]).mean(0)  # (3, 64)
    n = valid.sum(1)
    error = (p * (1 - p)).sum(1).sqrt() / n / math.sqrt(draws)
    assert ((mean.sum(1) / n - keep).abs() < 3 * error).all()
    assert ((mean - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()  # and no two entries are swapped


def test_masks_are_hard_and_pass_the_gradient_through() -> None:
    log_b, valid = rows(16, 7)
    p = keep_probabilities(log_b, valid, torch.tensor([0.3, 0.8], dtype=DOUBLE), 3.0).requires_grad_()
    masks = draw_masks(p, torch.Generator().manual_seed(0))
    assert ((masks == 0) | (masks == 1)).all()
    assert (masks[~valid] == 0).all()
    weights = torch.randn(p.shape, dtype=DOUBLE)
    (masks * weights).sum().backward()
    assert torch.equal(p.grad, weights)


def test_the_generator_alone_decides_the_masks() -> None:
    p = torch.full((3, 50), 0.5, dtype=DOUBLE)
    first, again, other = (draw_masks(p, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_blocks_of_grouped_convolutions_share_their_masks() -> None:
    model, x = CASES["grouped"].build()
    groups = find_channel_groups(model, x)
    assert [(g.size, g.step) for g in groups] == [(16, 4), (12, 4)]
    masks = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])
    gates = gates_of(masks, groups)
    assert gates["a"].tolist() == 4 * [1, 0, 0, 1]
    assert gates["g"].tolist() == 4 * [0, 1, 1]


def test_one_gradient_gathers_what_all_readers_say() -> None:
    """The mask's gradient is the sum over the layers that read the group, which gates one by one confirm."""
    model, x = CASES["residual"].build()
    groups = find_channel_groups(model, x)
    supernet = Supernet(model, groups)
    stem = next(g for g in groups if g.name == "stem")

    def loss(factor: Tensor) -> Tensor:
        with supernet.gated(gates_of(factor, [stem])):
            return model(x).square().sum()

    assert torch.autograd.gradcheck(loss, torch.rand(1, 6, dtype=DOUBLE, requires_grad=True))


# --- steepness ---------------------------------------------------------------------------------------


def test_steepness_grows_by_equal_factors() -> None:
    assert [steepness(t, last=81) for t in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([1, 3, 9, 27, 81])
    assert steepness(1) == 50


def test_only_groups_that_stray_are_sharpened() -> None:
    """Ten channels and a = 0.44: four are wanted, three to five are near enough."""
    current = torch.tensor([2.0, 2.0, 2.0, 2.0, 60.0], dtype=DOUBLE)
    kept = torch.tensor([3, 5, 6, 2, 9])
    masks = (torch.arange(10) < kept.unsqueeze(1)).double()
    keep = torch.full((5,), 0.44, dtype=DOUBLE)
    valid = torch.ones(5, 10, dtype=torch.bool)
    assert sharpened(current, 0.5, keep, masks, valid, last=100).tolist() == [2, 2, 10, 10, 60]


# --- importance --------------------------------------------------------------------------------------


def two_norms() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.bn1(net.stem(x)).relu()
        return head(net, x + net.bn2(net.a(x)))

    return Net(
        forward,
        stem=conv(3, 4),
        bn1=nn.BatchNorm2d(4),
        a=conv(4, 4),
        bn2=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 10),
    )


def test_importance_joins_the_groups_batch_norms() -> None:
    """Each norm counts by its shape, not its scale; the median is 1; a thousandth is added."""
    net = two_norms()
    (group,) = find_channel_groups(net, torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        net.bn1.weight.copy_(torch.tensor([1.0, -2, 3, -4]))
        net.bn2.weight.copy_(torch.tensor([300.0, 0, 0, 100]))
    joined = torch.tensor([(0.4 + 3) / 2, 0.8 / 2, 1.2 / 2, (1.6 + 1) / 2], dtype=DOUBLE) + 0.001
    found = group_importance(net, group)
    torch.testing.assert_close(found, joined / 0.601, rtol=1e-6, atol=0)
    assert not found.requires_grad
    with torch.no_grad():
        net.bn2.weight.zero_()  # as at initialisation
    single = torch.tensor([0.4, 0.8, 1.2, 1.6], dtype=DOUBLE) + 0.001
    torch.testing.assert_close(group_importance(net, group), single / 0.801, rtol=1e-6, atol=0)


def test_importance_without_batch_norm_is_that_of_the_filters() -> None:
    model, x = CASES["flattened"].build()
    for group in find_channel_groups(model, x):
        norm = l1_norm(model, group)
        expected = norm / norm.mean() + 0.001
        torch.testing.assert_close(group_importance(model, group), expected / expected.median())


def test_dead_groups_have_equal_and_finite_importance() -> None:
    net = two_norms()
    (group,) = find_channel_groups(net, torch.zeros(1, 3, 8, 8))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert group_importance(net, group).tolist() == [1, 1, 1, 1]


def test_log_importance_is_padded_and_by_unit() -> None:
    model, x = CASES["grouped"].build()
    groups = find_channel_groups(model, x)
    log_b, valid = log_importance(model, groups)
    assert valid.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert log_b.dtype == DOUBLE
    for g, found, number in zip(groups, log_b, (4, 3), strict=True):
        expected = group_importance(model, g).reshape(4, number).mean(0).log()
        assert torch.equal(found[:number], expected)
        ranked = channel_order(model, [g], group_importance)[g.name][:: g.step] % number
        assert found[:number].argsort(descending=True).tolist() == ranked.tolist()


# --- keep ratios -------------------------------------------------------------------------------------


def test_keep_ratios_begin_at_sigmoid_of_five() -> None:
    _, space, _ = resnet()
    ratios = KeepRatios(space)
    assert ratios.theta.shape == (12,)
    assert ratios().tolist() == pytest.approx([1 / (1 + math.exp(-5))] * 12, abs=1e-15)
    (slope,) = torch.autograd.grad(ratios().sum(), ratios.theta)
    assert slope.tolist() == pytest.approx([0.00664805667] * 12, abs=1e-11)


def test_groups_without_a_choice_have_no_ratio() -> None:
    _, space, _ = resnet()
    name = space.names[3]
    assert name not in {g.name for g in KeepRatios(space.among({name: [8]})).groups}
    with pytest.raises(WidthError, match="no group of this space has a choice"):
        KeepRatios(space.within(dict.fromkeys(space.names, (1.0, 1.0))))


# --- projection --------------------------------------------------------------------------------------


def used(bounds: Bounds, projection: BudgetProjection, z: Tensor) -> float:
    return float(bounds.used_batch(projection.widths(z).unsqueeze(0)))


@given(share=st.floats(0.02, 1), seed=st.integers(0, 999), centre=st.floats(-0.2, 1.5))
@settings(max_examples=25, deadline=None)
def test_projected_ratios_meet_the_budget(share: float, seed: int, centre: float) -> None:
    _, space, cost = resnet()
    bounds = bound(share, cost)
    projection = BudgetProjection(space, bounds)
    generator = torch.Generator().manual_seed(seed)
    v = centre + torch.randn(12, generator=generator, dtype=DOUBLE) / 3
    z = projection(v)
    assert ((projection.lo <= z) & (z <= projection.hi)).all()
    inside = v.clamp(projection.lo, projection.hi)
    if used(bounds, projection, inside) <= 1:
        assert torch.equal(z, inside)
    else:
        assert 1 - 1e-9 <= used(bounds, projection, z) <= 1
        assert (z <= inside).all()


@pytest.mark.parametrize("share", [0.75, 0.5, 1 / 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_projection_is_a_stationary_point(weighted: bool, share: float) -> None:
    """z = clip(v - mu / metric dF/dz) with one mu for all groups, and so for the groups at their bounds."""
    _, space, cost = resnet()
    metric = 0.5 + torch.rand(12, dtype=DOUBLE) if weighted else None
    projection = BudgetProjection(space, bound(share, cost), metric)
    v = 0.7 + 0.5 * torch.rand(12, dtype=DOUBLE)
    z = projection(v).requires_grad_()
    (slope,) = torch.autograd.grad(cost.batch(projection.widths(z).unsqueeze(0)).sum(), z)
    slope, z = slope / projection.metric, z.detach()
    free = (z > projection.lo) & (z < projection.hi)
    assert free.sum() >= 4
    multipliers = ((v - z) / slope)[free]
    assert float(multipliers.min()) > 0
    expected = (v - multipliers.mean() * slope).clamp(projection.lo, projection.hi)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-8)


def test_in_the_metric_of_the_cost_a_small_step_narrows_all_groups_alike() -> None:
    """To the first order; in the plain metric the group that most layers share is narrowed twice as much."""
    _, space, cost = resnet()
    bounds = bound(0.999, cost)
    full = torch.ones(12, dtype=DOUBLE)
    metric = cost_metric(space, bounds)
    assert float(metric.mean()) == pytest.approx(1)
    alike = 1 - BudgetProjection(space, bounds, metric)(full)
    assert float(alike.max() / alike.min()) == pytest.approx(1, abs=2e-3)
    plain = 1 - BudgetProjection(space, bounds)(full)
    torch.testing.assert_close(plain / plain.mean(), metric, rtol=2e-3, atol=0)
    assert float(plain.max() / plain.mean()) > 2


def test_the_projection_onto_a_plane_has_a_closed_form() -> None:
    """Channels of one group alone: its ratio is cut, the others stay; of two alike: both by the same."""
    _, space, _ = resnet()
    channels = width_costs(space.groups)[space.names[0]]  # 16 of them
    projection = BudgetProjection(space, Bounds(((Limit("flops", 6, False), channels, 6),)))
    v = torch.linspace(0.9, 0.5, 12, dtype=DOUBLE)
    assert projection(v)[0] == pytest.approx(6 / 16, abs=1e-12)
    assert torch.equal(projection(v)[1:], v[1:])


def product(share: float) -> BudgetProjection:
    """Two groups that cost nothing but their product: a saddle, whose projection jumps at low budgets."""
    space, _, _ = chain(2, 100, 1)

    class Product:
        full = 10_000

        def __call__(self, widths: Any) -> float:
            return math.prod(widths.get(name, 100) for name in space.names)

        def batch(self, widths: Tensor) -> Tensor:
            return widths.prod(1)

    space = space.within(dict.fromkeys(space.names, (0.1, 1.0)))
    return BudgetProjection(space, Bounds(((Limit("flops", share, True), Product(), share * 10_000),)))


@given(
    share=st.floats(0.011, 0.99), v=st.tuples(st.floats(0.3, 1.4), st.floats(0.3, 1.4)).map(lambda v: row(*v))
)
@settings(max_examples=200, deadline=None)
def test_the_projection_of_two_groups_is_the_nearest_point(share: float, v: Tensor) -> None:
    """Against a fine grid on the budget's curve; at low budgets it is near the ratios in two places."""
    projection = product(share)
    z = projection(v[0])
    if float(v.clamp(0.1, 1).prod()) <= share * (1 - 1e-12):  # not on the limit, to a rounding error
        assert torch.equal(z, v[0].clamp(0.1, 1))
        return
    assert float(z.prod()) == pytest.approx(share, abs=1e-9)
    first = torch.linspace(0.1, 1, 4001, dtype=DOUBLE)
    curve = torch.stack([first, share / first], 1)
    curve = torch.cat([curve, curve.flip(1)])
    curve = curve[((curve >= 0.1) & (curve <= 1)).all(1)]
    best = (curve - v).norm(dim=1).min()
    assert float((z - v[0]).norm()) <= float(best) + 1e-6


def test_several_limits_all_hold() -> None:
    model, space, cost = resnet()
    params = ParamsCost(model, space.groups)
    costs = {"flops": cost, "params": params}
    v = 0.6 + 0.5 * torch.rand(12, dtype=DOUBLE)
    for limits in (
        {"flops": 0.4, "params": 0.9},
        {"flops": 0.5, "params": 0.2},
        {"flops": 0.3, "params": 0.3},
    ):
        both = Budget.parse(limits).bound(costs)
        z = BudgetProjection(space, both)(v)
        share = used(both, BudgetProjection(space, both), z)
        assert 1 - 1e-9 <= share <= 1
    loose = Budget.parse({"flops": 0.3, "params": 1.0}).bound(costs)
    alone = Budget.parse(0.3).bound(costs)
    assert torch.equal(BudgetProjection(space, loose)(v), BudgetProjection(space, alone)(v))


class Cubic:
    """A cost that is no quadratic form: the mean of the cubes of the ratios."""

    full = 1.0

    def __init__(self, space: WidthSpace) -> None:
        self.space = space

    def __call__(self, widths: Any) -> float:
        return float(self.batch(self.space.encode(widths).unsqueeze(0)))

    def batch(self, widths: Tensor) -> Tensor:
        return ((widths / self.space.encode({})) ** 3).mean(1)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.05])
def test_other_costs_are_met_along_their_gradient(share: float) -> None:
    _, space, _ = resnet()
    bounds = Bounds(((Limit("flops", share, True), Cubic(space), share),))
    projection = BudgetProjection(space, bounds)
    v = 0.8 + 0.2 * torch.rand(12, dtype=DOUBLE)
    z = projection(v)
    if used(bounds, projection, v) <= 1:
        assert torch.equal(z, v)
        return
    assert 1 - 1e-9 <= used(bounds, projection, z) <= 1
    free = z > projection.lo
    step = ((v - z) / v**2)[free]
    torch.testing.assert_close(step, step.mean().expand_as(step), rtol=1e-9, atol=0)


def test_an_impossible_budget_is_refused() -> None:
    _, space, cost = resnet()
    bounds = bound(1e-4, cost)
    with pytest.raises(BudgetError, match="below the smallest network"):
        BudgetProjection(space, bounds)
    with pytest.raises(BudgetError, match="below the smallest network"):
        harden(torch.ones(12), torch.ones(12, 64), space, bounds)


# --- splitting ---------------------------------------------------------------------------------------


def test_the_penalty_pulls_by_rho_times_the_distance() -> None:
    splitting = Splitting(z=row(0.5, 0.2)[0], u=row(0.1, -0.3)[0], rho=4.0)
    a = row(0.9, 0.4)[0].requires_grad_()
    splitting.penalty(a).backward()
    torch.testing.assert_close(a.grad, row(4 * (0.9 - 0.5 + 0.1), 4 * (0.4 - 0.2 - 0.3))[0])


def test_penalty_and_balance_follow_the_metric() -> None:
    metric = row(2.0, 0.5)[0]
    splitting = Splitting.begin(row(1.0, 1.0)[0], row(0.3, 0.0)[0], lambda v: v - 0.4, metric)
    assert splitting.rho * 0.05 * 2.0 == pytest.approx(0.3)
    a = row(1.0, 1.0)[0].requires_grad_()
    splitting.penalty(a).backward()
    torch.testing.assert_close(a.grad, splitting.rho * metric * 0.4)


def test_the_dual_gathers_the_distance() -> None:
    splitting = Splitting(z=row(0.5, 0.2)[0], u=row(0.1, 0.0)[0], rho=4.0)
    distance = splitting.update(row(0.9, 0.4)[0], lambda v: v.clamp(max=0.6))
    torch.testing.assert_close(splitting.z, row(0.6, 0.4)[0])
    torch.testing.assert_close(splitting.u, row(0.1 + 0.9 - 0.6, 0.0)[0])
    assert distance == pytest.approx(0.9 - 0.6)


def test_a_stiffer_pull_keeps_the_multiplier() -> None:
    splitting = Splitting(z=row(0.5)[0], u=row(0.3)[0], rho=4.0, most=10.0)
    splitting.stiffen(2)
    assert (splitting.rho, float(splitting.u)) == (8, 0.15)
    splitting.stiffen(2)
    assert splitting.rho == 10
    assert splitting.rho * float(splitting.u) == pytest.approx(4 * 0.3)


def test_at_first_a_distance_of_a_twentieth_balances_the_loss() -> None:
    """Groups that are nearly full have no gradient and no say."""
    gradient = row(-2, 0, 3, 0, 7)[0]
    splitting = Splitting.begin(torch.ones(5, dtype=DOUBLE), gradient, lambda v: v / 2)
    assert (splitting.rho * 0.05, splitting.most) == pytest.approx((3, 100 * 3 / 0.05))
    assert splitting.z.tolist() == [0.5] * 5
    assert splitting.u.tolist() == [0] * 5
    assert Splitting.begin(torch.ones(2, dtype=DOUBLE), torch.zeros(2), lambda v: v).rho == 1


@pytest.mark.parametrize("share", [0.75, 0.5, 1 / 3])
def test_splitting_finds_the_best_ratios_inside_of_the_budget(share: float) -> None:
    """A quadratic loss, whose exact minimum inside of the budget is the weighted projection."""
    _, space, cost = resnet()
    bounds = bound(share, cost)
    projection = BudgetProjection(space, bounds)
    wish, weight = 0.8 + 0.2 * torch.rand(12, dtype=DOUBLE), 1 + torch.rand(12, dtype=DOUBLE)
    a = wish.clone()
    splitting = Splitting(projection(a), torch.zeros_like(a), rho=1.0)
    for _ in range(60):
        pulled = splitting.rho * (splitting.z - splitting.u)
        a = (weight * wish + pulled) / (weight + splitting.rho)  # the minimiser of loss + penalty
        distance = splitting.update(a, projection)
    assert distance < 1e-3
    assert used(bounds, projection, a) == pytest.approx(1, abs=1e-3)
    leaf = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost.batch(projection.widths(leaf).unsqueeze(0)).sum(), leaf)
    free = (splitting.z > projection.lo) & (splitting.z < projection.hi)
    multipliers = (weight * (wish - a) / slope)[free]
    torch.testing.assert_close(multipliers, multipliers.mean().expand_as(multipliers), rtol=1e-2, atol=0)


# --- hardening ---------------------------------------------------------------------------------------


@given(share=st.floats(0.05, 1), seed=st.integers(0, 999), full=st.booleans())
@settings(max_examples=20, deadline=None)
def test_hardened_networks_fill_the_budget_and_never_exceed_it(share: float, seed: int, full: bool) -> None:
    model, space, cost = resnet()
    bounds = bound(share, cost)
    keep = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    if not full:
        keep = BudgetProjection(space, bounds)(keep)
    log_b, valid = log_importance(model, space.groups)
    widths = harden(keep, keep_probabilities(log_b, valid, keep, 20.0), space, bounds)
    assert widths in space
    assert cost(widths) <= math.floor(share * cost.full)
    for name in space.names:
        wider = [w for w in space.choices(name) if w > widths[name]]
        assert not wider or not bounds.fits({**widths, name: wider[0]})


def test_ratios_that_stand_for_a_network_harden_to_it() -> None:
    """Where its cost is the budget, rounding to the nearest channel gives it back."""
    _, space, cost = resnet()
    widths = {g.name: 3 + 5 * i % (g.size - 3) for i, g in enumerate(space.groups)}
    bounds = Budget.parse(float(cost(widths))).bound({"flops": cost})
    keep = (space.encode(widths) + torch.linspace(-0.4, 0.4, 12)) / space.encode({})
    assert harden(keep, torch.ones(12, 64), space, bounds) == widths


def test_what_is_least_likely_and_costs_most_goes_first() -> None:
    """Four channels too many: groups of 16 that cost alike lose those of low probability."""
    space, _, _ = chain(3, 16, 1)
    channels = weighted_sum(list(width_costs(space.groups).values()), [1, 1, 1], 0)
    bounds = Bounds(((Limit("flops", 44, False), channels, 44),))
    likely = torch.ones(3, 16, dtype=DOUBLE)
    likely[1, 3:6] = 0.1
    likely[2, 0] = 0.2
    hard = harden(torch.ones(3), likely, space, bounds)
    assert hard == dict(zip(space.names, (16, 13, 15), strict=True))


def test_an_empty_wish_keeps_a_channel() -> None:
    space, cost, _ = chain(3, 16, 1)
    least = space.smallest()
    bounds = Budget.parse(float(cost(least))).bound({"flops": cost})
    assert harden(torch.zeros(3), torch.ones(3, 16), space, bounds) == least


def test_groups_without_a_choice_keep_their_width() -> None:
    model, space, cost = resnet()
    fixed = space.among({space.names[2]: [7]})
    groups = groups_with_choice(fixed)
    assert len(groups) == 11
    bounds = bound(0.4, cost)
    projection = BudgetProjection(fixed, bounds)
    keep = projection(torch.full((11,), 0.9, dtype=DOUBLE))
    assert projection.widths(keep)[2] == 7
    log_b, valid = log_importance(model, groups)
    widths = harden(keep, keep_probabilities(log_b, valid, keep, 9.0), fixed, bounds)
    assert widths[space.names[2]] == 7
    assert bounds.fits(widths)


def test_hardened_networks_compute_as_masked_ones() -> None:
    """Steep probabilities mask exactly the channels that hardening cuts; both networks give equal logits."""
    torch.manual_seed(1)
    model = randomised(resnet20())
    space = WidthSpace.from_model(model, X.double(), min_ratio=0.05, divisor=1)
    cost = FlopsCost(model, X.double(), space.groups)
    bounds = bound(0.5, cost)
    log_b, valid = log_importance(model, space.groups)
    keep = BudgetProjection(space, bounds)(torch.full((12,), 0.95, dtype=DOUBLE))
    widths = harden(keep, keep_probabilities(log_b, valid, keep, 50.0), space, bounds)
    order = channel_order(model, space.groups, group_importance)
    small = shrink(model, space.groups, widths, order)
    assert count_flops(small, X.double()) == cost(widths) <= math.floor(0.5 * cost.full)

    hard = space.encode(widths) / space.encode({})
    steep = keep_probabilities(log_b, valid, hard, 1e6)
    gates = gates_of(draw_masks(steep, torch.Generator().manual_seed(0)), space.groups)
    supernet = Supernet(model, space.groups, order)
    exact = supernet.gates_of(widths)
    for name in space.names:
        assert torch.equal(gates[name], exact[name])
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    with torch.no_grad():
        with supernet.gated(gates):
            masked = model(x)
        torch.testing.assert_close(small(x), masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


def test_the_loss_moves_the_ratios_that_matter() -> None:
    """A full step: masks, gated forward, penalty; gradients reach theta and the weights."""
    model, x = CASES["plain"].build()
    space = WidthSpace.from_model(model, x, min_ratio=0.1, divisor=1)
    bounds = bound(0.5, FlopsCost(model, x, space.groups))
    projection = BudgetProjection(space, bounds)
    ratios = KeepRatios(space, theta=1.0)
    supernet = Supernet(model, space.groups)
    splitting = Splitting.begin(ratios(), torch.ones(2, dtype=DOUBLE), projection)
    a = ratios()
    log_b, valid = log_importance(model, ratios.groups)
    masks = draw_masks(keep_probabilities(log_b, valid, a, 2.0), torch.Generator().manual_seed(0))
    with supernet.gated(gates_of(masks, ratios.groups)):
        task = model(x).square().mean()
    (by_task,) = torch.autograd.grad(task, ratios.theta, retain_graph=True)
    assert (by_task != 0).all()
    (task + splitting.penalty(a)).backward()
    by_penalty = splitting.rho * (a - splitting.z) * a * (1 - a)
    torch.testing.assert_close(ratios.theta.grad, by_task + by_penalty.detach())
    assert all(p.grad is not None for p in model.parameters())
