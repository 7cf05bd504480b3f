"""Networks composed at random: groups, surgery and costs must agree on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers import (
    assert_same_outputs,
    conv,
    count_parameters,
    random_order,
    random_widths,
    randomised,
    zeroed,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nni_dbs import FlopsCost, ParamsCost
from nni_dbs.cost import count_flops
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import find_channel_groups, shrink


class Residual(nn.Module):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.a, self.bn, self.b = conv(channels, middle), nn.BatchNorm2d(middle), conv(middle, channels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.bn(self.a(x)).relu())


class Concat(nn.Module):
    def __init__(self, channels: int, first: int, keep_input: bool) -> None:
        super().__init__()
        self.a, self.b, self.keep_input = conv(channels, first), conv(channels, 4, 1), keep_input
        self.out_channels = first + 4 + keep_input * channels
        self.bn = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.a(x), self.b(x)] + [x] * self.keep_input
        return self.bn(torch.cat(parts, 1)).relu()


class Depthwise(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.dw, self.bn = conv(channels, channels, groups=channels, bias=False), nn.BatchNorm2d(channels)
        self.pw = conv(channels, out, 1)
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.bn(self.dw(x)).relu())


class Grouped(nn.Module):
    """A bottleneck around a grouped convolution, whose own channels no other layer ties."""

    def __init__(self, channels: int, groups: int, out: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            conv(channels, 12, 1),
            conv(12, 24, groups=groups),
            conv(24, out, 1),
        )
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.down, self.up = conv(channels, squeeze, 1), conv(squeeze, channels, 1)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


KINDS = ["residual", "concat", "depthwise", "grouped", "se"]


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A stem, up to five blocks in any order, and a classifier after pooling or flattening."""
    width = st.integers(2, 7)
    channels = draw(width)
    blocks: list[Any] = [conv(3, channels), nn.ReLU()]
    for kind in draw(
        st.lists(st.sampled_from(["residual", "concat", "depthwise", "grouped", "se"]), max_size=5)
    ):
        if kind == "residual":
            block: Any = Residual(channels, draw(width))
        elif kind == "concat":
            block = Concat(channels, draw(width), draw(st.booleans()))
        elif kind == "depthwise":
            block = Depthwise(channels, draw(width))
        elif kind == "grouped":
            block = Grouped(channels, draw(st.sampled_from([2, 3, 4])), draw(width))
        else:
            block = SqueezeExcite(channels, draw(width))
        blocks.append(block)
        channels = block.out_channels
    side = draw(st.sampled_from([1, 2]))
    blocks += [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(channels * side**2, 5)]
    return nn.Sequential(*blocks)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=networks(), seed=st.integers(0, 2**31))
def test_random_networks(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    randomised(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    groups = find_channel_groups(model, x, verify=False)
    assert find_channel_groups(model, x) == groups
    assert [g.frozen for g in groups] == [None] * len(groups)
    flops, params = FlopsCost(model, x, groups), ParamsCost(model, groups)
    widths, order = random_widths(groups, seed), random_order(groups, seed)
    small = shrink(model, groups, widths, order)
    assert_same_outputs(small, zeroed(model, groups, widths, order), x)
    assert flops(widths) == count_flops(small, x)
    assert params(widths) == count_parameters(small)

    supernet = Supernet(model, groups, order)
    assert supernet.inexact == {}
    with supernet.at(widths):
        assert_same_outputs(model, small, x)
        assert count_flops(model, x) == flops(widths)
    with supernet.gated(supernet.gates_of(widths)):
        assert_same_outputs(model, small, x)
    others = random_widths(groups, seed + 1)
    with supernet.parallel([widths, others]):
        together = model(torch.cat([x, x]))
    with supernet.at(others):
        assert_same_outputs(model, lambda _: together[2:], x)
    assert_same_outputs(small, lambda _: together[:2], x)
