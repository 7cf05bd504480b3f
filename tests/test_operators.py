"""What operators tie: one small network for each rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, conv, head
from torch import Tensor, nn

from nni_dbs import FlopsCost
from nni_dbs.cost import count_flops
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import find_channel_groups, operators, shrink


def found(net: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """Group name -> (size, step); every group can be cut, and verification agrees."""
    groups = find_channel_groups(net, x)
    assert [g.frozen for g in groups] == [None] * len(groups)
    assert groups == find_channel_groups(net, x, verify=False)
    assert len({g.name for g in groups}) == len(groups)
    return {g.name: (g.size, g.step) for g in groups}


def test_parameters_of_one_module_are_told_apart() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, F.conv2d(F.conv2d(x, net.first).relu(), net.second).relu())

    first, second = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(4, 4, 1, 1))
    net = Net(forward, first=first, second=second, fc=nn.Linear(4, 5))
    assert found(net, torch.randn(1, 3, 8, 8)) == {"first": (4, 1), "second": (4, 1)}


def test_one_filter_for_each_group_is_not_depthwise() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.g(net.a(x).relu()))

    net = Net(forward, a=conv(3, 8), g=conv(8, 2, groups=2), fc=nn.Linear(2, 5))
    groups = {g.name: g for g in find_channel_groups(net, torch.randn(1, 3, 8, 8))}
    assert (groups["a"].size, groups["a"].step, groups["a"].frozen) == (8, 2, None)
    assert groups["g"].frozen == "its 2 channels can only be cut together"


def test_an_attribute_ties_what_it_counts() -> None:
    """Queries, keys and values are reshaped by one attribute; values would be free otherwise."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = 3
            self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                layer(x).view(*x.shape[:2], -1, self.size).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    net = nn.Sequential(Attention(), nn.Linear(6, 5))
    assert found(net, torch.randn(2, 7, 4)) == {"0.q": (6, 2)}


def test_a_shuffle_by_hand() -> None:
    """Shuffled channels are as many as before, whichever are cut: that ties nothing."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).relu()
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return head(net, net.g(x))

    net = Net(forward, a=conv(3, 8), g=conv(8, 6, groups=2), fc=nn.Linear(6, 5))
    assert found(net, torch.randn(1, 3, 8, 8)) == {"a": (8, 4), "g": (6, 2)}


def test_the_operator_shuffles_parts_that_keep_the_same_positions() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.g(torch.channel_shuffle(net.a(x).relu(), 2)))

    net = Net(forward, a=conv(3, 8), g=conv(8, 6, groups=2), fc=nn.Linear(6, 5))
    assert found(net, torch.randn(1, 3, 8, 8)) == {"a": (8, 4), "g": (6, 2)}


def test_pixel_shuffle_ties_the_channels_of_a_place() -> None:
    """Also where nothing else asks for it: a mean over all places would take any channels."""
    net = Net(lambda net, x: head(net, F.pixel_shuffle(net.a(x), 2)), a=conv(3, 16), fc=nn.Linear(4, 5))
    assert found(net, torch.randn(1, 3, 8, 8)) == {"a": (4, 1)}


def test_rolled_channels_stay() -> None:
    def rolled(dim: int) -> str | None:
        net = Net(lambda net, x: head(net, net.a(x).relu().roll(1, dim)), a=conv(3, 4), fc=nn.Linear(4, 5))
        return find_channel_groups(net, torch.randn(1, 3, 8, 8), verify=False)[0].frozen

    assert rolled(2) is None
    assert rolled(1) == "is moved by a fixed distance"


class InParts(nn.Module):
    """As many parts as each of them has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.parts, self.b = nn.Conv2d(3, 4, 1), 2, nn.Conv2d(2, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.a(x).chunk(self.parts, 1)
        return self.b(u) + self.b(v)


def test_the_number_of_parts_is_not_their_size() -> None:
    (group,) = find_channel_groups(InParts(), torch.zeros(1, 3, 4, 4), verify=False)
    assert group.frozen is None
    assert not any(m.attribute for m in group.members)


class ReadTwice(nn.Module):
    """One integer of the model, read by the model itself and by a child that has no integer of its own."""

    class Child(nn.Module):
        def forward(self, x: Tensor, outer: list[nn.Module]) -> Tensor:
            return x.view(len(x), outer[0].width, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.width, self.b = nn.Conv2d(3, 8, 1), 8, nn.Conv2d(8, 5, 1)
        self.child = self.Child()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.child(x.view(len(x), self.width, 16), [self])
        return self.b(x)


def test_an_integer_that_two_modules_read_is_set_around_both() -> None:
    net, x = ReadTwice(), torch.randn(2, 3, 4, 4)
    groups = find_channel_groups(net, x)
    assert {g.name: g.frozen for g in groups} == {"a": None}
    small = shrink(net, groups, {"a": 3})
    assert small.width == 3
    supernet = Supernet(net, groups)
    with supernet.at({"a": 3}):
        torch.testing.assert_close(net(x), small(x))


def test_an_embedding_computes_channels() -> None:
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3))
    tokens = torch.arange(6).reshape(2, 3)
    (group,) = find_channel_groups(net, tokens)
    assert (group.name, group.size, group.frozen) == ("0", 8, None)
    small = shrink(net, [group], {"0": 3})
    assert small[0].embedding_dim == small[1].in_features == 3
    assert small(tokens).shape == (2, 3, 3)


class Filled(nn.Module):
    """An output that is made empty and filled image by image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, whole = self.b(self.a(x)), torch.zeros(len(x), 5, 6, 6)
        for image, place in zip(y, whole, strict=True):
            place[:, :4, :4].copy_(image)
        return whole


def test_what_is_written_into_a_part_is_in_the_whole() -> None:
    groups = find_channel_groups(Filled(), torch.randn(2, 3, 4, 4))
    assert [g.name for g in groups if g.frozen is None] == ["a"]


def test_a_use_that_a_rule_does_not_know_freezes_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("new argument")

    monkeypatch.setitem(operators.RULES, "aten.relu", broken)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 2, 1))
    groups = find_channel_groups(net, torch.zeros(1, 3, 4, 4))
    assert [g.frozen for g in groups] == [
        "is read by aten.relu, which is not followed here (KeyError: 'new argument')",
        None,
    ]


class WithLazyHooks(nn.Module):
    """Registers a hook when it first runs, as Transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.hooked = conv(3, 8), conv(8, 5), False
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.a.register_forward_hook(lambda module, inputs, out: self.kept.append(out))
            self.hooked = True
        self.kept.clear()
        y = self.b(self.a(x))
        return y + self.kept[0].mean()


def test_hooks_of_the_forward_pass_stay() -> None:
    net, x = WithLazyHooks(), torch.randn(1, 3, 8, 8)
    find_channel_groups(net, x, verify=False)
    net(x)


class Mixer(nn.Module):
    """A layer that runs along the tokens has one output for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tokens, self.fc = nn.Conv2d(3, 12, 4, 4), nn.Linear(4, 4), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        return self.fc((x + self.tokens(x)).mean(2))


def test_layers_along_tokens_run_for_each_channel() -> None:
    groups = {g.name: g.frozen for g in find_channel_groups(Mixer(), torch.randn(1, 3, 8, 8))}
    assert groups["stem"] is None


class Parts(nn.Module):
    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.dim, self.a, self.fc = dim, nn.Linear(4, 3 * dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x).split(self.dim, dim=-1)
        return self.fc(q * k) + self.fc(v)


def test_parts_of_an_attributes_size_are_alike() -> None:
    net, x = Parts(), torch.randn(2, 4)
    assert found(net, x) == {"a": (6, 1)}


class Unshared(Parts):
    def __init__(self, dim: int = 6) -> None:
        super().__init__(dim)
        self.others = nn.ModuleList(nn.Linear(dim, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.a(x).split(self.dim, dim=-1)
        return self.fc(q) + self.others[0](k) + self.others[1](v)


def test_parts_of_an_attributes_size_are_cut_together() -> None:
    assert found(Unshared(), torch.randn(2, 4)) == {"a": (6, 1)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.fc = nn.Linear(4, 6), nn.LSTM(6, 7, batch_first=True), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.a(x))[0])


def test_products_that_are_not_counted_cost_nothing() -> None:
    net, x = Recurrent().double(), torch.randn(2, 3, 4).double()
    groups = find_channel_groups(net, x)
    assert FlopsCost(net, x, groups)({"a": 2}) == count_flops(shrink(net, groups, {"a": 2}), x)


class Experts(nn.Module):
    """Experts run on the rows that are sent to them: on none, with this input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(4, 8), nn.Linear(8, 5)
        self.experts = nn.ModuleList(nn.Linear(8, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        out = self.fc(x)
        for i, expert in enumerate(self.experts):
            rows = (torch.zeros(len(x)) == i).nonzero()[:, 0]
            out[rows] = out[rows] + expert(x[rows])
        return out + self.experts[1](x[x.new_zeros(len(x)) > 1]).sum()


def test_experts_without_rows_read_channels() -> None:
    assert found(Experts(), torch.randn(2, 4)) == {"a": (8, 1)}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_weights_that_hooks_compute_stay(norm: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), norm(nn.Linear(8, 6)), nn.Linear(6, 6), nn.Linear(6, 5))
    groups = {g.name: g.frozen for g in find_channel_groups(net, torch.randn(2, 4), verify=False)}
    assert groups["0"] == "'1' is parametrized" and groups["1"] is not None and groups["2"] is None


def test_layers_along_tokens_cost_by_channels() -> None:
    net, x = Mixer(), torch.randn(1, 3, 8, 8)
    groups = find_channel_groups(net, x)
    assert FlopsCost(net, x, groups)({"stem": 7}) == count_flops(shrink(net, groups, {"stem": 7}), x)


class SharedKeys(nn.Module):
    """Attention whose heads share keys and values by twos."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, n) for n in (16, 8, 8, 5))
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, heads in ((self.q, 4), (self.k, 2), (self.v, 2))
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def test_heads_that_share_keys() -> None:
    assert {name: size for name, (size, _) in found(SharedKeys(), torch.randn(2, 3, 4)).items()}.keys() == {
        "q",
        "v",
    }


class OwnNorm(nn.Module):
    """As in ConvNeXt's own code: a LayerNorm whose shape is a tuple, and a split by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(4, 5)
        self.normalized_shape, self.parts = (8,), [4, 2]
        self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(self.a(x), self.normalized_shape, self.weight, self.bias, 1e-6)
        u, v = self.b(x).split(self.parts, -1)
        return self.c(u) * v.mean()


def test_integers_in_tuples_and_lists_follow() -> None:
    net, x = OwnNorm(), torch.randn(2, 3)
    groups = find_channel_groups(net, x)
    assert {g.name: g.frozen for g in groups if g.consumers} == {"a": None, "b[0:4]": None}
    widths = {"a": 3, "b[0:4]": 1}
    small = shrink(net, groups, widths)
    assert (small.normalized_shape, small.parts[0]) == ((3,), 1)
    assert (net.normalized_shape, net.parts) == ((8,), [4, 2])
    assert type(net.normalized_shape[0]) is int
    with Supernet(net, groups).at(widths):
        torch.testing.assert_close(net(x), small(x))


def test_a_parametrized_grouped_convolution_stays() -> None:
    grouped = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=2))
    net = nn.Sequential(nn.Conv1d(3, 8, 1), grouped, nn.Conv1d(8, 5, 1), nn.Conv1d(5, 2, 1))
    x = torch.randn(2, 3, 6)
    groups = find_channel_groups(net, x)
    assert {g.name: g.frozen is None for g in groups}["2"]
    small = shrink(net, groups, {"2": 3})
    with Supernet(net, groups).at({"2": 3}):
        torch.testing.assert_close(net(x), small(x))


class WithUnusedLayer(nn.Module):
    """A layer that no pass runs lets the model be followed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x + self.attention(x, x, x)[0])


def test_products_count_once_in_a_model_that_is_followed_twice() -> None:
    net, x = WithUnusedLayer(), torch.randn(1, 6, 5)
    groups = find_channel_groups(net, x)
    (name,) = (g.name for g in groups if g.frozen is None)
    cost = FlopsCost(net, x, groups)
    for width in (2, 4, 8):
        assert cost({name: width}) == count_flops(shrink(net, groups, {name: width}), x)
