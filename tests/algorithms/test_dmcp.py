"""The chains of DMCP against enumeration of their networks, its gates, its budget loss, derived networks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nni_dbs import Budget, FlopsCost, ParamsCost, Supernet, Widths, WidthSpace
from nni_dbs.algorithms.dmcp import (
    MarkovWidths,
    bins,
    budget_loss,
    direct_samples,
    expected_costs,
    expected_widths,
    paper_choices,
)
from nni_dbs.cost import Bounds, Limit, PolynomialCost, count_flops
from nni_dbs.errors import BudgetError, ConfigError
from nni_dbs.projection import project
from tests.helpers import CASES, assert_same_outputs, bound, chain, random_order
from torch_pruning_adapters import find_channel_groups, prefix_order, shrink

Problem = tuple[Any, Tensor, WidthSpace]
EXACT = [name for name, case in CASES.items() if case.exact]


def made(name: str) -> Problem:
    """A small network in double precision, its input, and the space of all its widths."""
    model, x = CASES[name].build()
    return model, x, WidthSpace(find_channel_groups(model, x), min_ratio=0.0, divisor=1)


@functools.cache
def priced(name: str) -> tuple[WidthSpace, dict[str, Any]]:
    model, x, space = made(name)
    return space, {"flops": FlopsCost(model, x, space.groups), "params": ParamsCost(model, space.groups)}


def chains_of(space: WidthSpace, limit: int = 10, seed: int = 0, spread: float = 1.5) -> MarkovWidths:
    """Chains with random logits."""
    chains = MarkovWidths(space, limit)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        chains.alpha += spread * torch.randn(chains.alpha.shape, generator=generator, dtype=torch.float64)
    return chains


def certain(space: WidthSpace, widths: Mapping[str, int], logit: float = 1000.0) -> MarkovWidths:
    """Chains that end at the given options with a probability of 1."""
    chains = MarkovWidths(space, limit=100)
    with torch.no_grad():
        for row, name in enumerate(free(space)):
            reached = space.choices(name).index(widths[name])
            chains.alpha[row] = -logit
            chains.alpha[row, :reached] = logit
    return chains


def free(space: WidthSpace) -> list[str]:
    """Groups that have a choice."""
    return [name for name in space.names if len(space.choices(name)) > 1]


def chances(chains: MarkovWidths, limit: int = 10) -> dict[str, dict[int, float]]:
    """P(width) of every group, by walking along its chain."""
    space, logits = chains.space, iter(chains.alpha.tolist())
    found = {}
    for name in space.names:
        options = space.options(name, limit)
        stop = {}
        here = 1.0
        if len(options) > 1:
            for width, logit in zip(options, next(logits), strict=False):
                if width != options[-1]:
                    forward = 1 / (1 + math.exp(-logit))
                    stop[width] = here * (1 - forward)
                    here *= forward
        stop[options[-1]] = here
        found[name] = stop
    return found


def close(actual: Any, expected: Any, rtol: float = 1e-10, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@st.composite
def random_chains(draw: st.DrawFn) -> MarkovWidths:
    """Chains over random choices, some of them a single one, with any logits."""
    space, _ = priced(
        draw(st.sampled_from(["concat", "residual", "depthwise", "grouped", "concat_then_add"]))
    )
    choices = {
        name: draw(st.lists(st.sampled_from(space.choices(name)), min_size=1, max_size=6))
        for name in space.names
    }
    chains = MarkovWidths(space.among(choices))
    count = chains.alpha.numel()
    logits = draw(st.lists(st.floats(-8, 8), min_size=count, max_size=count))
    with torch.no_grad():
        chains.alpha.copy_(torch.tensor(logits, dtype=torch.float64).reshape(chains.alpha.shape))
    return chains


# --- bins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "high", "size", "kept"),
    [
        (64, 1.0, 64 // 10, 64 - 9 * 6),
        (256, 1.0, 256 // 10, 256 - 9 * 25),
        (512, 1.0, 512 // 10, 512 - 9 * 51),
        (2048, 1.0, 2048 // 10, 2048 - 9 * 204),
        (48, 1.5, 48 // 15, 48 - 14 * 3),
        (30, 1.0, 3, 3),
        (90, 1.5, 6, 6),
        (5, 1.0, 0, 5),
    ],
)
def test_bins_of_the_paper(channels: int, high: float, size: int, kept: int) -> None:
    assert bins(channels, 0.1, high, 0.1) == (size, kept)


def test_published_bins() -> None:
    assert [bins(c, 0.1, 1.0, 0.1) for c in (64, 256, 512, 2048)] == [(6, 10), (25, 31), (51, 53), (204, 212)]
    assert bins(48, 0.1, 1.5, 0.1) == (3, 6)


@given(channels=st.integers(1, 3000), step=st.sampled_from([0.05, 0.1]), narrowest=st.integers(1, 5))
def test_bins_fill_the_group(channels: int, step: float, narrowest: int) -> None:
    for widest in (round(1 / step), round(1.5 / step)):  # both in steps
        size, kept = bins(channels, narrowest * step, widest * step, step)
        assert size == channels // widest
        assert kept + size * (widest - narrowest) == channels
        assert kept * widest >= narrowest * channels


def test_paper_choices_make_a_space() -> None:
    model, x, _ = made("grouped")
    groups = find_channel_groups(model, x, ignore=["g"])
    by_name = {g.name: g for g in groups}
    assert paper_choices(by_name["g"]) == (12,)  # frozen
    free_groups = find_channel_groups(model, x)
    assert paper_choices(free_groups[0], 0.25, 1.0, 0.25) == (4, 8, 12, 16)  # multiples of 4
    assert paper_choices(free_groups[0]) == (16,)  # four units are too few for tenths
    space = WidthSpace(groups).among({g.name: paper_choices(g, 0.5, 1.0, 0.25) for g in groups})
    assert space.choices("a") == (8, 12, 16)


def test_the_papers_space_has_a_chain_of_its_transitions() -> None:
    space, _, _ = chain(3, 64, 8)
    space = space.among({g.name: paper_choices(g) for g in space.groups})
    assert space.choices(space.names[0]) == tuple(range(10, 65, 6))
    assert MarkovWidths(space).alpha.shape == (3, 9)


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0.0, 1.0, 0.1), (0.5, 0.4, 0.1), (0.1, 1.0, 0.0), (1e-6, 1.0, 0.1)]
)
def test_bins_that_make_no_sense(low: float, high: float, step: float) -> None:
    with pytest.raises(ConfigError, match="DMCP's bins"):
        bins(100, low, high, step)


# --- chains ------------------------------------------------------------------------------------------


def test_logits_of_zero_halve_each_transition() -> None:
    space, _, _ = chain(2, 40, 4)
    chains = MarkovWidths(space)
    assert chains.alpha.shape == (2, 9)
    close(chains.marginals(), torch.tensor([[0.5**k for k in range(1, 10)]] * 2, dtype=torch.float64), 1e-15)
    close(chains.marginals().sum(1), torch.full((2,), 1 - 2**-9, dtype=torch.float64), 1e-15)


@settings(max_examples=40, deadline=None)
@given(chains=random_chains())
def test_marginals_fall_strictly_between_0_and_1(chains: MarkovWidths) -> None:
    for name, pi in zip(free(chains.space), chains.marginals().tolist(), strict=True):
        transitions = len(chains.space.options(name)) - 1
        assert all(a > b for a, b in itertools.pairwise([1.0, *pi[:transitions], 0.0]))
        assert not any(pi[transitions:])


def test_slopes_of_marginals() -> None:
    chains = chains_of(chain(1, 40, 8)[0])
    (logits,) = chains.alpha.detach()
    p, pi = torch.sigmoid(logits), chains.marginals()[0].detach()
    for k in range(len(p)):
        (slope,) = torch.autograd.grad(chains.marginals()[0, k], chains.alpha)
        close(slope[0], torch.where(torch.arange(len(p)) <= k, pi[k] * (1 - p), 0.0), 1e-12)


@pytest.mark.parametrize("logit", [-1000.0, -8.0, 8.0, 1000.0])
def test_extreme_logits_give_finite_values_and_slopes(logit: float) -> None:
    chains = MarkovWidths(chain(2, 80, 1)[0], limit=80)
    with torch.no_grad():
        chains.alpha.fill_(logit)
    (chains.mean().sum() + chains.variance().sum()).backward()
    assert chains.mean().isfinite().all() and chains.variance().isfinite().all()
    assert chains.alpha.grad is not None and chains.alpha.grad.isfinite().all()


def test_what_lies_beyond_a_groups_transitions_has_no_effect() -> None:
    space, costs = priced("concat")  # groups of 4, 6 and 5 choices
    chains = chains_of(space)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    bounds = Budget.parse(0.5).bound(costs)
    before = chains.mean(), chains.variance(), chains.sample(50, torch.Generator())
    loss = budget_loss(*expected_costs(*before[:2], bounds))
    loss.backward()
    assert chains.alpha.grad is not None
    assert torch.equal(chains.alpha.grad == 0, padding)
    with torch.no_grad():
        chains.alpha[padding] = 5
    after = chains.mean(), chains.variance(), chains.sample(50, torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@settings(max_examples=60, deadline=None)
@given(chains=random_chains())
def test_moments_are_those_of_the_enumerated_widths(chains: MarkovWidths) -> None:
    mean, second = [], []
    for stop in chances(chains).values():
        assert sum(stop.values()) == pytest.approx(1, abs=1e-12)
        mean.append(sum(p * c for c, p in stop.items()))
        second.append(sum(p * c**2 for c, p in stop.items()))
    means, seconds = (torch.tensor(m, dtype=torch.float64) for m in (mean, second))
    close(chains.mean(), means, 1e-11)
    close(chains.variance(), seconds - means**2, 1e-11, 1e-10)
    close(chains.variance() + chains.mean() ** 2, seconds, 1e-11)


def test_variance_of_equal_steps_by_the_papers_bins() -> None:
    space, _, _ = chain(2, 64, 8)
    space = space.among({g.name: paper_choices(g) for g in space.groups})
    chains = chains_of(space)
    pi = chains.marginals()
    squares = ((2 * torch.arange(1, 10) - 1) * pi).sum(1)
    close(chains.mean(), 10 + 6 * pi.sum(1))
    close(chains.variance(), 6**2 * (squares - pi.sum(1) ** 2))


def test_groups_without_a_choice_stay() -> None:
    model, x, _ = made("concat")
    groups = find_channel_groups(model, x, ignore=["a"])
    chains = chains_of(WidthSpace(groups, divisor=1).among({"b": [4]}))
    stuck = [i for i, g in enumerate(groups) if g.name in ("a", "b")]
    assert chains.alpha.shape == (1, 4)
    assert chains.mean()[stuck].tolist() == [4, 4]
    assert chains.variance()[stuck].tolist() == [0, 0]
    assert (chains.sample(20, torch.Generator())[:, stuck] == 4).all()


def test_a_space_without_any_choice() -> None:
    space, costs = priced("residual")
    space = space.among({"stem": [4], "a": [2]})
    chains = MarkovWidths(space)
    bounds = Budget.parse(1.0).bound(costs)
    loss = budget_loss(*expected_costs(chains.mean(), chains.variance(), bounds))
    loss.backward()
    widths = Widths({"stem": 4, "a": 2})
    assert expected_widths(chains, bounds) == widths
    assert direct_samples(chains, bounds, generator=torch.Generator()) == [widths]


def test_only_the_logits_are_saved() -> None:
    chains = chains_of(chain(2, 40, 4)[0])
    fresh = MarkovWidths(chains.space)
    assert list(chains.state_dict()) == ["alpha"]
    fresh.load_state_dict(chains.state_dict())
    assert torch.equal(fresh.mean(), chains.mean())


def test_clamp_holds_the_logits() -> None:
    chains = chains_of(chain(2, 40, 4)[0], spread=20)
    expected = chains.alpha.detach().clone().clamp(-8, 8)
    assert not torch.equal(chains.alpha, expected)
    chains.clamp_()
    assert torch.equal(chains.alpha, expected)


# --- samples -----------------------------------------------------------------------------------------


def test_samples_reach_each_width_as_often_as_they_should() -> None:
    space, _ = priced("concat")
    chains = chains_of(space, spread=1.0)
    n = 20_000
    drawn = chains.sample(n, torch.Generator().manual_seed(1))
    assert drawn.shape == (n, 3) and drawn.dtype == torch.float64
    for column, stop in zip(drawn.T, chances(chains).values(), strict=True):
        assert set(column.tolist()) <= set(stop)
        for width, p in stop.items():
            assert abs(int((column == width).sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1
    centred = (drawn - chains.mean()) / chains.variance().sqrt()
    correlation = (centred.T @ centred / n - torch.eye(3)).detach()
    assert correlation.abs().max() < 5 * 2 / math.sqrt(n)


def test_samples_visit_the_options_only() -> None:
    space, _, _ = chain(2, 40, 1)
    drawn = chains_of(space, limit=4, spread=0.5).sample(300, torch.Generator())
    for name, column in zip(space.names, drawn.T, strict=True):
        assert set(column.tolist()) == set(map(float, space.options(name, 4)))


def test_the_same_seed_draws_the_same_samples() -> None:
    chains = chains_of(chain(3, 40, 4)[0])
    first, again, other = (chains.sample(30, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- expected costs ----------------------------------------------------------------------------------


def enumerated(chains: MarkovWidths, cost: PolynomialCost) -> float:
    """The expected cost, as the sum over all networks."""
    total = 0.0
    for combination in itertools.product(*(stop.items() for stop in chances(chains).values())):
        widths = {name: c for name, (c, _) in zip(chains.space.names, combination, strict=True)}
        total += math.prod(p for _, p in combination) * cost(widths)
    return total


@pytest.mark.parametrize(
    "name", ["shared", "residual", "depthwise", "concat", "layer_scale", "chunk_and_add"]
)
def test_expected_costs_are_sums_over_all_networks(name: str) -> None:
    space, costs = priced(name)
    chains = chains_of(space)
    bounds = Budget.parse({"params": 0.5, "flops": 0.25}).bound(costs)
    expected, most = expected_costs(chains.mean(), chains.variance(), bounds)
    sums = [enumerated(chains, costs[kind]) for kind in ("params", "flops")]
    close(expected, torch.tensor(sums, dtype=torch.float64), 1e-12)
    assert most.tolist() == [costs["params"].full // 2, costs["flops"].full // 4]


def test_a_layer_within_one_group_needs_the_variance() -> None:
    space, costs = priced("shared")
    chains = chains_of(space)
    bounds = Budget.parse(0.5).bound(costs)
    (expected,), _ = expected_costs(chains.mean(), chains.variance(), bounds)
    (without,), _ = expected_costs(chains.mean(), torch.zeros(1, dtype=torch.float64), bounds)
    assert expected - without > 0.05 * expected


def test_expected_flops_are_the_mean_of_samples() -> None:
    space, cost, _ = chain(10, 40, 4)
    chains = chains_of(space)
    n = 20_000
    drawn = cost.batch(chains.sample(n, torch.Generator().manual_seed(3)))
    (expected,), _ = expected_costs(chains.mean().detach(), chains.variance().detach(), bound(0.5, cost))
    assert abs(float(drawn.mean() / expected) - 1) < 0.01
    assert abs(float(drawn.mean() - expected)) < 4 * float(drawn.std()) / math.sqrt(n)


def test_a_depthwise_layer_is_counted_once_in_the_gradient() -> None:
    space, costs = priced("depthwise")
    layer = costs["flops"].layers()["dw"]
    bounds = Bounds(((Limit("flops", 1.0, True), layer, layer.full),))
    chains = chains_of(space)
    mean = chains.mean().detach().requires_grad_()
    (expected,), _ = expected_costs(mean, chains.variance().detach(), bounds)
    (slope,) = torch.autograd.grad(expected, mean)
    per_channel = 2 * 3 * 3 * 8 * 8  # in a batch of two images
    assert slope.tolist() == [per_channel if name == "a" else 0 for name in space.names]
    close(expected, per_channel * mean[space.names.index("a")], 1e-14)


class _Roots:
    """A cost that is no polynomial: the sum of the widths' roots."""

    full = 10.0

    def __call__(self, widths: Mapping[str, int]) -> float:
        return sum(math.sqrt(w) for w in widths.values())

    def batch(self, widths: Tensor) -> Tensor:
        return widths.sqrt().sum(1)


def test_other_costs_are_taken_at_the_mean() -> None:
    space, costs = priced("concat")
    chains = chains_of(space)
    bounds = Bounds(
        (
            (Limit("latency_ms", 5.0, False), _Roots(), 5.0),
            (Limit("flops", 100.0, False), costs["flops"], 100),
        )
    )
    expected, most = expected_costs(chains.mean(), chains.variance(), bounds)
    close(expected[0], chains.mean().sqrt().sum())
    assert most.tolist() == [5, 100]
    (slope,) = torch.autograd.grad(expected[0], chains.alpha)
    assert slope.abs().sum() > 0


# --- the budget's loss -------------------------------------------------------------------------------


def slope_at(
    expected: Sequence[float], most: Sequence[float], weight: float = 1.0
) -> tuple[float, list[float]]:
    """`budget_loss` and its gradient."""
    e = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    loss = budget_loss(e, torch.tensor(most, dtype=torch.float64), weight)
    loss.backward()
    assert e.grad is not None
    return float(loss.detach()), e.grad.tolist()


@pytest.mark.parametrize("expected", [190.0, 190.001, 195.0, math.nextafter(200, 0)])
def test_at_rest_just_below_the_budget(expected: float) -> None:
    assert slope_at([expected], [200]) == (0, [0])


@pytest.mark.parametrize("expected", [0.0, 1.0, 100.0, 189.999])
def test_widens_what_is_far_below(expected: float) -> None:
    loss, (slope,) = slope_at([expected], [200])
    assert loss == pytest.approx(math.log((200 - expected) / 10), rel=1e-12)
    assert slope == pytest.approx(1 / (expected - 200), rel=1e-12)
    assert -20 / 200 <= slope < 0 < loss


@pytest.mark.parametrize("expected", [200.0, 200.001, 300.0, 1e6])
def test_narrows_what_is_above(expected: float) -> None:
    loss, (slope,) = slope_at([expected], [200])
    assert loss == pytest.approx(math.log((expected - 190) / 10), rel=1e-12, abs=1e-12)
    assert slope == pytest.approx(1 / (expected - 190), rel=1e-12)
    assert 0 < slope <= 20 / 200 * (1 + 1e-12)


@given(share=st.floats(0, 10), unit=st.sampled_from([1e-3, 1.0, 1e6, 1e9]))
def test_the_unit_of_the_cost_does_not_matter(share: float, unit: float) -> None:
    loss, (slope,) = slope_at([share], [1.0])
    scaled, (scaled_slope,) = slope_at([share * unit], [unit])
    if min(abs(share - edge) for edge in (0.95, 1.0)) > 1e-12:
        assert scaled == pytest.approx(loss, rel=1e-9, abs=1e-9)
        assert scaled_slope * unit == pytest.approx(slope, rel=1e-9)
    assert abs(slope) <= 20 * (1 + 1e-12)


def test_the_weight_scales_the_loss() -> None:
    loss, (slope,) = slope_at([50], [200])
    lighter, (lighter_slope,) = slope_at([50], [200], 0.1)
    assert (lighter, lighter_slope) == (pytest.approx(0.1 * loss), pytest.approx(0.1 * slope))
    default = budget_loss(torch.tensor(50.0, dtype=torch.float64), 200)
    assert float(default) == pytest.approx(lighter, rel=1e-12)


def test_several_limits_add_up_and_the_tightest_alone_widens() -> None:
    above = [slope_at([e], [m]) for e, m in ((300, 200), (30, 10))]
    loss, slopes = slope_at([300, 30], [200, 10])
    assert loss == pytest.approx(sum(a[0] for a in above))
    assert slopes == [a[1][0] for a in above]
    assert slope_at([300, 3], [200, 10]) == (above[0][0], [above[0][1][0], 0])  # 3 is no reason to widen
    assert slope_at([195, 3], [200, 10]) == (0, [0, 0])  # the first is used in full
    below, (slope,) = slope_at([100], [200])
    assert slope_at([100, 3], [200, 10]) == (below, [slope, 0])


# --- gates -------------------------------------------------------------------------------------------


def test_each_channel_has_the_chance_that_it_is_kept() -> None:
    model, _, space = made("squeeze_excite")  # groups of 8 and 2
    space = space.among({"a": [2, 3, 6], "down": [1]})
    supernet = Supernet(model, space.groups, random_order(space.groups))
    chains = chains_of(space)
    gates = chains.gates(supernet)
    first, second = chains.marginals()[0].tolist()
    order = supernet.order
    assert gates["a"][order["a"]].tolist() == [1, 1, first, second, second, second, 0, 0]
    assert gates["down"][order["down"]].tolist() == [1, 0]


@pytest.mark.parametrize("name", CASES)
def test_gates_are_the_mean_of_hard_gates(name: str) -> None:
    model, _, space = made(name)
    supernet = Supernet(model, space.groups, random_order(space.groups))
    chains = chains_of(space, limit=4)
    mean: dict[str, Any] = dict.fromkeys(space.names, 0)
    for group, stop in chances(chains, 4).items():
        for width, p in stop.items():
            mean[group] = mean[group] + p * supernet.gates_of({group: width})[group]
    gates = chains.gates(supernet)
    assert set(gates) == set(space.names)
    for group, gate in gates.items():
        close(gate, mean[group], 1e-12)
        close(gate.sum(), chains.mean()[space.names.index(group)], 1e-12)


def test_groups_at_full_width_have_no_gate() -> None:
    model, x, _ = made("concat")
    groups = find_channel_groups(model, x, ignore=["a"])
    chains = MarkovWidths(WidthSpace(groups, divisor=1).among({"b": [6]}))
    assert list(chains.gates(Supernet(model, groups))) == ["c"]


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_open_chains_run_the_plain_network(name: str) -> None:
    model, x, space = made(name)
    supernet = Supernet(model, space.groups, random_order(space.groups))
    expected = model(x)
    with supernet.gated(certain(space, space.largest(), 20.0).gates(supernet)):
        close(model(x), expected, 1e-5, 1e-5 * float(expected.abs().max()))
    with supernet.gated(MarkovWidths(space).gates(supernet)):
        assert not torch.allclose(model(x), expected, rtol=1e-3)


@pytest.mark.parametrize("order", ["prefix", "random"])
@pytest.mark.parametrize("name", EXACT)
def test_certain_chains_run_the_cut_network(name: str, order: str) -> None:
    model, x, space = made(name)
    ranks = (prefix_order if order == "prefix" else random_order)(space.groups)
    supernet = Supernet(model, space.groups, ranks)
    widths = space.sample(torch.Generator().manual_seed(2))
    small = shrink(model, space.groups, widths, ranks)
    chains = certain(space, widths)
    with supernet.gated(chains.gates(supernet)):
        assert_same_outputs(model, small, x)
    assert chains.mean().tolist() == space.encode(widths).tolist()
    assert chains.variance().tolist() == [0] * len(widths)


@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("name", ["concat", "shared", "depthwise", "residual"])
def test_gradients_of_task_and_budget_are_central_differences(name: str, share: float) -> None:
    model, x, space = made(name)
    space = space.among({space.names[0]: [1, 2, 4]})
    supernet = Supernet(model, space.groups, random_order(space.groups))
    bounds = Budget.parse({"flops": share, "params": share}).bound(priced(name)[1])
    chains = chains_of(space)
    labels = torch.tensor([3, 7])

    def losses() -> tuple[Tensor, Tensor]:
        with supernet.gated(chains.gates(supernet)):
            logits = model(x)
        task = F.cross_entropy(logits if logits.shape[1] > 7 else F.pad(logits, (0, 8)), labels)
        return task, budget_loss(*expected_costs(chains.mean(), chains.variance(), bounds))

    for part in (0, 1):
        (slopes,) = torch.autograd.grad(losses()[part], chains.alpha)
        assert slopes.abs().max() > 1e-6
        step = 1e-5
        for i, slope in enumerate(slopes.flatten().tolist()):
            values = []
            for change in (step, -2 * step, step):
                with torch.no_grad():
                    chains.alpha.view(-1)[i] += change
                values.append(float(losses()[part].detach()))
            difference = (values[0] - values[1]) / (2 * step)
            assert difference == pytest.approx(slope, rel=1e-5, abs=1e-9)


# --- deriving networks -------------------------------------------------------------------------------


def growable(widths: Widths, space: WidthSpace, bounds: Bounds) -> bool:
    """Whether a group could take its next choice inside the budget."""
    return any(
        bounds.fits({**widths, name: wider})
        for name in space.names
        for wider in space.choices(name)
        if wider > widths[name]
    )


@st.composite
def derivations(draw: st.DrawFn) -> tuple[MarkovWidths, Bounds, dict[str, Any]]:
    """Chains, and a budget on FLOPs or parameters or both that the smallest network keeps."""
    chains = draw(random_chains())
    space = chains.space
    costs = next(costs for s, costs in map(priced, CASES) if s.groups is space.groups)
    kinds = draw(st.sampled_from([("flops",), ("params",), ("flops", "params")]))
    limits = {k: draw(st.integers(costs[k](space.smallest()), int(1.1 * costs[k].full))) for k in kinds}
    return chains, Budget.parse(limits).bound(costs), costs


@settings(max_examples=60, deadline=None)
@given(problem=derivations())
def test_expected_widths_fill_the_budget_and_keep_it(problem: Any) -> None:
    chains, bounds, _ = problem
    widths = expected_widths(chains, bounds)
    assert widths in chains.space
    assert bounds.fits(widths)
    assert not growable(widths, chains.space, bounds)
    assert expected_widths(chains, bounds) == widths


@settings(max_examples=60, deadline=None)
@given(problem=derivations(), n=st.integers(1, 4), tolerance=st.sampled_from([0.0, 0.02, 0.3]))
def test_direct_samples_are_close_below_the_budget(problem: Any, n: int, tolerance: float) -> None:
    chains, bounds, _ = problem

    def drawn() -> list[Widths]:
        generator = torch.Generator().manual_seed(0)
        return direct_samples(chains, bounds, n, generator=generator, tolerance=tolerance, batch=20, tries=2)

    found = drawn()
    assert 1 <= len(found) <= n
    assert len(set(found)) == len(found)
    for widths in found:
        assert widths in chains.space
        assert bounds.fits(widths)
        assert bounds.used(widths) >= 1 - tolerance or not growable(widths, chains.space, bounds)
    assert drawn() == found


@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_the_expected_network_is_the_choice_nearest_to_the_mean(seed: int) -> None:
    space, cost, _ = chain(4, 40, 4)
    space = space.among({name: [4, 8, 20, 28, 40] for name in space.names})
    chains = chains_of(space, seed=seed)
    nearest = Widths(
        {
            name: min(space.choices(name), key=lambda c: abs(c - mean))
            for name, mean in zip(space.names, chains.mean().tolist(), strict=True)
        }
    )
    assert len(set(nearest.values())) > 1
    assert expected_widths(chains, Budget.parse(cost(nearest)).bound({"flops": cost})) == nearest


def test_the_expected_network_uses_widths_between_the_chains_options() -> None:
    space, cost, _ = chain(2, 40, 1)
    chains = MarkovWidths(space, limit=2)
    assert expected_widths(chains, bound(1.0, cost)) == space.largest()
    middle = dict.fromkeys(space.names, 22)  # halfway between 4 and 40
    assert expected_widths(chains, Budget.parse(cost(middle)).bound({"flops": cost})) == middle


def test_a_mean_far_over_the_budget_is_repaired() -> None:
    space, cost, _ = chain(6, 40, 4)
    bounds = bound(0.3, cost)
    found = expected_widths(certain(space, space.largest()), bounds)
    assert 0.95 * 0.3 * cost.full <= cost(found) <= 0.3 * cost.full
    assert max(found.values()) - min(found.values()) <= 4  # its shape stays: uniform


def test_accepted_samples_are_not_changed() -> None:
    space, cost, _ = chain(10, 40, 1)
    chains = chains_of(space, limit=4, spread=0.5)
    (mean,), _ = expected_costs(chains.mean(), chains.variance(), bound(1.0, cost))
    bounds = bound(float(mean.detach()) / cost.full, cost)
    found = direct_samples(chains, bounds, 5, generator=torch.Generator().manual_seed(0))
    assert len(found) == 5
    drawn = chains.sample(1000, torch.Generator().manual_seed(0))
    used = bounds.used_batch(drawn)
    inside = drawn[(used <= 1) & (used >= 0.98)]
    assert found == list(dict.fromkeys(space.decode(row) for row in inside))[:5]


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_direct_sampling_ends_where_no_sample_can_hit_the_budget(end: str) -> None:
    space, cost, _ = chain(6, 40, 4)
    bounds = bound(0.4, cost)
    chains = certain(space, getattr(space, end)())
    (found,) = direct_samples(chains, bounds, 5, generator=torch.Generator(), batch=50)
    assert 0.95 * 0.4 * cost.full <= cost(found) <= 0.4 * cost.full
    assert not growable(found, space, bounds)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_the_missed_samples_nearest_to_the_budget_are_projected(share: float) -> None:
    space, cost, _ = chain(3, 40, 4)
    chains = chains_of(space, spread=0.5)
    bounds = bound(share, cost)
    generator = torch.Generator()
    found = direct_samples(chains, bounds, 10, generator=generator, tolerance=0.1, batch=30, tries=2)
    generator = torch.Generator()
    drawn = torch.cat([chains.sample(30, generator), chains.sample(30, generator)])
    used = bounds.used_batch(drawn)
    close = (used <= 1) & (used >= 0.9)
    accepted = dict.fromkeys(space.decode(row) for row in drawn[close])
    missed = drawn[~close][(used[~close] - 1).abs().argsort(stable=True)]
    projected = dict.fromkeys(project(space.decode(row), space, bounds) for row in missed)
    assert found == list(accepted | projected)[:10]
    assert len(accepted) < len(found) > 1
    assert bool(accepted) == (share == 0.1)


@pytest.mark.parametrize("n", [1, 5])
def test_derived_networks_are_inside_the_budget_after_the_cut(n: int) -> None:
    model, x, space = made("squeeze_excite")
    cost = FlopsCost(model, x, space.groups)
    bounds = bound(0.6, cost)
    chains = chains_of(space)
    found = direct_samples(chains, bounds, n, generator=torch.Generator(), batch=100)
    for widths in (expected_widths(chains, bounds), *found):
        assert count_flops(shrink(model, space.groups, widths), x) == cost(widths) <= 0.6 * cost.full


def test_budgets_below_the_smallest_network_are_refused() -> None:
    space, cost, _ = chain(3, 40, 4)
    bounds = bound(0.001, cost)
    with pytest.raises(BudgetError, match="below the smallest network"):
        expected_widths(MarkovWidths(space), bounds)
    with pytest.raises(BudgetError, match="below the smallest network"):
        direct_samples(MarkovWidths(space), bounds, generator=torch.Generator())


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"batch": 0}, {"tries": 0}, {"tolerance": -0.1}, {"tolerance": 2}]
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    space, cost, _ = chain(3, 40, 4)
    with pytest.raises(ConfigError, match="direct sampling needs"):
        direct_samples(MarkovWidths(space), bound(0.5, cost), generator=torch.Generator(), **wrong)


# --- descending --------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 3.0])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_steps_down_the_loss_reach_the_budget_and_narrow_the_useless_group(
    start: float, share: float
) -> None:
    space, cost, _ = chain(4, 40, 4)
    bounds = bound(share, cost)
    chains = MarkovWidths(space)
    with torch.no_grad():
        chains.alpha.fill_(start)
    optimizer = torch.optim.SGD(chains.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    useful = torch.tensor([1.0, 1.0, 0.0, 1.0])
    for _ in range(300):
        optimizer.zero_grad()
        mean = chains.mean()
        task = -0.3 * (useful * (mean / 40).log()).sum()
        (task + budget_loss(*expected_costs(mean, chains.variance(), bounds), weight=1.0)).backward()
        optimizer.step()
        chains.clamp_()
    (expected,), (most,) = expected_costs(chains.mean(), chains.variance(), bounds)
    assert 0.9 < float((expected / most).detach()) < 1.05
    widths = expected_widths(chains, bounds)
    assert bounds.fits(widths)
    assert widths[space.names[2]] == min(widths.values()) < 0.7 * max(widths.values())
