"""Networks composed at random: groups, surgery and costs must agree on all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_close,
    assert_same_outputs,
    conv,
    count_parameters,
    mixes_channels,
    outputs,
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
from torch_pruning_adapters import ChannelGroup, find_channel_groups, shrink
from torch_pruning_adapters.calls import Inputs, map_tensors

IMAGE = (3, 8, 8)
VECTOR = 5

ALLOWED = {
    r"reaches the network's output": "the network gives its features out",
    r"tied to the network's input": "added to a concatenation with the image",
    r"tied to a tensor of fixed size": "added to a concatenation with a fixed number of zeros",
    r"a single channel": "one channel is left where others are tied elsewhere",
    r"is reshaped to a fixed length, \d+": "as long as channels that cannot be cut",
    r"its \d+ channels can only be cut together": "two channels in two halves, heads or groups",
}
"""Why a group of these networks may be frozen: pattern -> which mechanism."""


class Block(nn.Module):
    """Maps (B, C, side, side) to (B, out_channels, side * scale, side * scale)."""

    out_channels: int
    scale: float = 1


# --- sums, concatenations and convolutions ----------------------------------------------------------------


class Residual(Block):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.a, self.bn, self.b = conv(channels, middle), nn.BatchNorm2d(middle), conv(middle, channels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.bn(self.a(x)).relu())


class Concat(Block):
    def __init__(self, channels: int, first: int, keep_input: bool) -> None:
        super().__init__()
        self.a, self.b, self.keep_input = conv(channels, first), conv(channels, 4, 1), keep_input
        self.out_channels = first + 4 + keep_input * channels
        self.bn = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.a(x), self.b(x)] + [x] * self.keep_input
        return self.bn(torch.cat(parts, 1)).relu()


class ConcatImage(Block):
    """Concatenates its features with the network's input."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.a = conv(channels, out)
        self.out_channels = out + IMAGE[0]

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        return torch.cat([self.a(x), F.adaptive_avg_pool2d(image, x.shape[2:])], 1)


class Depthwise(Block):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.dw, self.bn = conv(channels, channels, groups=channels, bias=False), nn.BatchNorm2d(channels)
        self.pw = conv(channels, out, 1)
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.bn(self.dw(x)).relu())


class Grouped(Block):
    """A bottleneck around a grouped convolution, whose own channels no other layer ties."""

    def __init__(self, channels: int, groups: int, out: int) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(channels, 12, 1), conv(12, 24, groups=groups), conv(24, out, 1)
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class SqueezeExcite(Block):
    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.down, self.up = conv(channels, squeeze, 1), conv(squeeze, channels, 1)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class Upsample(Block):
    scale = 2

    def __init__(self, channels: int, groups: int, out: int) -> None:
        super().__init__()
        self.a = conv(channels, 4 * groups, 1)
        self.up = nn.ConvTranspose2d(4 * groups, out * groups, 2, stride=2, groups=groups)
        self.out_channels = out * groups

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.a(x).relu()).relu()


class PixelShuffle(Block):
    scale = 2

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.a, self.b = conv(channels, 4 * out), conv(out, out)
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.pixel_shuffle(self.a(x), 2).relu())


class PatchMerging(Block):
    """Space to depth by slices, as in Swin and in YOLO's focus layer."""

    scale = 0.5

    def __init__(self, channels: int, out: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels) if norm else nn.Identity()
        self.reduce = nn.Linear(4 * channels, out, bias=False)
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        corners = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        return self.reduce(self.norm(torch.cat(corners, -1))).permute(0, 3, 1, 2)


# --- parts of channels ------------------------------------------------------------------------------------


class Gated(Block):
    """A gated linear unit: two halves of one layer's channels are multiplied."""

    def __init__(self, channels: int, half: int, out: int, way: str) -> None:
        super().__init__()
        self.a, self.b, self.half, self.way = conv(channels, 2 * half), conv(half, out, 1), half, way
        self.out_channels = out

    def halves(self, x: Tensor) -> Any:
        c = x.shape[1]
        if self.way == "chunk":
            return x.chunk(2, 1)
        if self.way == "split by attribute":
            return torch.split(x, self.half, dim=1)
        if self.way == "split by attributes":
            return x.split([self.half, self.half], 1)
        if self.way == "split by shape":
            return x.split(c // 2, 1)
        if self.way == "view":
            return x.view(len(x), 2, -1, *x.shape[2:]).unbind(1)
        return x[:, : c // 2], x[:, c // 2 :]

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.halves(self.a(x))
        return self.b(u * v.sigmoid())


class Branches(Block):
    """Parts of one layer's channels go different ways and come together again, as in CSP networks."""

    def __init__(self, channels: int, part: int, parts: int, out: int) -> None:
        super().__init__()
        self.a, self.parts = conv(channels, part * parts, 1), parts
        self.b, self.bn = conv(part, out), nn.BatchNorm2d(out)
        self.c = conv(part * parts + out, out, 1)
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.a(x).relu().chunk(self.parts, 1))
        parts.append(self.bn(self.b(parts[-1])))
        return self.c(torch.cat(parts, 1))


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleV1(Block):
    def __init__(self, channels: int, groups: int, built_in: bool) -> None:
        super().__init__()
        self.groups = groups
        self.shuffle = nn.ChannelShuffle(groups) if built_in else lambda x: shuffled(x, groups)
        self.a, self.bn = conv(channels, 4 * groups, 1, groups=groups), nn.BatchNorm2d(4 * groups)
        self.dw = conv(4 * groups, 4 * groups, groups=4 * groups)
        self.b = conv(4 * groups, channels, 1, groups=groups)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.b(self.dw(self.shuffle(self.bn(self.a(x)).relu())))).relu()


class ShuffleV2(Block):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.a, self.dw, self.b = conv(half, half, 1), conv(half, half, groups=half), conv(half, half, 1)
        self.bn = nn.BatchNorm2d(half)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        kept, x = x.chunk(2, 1)
        return shuffled(torch.cat([kept, self.bn(self.b(self.dw(self.a(x).relu()))).relu()], 1), 2)


# --- attention --------------------------------------------------------------------------------------------


class Attention(Block):
    """Self-attention over the places of a map, with a LayerNorm in front or none."""

    def __init__(self, channels: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.heads, self.head_dim = heads, channels // heads
        self.out_channels = channels

    def attend(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attend(self.norm(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


class FusedAttention(Attention):
    def __init__(self, channels: int, heads: int, norm: bool) -> None:
        super().__init__(channels, heads, norm)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class JointAttention(Attention):
    """Queries, keys and values from one layer, as in timm."""

    def __init__(self, channels: int, heads: int, norm: bool) -> None:
        super().__init__(channels, heads, norm)
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.project((weights @ v).transpose(1, 2).reshape(b, n, c))


class ApartAttention(Attention):
    """Queries, keys and values from a layer each; the number of heads or their size is what is left (-1)."""

    def __init__(self, channels: int, heads: int, norm: bool, way: str) -> None:
        super().__init__(channels, heads, norm)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.project, self.way = nn.Linear(channels, channels), way

    def split(self, x: Tensor) -> Tensor:
        heads = -1 if self.way == "cut heads" else self.heads
        size = -1 if self.way == "cut sizes" else self.head_dim
        return x.view(*x.shape[:2], heads, size).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class ClassToken(nn.Module):
    """A head that reads a class token after one layer of attention."""

    def __init__(self, channels: int, side: int, norm: bool, outputs: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, channels))
        self.position = nn.Parameter(torch.zeros(1, side**2 + 1, channels))
        self.attention = FusedAttention(channels, 1, norm)
        self.fc = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.fc((tokens + self.attention.attend(self.attention.norm(tokens)))[:, 0])


# --- parameters, norms, tensors of its own ----------------------------------------------------------------


class LayerScale(Block):
    """A ConvNeXt block: its layers see channels last."""

    def __init__(self, channels: int, middle: int, norm: bool) -> None:
        super().__init__()
        self.dw = conv(channels, channels, groups=channels)
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.a, self.b = nn.Linear(channels, middle), nn.Linear(middle, channels)
        self.gamma = nn.Parameter(torch.ones(channels))
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.b(F.gelu(self.a(y)))).permute(0, 3, 1, 2)


class Normed(Block):
    def __init__(self, channels: int, out: int, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = conv(channels, 6), norm, conv(6, out, 1)
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class Rectified(Block):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.each, self.a, self.one = nn.PReLU(channels), conv(channels, out), nn.PReLU()
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.a(self.each(x)))


class OwnConvolution(Block):
    """Applies parameters of its own with functions."""

    def __init__(self, channels: int, groups: int, out: int) -> None:
        super().__init__()
        self.a, self.groups = conv(channels, 4 * groups, 1), groups
        self.weight = nn.Parameter(torch.zeros(2 * groups, 4, 3, 3))
        self.bias = nn.Parameter(torch.zeros(2 * groups))
        self.point = nn.Parameter(torch.zeros(out, 2 * groups, 1, 1))
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.a(x).relu(), self.weight, self.bias, padding=1, groups=self.groups)
        return F.conv2d(x.relu(), self.point)


class OwnProjection(Block):
    """A residual branch of matrix products with parameters of its own."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(middle, channels))
        self.up = nn.Parameter(torch.zeros(middle, channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.permute(0, 2, 3, 1), self.down).relu()
        return x + (y @ self.up + self.offset).permute(0, 3, 1, 2)


class Reused(Block):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.a, self.again, self.relu = conv(channels, out), conv(out, out), nn.ReLU()
        self.out_channels = out

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.relu(self.again(self.relu(self.a(x)))))


class SharedWeights(Block):
    """Two layers have one weight and biases of their own."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.a, self.b = conv(channels, middle), conv(channels, middle)
        self.b.weight = self.a.weight
        self.c = conv(middle, channels, 1)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).relu() * self.b(x.flip(2)).sigmoid()) + x


class MadeFromShape(Block):
    def __init__(self, channels: int, zeros: int) -> None:
        super().__init__()
        self.zeros = zeros
        self.a = conv(channels, channels)
        self.out_channels = channels + zeros

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = self.a(x) * torch.full((b, c, 1, 1), 0.5, dtype=x.dtype) + x.new_ones(x.shape)
        return torch.cat([x, torch.zeros(b, self.zeros, h, w, dtype=x.dtype)], 1) if self.zeros else x


# --- networks ---------------------------------------------------------------------------------------------

WIDTH = st.integers(2, 7)


def divisor(draw: st.DrawFn, number: int) -> int:
    return draw(st.sampled_from([d for d in (1, 2, 3) if number % d == 0]))


def heads(draw: st.DrawFn, channels: int) -> int:
    """A number of heads; none has a single channel, which could only go with the head."""
    return draw(st.sampled_from([d for d in (1, 2, 3) if channels % d == 0 and (d == 1 or channels > d)]))


BLOCKS: dict[str, Callable[[st.DrawFn, int], Block]] = {
    "residual": lambda draw, c: Residual(c, draw(WIDTH)),
    "concat": lambda draw, c: Concat(c, draw(WIDTH), draw(st.booleans())),
    "concat with the image": lambda draw, c: ConcatImage(c, draw(WIDTH)),
    "depthwise": lambda draw, c: Depthwise(c, draw(WIDTH)),
    "grouped": lambda draw, c: Grouped(c, draw(st.sampled_from([2, 3, 4])), draw(WIDTH)),
    "squeeze-excite": lambda draw, c: SqueezeExcite(c, draw(WIDTH)),
    "upsample": lambda draw, c: Upsample(c, draw(st.sampled_from([1, 2])), draw(WIDTH)),
    "pixel shuffle": lambda draw, c: PixelShuffle(c, draw(WIDTH)),
    "patch merging": lambda draw, c: PatchMerging(c, draw(WIDTH), draw(st.booleans())),
    "gated": lambda draw, c: Gated(c, draw(WIDTH), draw(WIDTH), draw(st.sampled_from(HALVES))),
    "branches": lambda draw, c: Branches(c, draw(WIDTH), draw(st.sampled_from([2, 3])), draw(WIDTH)),
    "shuffle v1": lambda draw, c: ShuffleV1(c, divisor(draw, c), draw(st.booleans())),
    "shuffle v2": lambda draw, c: ShuffleV2(c),
    "fused attention": lambda draw, c: FusedAttention(c, heads(draw, c), draw(st.booleans())),
    "joint attention": lambda draw, c: JointAttention(c, heads(draw, c), draw(st.booleans())),
    "apart attention": lambda draw, c: ApartAttention(
        c, heads(draw, c), draw(st.booleans()), draw(st.sampled_from(HEADS))
    ),
    "layer scale": lambda draw, c: LayerScale(c, draw(WIDTH), draw(st.booleans())),
    "normed": lambda draw, c: Normed(c, draw(WIDTH), draw(st.sampled_from(NORMS))()),
    "rectified": lambda draw, c: Rectified(c, draw(WIDTH)),
    "own convolution": lambda draw, c: OwnConvolution(c, draw(st.sampled_from([1, 2, 3])), draw(WIDTH)),
    "own projection": lambda draw, c: OwnProjection(c, draw(WIDTH)),
    "reused": lambda draw, c: Reused(c, draw(WIDTH)),
    "shared weights": lambda draw, c: SharedWeights(c, draw(WIDTH)),
    "made from shape": lambda draw, c: MadeFromShape(c, draw(st.sampled_from([0, 2]))),
}
HALVES = ["chunk", "split by attribute", "split by attributes", "split by shape", "view", "slices"]
HEADS = ["both fixed", "cut heads", "cut sizes"]
NORMS: list[Callable[[], nn.Module]] = [
    lambda: nn.GroupNorm(2, 6),
    lambda: nn.GroupNorm(1, 6),
    lambda: LayerNorm2d(6),
    lambda: nn.InstanceNorm2d(6, affine=True),
    lambda: nn.InstanceNorm2d(6),
]


class Network(nn.Module):
    """A stem, blocks, and a head; gives out a tensor or more."""

    def __init__(self, blocks: list[Block], head: nn.Module, channels: int, vector: bool, gives: str) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = conv(IMAGE[0], channels), nn.ModuleList(blocks), head
        self.embed = nn.Linear(VECTOR, channels) if vector else None
        self.gives = gives

    def forward(self, image: Tensor, vector: Tensor | None = None) -> Any:
        x = self.stem(image).relu()
        if self.embed is not None:
            x = x + self.embed(vector)[:, :, None, None]
        for block in self.blocks:
            x = block(x, image) if isinstance(block, ConcatImage) else block(x)
        y = self.head(x)
        outputs = {"tensor": y, "dict": {"logits": y, "image": image.mean()}, "features": [y, x]}
        return outputs[self.gives]

    def inputs(self) -> Inputs:
        image = torch.randn(2, *IMAGE, dtype=torch.float64)
        if self.embed is None:
            return image
        vector = torch.randn(2, VECTOR, dtype=torch.float64)
        return {"image": image, "vector": vector} if self.gives == "dict" else [image, vector]


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Up to five blocks in any order that their shapes allow, and one of three heads."""
    first = channels = draw(WIDTH)
    side = IMAGE[1]
    blocks: list[Block] = []
    for kind in draw(st.lists(st.sampled_from(sorted(BLOCKS)), max_size=5)):
        if kind == "shuffle v2" and channels % 2:
            continue
        block = BLOCKS[kind](draw, channels)
        if (side * block.scale) % 1 or not 2 <= side * block.scale <= 16:
            continue
        blocks.append(block)
        channels, side = block.out_channels, int(side * block.scale)
    pooled = draw(st.sampled_from([0, 1, 2]))
    head: nn.Module = nn.Sequential(
        nn.AdaptiveAvgPool2d(pooled), nn.Flatten(), nn.Linear(channels * pooled**2, 5)
    )
    if not pooled:
        head = ClassToken(channels, side, draw(st.booleans()), 5)
    gives = draw(st.sampled_from(["tensor", "tensor", "dict", "features"]))
    return Network(blocks, head, first, draw(st.booleans()), gives)


def check(model: Network, seed: int) -> None:
    """All that must hold of a network, whatever it is made of."""
    torch.manual_seed(seed)
    randomised(model)
    x = model.inputs()
    groups = find_channel_groups(model, x, verify=False)
    assert find_channel_groups(model, x) == groups
    for g in groups:
        assert g.frozen is None or any(re.fullmatch(reason, g.frozen) for reason in ALLOWED), (
            g.name,
            g.frozen,
        )
    assert_whole(model, groups, x)

    widths, order = random_widths(groups, seed), random_order(groups, seed)
    small = shrink(model, groups, widths, order)
    supernet = Supernet(model, groups, order)
    with supernet.at(widths):
        assert_same_outputs(model, small, x)
    flops, params = FlopsCost(model, x, groups), ParamsCost(model, groups)
    assert flops(widths) == count_flops(small, x)
    assert params(widths) == count_parameters(small)

    mixing = {g.name: g.size for g in groups if mixes_channels(g)}
    assert supernet.inexact.keys() == mixing.keys()
    widths, others = ({**random_widths(groups, seed + i), **mixing} for i in (1, 2))
    small = shrink(model, groups, widths, order)
    assert_same_outputs(small, zeroed(model, groups, widths, order), x)
    with supernet.gated(supernet.gates_of(widths)):
        assert_same_outputs(model, small, x)
    if not any(m.reader or m.kind == "parameter" for g in groups for m in g.consumers):
        assert_parallel(supernet, x, widths, others)


def assert_whole(model: nn.Module, groups: tuple[ChannelGroup, ...], x: Inputs) -> None:
    """Cutting nothing changes nothing."""
    whole = shrink(model, groups, {g.name: g.size for g in groups})
    assert all(map(torch.equal, outputs(whole, x), outputs(model, x)))
    assert all(torch.equal(whole.state_dict()[name], t) for name, t in model.state_dict().items())


def assert_parallel(supernet: Supernet, x: Inputs, *networks: dict[str, int]) -> None:
    """Each part of the batch goes through its own network."""
    with supernet.parallel(networks):
        together = outputs(supernet.model, map_tensors(x, lambda t: torch.cat([t] * len(networks))))
    for k, widths in enumerate(networks):
        with supernet.at(widths):
            for joint, alone in zip(together, outputs(supernet.model, x), strict=True):
                if joint.dim():
                    assert_close(joint[len(alone) * k : len(alone) * (k + 1)], alone)


RELAXED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=150, **RELAXED)
@given(model=networks(), seed=st.integers(0, 2**31))
def test_random_networks(model: Network, seed: int) -> None:
    check(model, seed)


@pytest.mark.slow
@settings(max_examples=600, derandomize=True, **RELAXED)
@given(model=networks(), seed=st.integers(0, 2**31))
def test_many_random_networks(model: Network, seed: int) -> None:
    check(model, seed)
