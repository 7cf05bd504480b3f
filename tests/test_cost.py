"""Costs against counts on really cut networks, against published numbers, and budgets."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CASES, Case, Net, conv, count_parameters, random_widths
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model

from examples.cifar_resnet import CifarResNet, resnet20, resnet32, resnet56, resnet110
from nni_dbs import Budget, FlopsCost, ParamsCost, WidthSpace
from nni_dbs.cost import Bounds, Limit, count_flops, readable, weighted_sum, width_costs
from nni_dbs.errors import BudgetError
from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    find_channel_groups,
    shrink,
)

ZOO = ("resnet18", "mobilenet_v2", "efficientnet_b0", "densenet121", "regnet_y_400mf", "googlenet")


def zoo(name: str) -> nn.Module:
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    return get_model(name, weights=None, **kwargs).eval()


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """A second opinion: torch's own counter, which counts two for each multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


# --- exactness ---------------------------------------------------------------------------------------


def assert_exact(model: nn.Module, x: torch.Tensor, groups: tuple[ChannelGroup, ...], seeds: int) -> None:
    """FLOPs and parameters at random widths equal two counters' on the cut model."""
    flops, params = FlopsCost(model, x, groups), ParamsCost(model, groups)
    for seed in range(seeds):
        widths = random_widths(groups, seed)
        small = shrink(model, groups, widths)
        assert flops(widths) == count_flops(small, x) == multiply_adds(small, x)
        assert params(widths) == count_parameters(small)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_costs_of_cut_networks(case: Case) -> None:
    model, x = case.build()
    groups = find_channel_groups(model, x, verify=False)
    flops, params = FlopsCost(model, x, groups), ParamsCost(model, groups)
    assert (flops.full, params.full) == (count_flops(model, x), count_parameters(model))
    assert_exact(model, x, groups, seeds=4)


@pytest.mark.parametrize("name", ZOO)
def test_costs_of_cut_torchvision_networks(name: str) -> None:
    model, x = zoo(name), torch.randn(1, 3, 64, 64)
    groups = find_channel_groups(model, x, verify=False)
    assert_exact(model, x, groups, seeds=2)


@pytest.mark.parametrize("name", ZOO)
def test_batch_is_the_call(name: str) -> None:
    model, x = zoo(name), torch.randn(1, 3, 64, 64)
    groups = find_channel_groups(model, x, verify=False)
    space = WidthSpace(groups, min_ratio=0, divisor=1)
    many = [space.sample(torch.Generator().manual_seed(i)) for i in range(20)] + [
        space.largest(),
        space.smallest(),
    ]
    rows = torch.stack([space.encode(w) for w in many])
    for cost in (FlopsCost(model, x, groups), ParamsCost(model, groups)):
        exact = [cost(w) for w in many]
        batch = cost.batch(rows)
        assert batch.dtype == torch.float64
        assert batch.tolist() == exact
        assert cost.batch(rows.long()).tolist() == exact
        assert [sum(cost.by_layer(w).values()) for w in many] == exact
        assert cost({}) == cost.full == exact[-2]


def test_gradient_is_the_finite_difference() -> None:
    """The cost is quadratic, so central differences are exact."""
    model, x = zoo("mobilenet_v2"), torch.randn(1, 3, 64, 64)
    groups = find_channel_groups(model, x, verify=False)
    cost = FlopsCost(model, x, groups)
    widths = torch.stack([torch.rand(len(groups), dtype=torch.float64) * 50 + 5 for _ in range(3)])
    widths.requires_grad_()
    (gradient,) = torch.autograd.grad(cost.batch(widths).sum(), widths)
    steps = torch.eye(len(groups), dtype=torch.float64)
    for row, found in zip(widths.detach(), gradient, strict=True):
        difference = (cost.batch(row + steps) - cost.batch(row - steps)) / 2
        torch.testing.assert_close(found, difference, rtol=1e-8, atol=1e-3)


@pytest.mark.parametrize("name", ["residual", "shared", "grouped", "squeeze_excite"])
def test_expected_cost_is_the_enumerated_one(name: str) -> None:
    """In `shared` the layer reads and computes channels of one and the same group."""
    model, x = CASES[name].build()
    groups = find_channel_groups(model, x, verify=False)
    space = WidthSpace(groups, min_ratio=0, divisor=1)
    rng = np.random.default_rng(0)
    chances = [rng.dirichlet(np.ones(len(space.choices(g.name)))) for g in groups]
    choices = [np.array(space.choices(g.name)) for g in groups]
    mean = [p @ c for p, c in zip(chances, choices, strict=True)]
    variance = [p @ c**2 - m**2 for p, c, m in zip(chances, choices, mean, strict=True)]
    for cost in (FlopsCost(model, x, groups), ParamsCost(model, groups)):
        total = sum(
            math.prod(p for p, _ in drawn)
            * cost(dict(zip(space.names, (int(w) for _, w in drawn), strict=True)))
            for drawn in itertools.product(
                *(zip(p, c, strict=True) for p, c in zip(chances, choices, strict=True))
            )
        )
        found = cost.expected(torch.tensor([mean]), torch.tensor([variance]))
        assert found.shape == (1,)
        assert found.item() == pytest.approx(total, rel=1e-12)
    if name == "shared":
        assert cost.batch(torch.tensor([mean])).item() < 0.999 * total  # E[c]^2 would be too little


def test_batches_and_named_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = conv(3, 6), nn.Linear(6, 10)

        def forward(self, scale: Tensor, image: Tensor) -> Tensor:
            return self.fc(self.a(image).mean((2, 3))) * scale

    model, image, scale = Named(), torch.randn(4, 3, 8, 8), torch.ones(4, 1)
    expected = 4 * (6 * 3 * 9 * 64 + 60)
    for inputs in ({"image": image, "scale": scale}, (scale, image), [scale, image]):
        groups = find_channel_groups(model, inputs)
        cost = FlopsCost(model, inputs, groups)
        assert cost.full == expected
        assert cost({"a": 3}) * 2 == expected
        assert cost.by_layer({}) == {"a": 4 * 6 * 3 * 9 * 64, "fc": 4 * 60}


def test_frozen_groups_cost_what_they_are() -> None:
    model, x = CASES["concat"].build()
    groups = find_channel_groups(model, x, ["a"])
    cost = FlopsCost(model, x, groups)
    for width in (1, 3, 6):
        small = shrink(model, groups, {"b": width})
        assert cost({"b": width}) == count_flops(small, x)
    with pytest.raises(WidthError, match="keeps its 4 channels"):
        cost({"a": 2})
    with pytest.raises(WidthError, match="no channel group 'z'"):
        cost({"z": 2})


def test_norm_and_pooling_are_not_counted() -> None:
    model, x = CASES["plain"].build()
    groups = find_channel_groups(model, x)
    assert FlopsCost(model, x, groups).by_layer({}) == {
        "a": 2 * 6 * 3 * 9 * 64,
        "b": 2 * 5 * 6 * 9 * 64,
        "fc": 2 * 5 * 10,
    }


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(8, 2)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(1, 2)).softmax(2) @ v
        return self.down(self.up(y).relu())


@pytest.mark.parametrize("fused", [False, True])
def test_attention_products_are_counted(fused: bool) -> None:
    x = torch.randn(2, 5, 8)
    products = 2 * (5 * 5 * 8 + 5 * 5 * 8)
    assert count_flops(Attention(fused), x) == 2 * 5 * (8 * 24 + 2 * 8 * 16) + products


def test_multi_head_attention_is_counted_beside_its_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    expected = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert count_flops(layer, torch.randn(1, 5, 8)) == expected
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_products_that_depend_on_the_widths_are_followed() -> None:
    """Attention between channels: one width is two dimensions of each product."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x).flatten(2)
        return net.fc((y @ y.transpose(1, 2) @ y).mean(2))

    net, x = Net(forward, a=conv(3, 6), fc=nn.Linear(6, 10)), torch.randn(1, 3, 8, 8)
    (group,) = find_channel_groups(net, x)
    assert group.frozen is None
    cost = FlopsCost(net, x, [group])
    for width in range(1, 7):
        assert cost({"a": width}) == count_flops(shrink(net, [group], {"a": width}), x)


def test_counting_leaves_the_model_alone() -> None:
    model, x = CASES["plain"].build()
    model.train()
    model.bn.eval()
    model.a.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    FlopsCost(model, x, find_channel_groups(model, x, verify=False))
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.a.parameters()] == [False, False]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_aliased_layers_count_once() -> None:
    """One convolution under two names, run twice: twice the FLOPs, once the parameters."""
    same = conv(6, 6)
    model = nn.Sequential(
        conv(3, 6), same, nn.ReLU(), same, nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(256, 2)
    )
    x = torch.randn(1, 3, 8, 8)
    groups = find_channel_groups(model, x)
    flops, params = FlopsCost(model, x, groups), ParamsCost(model, groups)
    for seed in range(3):
        widths = random_widths(groups, seed)
        small = shrink(model, groups, widths)
        assert small[1] is small[3]
        assert flops(widths) == count_flops(small, x) == multiply_adds(small, x)
        assert params(widths) == count_parameters(small)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers_add_up(case: Case) -> None:
    model, x = case.build()
    groups = find_channel_groups(model, x, verify=False)
    for cost in (FlopsCost(model, x, groups), ParamsCost(model, groups)):
        for seed in range(3):
            widths = random_widths(groups, seed)
            assert {name: layer(widths) for name, layer in cost.layers().items()} == cost.by_layer(widths)


def test_weighted_sums() -> None:
    model, x = CASES["grouped"].build()
    groups = find_channel_groups(model, x, verify=False)
    flops, params, widths = FlopsCost(model, x, groups), ParamsCost(model, groups), width_costs(groups)
    assert list(widths) == [g.name for g in groups]
    total = weighted_sum([flops, params, *widths.values()], [3, 5, 7, 11], 13)
    for seed in range(3):
        w = random_widths(groups, seed)
        assert {name: cost(w) for name, cost in widths.items()} == w
        expected = 3 * flops(w) + 5 * params(w) + 7 * w["a"] + 11 * w["g"] + 13
        assert total(w) == total.batch(torch.tensor([list(w.values())])).item() == expected


def test_weighted_sums_have_whole_coefficients() -> None:
    model, x = CASES["grouped"].build()
    flops = FlopsCost(model, x, find_channel_groups(model, x, verify=False))
    scaled = weighted_sum([flops], [1e3 / 7], 0.6)
    assert isinstance(scaled({}), int)
    assert scaled({}) == pytest.approx(flops.full * 1e3 / 7, rel=1e-4)


# --- golden numbers ----------------------------------------------------------------------------------

DATA = Path(os.environ.get("NNI_DBS_DATA") or Path(__file__).resolve().parents[1] / "../shared/data")
CIFAR = torch.zeros(1, 3, 32, 32)


def data(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in {DATA}; set NNI_DBS_DATA to the folder that holds it")
    return path


class MacroBlock(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project, each with BN; ReLU after all but the last."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, stride: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.layers = nn.Sequential(
            nn.Conv2d(c_in, c_mid, 1, bias=False),
            nn.BatchNorm2d(c_mid),
            nn.ReLU(),
            nn.Conv2d(c_mid, c_mid, 3, stride, 1, groups=c_mid, bias=False),
            nn.BatchNorm2d(c_mid),
            nn.ReLU(),
            nn.Conv2d(c_mid, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skip else self.layers(x)


def macro_mobilenet() -> nn.Module:
    """Channel-Bench-Macro's network, as the data's README describes it."""
    w = (128, 768, 768, 768, 256, 1536, 1024)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, w[0], 3, 2, 1, bias=False), nn.BatchNorm2d(w[0]), nn.ReLU()),
        MacroBlock(w[0], w[1], w[0], 1, skip=True),
        MacroBlock(w[0], w[2], w[0], 1, skip=True),
        MacroBlock(w[0], w[3], w[4], 2, skip=False),
        MacroBlock(w[4], w[5], w[4], 1, skip=True),
        nn.Sequential(nn.Conv2d(w[4], w[6], 1, bias=False), nn.BatchNorm2d(w[6]), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(w[6], 10),
    )


def test_channel_bench_macro() -> None:
    with data("channel_bench_macro_mobilenet.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4**7
    model = macro_mobilenet()
    groups = find_channel_groups(model, CIFAR)
    assert [g.size for g in groups] == [128, 768, 768, 768, 256, 1536, 1024]
    assert [g.frozen for g in groups] == [None] * 7
    flops, params = FlopsCost(model, CIFAR, groups), ParamsCost(model, groups)
    assert (flops.full, params.full) == (211_281_920, 1_804_170)
    quarters = torch.tensor([[int(digit) for digit in row["widths"]] for row in rows])
    widths = quarters * torch.tensor([g.size // 4 for g in groups])
    assert flops.batch(widths).tolist() == [int(row["flops"]) for row in rows]
    assert params.batch(widths).tolist() == [int(row["params"]) for row in rows]
    for i in (0, 5000, 16383):
        chosen = {g.name: int(w) for g, w in zip(groups, widths[i], strict=True)}
        assert (flops(chosen), params(chosen)) == (int(rows[i]["flops"]), int(rows[i]["params"]))


@pytest.mark.parametrize(
    ("build", "millions"),
    [(resnet20, 40.813), (resnet32, 69.125), (resnet56, 125.748), (resnet110, 253.150)],
)
def test_full_cifar_resnets(build: Callable[[], CifarResNet], millions: float) -> None:
    model = build()
    groups = find_channel_groups(model, CIFAR, verify=False)
    assert FlopsCost(model, CIFAR, groups).full / 1e6 == pytest.approx(millions, abs=5e-4)


def test_predefined_resnet32() -> None:
    """Tied stages of 12, 25 and 50 channels: reachable from the full network through its groups."""
    model = resnet32(num_classes=100)
    groups = find_channel_groups(model, CIFAR)
    widths = {g.name: {16: 12, 32: 25, 64: 50}[g.size] for g in groups}
    cost = FlopsCost(model, CIFAR, groups)
    assert cost(widths) == 41_095_816
    assert count_flops(shrink(model, groups, widths), CIFAR) == 41_095_816
    assert count_flops(resnet32(100, widths=(12, 25, 50)), CIFAR) == 41_095_816


@pytest.mark.parametrize(
    ("build", "groups_in_spec", "flops_in_spec"),
    [(resnet20, 12, 81_625_088), (resnet56, 30, 251_494_400)],
)
def test_dsa_totals(build: Callable[[], CifarResNet], groups_in_spec: int, flops_in_spec: int) -> None:
    """DSA counts a multiply-add as two and leaves out the classifier."""
    model = build()
    groups = find_channel_groups(model, CIFAR)
    assert len(groups) == groups_in_spec
    shares = FlopsCost(model, CIFAR, groups).by_layer({})
    assert 2 * (sum(shares.values()) - shares["fc"]) == flops_in_spec


TAS_MILLIONS = {
    "C010-ResNet20": 22.4445,
    "C010-ResNet32": 34.9453,
    "C010-ResNet56": 59.8584,
    "C010-ResNet110": 119.2593,
    "C100-ResNet20": 22.4338,
    "C100-ResNet32": 42.4686,
    "C100-ResNet56": 61.2338,
    "C100-ResNet110": 119.5783,
}


def tas_flops(row: dict[str, Any]) -> int:
    """The arithmetic of the data's README: a stem, the kept blocks at 32, 16 and 8 pixels, a classifier."""
    image, stem, *inner = row["channels"]
    per_stage = (row["depth"] - 2) // 6
    kept = row["blocks"] or [per_stage] * 3
    total = 32 * 32 * 9 * image * stem
    width = stem
    for stage, blocks in enumerate(kept):
        pixels = (32 >> stage) ** 2
        for block in range(blocks):
            at = 2 * (stage * per_stage + block)
            middle, out = inner[at], inner[at + 1]
            total += pixels * 9 * (width * middle + middle * out)
            strides = stage > 0 and block == 0
            if strides or width != out:
                total += pixels * width * out
            width = out
    return total + width * row["classes"]


def test_tas_published_widths() -> None:
    rows = json.loads(data("tas_published_widths.json").read_text())
    found = {row["name"]: tas_flops(row) / 1e6 for row in rows}
    for name, millions in TAS_MILLIONS.items():
        assert found[name] == pytest.approx(millions, abs=5.1e-5), name
    for row in rows:
        if not row["blocks"]:
            assert found[row["name"]] == pytest.approx(row["published_mflops"], abs=2e-6), row["name"]


# --- budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "amount", "relative"),
    [
        ("300M", 300e6, False),
        (" 1.04 g ", 1.04e9, False),
        ("12k", 12e3, False),
        ("2T", 2e12, False),
        ("0.5M", 0.5e6, False),
        ("1.04e9", 1.04e9, False),
        ("3e-1", 0.3, True),
        ("50%", 0.5, True),
        ("100%", 1.0, True),
        ("0.5", 0.5, True),
        (0.5, 0.5, True),
        (1, 1.0, True),
        (1.0, 1.0, True),
        (1.5, 1.5, False),
        (300_000_000, 3e8, False),
        (np.float32(0.5), 0.5, True),
        (np.int64(300_000_000), 3e8, False),
    ],
)
def test_budgets(value: Any, amount: float, relative: bool) -> None:
    budget = Budget.parse(value)
    assert budget == Budget((Limit("flops", pytest.approx(amount, rel=1e-12), relative),))
    assert budget.is_relative == relative
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "cannot read the budget ''; write 300M, 1.04G, 50% or 0.5"),
        ("many", "cannot read the budget 'many'"),
        ("300 MB", "cannot read"),
        ("1.0.0M", "cannot read"),
        (".", "cannot read"),
        ("-300M", "cannot read"),
        ("1e999", "must be positive"),
        (0, "must be positive"),
        ("0M", "must be positive"),
        (-0.5, "must be positive"),
        (math.nan, "must be positive"),
        (math.inf, "must be positive"),
        ("150%", "at most 100%"),
        (True, "a number or a text"),
        (None, "a number or a text"),
        ([0.5], "a number or a text"),
        ({}, "an empty budget bounds nothing"),
        ({"flop": 0.5}, "a budget bounds flops or params or latency_ms, not 'flop'"),
        ({"flops": 0.5, "params": "x"}, "cannot read the budget 'x'"),
        ("20ms", "flops is a count: '20ms' has the wrong unit; write 300M, 1.04G, 50% or 0.5"),
        ({"params": "3 MS"}, "params is a count: '3 MS' has the wrong unit"),
        (
            {"latency_ms": "20M"},
            "latency_ms is milliseconds: '20M' has the wrong unit; write 20, 0.8ms, 50% or 0.5",
        ),
        ({"latency_ms": "1k"}, "latency_ms is milliseconds"),
        ({"latency_ms": "0.02s"}, "cannot read the budget '0.02s'; write 20, 0.8ms, 50% or 0.5"),
        ({"latency_ms": 0}, "must be positive"),
        ({"latency_ms": "0ms"}, "must be positive"),
        ({"latency_ms": "101%"}, "at most 100%"),
        ({"latency_ms": None}, "a budget is a number or a text such as 20, not None"),
    ],
)
def test_bad_budgets(value: Any, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "amount", "relative", "text"),
    [
        (20, 20.0, False, "latency_ms <= 20 ms"),
        (3.25, 3.25, False, "latency_ms <= 3.25 ms"),
        ("20", 20.0, False, "latency_ms <= 20 ms"),
        ("0.8ms", 0.8, False, "latency_ms <= 0.8 ms"),
        (" 1 MS ", 1.0, False, "latency_ms <= 1 ms"),
        (2500, 2500.0, False, "latency_ms <= 2500 ms"),
        (0.5, 0.5, True, "latency_ms <= 0.5 of the full network"),
        ("50%", 0.5, True, "latency_ms <= 0.5 of the full network"),
        (1, 1.0, True, "latency_ms <= 1 of the full network"),
    ],
)
def test_latency_budgets(value: Any, amount: float, relative: bool, text: str) -> None:
    budget = Budget.parse({"latency_ms": value})
    assert budget == Budget((Limit("latency_ms", amount, relative),))
    assert str(budget) == text


def test_several_limits() -> None:
    budget = Budget.parse({"flops": "300M", "params": 0.5})
    assert [(limit.kind, limit.amount, limit.relative) for limit in budget.limits] == [
        ("flops", 3e8, False),
        ("params", 0.5, True),
    ]
    assert not budget.is_relative
    assert str(budget) == "flops <= 300M and params <= 0.5 of the full network"


@pytest.fixture
def residual() -> tuple[WidthSpace, dict[str, Any]]:
    model, x = CASES["residual"].build()
    space = WidthSpace.from_model(model, x, min_ratio=0, divisor=1)
    return space, {"flops": FlopsCost(model, x, space.groups), "params": ParamsCost(model, space.groups)}


def bounds_of(budget: Any, costs: dict[str, Any]) -> Bounds:
    return Budget.parse(budget).bound(costs)


def test_bounds_hold_every_limit(residual: tuple[WidthSpace, dict[str, Any]]) -> None:
    space, costs = residual
    bounds = bounds_of({"flops": 0.5, "params": 0.3}, costs)
    every = [
        dict(zip(space.names, w, strict=True)) for w in itertools.product(*map(space.choices, space.names))
    ]
    flops = [costs["flops"](w) <= costs["flops"].full * 0.5 for w in every]
    params = [costs["params"](w) <= costs["params"].full * 0.3 for w in every]
    both = [f and p for f, p in zip(flops, params, strict=True)]
    assert any(both)
    assert both != flops
    assert [bounds.fits(w) for w in every] == both
    assert bounds.fits_batch(torch.stack([space.encode(w) for w in every])).tolist() == both
    assert all((bounds.used(w) <= 1) == fits for w, fits in zip(every, both, strict=True))


def test_a_limit_may_be_met_exactly(residual: tuple[WidthSpace, dict[str, Any]]) -> None:
    _, costs = residual
    widths = {"stem": 3, "a": 2}
    assert bounds_of(costs["flops"](widths), costs).fits(widths)
    assert not bounds_of(costs["flops"](widths) - 1, costs).fits(widths)
    assert bounds_of(1.0, costs).fits({})
    assert bounds_of(1.0, costs).used({}) == 1


def test_limits_are_rounded_down(residual: tuple[WidthSpace, dict[str, Any]]) -> None:
    _, costs = residual
    widths = {"stem": 3, "a": 2}
    spent = costs["flops"](widths)
    assert bounds_of((spent + 0.9) / costs["flops"].full, costs).fits(widths)
    assert not bounds_of((spent - 0.1) / costs["flops"].full, costs).fits(widths)
    assert bounds_of(spent + 0.9, costs).limits[0][2] == spent


def test_impossible_budget_tells_the_range(residual: tuple[WidthSpace, dict[str, Any]]) -> None:
    space, costs = residual
    least, most = costs["flops"](space.smallest()), costs["flops"](space.largest())
    ends = (space.smallest(), space.largest())
    bounds_of(least, costs).check_reachable(*ends)
    with pytest.raises(BudgetError) as caught:
        bounds_of(least - 1, costs).check_reachable(*ends)
    message = str(caught.value)
    assert f"reachable are {readable(least)} to {readable(most)}" in message
    assert "raise the budget or lower min_ratio" in message
    assert "\n" not in message
    with pytest.raises(BudgetError, match=r"params: .* is below the smallest network"):
        bounds_of({"flops": 1.0, "params": 2}, costs).check_reachable(*ends)


class Milliseconds:
    """A cost that is no whole number: 0.25 ms for each channel."""

    full = 2.5

    def __call__(self, widths: dict[str, int]) -> float:
        return 0.25 * (widths.get("stem", 6) + widths.get("a", 4))

    def batch(self, widths: Tensor) -> Tensor:
        return 0.25 * widths.double().sum(1)


def test_limits_in_milliseconds_are_not_rounded(residual: tuple[WidthSpace, dict[str, Any]]) -> None:
    space, costs = residual
    costs["latency_ms"] = Milliseconds()
    for budget, most in (({"latency_ms": "75%"}, 1.875), ({"latency_ms": "1.8ms"}, 1.8)):
        bounds = bounds_of(budget, costs)
        assert bounds.limits[0][2] == most
        every = [{"stem": s, "a": a} for s in range(1, 7) for a in range(1, 5)]
        expected = [0.25 * (w["stem"] + w["a"]) <= most for w in every]
        assert [bounds.fits(w) for w in every] == expected
        assert bounds.fits_batch(torch.stack([space.encode(w) for w in every])).tolist() == expected
    assert bounds.used({"stem": 3, "a": 3}) == 1.5 / 1.8
    flops = costs["flops"].full
    both = bounds_of({"flops": 0.5, "latency_ms": 0.3}, costs)
    assert [most for *_, most in both.limits] == [flops // 2, 0.75]
    assert not both.fits({"stem": 3, "a": 1})  # 1 ms
    assert both.fits({"stem": 2, "a": 1})


def test_impossible_latency_tells_the_range(residual: tuple[WidthSpace, dict[str, Any]]) -> None:
    space, _ = residual
    bounds = bounds_of({"latency_ms": "0.4ms"}, {"latency_ms": Milliseconds()})
    with pytest.raises(BudgetError) as caught:
        bounds.check_reachable(space.smallest(), space.largest())
    assert str(caught.value) == (
        "latency_ms: 0.4 ms is below the smallest network of this space (0.5 ms); reachable are 0.5 ms to "
        "2.5 ms: raise the budget or lower min_ratio"
    )


def test_a_cost_that_is_not_given(residual: tuple[WidthSpace, dict[str, Any]]) -> None:
    _, costs = residual
    with pytest.raises(BudgetError, match="the budget bounds latency_ms, but that cost is not given"):
        bounds_of({"flops": 0.5, "latency_ms": 20}, costs)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(1814073344, "1.814G"), (300e6, "300M"), (12_500, "12.5K"), (7, "7"), (2e12, "2T"), (0.5, "0.5")],
)
def test_readable(amount: float, text: str) -> None:
    assert readable(amount) == text
