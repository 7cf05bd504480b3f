"""One small network for each way in which models move, tie and count channels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, conv, count_parameters, random_order, random_widths, randomised, zeroed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)
from torchvision.ops import FeaturePyramidNetwork, StochasticDepth

from nni_dbs import FlopsCost, ParamsCost
from nni_dbs.cost import count_flops
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import (
    ChannelGroup,
    Channels,
    UnsupportedModelError,
    find_channel_groups,
    register,
    shrink,
)
from torch_pruning_adapters import trace as tracing
from torch_pruning_adapters.calls import Inputs, call, tensors_in

few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
widths = st.integers(2, 5)
seeds = st.integers(0, 2**31)

Expected = Mapping[str, "tuple[int, int] | str"]  # group -> (size, step), or a part of why it is frozen


def check(
    model: nn.Module, inputs: Inputs, expected: Expected, mixed: Sequence[str] = (), seed: int = 0
) -> dict[str, ChannelGroup]:
    """Asserts the groups and all that must agree with them.

    Args:
        model: Any network; its parameters become random ones.
        inputs: Its inputs.
        expected: Its groups.
        mixed: Those over whose channels a norm, a mean or a score is taken.
        seed: Of the widths and the channels that are cut.
    """
    torch.manual_seed(seed)
    randomised(model)
    inputs = inputs.double() if isinstance(inputs, Tensor) else inputs
    groups = find_channel_groups(model, inputs, verify=False)
    found = {g.name: (g.size, g.step) if g.frozen is None else g.frozen for g in groups}
    assert list(found) == list(expected), found
    for name, want in expected.items():
        assert want in found[name] if isinstance(want, str) else want == found[name], found
    assert find_channel_groups(model, inputs) == groups

    flops, params = FlopsCost(model, inputs, groups), ParamsCost(model, groups)
    width, order = random_widths(groups, seed), random_order(groups, seed)
    width.update({g.name: max(width[g.name], min(2 * g.step, g.size)) for g in groups})
    supernet = Supernet(model, groups, order)
    assert set(supernet.inexact) == set(mixed)
    small = shrink(model, groups, width, order)
    with supernet.at(width):
        assert_equal(model, small, inputs)
        assert count_flops(model, inputs) == flops(width)
    assert flops(width) == count_flops(small, inputs)
    assert params(width) == count_parameters(small)
    assert_sizes(small)
    assert_same_groups(small, inputs, groups, width)

    whole = {**width, **{g.name: g.size for g in groups if g.name in mixed}}
    assert_equal(shrink(model, groups, whole, order), zeroed(model, groups, whole, order), inputs)
    return {g.name: g for g in groups}


def assert_equal(a: nn.Module, b: nn.Module, inputs: Inputs) -> None:
    """Up to rounding in double precision, and not because everything is zero."""
    with torch.no_grad():
        found, wanted = tensors_in(call(a, inputs)), tensors_in(call(b, inputs))
    assert wanted
    for u, v in zip(found, wanted, strict=True):
        assert v.abs().max() > 1e-12
        torch.testing.assert_close(u, v, rtol=1e-9, atol=1e-9 * float(v.abs().max()))


def assert_sizes(model: nn.Module) -> None:
    """What layers say of their sizes is what they have."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features)
        elif isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            assert m.weight.shape[:2] == (m.out_channels, m.in_channels // m.groups)
        elif isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            assert m.weight.shape[:2] == (m.in_channels, m.out_channels // m.groups)
        elif isinstance(m, nn.LayerNorm) and m.weight is not None:
            assert m.weight.shape == m.normalized_shape
        elif isinstance(m, nn.GroupNorm) and m.weight is not None:
            assert m.weight.shape == (m.num_channels,)
        elif isinstance(m, nn.Embedding):
            assert m.weight.shape[1] == m.embedding_dim
        elif isinstance(m, nn.MultiheadAttention):
            assert m.embed_dim == m.head_dim * m.num_heads == m.out_proj.in_features
            if m.in_proj_weight is not None:
                assert m.in_proj_weight.shape == (3 * m.embed_dim, m.embed_dim)
                assert m.embed_dim == m.kdim == m.vdim
            else:
                columns = [w.shape[1] for w in (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)]
                assert columns == [m.embed_dim, m.kdim, m.vdim]


def assert_same_groups(
    small: nn.Module, inputs: Inputs, groups: Sequence[ChannelGroup], width: Mapping[str, int]
) -> None:
    """The cut network has the groups of the whole one, narrower."""
    again = find_channel_groups(small, inputs)
    assert [g.name.split("[")[0] for g in again] == [g.name.split("[")[0] for g in groups]
    assert [g.size for g in again] == [width[g.name] for g in groups]
    for g, old in zip(again, groups, strict=True):
        assert (g.frozen is None) == (old.frozen is None and width[old.name] > old.step), g
        assert g.step == old.step, g


def on(group: ChannelGroup, role: str) -> set[str]:
    """What a group touches: layers, `module.tensor` of bare parameters, `module.attribute` of sizes."""
    names = set()
    for m in group.members:
        if m.role == role and m.kind != "statistics":
            if m.kind in ("parameter", "size"):
                names.add(f"{m.layer}.{m.attribute or m.tensors[0][0]}".lstrip("."))
            else:
                names.add(m.layer)
    return names


def pooled(net: Any, x: Tensor) -> Tensor:
    """Global average pooling and the layer `fc`."""
    return net.fc(x.mean(tuple(range(2, x.dim()))))


# --- entries that move ----------------------------------------------------------------------------------


class Shuffle(nn.Module):
    """A unit of ShuffleNet: channels of a grouped convolution are dealt to the groups of the next."""

    def __init__(self, groups: int, width: int, how: str) -> None:
        super().__init__()
        channels = groups * groups * width
        self.groups, self.how = groups, how
        self.a = conv(3, groups, 1)
        self.first = conv(groups, channels, 1, groups=groups)
        self.bn = nn.BatchNorm2d(channels)
        self.dw = conv(channels, channels, groups=channels)
        self.last = conv(channels, groups * 3, 1, groups=groups)
        self.fc = nn.Linear(groups * 3, 4)

    def shuffle(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return F.channel_shuffle(x, self.groups)
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w)
        if self.how == "transpose":
            return x.transpose(1, 2).contiguous().view(n, -1, h, w)
        return x.permute(0, 2, 1, 3, 4).reshape(n, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(self.bn(self.first(self.a(x))).relu())
        return pooled(self, self.last(self.dw(x)))


@pytest.mark.parametrize("how", ["function", "transpose", "permute"])
@few
@given(groups=st.integers(2, 3), width=widths, seed=seeds)
def test_channel_shuffle(how: str, groups: int, width: int, seed: int) -> None:
    """Every group of the second convolution keeps the same positions of what each of the first computes."""
    step = groups * groups
    expected = {
        "a": f"its {groups} channels can only be cut together",
        "first": (step * width, step),
        "last": (groups * 3, groups),
    }
    found = check(Shuffle(groups, width, how), torch.randn(2, 3, 4, 4), expected, seed=seed)
    assert on(found["first"], "through") == {"bn", "dw"}
    assert on(found["first"], "consumer") == {"last"}


def halves(how: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second half of the channels."""
    c = x.shape[1]
    if how == "chunk":
        first, second = x.chunk(2, 1)
    elif how == "tensor_split":
        first, second = x.tensor_split(2, 1)
    elif how == "split":
        first, second = x.split(c // 2, 1)
    elif how == "torch.split":
        first, second = torch.split(x, [c // 2, c - c // 2], dim=1)
    elif how == "size":
        first, second = torch.split(x, split_size_or_sections=x.size(1) // 2, dim=1)
    elif how == "slices":
        first, second = x[:, : c // 2], x[:, c // 2 :]
    elif how == "bounds":
        first, second = x[:, 0 : c // 2, ...], x[:, c // 2 : c]
    elif how == "narrow":
        first, second = x.narrow(1, 0, c // 2), x.narrow(1, c // 2, c // 2)
    else:
        raise ValueError(how)
    return first, second


HALVES = ["chunk", "tensor_split", "split", "torch.split", "size", "slices", "bounds"]


@pytest.mark.parametrize("how", HALVES)
@few
@given(width=widths, seed=seeds)
def test_halves_that_are_multiplied(how: str, width: int, seed: int) -> None:
    """A gated linear unit: a channel and its gate are one."""

    def forward(net: Any, x: Tensor) -> Tensor:
        u, v = halves(how, net.a(x))
        return pooled(net, u * v.sigmoid())

    net = Net(forward, a=conv(3, 2 * width), fc=nn.Linear(width, 4))
    found = check(net, torch.randn(2, 3, 4, 4), {"a": (width, 1)}, seed=seed)
    assert found["a"].members[0].multiplicity == 2


@pytest.mark.parametrize("how", HALVES)
@few
@given(width=widths, seed=seeds)
def test_halves_on_ways_of_their_own(how: str, width: int, seed: int) -> None:
    """Equal parts stay equal: what stays of one is what stays of the other, a pair counts as one channel."""

    def forward(net: Any, x: Tensor) -> Tensor:
        u, v = halves(how, net.a(x))
        return pooled(net, torch.cat([net.b(u).relu(), v], 1))

    net = Net(forward, a=conv(3, 2 * width), b=conv(width, 3), fc=nn.Linear(width + 3, 4))
    check(net, torch.randn(2, 3, 4, 4), {"a": (width, 1), "b": (3, 1)}, seed=seed)


class Partial(nn.Module):
    """Only the first channels are convolved, as many as the module says."""

    def __init__(self, first: int, rest: int) -> None:
        super().__init__()
        self.dim_conv, self.dim_untouched = first, rest
        self.a, self.part = conv(3, first + rest), conv(first, first, bias=False)
        self.fc = nn.Linear(first + rest, 4)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.split(self.a(x), [self.dim_conv, self.dim_untouched], dim=1)
        return pooled(self, torch.cat((self.part(u), v), 1))


@few
@given(first=widths, rest=widths, seed=seeds)
def test_parts_as_large_as_attributes(first: int, rest: int, seed: int) -> None:
    expected = {f"a[0:{first}]": (first, 1), f"a[{first}:{first + rest}]": (rest, 1), "part": (first, 1)}
    found = check(Partial(first, rest), torch.randn(2, 3, 4, 4), expected, seed=seed)
    assert [on(g, "through") for g in found.values()] == [{"dim_conv"}, {"dim_untouched"}, set()]


def fixed_parts(net: Any, x: Tensor) -> Tensor:
    u, v = net.a(x).split([4, 2], 1)
    return pooled(net, torch.cat([u, v], 1))


def fixed_slice(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return pooled(net, torch.cat([x[:, :4] * 2, x[:, 4:]], 1))


def true_division(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return pooled(net, torch.cat([x[:, : int(x.shape[1] / 2)], x[:, int(x.shape[1] / 2) :]], 1))


def one_channel(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return pooled(net, x * x[:, 0:1])


def every_second(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return pooled(net, torch.cat([x[:, ::2], x[:, 1::2]], 1))


def chosen(net: Any, x: Tensor) -> Tensor:
    return pooled(net, net.a(x)[:, [5, 4, 3, 2, 1, 0]])


def fixed_shape(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return pooled(net, x.view(x.shape[0], 6, 16).view(x.shape[0], 6, 4, 4))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (fixed_parts, "is cut at a fixed position"),
        (fixed_slice, "is cut at a fixed position"),
        (true_division, "is cut at a fixed position"),
        (one_channel, "is cut at a fixed position"),
        (every_second, "is cut at a fixed position"),
        (chosen, "is read at fixed positions"),
        (fixed_shape, "is reshaped to a fixed length, 6"),
    ],
)
def test_positions_that_do_not_follow_the_widths(forward: Any, reason: str) -> None:
    """Channels stay where the code has numbers for them."""
    net = Net(forward, a=conv(3, 6), fc=nn.Linear(6, 4))
    check(net, torch.randn(2, 3, 4, 4), {"a": reason})


# --- attention ------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, heads: int, width: int, **kwargs: Any) -> None:
        super().__init__()
        self.emb = nn.Linear(3, heads * width)
        self.attn = nn.MultiheadAttention(heads * width, heads, **kwargs)
        self.fc = nn.Linear(heads * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        return self.fc(x + self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"add_bias_kv": True}])
@few
@given(heads=st.integers(1, 3), width=widths, batch_first=st.booleans(), seed=seeds)
def test_fused_attention(kwargs: Any, heads: int, width: int, batch_first: bool, seed: int) -> None:
    """The embedding, queries, keys and values have one width, and heads are equally wide."""
    model = SelfAttention(heads, width, batch_first=batch_first, **kwargs)
    expected = {"emb": (heads * width, heads)}
    found = check(model, torch.randn(2, 3, 3), expected, mixed=["emb"], seed=seed)
    group = found["emb"]
    assert on(group, "producer") == {"emb", "attn.in_proj_weight", "attn.out_proj"}
    assert on(group, "consumer") == {"attn.in_proj_weight", "attn.out_proj", "fc"}
    sizes = {m.attribute for m in group.members if m.kind == "size"}
    assert sizes == {"embed_dim", "head_dim", "kdim", "vdim"}


class CrossAttention(nn.Module):
    def __init__(self, heads: int, width: int, kdim: int, vdim: int, batch_first: bool) -> None:
        super().__init__()
        dim = heads * width
        self.q, self.k, self.v = nn.Linear(3, dim), nn.Linear(2, kdim), nn.Linear(2, vdim)
        self.attn = nn.MultiheadAttention(dim, heads, kdim=kdim, vdim=vdim, batch_first=batch_first)
        self.fc = nn.Linear(dim, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y, weights = self.attn(self.q(x), key=self.k(memory), value=self.v(memory))
        return self.fc(y), weights


@few
@given(heads=st.integers(1, 3), width=widths, kdim=widths, vdim=widths, batch_first=st.booleans(), seed=seeds)
def test_fused_cross_attention(
    heads: int, width: int, kdim: int, vdim: int, batch_first: bool, seed: int
) -> None:
    """Keys and values are read at widths of their own."""
    dim = heads * width
    vdim += kdim == vdim == dim  # else there is one weight for all three
    model = CrossAttention(heads, width, kdim, vdim, batch_first)
    inputs = [torch.randn(2, 2, 3).double(), torch.randn(2, 2, 2).double()]
    expected = {"q": (dim, heads), "k": (kdim, 1), "v": (vdim, 1), "attn.out_proj": (dim, 1)}
    found = check(model, inputs, expected, mixed=["q"], seed=seed)
    assert on(found["k"], "through") == {"attn.kdim"}
    assert on(found["v"], "through") == {"attn.vdim"}


class Layers(nn.Module):
    def __init__(self, dim: int, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.emb, self.memory = nn.Linear(3, dim), nn.Linear(2, dim)
        self.encoder, self.decoder, self.fc = encoder, decoder, nn.Linear(dim, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.fc(self.decoder(self.emb(x), self.encoder(self.memory(memory))))


@few
@given(
    heads=st.integers(1, 3),
    width=widths,
    middle=widths,
    norm_first=st.booleans(),
    batch_first=st.booleans(),
    activation=st.sampled_from(["relu", "gelu"]),
    seed=seeds,
)
def test_transformer_layers(heads: int, width: int, middle: int, seed: int, **kwargs: Any) -> None:
    dim = heads * width
    encoder = nn.TransformerEncoderLayer(dim, heads, middle, **kwargs)
    decoder = nn.TransformerDecoderLayer(dim, heads, middle, **kwargs)
    expected = {
        "emb": (dim, heads),
        "encoder.linear1": (middle, 1),
        "decoder.linear1": (middle, 1),
    }
    inputs = [torch.randn(2, 2, 3).double(), torch.randn(2, 2, 2).double()]
    check(Layers(dim, encoder, decoder), inputs, expected, mixed=["emb"], seed=seed)


class Attention(nn.Module):
    """Self-attention in the spellings of timm, ViT and others."""

    def __init__(self, heads: int, width: int, how: str) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale, self.how = heads, width, width**-0.5, how
        self.qkv, self.proj = (
            nn.Linear(heads * width, 3 * heads * width),
            nn.Linear(heads * width, heads * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        if self.how == "timm":
            qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            x = F.scaled_dot_product_attention(q, k, v)
            x = x.transpose(1, 2).reshape(B, N, C)
        elif self.how == "old timm":
            qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
            attn = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
            x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        elif self.how == "chunk":
            q, k, v = (
                t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
            )
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        elif self.how == "einsum":
            q, k, v = (t.view(B, N, self.num_heads, -1) for t in self.qkv(x).chunk(3, dim=-1))
            attn = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(self.scale).softmax(-1)
            x = torch.einsum("bhnm,bmhd->bnhd", attn, v).reshape(B, N, -1)
        elif self.how == "head_dim":
            qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        elif self.how == "last":
            q, k, v = self.qkv(x).view(B, N, self.num_heads, -1).transpose(1, 2).chunk(3, -1)
            x = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
            x = x.transpose(1, 2).reshape(B, N, -1)
        elif self.how == "folded":
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k, v = (t.reshape(B, N, self.num_heads, -1).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            x = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
            x = x.view(B, self.num_heads, N, -1).transpose(1, 2).reshape(B, N, -1)
        return self.proj(x)


SPELLINGS = ["timm", "old timm", "chunk", "einsum", "head_dim", "last", "folded"]
INNER = ["chunk", "einsum", "last", "folded"]


class Block(nn.Module):
    """A block of a transformer with layer scale and stochastic depth, and what lies around it."""

    def __init__(self, heads: int, width: int, middle: int, how: str) -> None:
        super().__init__()
        dim = heads * width
        self.patch = nn.Conv2d(3, dim, 2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, dim))
        self.norm1, self.attn, self.gamma1 = (
            nn.LayerNorm(dim),
            Attention(heads, width, how),
            nn.Parameter(torch.ones(dim)),
        )
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, middle), nn.GELU(), nn.Linear(middle, dim)),
        )
        self.gamma2 = nn.Parameter(torch.ones(dim))
        self.drop = StochasticDepth(0.5, "row")
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = x + self.drop(self.gamma1 * self.attn(self.norm1(x)))
        x = x + self.drop(self.gamma2 * self.mlp(self.norm2(x)))
        return self.fc(self.norm(x)[:, 0])


@pytest.mark.parametrize("how", SPELLINGS)
@few
@given(heads=st.integers(2, 3), width=widths, middle=widths, seed=seeds)
def test_attention_as_it_is_spelled(how: str, heads: int, width: int, middle: int, seed: int) -> None:
    dim = heads * width
    expected = {"patch": (dim, heads), "mlp.0": (middle, 1)}
    mixed = ["patch"]
    if how in INNER:  # no shape says that attention is as wide as the stream
        expected = {"patch": (dim, 1), "attn.qkv": (dim, heads), "mlp.0": (middle, 1)}
        mixed = ["patch", "attn.qkv"]
    check(Block(heads, width, middle, how), torch.randn(2, 3, 4, 4), expected, mixed, seed)


class Window(nn.Module):
    """Attention in shifted windows with a bias for each offset, as in torchvision's Swin."""

    def __init__(self, heads: int, width: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = heads, window, shift
        dim = heads * width
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = at[:, None] - at[None] + window - 1
        self.register_buffer("index", (offset[..., 0] * (2 * window - 1) + offset[..., 1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w, tokens = self.window, self.window**2
        x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, tokens, C)
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        qkv = qkv.reshape(x.size(0), x.size(1), 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * (C // self.num_heads) ** -0.5).matmul(k.transpose(-2, -1))
        bias = self.table[self.index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        attn = F.softmax(attn + bias, dim=-1)
        x = F.linear(
            attn.matmul(v).transpose(1, 2).reshape(x.size(0), tokens, C), self.proj.weight, self.proj.bias
        )
        x = x.view(B, H // w, W // w, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))


class Swin(nn.Module):
    def __init__(self, dim: int, attn: nn.Module, merge: nn.Module | None = None) -> None:
        super().__init__()
        self.patch, self.norm, self.attn = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim), attn
        self.merge = merge or nn.Identity()
        self.fc = nn.Linear(2 * dim if merge else dim, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        return self.fc(self.merge(x + self.attn(self.norm(x))).mean((1, 2)))


@few
@given(heads=st.integers(2, 3), width=widths, window=st.integers(2, 3), shift=st.integers(0, 1), seed=seeds)
def test_shifted_windows(heads: int, width: int, window: int, shift: int, seed: int) -> None:
    dim = heads * width
    model = Swin(dim, Window(heads, width, window, shift))
    x = torch.randn(1, 3, 4 * window, 4 * window)
    found = check(model, x, {"patch": (dim, heads)}, ["patch"], seed)
    assert on(found["patch"], "producer") == {"patch", "attn.qkv", "attn.proj"}


@pytest.mark.parametrize(
    "kinds", [(ShiftedWindowAttention, PatchMerging), (ShiftedWindowAttentionV2, PatchMergingV2)]
)
@few
@given(heads=st.integers(2, 3), width=widths, shift=st.integers(0, 1), seed=seeds)
def test_windows_of_torchvision(kinds: Any, heads: int, width: int, shift: int, seed: int) -> None:
    dim = heads * width
    attention, merging = kinds
    model = Swin(dim, attention(dim, [2, 2], [shift, shift], heads), merging(dim))
    expected: dict[str, Any] = {"patch": (dim, heads), "merge.reduction": (2 * dim, 1)}
    mixed = ["patch"]
    if attention is ShiftedWindowAttentionV2:  # has an MLP for the bias of each head, and normalises later
        bias = {"attn.cpb_mlp.0": (512, 1), "attn.cpb_mlp.2": "tied to the network's input"}
        expected = {"patch": (dim, heads), **bias, "merge.reduction": (2 * dim, 1)}
        mixed = ["patch", "merge.reduction"]
    found = check(model, torch.randn(1, 3, 8, 8), expected, mixed, seed)
    assert "merge.reduction" in on(found["patch"], "consumer")


# --- parts of convolutional networks --------------------------------------------------------------------


class Pyramid(nn.Module):
    """Features of two levels, torchvision's FPN, and one head for all levels."""

    def __init__(self, first: int, second: int, width: int) -> None:
        super().__init__()
        self.a, self.b = conv(3, first, stride=2), conv(first, second, stride=2)
        self.fpn = FeaturePyramidNetwork([first, second], width)
        self.tower, self.norm = conv(width, width), nn.GroupNorm(1, width)
        self.heads = nn.ModuleDict({"cls": conv(width, 4), "box": conv(width, 8)})

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        a = self.a(x).relu()
        levels = self.fpn({"0": a, "1": self.b(a).relu()})
        out: dict[str, list[Tensor]] = {name: [] for name in self.heads}
        for level in levels.values():
            level = self.norm(self.tower(level)).relu()
            for name, head in self.heads.items():
                y = head(level)
                N, _, H, W = y.shape
                out[name].append(y.view(N, -1, 2, H, W).permute(0, 3, 4, 1, 2).reshape(N, -1, 2))
        return {name: torch.cat(parts, dim=1) for name, parts in out.items()}


@few
@given(first=widths, second=widths, width=widths, seed=seeds)
def test_a_head_for_all_levels_of_a_pyramid(first: int, second: int, width: int, seed: int) -> None:
    expected = {
        "a": (first, 1),
        "b": (second, 1),
        "fpn.inner_blocks.0.0": (width, 1),
        "fpn.layer_blocks.0.0": (width, 1),
        "tower": (width, 1),
    }
    found = check(Pyramid(first, second, width), torch.randn(1, 3, 8, 8), expected, ["tower"], seed)
    assert on(found["fpn.layer_blocks.0.0"], "producer") == {"fpn.layer_blocks.0.0", "fpn.layer_blocks.1.0"}
    assert on(found["tower"], "consumer") == {"heads.cls", "heads.box"}


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class OwnNorm(nn.Module):
    """ConvNeXt's, for channels in dimension 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


NORMS = {
    "group": lambda c: nn.GroupNorm(2, c),
    "one": lambda c: nn.GroupNorm(1, c),
    "layer": LayerNorm2d,
    "own": OwnNorm,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "batch": nn.BatchNorm2d,
}


@pytest.mark.parametrize("name", NORMS)
@few
@given(half=widths, seed=seeds)
def test_norms(name: str, half: int, seed: int) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return pooled(net, net.norm(net.a(x)).relu())

    net = Net(forward, a=conv(3, 2 * half), norm=NORMS[name](2 * half), fc=nn.Linear(2 * half, 4))
    mixed = [] if name in ("instance", "batch") else ["a"]
    check(net, torch.randn(2, 3, 4, 4), {"a": (2 * half, 2 if name == "group" else 1)}, mixed, seed)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@few
@given(groups=st.integers(1, 3), a=widths, b=widths, seed=seeds)
def test_transposed_convolutions(ndim: int, groups: int, a: int, b: int, seed: int) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return pooled(net, net.act(net.bn(net.up(net.a(x)))))

    kinds = [nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][ndim - 1]
    down, up = (kind[ndim - 1] for kind in kinds)
    net = Net(
        forward,
        a=down(3, groups * a, 3),
        up=up(groups * a, groups * b, 2, stride=2, groups=groups),
        bn=norm(groups * b),
        act=nn.PReLU(groups * b),
        fc=nn.Linear(groups * b, 4),
    )
    found = check(
        net,
        torch.randn(2, 3, *[4] * ndim),
        {"a": (groups * a, groups), "up": (groups * b, groups)},
        seed=seed,
    )
    assert on(found["up"], "through") == {"bn", "act"}


# --- weights that are used twice ------------------------------------------------------------------------


class Tokens(nn.Module):
    """Token and position embeddings, a residual MLP and the embedding again as the output's weight."""

    def __init__(self, dim: int, middle: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(7, dim), nn.Embedding(9, dim)
        self.up, self.down = nn.Linear(dim, middle), nn.Linear(middle, dim)
        self.out = nn.Linear(dim, 7, bias=False)
        self.out.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        return self.out(x + self.down(F.gelu(self.up(x))))


@few
@given(dim=widths, middle=widths, seed=seeds)
def test_tied_embeddings(dim: int, middle: int, seed: int) -> None:
    model = Tokens(dim, middle)
    randomised(model)
    found = check(model, [torch.randint(7, (2, 5))], {"place": (dim, 1), "up": (middle, 1)}, seed=seed)
    assert on(found["place"], "producer") == {"place", "down"}
    assert on(found["place"], "through") == {"token"}
    assert on(found["place"], "consumer") == {"up", "out"}
    small = shrink(model, found.values(), {"place": dim - 1})
    assert small.out.weight is small.token.weight


@few
@given(width=widths, seed=seeds)
def test_one_parameter_in_two_layers(width: int, seed: int) -> None:
    """What the weight reads and computes is the same in both."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return pooled(net, net.b(net.a(x).relu()) + net.c(net.d(x)))

    b, c = conv(width, 5), conv(width, 5)
    c.weight = b.weight
    net = Net(forward, a=conv(3, width), b=b, c=c, d=conv(3, width), fc=nn.Linear(5, 4))
    found = check(net, torch.randn(2, 3, 4, 4), {"a": (width, 1), "b": (5, 1)}, seed=seed)
    assert on(found["a"], "producer") == {"a", "d"}


# --- models as people write them ------------------------------------------------------------------------


class Bare(nn.Module):
    """Parameters of its own and functional calls."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(a, 3, 3, 3)), nn.Parameter(torch.zeros(a))
        self.scale = nn.Parameter(torch.zeros(1, a, 1, 1))
        self.layers = nn.ParameterList([nn.Parameter(torch.zeros(b, a)), nn.Parameter(torch.zeros(4, b))])
        self.register_buffer("offset", torch.zeros(b))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1) * self.scale).mean((2, 3))
        return (x @ self.layers[0].T + self.offset).tanh() @ self.layers[1].t()


@few
@given(a=widths, b=widths, seed=seeds)
def test_own_parameters_in_functional_calls(a: int, b: int, seed: int) -> None:
    groups = list(
        check(Bare(a, b), torch.randn(2, 3, 4, 4), {"weight": (a, 1), "layers": (b, 1)}, seed=seed).values()
    )
    assert on(groups[0], "producer") == {"weight"}
    assert on(groups[0], "through") == {"bias", "scale"}
    assert on(groups[0], "consumer") == {"layers.0"}
    assert on(groups[1], "through") == {"offset"}


class Nested(nn.Module):
    """Containers in containers, dicts and lists in and out, a reused module, a layer that became Identity."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({"image": conv(3, a), "mask": conv(1, a, bias=False)})
        self.blocks = nn.ModuleList(
            [nn.ModuleList([conv(a, b), nn.BatchNorm2d(b)]), nn.ModuleList([conv(b, a)])]
        )
        self.act, self.fc, self.heads = (
            nn.ReLU(),
            nn.Linear(a, 9),
            nn.ModuleList([nn.Linear(a, 2), nn.Linear(a, 4)]),
        )
        self.fc = nn.Identity()

    def forward(self, images: dict[str, Tensor], scales: list[Tensor]) -> dict[str, Any]:
        x = sum(
            self.stems[name](image) * scale
            for (name, image), scale in zip(images.items(), scales, strict=True)
        )
        for _ in range(2):
            y = x
            for layers in self.blocks:
                for layer in layers:
                    y = layer(y)
                y = self.act(y)
            x = x + y
        x = self.fc(torch.flatten(x.mean([2, 3]), 1))
        return {"all": [head(x) for head in self.heads], "first": self.heads[0](x)}


@few
@given(a=widths, b=widths, seed=seeds)
def test_nested_inputs_outputs_and_containers(a: int, b: int, seed: int) -> None:
    images = {"image": torch.randn(2, 3, 4, 4).double(), "mask": torch.randn(2, 1, 4, 4).double()}
    inputs = {"images": images, "scales": [torch.rand(1).double(), torch.rand(2, 1, 1, 1).double()]}
    expected = {"stems.image": (a, 1), "blocks.0.0": (b, 1)}
    found = check(Nested(a, b), inputs, expected, seed=seed)
    assert on(found["stems.image"], "producer") == {"stems.image", "stems.mask", "blocks.1.0"}
    assert on(found["stems.image"], "consumer") == {"blocks.0.0", "heads.0", "heads.1"}


def zeros_of_sizes(x: Tensor) -> Tensor:
    b, c, h, _ = x.shape
    return torch.cat([x, torch.zeros(b, c, h, 1, dtype=x.dtype, device=x.device)], 3)


def ones_of_shape(x: Tensor) -> Tensor:
    return x + x.new_ones(x.shape) + torch.ones(x.size()[1:], dtype=x.dtype)


def zeros_like(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:, :, :1]), x), 2) + torch.full_like(x[:, :, :1], 2)


def in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x += 1
    x.mul_(2).clamp_(min=0)
    x[:, :, 0] = 0
    return F.relu_(x)


def preallocated(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    out = x.new_empty(b, c, 2 * h, w)
    out[:, :, :h] = x
    out[:, :, h:].copy_(x * 2)
    return out


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 1, 0))[:, :, 1:]


def stacked(x: Tensor) -> Tensor:
    return torch.stack([x, x * 2, x.flip(3)]).sum(0) + torch.stack((x, x), dim=1).amax(1)


def expanded(x: Tensor) -> Tensor:
    return x + x.mean((2, 3), keepdim=True).expand_as(x) + x.amax(3, keepdim=True).repeat(1, 1, 1, x.shape[3])


def looped(x: Tensor) -> Tensor:
    rows = [row * i for i, row in enumerate(x.unbind(2), 1)]
    return torch.stack(rows, 2) + torch.cat([sample.unsqueeze(0) for sample in x])


def swapped(x: Tensor) -> Tensor:
    x = torch.einsum("bchw->bhwc", x)
    return x.reshape(-1, x.shape[-1]).T.reshape(x.size(-1), x.size(0), *x.shape[1:3]).transpose(0, 1)


def numel(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1]).view(
        x.size(0), x.numel() // (x.size(0) * x.size(2) * x.size(3)), -1, x.size(3)
    )


IDIOMS = [
    zeros_of_sizes,
    ones_of_shape,
    zeros_like,
    in_place,
    preallocated,
    padded,
    stacked,
    expanded,
    looped,
    swapped,
    numel,
]


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda f: f.__name__)
@few
@given(width=widths, batch=st.integers(1, 3), side=st.integers(2, 5), seed=seeds)
def test_tensors_made_on_the_way(idiom: Any, width: int, batch: int, side: int, seed: int) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return pooled(net, net.b(idiom(net.a(x))).relu())

    net = Net(forward, a=conv(3, width), b=conv(width, 3), fc=nn.Linear(3, 4))
    check(net, torch.randn(batch, 3, side, side), {"a": (width, 1), "b": (3, 1)}, seed=seed)


@pytest.mark.parametrize("how", ["view", "size", "flatten", "product"])
@few
@given(width=widths, batch=st.integers(1, 3), side=st.integers(2, 3), seed=seeds)
def test_flattened_maps(how: str, width: int, batch: int, side: int, seed: int) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        b, c, h, w = x.shape
        if how == "view":
            return net.fc(x.view(x.size(0), -1))
        if how == "size":
            return net.fc(x.reshape(-1, x.size(1) * h * w))
        return net.fc(x.flatten(1) if how == "flatten" else x.view(b, c * h * w))

    net = Net(forward, a=conv(3, width), fc=nn.Linear(width * side**2, 4))
    found = check(net, torch.randn(batch, 3, side, side), {"a": (width, 1)}, seed=seed)
    assert [m.multiplicity for m in found["a"].consumers] == [side**2]


class Recurrent(nn.Module):
    """A ConvLSTM: its cell makes its own state, as wide as it says."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.gates, self.out = conv(3 + hidden, 4 * hidden), conv(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, steps, _, height, width = x.size()
        h = torch.zeros(b, self.hidden_dim, height, width, dtype=x.dtype, device=x.device)
        c = torch.zeros_like(h)
        for t in range(steps):
            combined = self.gates(torch.cat([x[:, t], h], dim=1))
            i, f, o, g = torch.split(combined, self.hidden_dim, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.out(h)


@few
@given(hidden=widths, seed=seeds)
def test_a_cell_that_makes_its_state(hidden: int, seed: int) -> None:
    found = check(Recurrent(hidden), torch.randn(2, 3, 3, 4, 4), {"gates": (hidden, 1)}, seed=seed)
    assert on(found["gates"], "through") == {"hidden_dim"}
    assert on(found["gates"], "consumer") == {"gates", "out"}


# --- what is not followed -------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Followed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0) * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + x.view(x.size(0), -1).mean(1).view(-1, 1, 1, 1)


def between(function: Any, **layers: nn.Module) -> Net:
    """A network with a function between its layers."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return pooled(net, function(net, net.a(x)))

    return Net(forward, a=conv(3, 6), fc=nn.Linear(6, 4), **layers)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (between(lambda _, x: Doubled.apply(x)), "leaves PyTorch through numpy()"),
        (between(lambda _, x: torch.linalg.svd(x)[2]), "is read by"),
        (between(lambda _, x: torch.fft.fft2(x).real), "is read by"),
        (between(lambda _, x: x.cumsum(1)), "cumsum runs over its channels"),
        (between(lambda _, x: torch.tensor(x.tolist()).double()), "leaves PyTorch through tolist()"),
        (between(lambda _, x: torch.sort(x, 1).values), "runs over its channels"),
        (between(lambda _, x: from_dlpack(to_dlpack(x))), "nothing that is followed reads it"),
    ],
    ids=["numpy", "svd", "fft", "cumsum", "lists", "sort", "dlpack"],
)
def test_what_is_not_followed_is_not_cut(net: Net, reason: str) -> None:
    groups = find_channel_groups(randomised(net), torch.randn(2, 3, 4, 4).double(), verify=False)
    assert all(g.frozen and reason in g.frozen for g in groups)
    assert find_channel_groups(net, torch.randn(2, 3, 4, 4).double()) == groups


def test_a_function_of_ones_own_is_followed() -> None:
    check(between(lambda _, x: Followed.apply(x)), torch.randn(2, 3, 4, 4), {"a": (6, 1)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_module() -> None:
    """Nothing changes inside of it, the rest of the network can narrow."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return pooled(net, net.b(net.script(net.a(x))))

    net = Net(forward, a=conv(3, 6), script=torch.jit.script(Scripted()), b=conv(6, 5), fc=nn.Linear(5, 4))
    x = torch.randn(2, 3, 4, 4).double()
    groups = find_channel_groups(randomised(net), x)
    assert {g.name: g.frozen for g in groups} == {"a": "is read by 'script', which is scripted", "b": None}
    small = shrink(net, groups, {"b": 3}, random_order(groups))
    assert small(x).shape == (2, 4)


# --- handlers -------------------------------------------------------------------------------------------


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers goes with it."""
    monkeypatch.setattr(tracing, "_HANDLERS", dict(tracing._HANDLERS))


class Kernel(torch.autograd.Function):
    """Something that no operator shows: x * scale and x @ weight.T in numpy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        a, b = x.detach().numpy(), weight.detach().numpy()
        return torch.from_numpy(a @ b.T if b.ndim == 2 else a * b[:, None, None])


class PerChannelScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_channels = channels
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.num_channels
        return Kernel.apply(x, self.scale)


class Dense(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        assert x.shape[-1] == self.in_features
        assert self.weight.shape[0] == self.out_features
        return torch.from_numpy(Kernel.apply(x, self.weight).numpy() + self.bias.detach().numpy())


def scale_handler(module: PerChannelScale, inputs: Any, output: Tensor, channels: Channels) -> None:
    channels.tie((inputs[0], 1), (module.scale, 0))
    channels.carry((inputs[0], 1), (output, 1))
    channels.resize(module, "num_channels", (output, 1))


def dense_handler(module: Dense, inputs: Any, output: Tensor, channels: Channels) -> None:
    channels.read((inputs[0], -1), (module.weight, 1))
    channels.write((module.weight, 0), (output, -1))
    channels.tie((module.weight, 0), (module.bias, 0))
    channels.resize(module, "in_features", (module.weight, 1))
    channels.resize(module, "out_features", (module.weight, 0))


@pytest.mark.usefixtures("handlers")
@few
@given(width=widths, seed=seeds)
def test_a_handler_of_a_scale(width: int, seed: int) -> None:
    net = between(lambda net, x: net.scale(x), scale=PerChannelScale(6))
    x = torch.randn(2, 3, 4, 4)
    register(PerChannelScale)(scale_handler)
    found = check(net, x, {"a": (6, 1)}, seed=seed)
    assert on(found["a"], "through") == {"scale.scale", "scale.num_channels"}
    assert shrink(net, found.values(), {"a": 2}).scale.num_channels == 2


def dense_network(kind: type[Dense], width: int, middle: int, named: bool = False) -> Net:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.a(x).mean((2, 3))
        return net.last((net.first(extra=None, x=x) if named else net.first(x)).relu())

    return Net(forward, a=conv(3, width), first=kind(width, middle), last=kind(middle, 4))


@pytest.mark.usefixtures("handlers")
@few
@given(width=widths, middle=widths, named=st.booleans(), seed=seeds)
def test_a_handler_of_a_dense_layer(width: int, middle: int, named: bool, seed: int) -> None:
    """Named inputs come in the order of the signature."""
    register(Dense)(dense_handler)
    net = dense_network(Dense, width, middle, named)
    found = check(net, torch.randn(2, 3, 4, 4), {"a": (width, 1), "first": (middle, 1)}, seed=seed)
    assert on(found["a"], "consumer") == {"first.weight"}
    assert on(found["first"], "producer") == {"first.weight"}
    assert on(found["first"], "consumer") == {"last.weight"}
    assert on(found["first"], "through") == {"first.bias", "first.out_features", "last.in_features"}


class Narrow(Dense):
    pass


@pytest.mark.usefixtures("handlers")
def test_a_handler_that_freezes_and_subclasses() -> None:
    """The handler of the nearest type is called."""
    x = torch.randn(2, 3, 4, 4)
    register(Dense)(dense_handler)
    check(dense_network(Narrow, 4, 5), x, {"a": (4, 1), "first": (5, 1)})

    @register(Narrow)
    def freeze(module: Narrow, inputs: Any, output: Tensor, channels: Channels) -> None:
        channels.freeze((inputs[0], -1), "the kernel is made for this size")

    net = dense_network(Dense, 4, 5)
    net.first = Narrow(4, 5)
    check(net, x, {"a": "the kernel is made for this size"})


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (
            lambda module, inputs, output, channels: {}["key"],
            "the handler of 'first' (Dense) fails: KeyError",
        ),
        (
            lambda module, inputs, output, channels: channels.tie((inputs[0], 1), (module.bias, 0)),
            "channels are paired on dimensions of 4 and 5 entries",
        ),
        (
            lambda module, inputs, output, channels: channels.carry((inputs[0], 1), (output, 1)),
            "4 channels do not fit a dimension of 5 entries",
        ),
    ],
)
def test_errors_in_a_handler_name_the_module(handler: Any, message: str) -> None:
    register(Dense)(handler)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)) as caught:
        find_channel_groups(dense_network(Dense, 4, 5).double(), torch.randn(2, 3, 4, 4).double())
    assert "the handler of 'first' (Dense) fails" in str(caught.value)
