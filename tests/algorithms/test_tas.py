"""TAS: interpolation, samples, expected costs, stages, the network that mixes widths and depths, decoding."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.cifar_resnet import CifarResNet, resnet20, resnet32
from nni_dbs import Budget, FlopsCost, ParamsCost, Widths, WidthSpace
from nni_dbs.algorithms.tas import (
    DepthLogits,
    WidthLogits,
    candidates,
    cosine_temperature,
    cost_loss,
    decode,
    expected_costs,
    linear_temperature,
)
from nni_dbs.algorithms.tas_supernet import (
    Pair,
    Stage,
    TASSupernet,
    depth_candidates,
    find_stages,
    interpolate_channels,
    single,
)
from nni_dbs.cost import Bounds, Limit, PolynomialCost, count_flops
from nni_dbs.errors import BudgetError, ConfigError, TrainingError
from nni_dbs.projection import FULL, project
from nni_dbs.training import distillation_loss
from tests.helpers import (
    CASES,
    Net,
    bound,
    chain,
    conv,
    entries,
    head,
    random_order,
    random_widths,
    randomised,
)
from torch_pruning_adapters import (
    WidthError,
    find_channel_groups,
    find_residual_blocks,
    prefix_order,
    shrink,
)

Norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DOUBLE = torch.float64
X = torch.zeros(1, 3, 32, 32)


def close(actual: Any, expected: Any, rtol: float = 1e-10, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(logits: WidthLogits | DepthLogits, seed: int = 0, std: float = 1.0) -> Any:
    """The same, with logits that differ."""
    with torch.no_grad():
        for parameter in logits.parameters():
            parameter += std * torch.randn(parameter.shape, generator=seeded(seed), dtype=DOUBLE)
    return logits


def favouring(logits: WidthLogits | DepthLogits, table: Tensor, chosen: Sequence[int]) -> Any:
    """The same, with a probability of 1 for the chosen candidates."""
    with torch.no_grad():
        for parameter in logits.parameters():
            parameter.copy_(torch.where(table == torch.tensor(chosen).unsqueeze(1), 1000.0, -1000.0))
    return logits


# --- networks ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + conv(relu(bn(conv(x)))), with a BatchNorm at the end."""

    def __init__(self, channels: int, inner: int, depthwise: bool = False) -> None:
        super().__init__()
        self.a, self.bn_a = conv(channels, inner, 1), nn.BatchNorm2d(inner)
        self.dw: nn.Module = conv(inner, inner, groups=inner) if depthwise else nn.Identity()
        self.bn_dw: nn.Module = nn.BatchNorm2d(inner) if depthwise else nn.Identity()
        self.b, self.bn_b = conv(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_a(self.a(x)).relu()
        y = self.bn_dw(self.dw(y)).relu()
        return x + self.bn_b(self.b(y))


def staged() -> Net:
    """Two stages in one Sequential (of 3 and 4 blocks with their leaders), one in another."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.late(net.body(x)))

    body = nn.Sequential(
        conv(3, 6),
        Block(6, 4),
        Block(6, 5, depthwise=True),
        nn.Sequential(conv(6, 8), nn.BatchNorm2d(8), nn.ReLU()),
        Block(8, 4),
        Block(8, 6),
        Block(8, 5),
    )
    return Net(forward, body=body, late=nn.Sequential(Block(8, 4), Block(8, 4)), fc=nn.Linear(8, 10))


def two_groups_on_a_norm() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.cat([net.bn_a(net.a(x)), net.bn_b(net.b(x))], 1)
        return head(net, (net.bn_c(net.c(x)) + y).relu())

    return Net(
        forward,
        a=conv(3, 4),
        bn_a=nn.BatchNorm2d(4),
        b=conv(3, 6),
        bn_b=nn.BatchNorm2d(6),
        c=conv(3, 10),
        bn_c=nn.BatchNorm2d(10),
        fc=nn.Linear(10, 10),
    )


def pre_activation() -> Net:
    """A stem that a BatchNorm and a sum read."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return head(net, x + net.b(net.bn_b(net.a(net.bn_a(x).relu())).relu()))

    return Net(
        forward,
        stem=conv(3, 6),
        bn_a=nn.BatchNorm2d(6),
        a=conv(6, 4),
        bn_b=nn.BatchNorm2d(4),
        b=conv(4, 6),
        fc=nn.Linear(6, 10),
    )


def dense() -> Net:
    """Two layers of a DenseNet."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.norm0(net.conv0(x)).relu()
        new = net.conv2(net.norm2(net.conv1(net.norm1(x).relu())).relu())
        return head(net, net.norm3(torch.cat([x, new], 1)).relu())

    return Net(
        forward,
        conv0=conv(3, 6),
        norm0=nn.BatchNorm2d(6),
        norm1=nn.BatchNorm2d(6),
        conv1=conv(6, 5, 1, bias=False),
        norm2=nn.BatchNorm2d(5),
        conv2=conv(5, 4),
        norm3=nn.BatchNorm2d(10),
        fc=nn.Linear(10, 10),
    )


def grouped_with_norms() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.bn_g(net.g(net.bn_a(net.a(x)).relu())).relu())

    return Net(
        forward,
        a=conv(3, 12),
        bn_a=nn.BatchNorm2d(12),
        g=conv(12, 8, groups=2),
        bn_g=nn.BatchNorm2d(8),
        fc=nn.Linear(8, 10),
    )


def used_twice() -> Net:
    """A convolution and its BatchNorm run twice; another one's output goes to a norm once, then elsewhere."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.bn(net.a(x)).relu()
        x = net.bn_s(net.s(net.bn_s(net.s(x)).relu())).relu()
        return head(net, net.t(net.bn_t(net.t(x)).relu()).relu())

    return Net(
        forward,
        a=conv(3, 6),
        bn=nn.BatchNorm2d(6),
        s=conv(6, 6),
        bn_s=nn.BatchNorm2d(6),
        t=conv(6, 6),
        bn_t=nn.BatchNorm2d(6),
        fc=nn.Linear(6, 10),
    )


# Layers after which widths are mixed: BatchNorms with copies, layers without; BatchNorms that keep their own.
POINTS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], str, str, str]] = {
    name: (CASES[name].build, copies, plain, own)
    for name, (copies, plain, own) in {
        "plain": ("bn", "b", ""),
        "residual": ("", "stem a b", ""),
        "concat": ("", "a b c", "bn"),
        "depthwise": ("bn", "a b", ""),
        "grouped": ("", "a g", ""),
        "squeeze_excite": ("", "a down up", ""),
        "chunk_and_add": ("", "a b", ""),
        "concat_then_add": ("", "c a b d", ""),
        "shared": ("", "a s", ""),
        "prelu": ("", "a", ""),
        "layer_scale": ("", "stem a", ""),
        "transposed": ("", "a up b", ""),
        "one_dimension": ("bn", "b", ""),
        "three_dimensions": ("bn", "b", ""),
    }.items()
} | {
    build.__name__: (functools.partial(lambda b: made(b), build), copies, plain, own)
    for build, (copies, plain, own) in {
        two_groups_on_a_norm: ("bn_a bn_b bn_c", "", ""),
        pre_activation: ("bn_b", "stem b", "bn_a"),
        dense: ("norm0 norm2", "conv2", "norm1 norm3"),
        grouped_with_norms: ("bn_a bn_g", "", ""),
        used_twice: ("bn bn_s", "t", "bn_t"),
    }.items()
}


def made(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomised(build()), torch.randn(2, 3, 8, 8, dtype=DOUBLE)


def problem(name: str) -> tuple[Any, Tensor, WidthSpace]:
    model, x = POINTS[name][0]()
    return model, x, WidthSpace(find_channel_groups(model, x), min_ratio=0.0, divisor=1)


@functools.cache
def stage_problem() -> tuple[nn.Module, Tensor, WidthSpace, dict[str, Any]]:
    model, x = made(staged)
    groups = find_residual_blocks(model, find_channel_groups(model, x), x)
    space = WidthSpace(groups, min_ratio=0.0, divisor=1)
    return model, x, space, {"flops": FlopsCost(model, x, groups), "params": ParamsCost(model, groups)}


def supernet_of(
    model: nn.Module, x: Tensor, space: WidthSpace, seed: int = 0, limit: int = 8
) -> tuple[TASSupernet, WidthLogits, DepthLogits]:
    """A supernet in a random order whose BatchNorm copies all differ, and logits."""
    widths = spread(WidthLogits(space, limit, generator=seeded(seed)), seed)
    order = random_order(space.groups, seed)
    supernet = TASSupernet(model, space.groups, widths.candidates, x, order)
    randomised(supernet.norms)
    return supernet, widths, spread(DepthLogits(supernet.stages, generator=seeded(seed)), seed + 1)


def picked(widths: WidthLogits, seed: int = 0) -> Widths:
    """A network of candidates."""
    return widths.space.decode(widths.networks(1, seeded(seed))[0])


# --- interpolation and candidates --------------------------------------------------------------------


def test_published_interpolations() -> None:
    x = torch.arange(4.0).reshape(1, 4, 1)
    assert interpolate_channels(x, 6).flatten().tolist() == [0, 0.5, 1, 2, 2.5, 3]
    assert interpolate_channels(x, 4) is x
    assert interpolate_channels(x, 2).flatten().tolist() == [0.5, 2.5]
    assert interpolate_channels(x, 3).flatten().tolist() == [0.5, 1.5, 2.5]
    assert interpolate_channels(x, 8).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@given(
    size=st.integers(1, 20),
    channels=st.integers(1, 40),
    dim=st.sampled_from([1, 2, -1]),
    last=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_interpolation_is_the_mean_of_windows(size: int, channels: int, dim: int, last: bool) -> None:
    shape = [2, 3, 4, 2]
    shape[dim] = size
    x = torch.randn(shape, dtype=DOUBLE)
    if last:
        x = x.to(memory_format=torch.channels_last)
    result = interpolate_channels(x, channels, dim)
    windows = [
        range(math.floor(i * size / channels), math.ceil((i + 1) * size / channels)) for i in range(channels)
    ]
    means = [torch.stack([x.select(dim, j) for j in window]).mean(0) for window in windows]
    close(result, torch.stack(means, dim if dim > 0 else 3), 1e-12, 1e-12)
    assert torch.equal(interpolate_channels(torch.ones_like(x), channels, dim), torch.ones_like(result))


@pytest.mark.parametrize(("size", "channels"), [(3, 5), (5, 3), (4, 4), (1, 3), (3, 1)])
def test_gradients_of_interpolation(size: int, channels: int) -> None:
    x = torch.randn(2, size, 3, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: interpolate_channels(x, channels), x)


def test_published_candidates() -> None:
    assert candidates(16) == (4, 6, 8, 9, 11, 12, 14, 16)
    assert candidates(64) == (19, 25, 32, 38, 44, 51, 57, 64)
    assert candidates(3) == (1, 2, 3)
    assert candidates(10) == (3, 4, 5, 6, 7, 8, 9, 10)  # 0.7 * 10 is below 7
    assert candidates(16, step=4) == (4, 8, 12, 16)
    assert candidates(100, (0.57,)) == (57,)


@pytest.mark.parametrize("ratios", [(), (0.0, 1.0), (0.5, 1.1)])
def test_candidates_that_make_no_sense(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="candidate widths"):
        candidates(16, ratios)


def test_the_papers_space() -> None:
    model = resnet20()
    groups = find_channel_groups(model, X, ignore=["stage1.1.conv1"])
    space = WidthSpace(groups).among(
        {g.name: candidates(g.size, step=g.step) for g in groups if g.frozen is None}
    )
    logits = WidthLogits(space, generator=seeded())
    assert logits.alpha.shape == (len(groups) - 1, 8)
    assert logits.candidates["conv1"] == candidates(16)
    assert logits.candidates["stage1.1.conv1"] == (16,)


def test_published_temperatures() -> None:
    assert [linear_temperature(p) for p in (0, 0.5, 1)] == pytest.approx([10, 5.05, 0.1])
    assert [cosine_temperature(p) for p in (0, 0.5, 1)] == pytest.approx([5, 2.55, 0.1])
    assert cosine_temperature(1 / 3) == pytest.approx(0.1 + 4.9 * 0.75)


# --- logits of widths --------------------------------------------------------------------------------


def mixed_space() -> WidthSpace:
    """Groups with 1, 2, 3 and 8 candidates."""
    space, _, _ = chain(4, 40, 1)
    names = space.names
    return space.among({names[0]: [8], names[1]: [4, 40], names[2]: [10, 20, 30]})


def test_first_logits() -> None:
    space, _, _ = chain(50, 40, 4)
    alpha = WidthLogits(space, generator=seeded()).alpha
    assert alpha.shape == (50, 8) and alpha.dtype == DOUBLE
    assert float(alpha.detach().std()) == pytest.approx(0.01, rel=0.15)
    assert abs(float(alpha.detach().mean())) < 4 * 0.01 / 20
    assert torch.equal(alpha, WidthLogits(space, generator=seeded()).alpha)
    assert not torch.equal(alpha, WidthLogits(space, generator=seeded(1)).alpha)


@torch.no_grad()
def test_moments_are_those_of_the_enumerated_widths() -> None:
    space = mixed_space()
    logits = spread(WidthLogits(space, generator=seeded()))
    rows = iter(logits.alpha.tolist())
    for i, name in enumerate(space.names):
        options = logits.candidates[name]
        assert options == space.options(name, 8)
        row = next(rows) if len(options) > 1 else [0.0]
        total = sum(math.exp(a) for a, _ in zip(row, options, strict=False))
        p = [math.exp(a) / total for a, _ in zip(row, options, strict=False)]
        mean = sum(q * c for q, c in zip(p, options, strict=True))
        assert float(logits.mean()[i]) == pytest.approx(mean, rel=1e-12)
        squares = sum(q * (c - mean) ** 2 for q, c in zip(p, options, strict=True))
        assert float(logits.variance()[i]) == pytest.approx(squares, rel=1e-12, abs=1e-12)
        assert float(logits.most_probable()[i]) == options[p.index(max(p))]


def test_two_different_candidates_and_their_weights() -> None:
    logits = spread(WidthLogits(mixed_space(), generator=seeded()))
    generator = seeded()
    for tau in (10.0, 1.0, 0.1):
        for _ in range(20):
            pairs = logits.sample(tau, generator)
            assert list(pairs) == list(logits.space.names)
            for i, (name, (widths, weights)) in enumerate(pairs.items()):
                assert set(widths) <= set(logits.candidates[name])
                assert len(set(widths)) == min(2, len(logits.candidates[name])) == (1 if i == 0 else 2)
                assert float(weights.sum()) == pytest.approx(1, abs=1e-12) and (weights >= 0).all()


def test_only_drawn_logits_get_a_gradient_equal_and_opposite() -> None:
    logits = spread(WidthLogits(mixed_space(), generator=seeded()))
    pairs = logits.sample(0.7, seeded(3))
    for row, name in enumerate(logits.space.names[1:]):
        widths, weights = pairs[name]
        (slope,) = torch.autograd.grad(weights[0], logits.alpha, retain_graph=True)
        drawn = [logits.candidates[name].index(w) for w in widths]
        a, b = weights.tolist()
        expected = torch.zeros_like(slope)
        expected[row, drawn[0]], expected[row, drawn[1]] = a * b / 0.7, -a * b / 0.7
        close(slope, expected, 1e-12, 1e-15)


def test_what_lies_beyond_a_groups_candidates_has_no_effect() -> None:
    logits = spread(WidthLogits(mixed_space(), generator=seeded()))
    padding = logits.widths == 0
    assert padding.sum(1).tolist() == [6, 5, 0]

    def outcome() -> list[Any]:
        pairs = logits.sample(0.5, seeded())
        return [logits.mean(), logits.variance(), *(p.weights for p in pairs.values())]

    before = outcome()
    torch.stack([t.sum() for t in before if t.requires_grad]).sum().backward()
    assert logits.alpha.grad is not None and not logits.alpha.grad[padding].any()
    with torch.no_grad():
        logits.alpha[padding] = 50
    assert all(torch.equal(a, b) for a, b in zip(before, outcome(), strict=True))


def test_pairs_come_as_often_as_they_should() -> None:
    space, _, _ = chain(1, 40, 10)  # 4 candidates
    logits = spread(WidthLogits(space, generator=seeded()))
    (name,), alpha = space.names, logits.alpha.detach()[0]
    options = logits.candidates[name]
    tau, n = 1.5, 4000
    noise = -torch.rand(200_000, 4, generator=seeded(7), dtype=DOUBLE).log().neg().log()
    p = ((alpha + noise) / tau).softmax(1)
    generator = seeded(5)
    drawn = [frozenset(logits.sample(tau, generator)[name].widths) for _ in range(n)]
    for i, j in itertools.combinations(range(4), 2):
        chance = float((p[:, i] * p[:, j] * (1 / (1 - p[:, i]) + 1 / (1 - p[:, j]))).mean())
        count = sum(pair == {options[i], options[j]} for pair in drawn)
        assert abs(count - n * chance) < 4 * math.sqrt(n * chance * (1 - chance)) + 0.01 * n * chance


def test_at_low_temperatures_the_heavier_candidate_is_drawn_from_the_softmax() -> None:
    space, _, _ = chain(1, 40, 10)
    logits = spread(WidthLogits(space, generator=seeded()))
    name, n, generator = space.names[0], 3000, seeded(2)
    heaviest = []
    for _ in range(n):
        (a, b), weights = logits.sample(1e-3, generator)[name]
        heaviest.append(a if weights[0] > weights[1] else b)
    for c, p in zip(logits.candidates[name], logits.probabilities()[0].tolist(), strict=True):
        assert abs(heaviest.count(c) - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_at_high_temperatures_all_pairs_are_alike() -> None:
    space, _, _ = chain(1, 40, 10)
    logits = spread(WidthLogits(space, generator=seeded()))
    name, n, generator = space.names[0], 3000, seeded(4)
    pairs = [logits.sample(1e6, generator)[name] for _ in range(n)]
    assert all(abs(float(pair.weights[0].detach()) - 0.5) < 1e-4 for pair in pairs)
    for a, b in itertools.combinations(logits.candidates[name], 2):
        count = sum(set(pair.widths) == {a, b} for pair in pairs)
        assert abs(count - n / 6) < 4 * math.sqrt(n * 5 / 36)


def test_equal_seeds_draw_equal_samples() -> None:
    logits = WidthLogits(mixed_space(), generator=seeded())
    depths = DepthLogits([Stage("a", "", ("b", "c"))], generator=seeded())
    for sample in (logits.sample, depths.sample):
        first, again, other = (str(sample(1.0, seeded(s))) for s in (1, 1, 2))
        assert first == again != other


def test_drawn_networks_follow_the_softmax() -> None:
    logits = spread(WidthLogits(mixed_space(), generator=seeded()))
    n = 5000
    drawn = logits.networks(n, seeded(1))
    assert drawn.shape == (n, 4) and (drawn[:, 0] == 8).all()
    for row, column in zip(range(3), drawn.T[1:], strict=True):
        for c, p in zip(logits.widths[row].tolist(), logits.probabilities()[row].tolist(), strict=True):
            assert abs(int((column == c).sum()) - n * p) < 4 * math.sqrt(n * p * (1 - p)) + 1e-9


def test_a_space_without_any_choice() -> None:
    space, cost, _ = chain(2, 40, 4)
    space = space.among(dict.fromkeys(space.names, (20,)))
    logits, depths = WidthLogits(space, generator=seeded()), DepthLogits(generator=seeded())
    fixed = dict.fromkeys(space.names, 20)
    assert {pair.widths for pair in logits.sample(1.0, seeded()).values()} == {(20, 20)}
    assert depths.sample(1.0, seeded()) == depths.presence() == {}
    assert logits.most_probable().tolist() == [20, 20]
    assert logits.networks(3, seeded()).tolist() == [[20, 20]] * 3
    assert depths.networks(3, seeded()).shape == (3, 0)
    bounds = bound(1.0, cost)
    expected, found, _ = expected_costs(logits, depths, bounds)
    assert expected.tolist() == found.tolist() == [cost(fixed)]
    assert decode(logits, depths, bounds, 4, generator=seeded()) == [Widths(fixed)]


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_temperatures_that_make_no_sense(tau: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be positive"):
        WidthLogits(mixed_space(), generator=seeded()).sample(tau, seeded())


def test_logits_that_are_not_finite() -> None:
    logits = WidthLogits(mixed_space(), generator=seeded())
    with torch.no_grad():
        logits.alpha[0, 0] = math.nan
    with pytest.raises(TrainingError, match="no longer finite"):
        logits.sample(1.0, seeded())


# --- depths ------------------------------------------------------------------------------------------


def test_published_candidate_depths() -> None:
    assert [depth_candidates(n) for n in range(1, 9)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 3, 4),
        (1, 3, 5),
        (1, 3, 5, 6),
        (1, 3, 5, 7),
        (1, 3, 5, 7, 8),
    ]
    assert depth_candidates(18) == (*range(1, 18, 2), 18)


def stages_of(model: nn.Module, x: Tensor = X) -> tuple[Stage, ...]:
    model.eval()
    return find_stages(model, find_residual_blocks(model, find_channel_groups(model, x, verify=False), x))


def test_stages_of_cifar_resnets() -> None:
    for n, blocks in ((2, ("1",)), (3, ("1", "2")), (5, ("1", "2", "3", "4"))):
        assert stages_of(CifarResNet(6 * n + 2)) == tuple(
            Stage(f"{s}.0", s, tuple(f"{s}.{b}" for b in blocks)) for s in ("stage1", "stage2", "stage3")
        )
    assert stages_of(CifarResNet(8)) == ()


def test_stages_of_torchvision_models() -> None:
    assert stages_of(torchvision.models.resnet18()) == tuple(
        Stage(f"layer{i}.0", f"layer{i}", (f"layer{i}.1",)) for i in (1, 2, 3, 4)
    )
    runs = [(2, 3, 3), (4, 5, 6), (7, 8, 10), (11, 12, 13), (14, 15, 16)]
    assert stages_of(torchvision.models.mobilenet_v2()) == tuple(
        Stage(f"features.{leader}", "features", tuple(f"features.{b}" for b in range(first, last + 1)))
        for leader, first, last in runs
    )


def test_stages_of_a_bottleneck_network() -> None:
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 3, 2, 1])
    assert stages_of(model) == (
        Stage("layer2.0", "layer2", ("layer2.1", "layer2.2")),
        Stage("layer3.0", "layer3", ("layer3.1",)),
    )


class _Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for child in reversed(list(self)):
            x = child(x)
        return x


def test_stages_need_a_plain_sequential() -> None:
    model, x, space, _ = stage_problem()
    assert find_stages(model, space.groups) == (
        Stage("body.0", "body", ("body.1", "body.2")),
        Stage("body.3", "body", ("body.4", "body.5", "body.6")),
        Stage("late.0", "late", ("late.1",)),
    )
    assert find_stages(model, find_channel_groups(model, x)) == ()
    blocks = [Block(6, 4), Block(6, 4)]
    other = Net(lambda net, x: net.body(x).mean((2, 3)), body=_Backwards(*blocks, conv(3, 6)))
    assert stages_of(other, x[:1].float()) == ()
    bare = nn.Sequential(conv(3, 6), *blocks, conv(6, 2))
    assert stages_of(bare, x[:1].float()) == (Stage("0", "", ("1", "2")),)


def test_depths_leave_out_the_last_blocks() -> None:
    stage = Stage("s.0", "s", ("s.1", "s.2", "s.3"))
    assert stage.depths == (1, 3, 4)
    assert [stage.removed(d) for d in stage.depths] == [("s.1", "s.2", "s.3"), ("s.3",), ()]
    depths = DepthLogits([stage, Stage("t.0", "t", ("t.1",))], generator=seeded())
    assert depths.removed(torch.tensor([3, 1])) == ("s.3", "t.1")


def some_depths() -> DepthLogits:
    """Stages of 4, 2, 9 and 3 blocks."""
    stages = [
        Stage(f"{s}.0", s, tuple(f"{s}.{i}" for i in range(1, n)))
        for s, n in zip("abcd", (4, 2, 9, 3), strict=True)
    ]
    return spread(DepthLogits(stages, generator=seeded()))


def test_blocks_are_present_at_all_depths_that_include_them() -> None:
    depths = some_depths()
    presence = depths.presence()
    assert len(presence) == 3 + 1 + 8 + 2
    for stage, p in zip(depths.stages, depths.probabilities(), strict=True):
        for block in stage.blocks:
            kept = [k for k, d in enumerate(stage.depths) if block not in stage.removed(d)]
            close(presence[block], p[kept].sum(), 1e-13)
            (slope,) = torch.autograd.grad(presence[block], depths.beta, retain_graph=True)
            assert slope.any()


def test_depths_are_weighed_by_the_noisy_softmax_of_all_candidates() -> None:
    depths, tau, n = some_depths(), 0.8, 3000
    generator = seeded()
    samples = [depths.sample(tau, generator) for _ in range(n)]
    for stage, row, p in zip(depths.stages, depths.beta, depths.probabilities(), strict=True):
        k = len(stage.depths)
        drawn = torch.stack([s[stage.name] for s in samples]).detach()  # (n, k)
        assert drawn.shape == (n, k)
        close(drawn.sum(1), torch.ones(n, dtype=DOUBLE), 1e-12)
        noise = -torch.rand(100_000, k, generator=seeded(1), dtype=DOUBLE).log().neg().log()
        expected = ((row[:k].detach() + noise) / tau).softmax(1)
        error = drawn.std(0) / math.sqrt(n)
        assert ((drawn.mean(0) - expected.mean(0)).abs() < 5 * error).all()
        first = drawn.argmax(1).bincount(minlength=k) / n  # Gumbel's maximum
        assert ((first - p[:k].detach()).abs() < 4 * (p[:k] * (1 - p[:k]) / n).sqrt().detach()).all()
    (slope,) = torch.autograd.grad(samples[0]["a.0"][0], depths.beta)
    assert (slope[0, :3] != 0).all() and not slope[0, 3:].any() and not slope[1:].any()


def test_most_probable_and_drawn_depths() -> None:
    depths, n = some_depths(), 4000
    best = depths.most_probable().tolist()
    drawn = depths.networks(n, seeded(1))
    assert drawn.shape == (n, 4)
    for stage, d, p, column in zip(depths.stages, best, depths.probabilities(), drawn.T, strict=True):
        assert d == stage.depths[int(p.argmax())]
        for candidate, chance in zip(stage.depths, p.tolist(), strict=False):
            count = int((column == candidate).sum())
            assert abs(count - n * chance) < 4 * math.sqrt(n * chance * (1 - chance))


# --- the loss of the cost ----------------------------------------------------------------------------


def slope_at(expected: Sequence[float], found: Sequence[float], most: Sequence[float]) -> list[float]:
    e = torch.tensor(expected, dtype=DOUBLE, requires_grad=True)
    loss = cost_loss(e, torch.tensor(found, dtype=DOUBLE), torch.tensor(most, dtype=DOUBLE))
    loss.backward()
    assert e.grad is not None
    return e.grad.tolist()


@pytest.mark.parametrize(
    ("found", "sign"),
    [(300, 1), (210.001, 1), (209.999, 0), (200, 0), (190.001, 0), (189.999, -1), (1, -1)],
)
def test_the_found_cost_decides_and_the_expected_one_gets_the_gradient(found: float, sign: int) -> None:
    for expected in (1.0, 150.0, 1e6):
        assert slope_at([expected], [found], [200]) == pytest.approx([sign / expected])
    assert slope_at([0.15], [found / 1e3], [0.2]) == pytest.approx([sign / 0.15])  # in another unit


def test_the_value_is_the_logarithm_of_the_expected_share() -> None:
    e, r = torch.tensor([300.0], dtype=DOUBLE), torch.tensor([200.0], dtype=DOUBLE)
    assert float(cost_loss(e, 2 * r, r)) == pytest.approx(math.log(1.5))
    assert float(cost_loss(e, r / 2, r)) == pytest.approx(-math.log(1.5))
    assert float(cost_loss(e, r, r)) == 0
    assert float(cost_loss(e, 1.08 * r, r, tolerance=0.1)) == 0


def test_several_limits_narrow_together_and_the_tightest_alone_widens() -> None:
    assert slope_at([2, 4], [30, 30], [10, 20]) == [0.5, 0.25]
    assert slope_at([2, 4], [30, 10], [10, 20]) == [0.5, 0]
    assert slope_at([2, 4], [10, 10], [10, 20]) == [0, 0]
    assert slope_at([2, 4], [5, 14], [10, 20]) == [0, -0.25]


# --- expected costs ----------------------------------------------------------------------------------


def stage_logits(seed: int = 0) -> tuple[WidthLogits, DepthLogits]:
    """Few candidates, so that all networks can be enumerated."""
    model, _, space, _ = stage_problem()
    choices = {name: space.choices(name)[-1:] for name in space.names}
    for name in ("body.0", "body.1.a", "body.2.a", "body.4.a", "late.1.a"):
        choices[name] = space.choices(name)[1::2]
    space = space.among(choices)
    widths = spread(WidthLogits(space, generator=seeded(seed)), seed)
    return widths, spread(DepthLogits(find_stages(model, space.groups), generator=seeded(seed)), seed + 1)


def enumerated(widths: WidthLogits, depths: DepthLogits, cost: PolynomialCost) -> float:
    """The expected cost, as the sum over all networks."""
    rows = iter(widths.probabilities().tolist())
    chances = {
        name: list(zip(c, next(rows) if len(c) > 1 else [1.0], strict=False))
        for name, c in widths.candidates.items()
    }
    rows = iter(depths.probabilities().tolist())
    of_depths = [list(zip(stage.depths, next(rows), strict=False)) for stage in depths.stages]
    total = 0.0
    for combination in itertools.product(*of_depths):
        removed = depths.removed(torch.tensor([d for d, _ in combination]))
        gone = {g.name for g in widths.space.groups if g.block in removed}
        for choice in itertools.product(*chances.values()):
            network = {n: 0 if n in gone else c for n, (c, _) in zip(chances, choice, strict=True)}
            p = math.prod(p for _, p in (*combination, *choice))
            total += p * cost(network)
    return total


def test_expected_costs_are_sums_over_all_networks() -> None:
    _, _, _, costs = stage_problem()
    widths, depths = stage_logits()
    bounds = Budget.parse({"params": 0.5, "flops": 0.25}).bound(costs)
    expected, found, most = expected_costs(widths, depths, bounds)
    sums = [enumerated(widths, depths, costs[kind]) for kind in ("params", "flops")]
    close(expected, torch.tensor(sums, dtype=DOUBLE), 1e-12)
    best = found_network(widths, depths)
    assert found.tolist() == [costs["params"](best), costs["flops"](best)]
    assert most.tolist() == [costs["params"].full // 2, costs["flops"].full // 4]


def found_network(widths: WidthLogits, depths: DepthLogits) -> dict[str, int]:
    """The most probable network."""
    removed = depths.removed(depths.most_probable())
    gone = {g.name for g in widths.space.groups if g.block in removed}
    network = widths.space.decode(widths.most_probable())
    return {name: 0 if name in gone else width for name, width in network.items()}


@pytest.mark.parametrize("seed", range(4))
def test_certain_logits_expect_what_they_find(seed: int) -> None:
    _, _, space, costs = stage_problem()
    widths, depths = WidthLogits(space, generator=seeded()), stage_logits()[1]
    network, at = picked(spread(widths, seed), seed), depths.networks(1, seeded(seed))[0]
    free = [network[n] for n in space.names if len(space.choices(n)) > 1]
    favouring(widths, widths.widths, free)
    favouring(depths, depths.depths, at.tolist())
    bounds = Budget.parse({"flops": 0.5, "params": 0.5}).bound(costs)
    expected, found, _ = expected_costs(widths, depths, bounds)
    close(expected.detach(), found, 1e-12)
    removed = depths.removed(at)
    gone = {g.name for g in space.groups if g.block in removed}
    assert found[0] == costs["flops"]({n: 0 if n in gone else w for n, w in network.items()})


class _Roots:
    """A cost that is no polynomial: the sum of the widths' roots."""

    full = 10.0

    def __call__(self, widths: Mapping[str, int]) -> float:
        return sum(math.sqrt(w) for w in widths.values())

    def batch(self, widths: Tensor) -> Tensor:
        return widths.sqrt().sum(1)


def test_other_costs_are_expected_at_the_mean_widths_and_full_depth() -> None:
    widths, depths = stage_logits()
    bounds = Bounds(((Limit("latency_ms", 5.0, False), _Roots(), 5.0),))
    (expected,), (found,), (most,) = expected_costs(widths, depths, bounds)
    close(expected, widths.mean().sqrt().sum())
    assert float(found) == pytest.approx(_Roots()(found_network(widths, depths)), rel=1e-12)
    assert float(most) == 5
    alpha, beta = torch.autograd.grad(expected, [widths.alpha, depths.beta], allow_unused=True)
    assert alpha.any() and beta is None


def differences(loss: Callable[[], Tensor], parameter: nn.Parameter) -> None:
    """The gradient is that of central differences."""
    (slopes,) = torch.autograd.grad(loss(), parameter)
    assert slopes.abs().max() > 1e-6
    step = 1e-5
    for i, slope in enumerate(slopes.flatten().tolist()):
        values = []
        for change in (step, -2 * step, step):
            with torch.no_grad():
                parameter.view(-1)[i] += change
            values.append(float(loss().detach()))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_gradients_of_the_cost_are_central_differences(share: float) -> None:
    _, _, _, costs = stage_problem()
    widths, depths = stage_logits()
    bounds = Budget.parse({"flops": share, "params": share}).bound(costs)

    def loss() -> Tensor:
        return cost_loss(*expected_costs(widths, depths, bounds))

    for parameter in (widths.alpha, depths.beta):
        differences(loss, parameter)


def test_the_cost_alone_leads_into_the_band() -> None:
    space, cost, _ = chain(6, 64, 4)
    for share in (0.2, 0.6):
        bounds = bound(share, cost)
        widths, depths = WidthLogits(space, generator=seeded()), DepthLogits(generator=seeded())
        optimizer = torch.optim.Adam(widths.parameters(), 0.05)
        for _ in range(150):
            optimizer.zero_grad()
            cost_loss(*expected_costs(widths, depths, bounds)).backward()
            optimizer.step()
        _, found, most = expected_costs(widths, depths, bounds)
        assert 0.95 <= float(found / most) <= 1.05


# --- the supernet: what it computes ------------------------------------------------------------------


class PaddedMix(nn.Module):
    """The paper's way: widths cut out of the full layer's output, interpolated, padded by zeros."""

    def __init__(self, supernet: TASSupernet, layer: str, pairs: Mapping[str, Pair]) -> None:
        super().__init__()
        module = supernet.model.get_submodule(layer)
        own = module if isinstance(module, Norms) else None
        self.dim = 1 if own else 1 - module.weight.dim()
        self.parts: list[tuple[list[int], int, Tensor, Normalise]] = []
        members = [(g, m) for g in supernet.groups for m in g.members if m.layer == layer]
        for g, member in members:
            if member.role == "consumer":
                continue
            where: dict[int, list[int]] = {}  # entries of each channel
            for entry, channel in entries(member):
                where.setdefault(channel, []).append(entry)
            copies = [[where[c][i] for c in supernet.order[g.name]] for i in range(len(where[0]))]
            blocks = [entries_[b :: g.step] for entries_ in copies for b in range(g.step)]
            for number, ranked in enumerate(blocks):
                for width, weight in zip(pairs[g.name].widths, pairs[g.name].weights, strict=True):
                    n = width // g.step
                    key = f"{layer} {g.name} {width}".replace(".", "/")
                    if key in supernet.norms:
                        norm = Normalise(supernet.norms[key], [*range(number * n, number * n + n)])
                    else:
                        norm = Normalise(own, ranked[:n])
                    self.parts.append((ranked[: max(pairs[g.name].widths) // g.step], n, weight, norm))

    def forward(self, y: Tensor) -> Tensor:
        y = y.movedim(self.dim, 1)
        result = torch.zeros_like(y)
        for wider, n, weight, norm in self.parts:
            part = interpolate_channels(norm(y[:, wider[:n]]), len(wider))
            result[:, wider] = result[:, wider] + weight * part
        return result.movedim(1, self.dim)


class Normalise:
    """A part of a BatchNorm in eval mode; None: the identity."""

    def __init__(self, norm: Any, index: list[int]) -> None:
        self.norm = norm
        self.index = index

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        names = ("running_mean", "running_var", "weight", "bias")
        parts = [getattr(self.norm, name)[self.index] for name in names]
        return F.batch_norm(x, *parts, eps=self.norm.eps)


class Masked(nn.Module):
    """A layer whose output is zero at the channels that are wider than both widths."""

    def __init__(self, supernet: TASSupernet, name: str, layer: nn.Module, pairs: Mapping[str, Pair]) -> None:
        super().__init__()
        self.layer = layer
        self.gone = [
            entry
            for g in supernet.groups
            for m in g.members
            if m.layer == name
            for entry, channel in entries(m)
            if channel in supernet.order[g.name][max(pairs[g.name].widths) :]
        ]

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).clone()
        y[:, self.gone] = 0
        return y


def padded(name: str, supernet: TASSupernet, pairs: Mapping[str, Pair]) -> nn.Module:
    """The model whose layers compute as in the paper."""
    _, copies, plain, own = POINTS[name]
    model = copy.deepcopy(supernet.model)
    for layer in copies.split():
        setattr(model, layer, PaddedMix(supernet, layer, pairs))
    for layer in plain.split():
        setattr(model, layer, nn.Sequential(getattr(model, layer), PaddedMix(supernet, layer, pairs)))
    for layer in own.split():
        setattr(model, layer, Masked(supernet, layer, getattr(model, layer), pairs))
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POINTS)
def test_outputs_are_those_of_the_papers_padded_network(name: str, seed: int) -> None:
    model, x, space = problem(name)
    supernet, widths, _ = supernet_of(model, x, space, seed)
    pairs = widths.sample(2.0, seeded(seed))
    with torch.no_grad():
        expected = padded(name, supernet, pairs)(x)
        with supernet.sampled(pairs):
            outputs = model(x)
    assert expected.abs().max() > 1e-12
    close(outputs, expected, 1e-9, 1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", POINTS)
def test_copies_are_where_a_norm_alone_reads_a_layer(name: str) -> None:
    model, x, space = problem(name)
    supernet, _, _ = supernet_of(model, x, space)
    assert {key.split()[0] for key in supernet.norms} == set(POINTS[name][1].split())


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_single_network_is_the_sliced_one(name: str) -> None:
    model, x = CASES[name].build()
    space = WidthSpace(find_channel_groups(model, x), min_ratio=0.0, divisor=1)
    order = random_order(space.groups)
    choices = {n: space.choices(n) for n in space.names}
    supernet = TASSupernet(model, space.groups, choices, x, order)
    for seed in range(3):
        widths = random_widths(space.groups, seed)
        with torch.no_grad(), supernet.at(widths):
            expected = model(x)
        with torch.no_grad(), supernet.sampled(single(widths)):
            close(model(x), expected, 1e-9, 1e-12)
        with torch.no_grad(), supernet.sampled({n: Pair((w, w), torch.rand(2)) for n, w in widths.items()}):
            close(model(x), expected, 1e-9, 1e-12)


def images(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "densenet":
        return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5), torch.randn(2, 3, 32, 32)
    if name == "mobilenet":
        return torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5), torch.randn(2, 3, 32, 32)
    if name == "bottlenecks":
        block = torchvision.models.resnet.Bottleneck
        return torchvision.models.resnet.ResNet(block, [1, 2, 1, 1], 5, groups=2), torch.randn(2, 3, 32, 32)
    return resnet20(5), torch.randn(2, 3, 32, 32)


IMAGES = ("resnet", "bottlenecks", "mobilenet", "densenet")


def real(name: str) -> tuple[nn.Module, Tensor, WidthSpace]:
    model, x = images(name)
    randomised(model)
    groups = find_channel_groups(model, x.double(), verify=False)
    groups = find_residual_blocks(model, groups, x.double())
    return model, x.double(), WidthSpace(groups, min_ratio=0.2, divisor=4)


@pytest.mark.parametrize("name", [*POINTS, *IMAGES])
def test_an_adopted_network_is_cut_as_it_was_sampled(name: str) -> None:
    model, x, space = real(name) if name in IMAGES else problem(name)
    supernet, widths, depths = supernet_of(model, x, space)
    network = dict(picked(widths))
    removed = depths.removed(depths.networks(1, seeded(1))[0])
    network |= {g.name: 0 for g in space.groups if g.block is not None and g.block in removed}
    assert bool(removed) == (name in ("resnet", "bottlenecks", "mobilenet"))
    with torch.no_grad(), supernet.sampled(single(network)):
        expected = model(x)
    if len(supernet.norms):
        with torch.no_grad(), supernet.at(network):
            assert not torch.allclose(model(x), expected, rtol=1e-3)
    supernet.adopt(network)
    small = shrink(model, space.groups, network, supernet.order)
    with torch.no_grad():
        close(small(x), expected, 1e-9, 1e-9 * float(expected.abs().max()))
        with supernet.at(network):
            close(model(x), expected, 1e-9, 1e-9 * float(expected.abs().max()))


def test_widths_between_candidates_adopt_the_wider_ones_norms() -> None:
    model, x, space = problem("grouped_with_norms")  # groups of 12 and 8 channels, step 2
    order = random_order(space.groups)
    supernet = TASSupernet(model, space.groups, {"a": (4, 10, 12), "g": (4, 8)}, x, order)
    randomised(supernet.norms)
    before = copy.deepcopy(model.bn_a)
    supernet.adopt({"a": 6, "g": 8})
    wide: Any = supernet.norms["bn_a a 10"]
    blocks = [order["a"][b::2] for b in range(2)]  # each channel of a block of five in the copy
    for attribute in ("weight", "bias", "running_mean", "running_var"):
        new, old, source = (getattr(m, attribute) for m in (model.bn_a, before, wide))
        for b, ranked in enumerate(blocks):
            assert torch.equal(new[ranked[:3]], source[5 * b : 5 * b + 3])
            assert torch.equal(new[ranked[3:]], old[ranked[3:]])
    assert torch.equal(model.bn_g.weight[order["g"][::2]], supernet.norms["bn_g g 8"].weight[:4])
    supernet.adopt({"a": 2})
    assert torch.equal(model.bn_a.weight[blocks[1][:1]], supernet.norms["bn_a a 4"].weight[2:3])


def test_groups_with_a_single_candidate_keep_the_models_norms() -> None:
    model, x, space = problem("two_groups_on_a_norm")
    name, other = space.names
    supernet = TASSupernet(model, space.groups, {name: (2,), other: (3, 6)}, x, random_order(space.groups))
    randomised(supernet.norms)
    assert {key.split()[1] for key in supernet.norms} == {other.replace(".", "/")}
    weights = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    pairs = {name: Pair((2, 2), weights), other: Pair((3, 6), weights)}
    with torch.no_grad():
        expected = padded("two_groups_on_a_norm", supernet, pairs)(x)
        with supernet.sampled(pairs):
            close(model(x), expected, 1e-9, 1e-12)


# --- the supernet: depths ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_certain_depths_run_the_network_without_the_blocks(seed: int) -> None:
    model, x, space, _ = stage_problem()
    supernet, widths, depths = supernet_of(model, x, space, seed)
    network, at = picked(widths, seed), depths.networks(1, seeded(seed))[0]
    favouring(depths, depths.depths, at.tolist())
    removed = depths.removed(at)
    shallow = {g.name: 0 if g.block in removed else network[g.name] for g in space.groups}
    with torch.no_grad(), supernet.sampled(single(shallow)):
        expected = model(x)
    with torch.no_grad(), supernet.sampled(single(network), depths.sample(1.0, seeded())):
        close(model(x), expected, 1e-9, 1e-12)
    pairs = widths.sample(1.0, seeded())
    gone = {g.name: Pair((0, 0), torch.ones(2)) for g in space.groups if g.block in removed}
    with torch.no_grad(), supernet.sampled({**pairs, **gone}):
        expected = model(x)
    with torch.no_grad(), supernet.sampled(pairs, depths.sample(1.0, seeded())):
        close(model(x), expected, 1e-9, 1e-12)


def test_a_stage_adds_up_its_outputs_at_the_candidate_depths() -> None:
    model, x, space, _ = stage_problem()
    supernet, _, _ = supernet_of(model, x, space)
    weights = {s.name: torch.rand(len(s.depths), dtype=DOUBLE) for s in supernet.stages}
    with torch.no_grad():
        y = x
        for stage, leader in ((0, 0), (1, 3)):
            outputs = []
            for child in model.body[leader : leader + (3, 4)[stage]]:
                y = child(y)
                outputs.append(y)
            own = supernet.stages[stage]
            y = sum(w * outputs[d - 1] for w, d in zip(weights[own.name], own.depths, strict=True))
        first = model.late[0](y)
        y = weights["late.0"][0] * first + weights["late.0"][1] * model.late[1](first)
        with supernet.sampled({}, weights):
            close(model(x), head(model, y), 1e-12, 1e-12)
        with supernet.sampled({}, {"late.0": torch.tensor([0.0, 1.0])}):
            close(model(x), model(x), 0)


def test_other_stages_run_all_their_blocks() -> None:
    model, x, space, _ = stage_problem()
    supernet, _, _ = supernet_of(model, x, space)
    with torch.no_grad():
        expected = model(x)
        with supernet.sampled({}, {"body.3": torch.tensor([0.0, 0.0, 1.0])}):
            close(model(x), expected, 1e-12)


# --- the supernet: training --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_logits_are_central_differences(training: bool) -> None:
    model, x, space, _ = stage_problem()
    model = copy.deepcopy(model)
    supernet, widths, depths = supernet_of(model, x, space, limit=3)
    model.train(training)
    labels = torch.tensor([3, 7])

    def loss() -> Tensor:
        generator = seeded(1)
        with supernet.sampled(widths.sample(1.0, generator), depths.sample(1.0, generator)):
            return F.cross_entropy(model(x), labels)

    for parameter in (widths.alpha, depths.beta):
        differences(loss, parameter)


@pytest.mark.parametrize("name", [*POINTS, *IMAGES])
def test_gradients_reach_all_layers_and_just_the_copies_in_use(name: str) -> None:
    model, x, space = real(name) if name in IMAGES else problem(name)
    supernet, widths, depths = supernet_of(model, x, space)
    model.train()
    pairs = widths.sample(5.0, seeded())
    with supernet.sampled(pairs, depths.sample(5.0, seeded())):
        outputs = model(x)
    outputs.square().sum().backward()
    for layer, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert module.weight.grad is not None and module.weight.grad.any(), layer
    own = {key.split()[0].replace("/", ".") for key in supernet.norms}
    assert all(model.get_submodule(layer).weight.grad is None for layer in own)
    used = {
        key
        for key in supernet.norms
        for _, group, width in [key.split()]
        if int(width) in next(p.widths for g, p in pairs.items() if g.replace(".", "/") == group)
    }
    for key, norm in supernet.norms.items():
        grad: Any = norm.weight.grad
        assert (grad is not None and bool(grad.any())) == (key in used), key
    assert len(used) < len(supernet.norms) or not own
    assert widths.alpha.grad is not None and widths.alpha.grad.any()


def test_statistics_of_the_copies_in_use_follow_the_mode() -> None:
    model, x, space = problem("plain")
    supernet, _, _ = supernet_of(model, x, space)
    pairs = {"a": Pair((2, 5), torch.tensor([0.5, 0.5])), "b": Pair((5, 5), torch.ones(2))}
    before = {key: t.clone() for key, t in supernet.norms.state_dict().items()}
    with supernet.sampled(pairs):
        model(x)
    assert all(torch.equal(t, before[key]) for key, t in supernet.norms.state_dict().items())
    model.train()
    y = model.a(x)
    with supernet.sampled(pairs):
        model(x)
    for width in range(1, 7):
        mean: Any = supernet.norms[f"bn a {width}"].running_mean
        expected = before[f"bn a {width}.running_mean"]
        if width in (2, 5):
            kept = list(supernet.order["a"][:width])
            expected = 0.9 * expected + 0.1 * y.mean((0, 2, 3))[kept]
        close(mean, expected, 1e-12)


@pytest.mark.parametrize("name", ["plain", "used_twice", "resnet"])
def test_the_model_is_as_it_was_after_the_block(name: str) -> None:
    model, x, space = real(name) if name in IMAGES else problem(name)
    state = copy.deepcopy(model.state_dict())
    for parameter in itertools.islice(model.parameters(), 2):
        parameter.requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    expected = model(x)
    supernet, widths, depths = supernet_of(model, x, space)
    with pytest.raises(ZeroDivisionError), supernet.sampled(widths.sample(1.0, seeded())):
        model(x)
        raise ZeroDivisionError
    with supernet.sampled(widths.sample(1.0, seeded()), depths.sample(1.0, seeded())):
        with supernet.at(picked(widths)):
            model(x)
        assert not torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert list(state) == list(model.state_dict())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)
        assert not module.training


def test_the_supernet_trains_the_model_and_the_copies() -> None:
    model, x, space = problem("plain")
    supernet, _, _ = supernet_of(model, x, space)
    parts: Iterator[nn.Parameter] = itertools.chain(model.parameters(), supernet.norms.parameters())
    assert [id(p) for p in supernet.parameters()] == [id(p) for p in parts]
    assert set(supernet.modules()) == {*model.modules(), *supernet.norms.modules()}
    assert len(supernet.norms) == 6


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"nothing": Pair((2, 2), torch.ones(2))}, "no channel group 'nothing'"),
        ({"a": Pair((2, 5), torch.ones(2))}, "5 is not among the candidate widths of group 'a'"),
        ({"a": Pair((0, 0), torch.ones(2))}, "0 is not among"),
    ],
)
def test_pairs_of_no_candidates(pairs: dict[str, Pair], message: str) -> None:
    model, x, space = problem("plain")
    supernet = TASSupernet(model, space.groups, {"a": (2, 4)}, x)
    with pytest.raises(WidthError, match=message), supernet.sampled(pairs):
        pass


def test_weights_of_no_stage() -> None:
    model, x, space, _ = stage_problem()
    supernet = TASSupernet(model, space.groups, {}, x)
    with (
        pytest.raises(WidthError, match=r"no stage 'body\.1'"),
        supernet.sampled({}, {"body.1": torch.ones(3)}),
    ):
        pass
    message = r"weights of its depths \(1, 2, 3\), not of shape \(2,\)"
    with pytest.raises(WidthError, match=message), supernet.sampled({}, {"body.0": torch.ones(2)}):
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": ()}, "at least one"),
        ({"a": (0, 2)}, "below 1"),
        ({"a": (7,)}, "cannot have 7"),
        ({"z": (1,)}, "'z'"),
    ],
)
def test_candidates_of_another_model(wrong: dict[str, Any], message: str) -> None:
    model, x, space = problem("plain")
    with pytest.raises(WidthError, match=message):
        TASSupernet(model, space.groups, wrong, x)
    supernet = TASSupernet(model, space.groups, {"a": (2, 4)}, x)
    with pytest.raises(WidthError, match="cannot have 9"):
        supernet.adopt({"a": 9})


# --- decoding ----------------------------------------------------------------------------------------


def growable(network: Mapping[str, int], space: WidthSpace, bounds: Bounds) -> bool:
    """Whether a group could take its next choice inside the budget, blocks that are gone apart."""
    return any(
        bounds.fits({**network, name: wider})
        for name in space.names
        for wider in space.choices(name)
        if wider > network[name] > 0
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    std=st.sampled_from([0.1, 3.0]),
    place=st.floats(0, 1.1),
    kinds=st.sampled_from([("flops",), ("params",), ("flops", "params")]),
    narrow=st.booleans(),
)
def test_decoded_networks_fill_the_budget_and_keep_it(
    seed: int, std: float, place: float, kinds: tuple[str, ...], narrow: bool
) -> None:
    model, _, space, costs = stage_problem()
    if narrow:  # depths alone make most of the difference
        space = space.among({name: space.choices(name)[-2:] for name in space.names})
    widths = spread(WidthLogits(space, generator=seeded(seed)), seed, std)
    depths = spread(DepthLogits(find_stages(model, space.groups), generator=seeded(seed)), seed, std)
    least = space.without([b for s in depths.stages for b in s.blocks]).smallest()
    limits = {k: costs[k](least) + int(place * (costs[k].full - costs[k](least))) for k in kinds}
    bounds = Budget.parse(limits).bound(costs)
    found = decode(widths, depths, bounds, 3, generator=seeded())
    assert found == decode(widths, depths, bounds, 3, generator=seeded())
    assert 1 <= len(found) == len(set(found)) <= 3
    for network in found:
        assert bounds.fits(network)
        gone = {g.block for g in space.groups if network[g.name] == 0}
        assert network in space.without(gone)
        assert not growable(network, space, bounds)
        kept = [sum(b not in gone for b in s.blocks) + 1 for s in depths.stages]
        assert all(d in s.depths for d, s in zip(kept, depths.stages, strict=True))
        if not narrow and bounds.used(network) < FULL:  # widths are too few, or too coarse
            deeper = [
                space.without(gone - set(s.blocks[: s.depths[s.depths.index(d) + 1] - 1]))
                for d, s in zip(kept, depths.stages, strict=True)
                if d < s.depths[-1]
            ]
            full = bounds.used(space.without(gone).largest()) >= FULL
            assert full or not any(bounds.fits(other.smallest()) for other in deeper)


def test_a_network_that_fills_the_budget_is_not_changed() -> None:
    costs = stage_problem()[3]
    widths, depths = stage_logits()
    network = found_network(widths, depths)
    bounds = Budget.parse(costs["flops"](network)).bound(costs)
    assert depths.removed(depths.most_probable())
    assert decode(widths, depths, bounds, generator=seeded()) == [Widths(network)]


def test_the_first_network_is_the_most_probable_one_and_others_are_drawn() -> None:
    space, cost, _ = chain(4, 40, 4)
    widths, depths = spread(WidthLogits(space, generator=seeded()), 0, 3), DepthLogits(generator=seeded())
    bounds = bound(0.3, cost)
    found = decode(widths, depths, bounds, 6, generator=seeded(1))
    wished = [widths.most_probable(), *widths.networks(5, seeded(1))]
    assert found == list(dict.fromkeys(project(space.decode(w), space, bounds) for w in wished))
    assert len(found) > 1
    assert decode(widths, depths, bounds, generator=seeded()) == found[:1]


def shallow_space(minimum: float) -> tuple[WidthSpace, DepthLogits, dict[str, Any]]:
    model, _, space, costs = stage_problem()
    space = space.within(dict.fromkeys(space.names, (minimum, 1.0)))
    return space, DepthLogits(find_stages(model, space.groups), generator=seeded()), costs


def test_blocks_come_back_where_the_widest_network_leaves_room() -> None:
    space, depths, costs = shallow_space(0.0)
    widths = WidthLogits(space, generator=seeded())
    with (
        torch.no_grad()
    ):  # depths 1, 1, 1; the last stage's next depth is the most probable, then the first's
        depths.beta.copy_(torch.tensor([[5.0, 1, 0], [5, 0, 4], [5, 2, 0]]))
    everything = {b for s in depths.stages for b in s.blocks}

    def largest(back: set[str]) -> int:
        return costs["flops"](space.without(everything - back).largest())

    one, two = {"late.1"}, {"late.1", "body.1"}
    for budget, back in ((largest(set()), set()), (largest(one), one), (largest(two), two)):
        bounds = Budget.parse(budget).bound(costs)
        (found,) = decode(widths, depths, bounds, generator=seeded())
        assert found == space.without(everything - back).largest()
        assert bounds.used(found) == 1
    (found,) = decode(widths, depths, Budget.parse(1.0).bound(costs), generator=seeded())
    assert found == space.largest()


def test_more_blocks_go_where_the_narrowest_network_is_too_large() -> None:
    space, depths, costs = shallow_space(1.0)  # depths alone
    widths = WidthLogits(space, generator=seeded())
    with torch.no_grad():  # depths 3, 4, 2; of the next smaller ones, the first stage's is the most probable
        depths.beta.copy_(torch.tensor([[2.0, 3, 5], [0, 1, 5], [2, 5, 0]]))
    full = costs["flops"].full
    (found,) = decode(widths, depths, Budget.parse(full - 1).bound(costs), generator=seeded())
    assert {g.block for g in space.groups if found[g.name] == 0} == {"body.2"}
    assert found == space.without(["body.2"]).largest()


def test_impossible_budgets_are_judged_at_the_shallowest_depths() -> None:
    space, depths, costs = shallow_space(0.5)
    widths = WidthLogits(space, generator=seeded())
    blocks = [b for s in depths.stages for b in s.blocks]
    least = costs["flops"](space.without(blocks).smallest())
    assert least < costs["flops"](space.smallest())
    (found,) = decode(widths, depths, Budget.parse(least).bound(costs), generator=seeded())
    assert found == space.without(blocks).smallest()
    with pytest.raises(BudgetError, match="below the smallest network"):
        decode(widths, depths, Budget.parse(least - 1).bound(costs), generator=seeded())


@pytest.mark.parametrize("share", [0.15, 0.4, 0.9])
def test_decoded_networks_are_inside_the_budget_after_the_cut(share: float) -> None:
    model = resnet20().eval()
    groups = find_residual_blocks(model, find_channel_groups(model, X, verify=False), X)
    space = WidthSpace(groups, min_ratio=0.2, divisor=1)
    bounds = bound(share, FlopsCost(model, X, groups))
    widths = spread(WidthLogits(space, generator=seeded()))
    depths = spread(DepthLogits(find_stages(model, groups), generator=seeded()), 3)
    for network in decode(widths, depths, bounds, 3, generator=seeded()):
        small = shrink(model, groups, network, prefix_order(groups))
        flops = count_flops(small, X)
        assert FULL * bounds.limits[0][2] <= flops <= bounds.limits[0][2]
        small(X)


# --- published numbers -------------------------------------------------------------------------------


def multiply_adds(channels: Sequence[int], classes: int) -> int:
    """Of a ResNet for CIFAR: image, stem, two widths of each block; 1x1 shortcuts where shapes differ."""
    blocks = (len(channels) - 2) // 2
    total, size, before = 32 * 32 * 9 * channels[0] * channels[1], 32, channels[1]
    for i, (inner, out) in enumerate(zip(channels[2::2], channels[3::2], strict=True)):
        strides = i > 0 and i % (blocks // 3) == 0
        size //= 1 + strides
        total += size**2 * 9 * (before * inner + inner * out)
        total += size**2 * before * out * (strides or before != out)
        before = out
    return total + before * classes


@pytest.mark.parametrize(("depth", "millions"), [(20, 40.813), (32, 69.125), (56, 125.748), (110, 253.150)])
def test_published_flops_of_full_networks(depth: int, millions: float) -> None:
    n = (depth - 2) // 6
    flops = multiply_adds([3, 16, *[16] * 2 * n, *[32] * 2 * n, *[64] * 2 * n], 10)
    assert flops / 1e6 == pytest.approx(millions, abs=5e-4)
    assert FlopsCost(CifarResNet(depth), X, ()).full == flops


def test_published_flops_of_the_pre_defined_network() -> None:
    model = resnet32(100)
    groups = find_channel_groups(model, X, verify=False)
    widths = {g.name: {16: 12, 32: 25, 64: 50}[g.size] for g in groups}
    assert widths["conv1"] == math.floor(math.sqrt(0.6) * 16)
    flops = multiply_adds([3, 12, *[12] * 10, *[25] * 10, *[50] * 10], 100)
    assert FlopsCost(model, X, groups)(widths) == flops == 41_095_816


class PooledShortcut(nn.Module):
    """A block of the public code: 2x2 pooling where it strides, a 1x1 convolution where widths differ."""

    def __init__(self, before: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(before, inner, 3, stride, 1, bias=False)
        self.b = conv(inner, out, bias=False)
        self.pool = nn.AvgPool2d(stride, stride)
        differs = stride > 1 or before != out
        self.shortcut = nn.Conv2d(before, out, 1, bias=False) if differs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).relu()) + self.shortcut(self.pool(x))).relu()


# Channels of ResNet-32 for CIFAR-100, image and stem first, then each block's two, and the stored FLOPs.
PUBLISHED = {
    "searched": (
        "3 16  4 4  4 14  6 4  8 4  4 4  32 32  9 28  28 28  28 28  32 32  64 64  64 64  64 64  64 64  64 64",
        42_493_184,
    ),
    "random": (
        "3 4  11 11  11 12  14 16  8 9  6 12  28 32  28 32  12 25  28 22  28 25  57 19  38 64  64 51  57 64"
        "  64 57",
        42_908_996,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flops_of_found_networks(name: str) -> None:
    text, flops = PUBLISHED[name]
    channels = [int(c) for c in text.split()]
    blocks: list[nn.Module] = [conv(3, channels[1], bias=False), nn.ReLU()]
    before = channels[1]
    for i, (inner, out) in enumerate(zip(channels[2::2], channels[3::2], strict=True)):
        blocks.append(PooledShortcut(before, inner, out, 2 if i in (5, 10) else 1))
        before = out
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 100))
    assert multiply_adds(channels, 100) == flops
    assert count_flops(model, X) == flops


# --- distillation ------------------------------------------------------------------------------------


def test_the_loss_of_distillation() -> None:
    student, teacher = (torch.randn(5, 4, generator=seeded(s), dtype=DOUBLE) for s in (0, 1))
    labels = torch.tensor([0, 1, 2, 3, 0])
    for weight, t in ((0.9, 4.0), (0.3, 1.0), (0.0, 2.0)):
        total = 0.0
        for s, y, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
            soft = [[math.exp(v / t) for v in logits] for logits in (s, y)]
            q, p = ([v / sum(row) for v in row] for row in soft)
            total -= (1 - weight) * math.log(math.exp(s[label]) / sum(map(math.exp, s)))
            total += weight * t**2 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        assert float(distillation_loss(student, labels, teacher, weight, t)) == pytest.approx(total / 5)
    default = distillation_loss(student, labels, teacher)
    assert torch.equal(default, distillation_loss(student, labels, teacher, 0.9, 4.0))
    smoothed = distillation_loss(student, labels, teacher, 0.9, 4.0, label_smoothing=0.1)
    change = F.cross_entropy(student, labels, label_smoothing=0.1) - F.cross_entropy(student, labels)
    close(smoothed - default, 0.1 * change, 1e-9)


def test_a_student_that_equals_its_teacher_gets_no_gradient_from_it() -> None:
    student = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    labels = torch.zeros(5, dtype=torch.long)
    loss = distillation_loss(student, labels, teacher, weight=1.0)
    loss.backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-15
    assert float(loss.detach()) == pytest.approx(0, abs=1e-15)
    assert teacher.grad is None
    other = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    distillation_loss(student, labels, other).backward()
    assert student.grad.abs().max() > 1e-3 and other.grad is None
