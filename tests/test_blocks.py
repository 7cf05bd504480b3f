"""Width 0 removes a residual block: found, counted, sliced, cut, trained and saved as the identity."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_outputs, conv, count_parameters, head, random_order, random_widths, randomised
from torch import Tensor, nn
from torchvision.models import get_model

from examples.cifar_resnet import CifarResNet
from nni_dbs import Budget, FlopsCost, ParamsCost, Slimmable, Supernet, UniformPruner, WidthSpace, load_pruned
from nni_dbs.cost import PolynomialCost, count_flops, weighted_sum, width_costs
from nni_dbs.errors import ResultError
from nni_dbs.plot import plot_cost, plot_widths
from nni_dbs.projection import leaves_room, project, project_batch
from nni_dbs.result import load_groups, load_widths, save_pruned
from nni_dbs.space import Widths
from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    check_widths,
    find_channel_groups,
    find_residual_blocks,
    prefix_order,
    removed_blocks,
    shrink,
)


class Residual(nn.Module):
    """`after(x + scale * branch(x))`, where the branch squeezes to `hidden` channels."""

    def __init__(
        self, channels: int, hidden: int, after: Callable[[Tensor], Tensor] = torch.relu, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.a, self.norm_a = conv(channels, hidden), nn.BatchNorm2d(hidden)
        self.b, self.norm_b = conv(hidden, channels), nn.BatchNorm2d(channels)
        self.after, self.scale = after, scale

    def branch(self, x: Tensor) -> Tensor:
        return self.norm_b(self.b(self.norm_a(self.a(x)).relu()))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.scale * x + self.branch(x))


class Bottleneck(nn.Module):
    """Three groups of its own: two of a grouped convolution, one of a squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(channels, 8, 1), conv(8, 8, groups=2), conv(8, channels, 1)
        self.down, self.up = conv(8, 3, 1), conv(3, 8, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        y = y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return (x + self.norm(self.c(y))).relu()


class Next(nn.Module):
    """ConvNeXt's block: a depthwise convolution, a norm and a scale on the residual stream's channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = conv(channels, channels, 5, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 10), nn.Linear(10, channels)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.gamma * self.narrow(self.wide(y).relu()).permute(0, 3, 1, 2)


class Doubled(Residual):
    """Its first layer reads and computes channels of the residual stream."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(channels, hidden)
        self.first = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return (x + self.branch(y + x) * 0.5 + y).relu()


class Stacked(nn.Module):
    """Stem, elements of an `nn.Sequential`, classifier."""

    def __init__(self, *elements: nn.Module, channels: int = 6, start: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, channels), nn.ReLU() if start is None else start)
        self.body = nn.Sequential(*elements)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return head(self, self.body(self.stem(x)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "cifar": lambda: CifarResNet(20, widths=(4, 6, 8)),
    "residual": lambda: Stacked(Residual(6, 4), nn.BatchNorm2d(6), nn.ReLU(), Residual(6, 5)),
    "bottleneck": lambda: Stacked(Bottleneck(6), Bottleneck(6)),
    "next": lambda: Stacked(Next(6), Next(6), start=nn.Identity()),
    "doubled": lambda: Stacked(Doubled(6, 4), Residual(6, 5)),
    **{
        name: functools.partial(get_model, name, weights=None)
        for name in ("resnet18", "resnet50", "mobilenet_v2")
    },
}
SMALL = ("cifar", "residual", "bottleneck", "next", "doubled")
IMAGE = torch.zeros(1, 3, 32, 32)


@functools.cache
def made(name: str) -> tuple[nn.Module, tuple[ChannelGroup, ...]]:
    torch.manual_seed(0)
    model = NETS[name]()
    return model, find_residual_blocks(model, find_channel_groups(model, IMAGE, verify=False), IMAGE)


@functools.cache
def costs(name: str) -> tuple[FlopsCost, ParamsCost]:
    model, groups = made(name)
    return FlopsCost(model, IMAGE, groups), ParamsCost(model, groups)


def blocks_of(groups: Iterable[ChannelGroup]) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for g in groups:
        if g.block is not None:
            blocks.setdefault(g.block, []).append(g.name)
    return blocks


def found_in(model: nn.Module, image: Tensor = IMAGE) -> dict[str, list[str]]:
    return blocks_of(find_residual_blocks(model, find_channel_groups(model, image, verify=False), image))


def random_depth(groups: Iterable[ChannelGroup], seed: int = 0) -> dict[str, int]:
    """Random widths without a random half of the blocks, at least one of them."""
    groups = tuple(groups)
    widths, blocks = random_widths(groups, seed), blocks_of(groups)
    gone = np.random.default_rng(seed).choice(list(blocks), max(len(blocks) // 2, 1), replace=False)
    return {**widths, **{name: 0 for block in gone for name in blocks[block]}}


class TestFinding:
    def test_resnet18(self) -> None:
        names = ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
        assert blocks_of(made("resnet18")[1]) == {name: [f"{name}.conv1"] for name in names}

    def test_resnet50(self) -> None:
        depths = {1: 3, 2: 4, 3: 6, 4: 3}
        names = [f"layer{stage}.{i}" for stage, depth in depths.items() for i in range(1, depth)]
        assert blocks_of(made("resnet50")[1]) == {n: [f"{n}.conv1", f"{n}.conv2"] for n in names}

    def test_mobilenet_v2(self) -> None:
        names = [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]
        assert blocks_of(made("mobilenet_v2")[1]) == {name: [f"{name}.conv.0.0"] for name in names}

    def test_small_networks(self) -> None:
        names = [f"stage{s}.{i}" for s in (1, 2, 3) for i in range(s > 1, 3)]
        assert blocks_of(made("cifar")[1]) == {name: [f"{name}.conv1"] for name in names}
        assert blocks_of(made("residual")[1]) == {"body.0": ["body.0.a"], "body.3": ["body.3.a"]}
        assert blocks_of(made("bottleneck")[1]) == {
            f"body.{i}": [f"body.{i}.a", f"body.{i}.b", f"body.{i}.down"] for i in (0, 1)
        }
        assert blocks_of(made("next")[1]) == {f"body.{i}": [f"body.{i}.wide"] for i in (0, 1)}
        assert blocks_of(made("doubled")[1]) == {"body.0": ["body.0.a"], "body.1": ["body.1.a"]}

    def test_only_the_innermost_blocks_count(self) -> None:
        stages = [nn.Sequential(Residual(6, 4), Residual(6, 4)), nn.Sequential(Residual(6, 4))]
        assert list(found_in(Stacked(*stages))) == ["body.0.0", "body.0.1", "body.1.0"]

    def test_a_block_around_a_block_is_none(self) -> None:
        class Around(Residual):
            def __init__(self) -> None:
                super().__init__(6, 4)
                self.inside = nn.Sequential(Residual(4, 3))

            def branch(self, x: Tensor) -> Tensor:
                return self.norm_b(self.b(self.inside(self.norm_a(self.a(x)).relu())))

        assert found_in(Stacked(Around())) == {"body.0.inside.0": ["body.0.inside.0.a"]}

    @pytest.mark.parametrize("name", ["vgg11_bn", "squeezenet1_1"])
    def test_networks_without_blocks_keep_their_groups(self, name: str) -> None:
        model, image = get_model(name, weights=None), torch.zeros(1, 3, 64, 64)
        groups = find_channel_groups(model, image, verify=False)
        assert find_residual_blocks(model, groups, image) == groups

    @pytest.mark.parametrize(
        "element",
        [
            pytest.param(lambda: nn.Sequential(conv(6, 4), conv(4, 6)), id="no residual"),
            pytest.param(lambda: Residual(6, 4, scale=0.5), id="scaled stream"),
            pytest.param(lambda: Residual(6, 4, after=torch.sigmoid), id="changed stream"),
            pytest.param(lambda: Residual(6, 4, after=lambda x: x[:, :, ::2]), id="other shape"),
            pytest.param(lambda: nn.Sequential(nn.ReLU(), conv(6, 6)), id="no group of its own"),
        ],
    )
    def test_what_is_no_block(self, element: Callable[[], nn.Module]) -> None:
        assert found_in(Stacked(element())) == {}

    def test_activations_behind_a_block_need_a_stream_that_they_leave_alone(self) -> None:
        assert list(found_in(Stacked(Residual(6, 4)))) == ["body.0"]
        assert found_in(Stacked(Residual(6, 4), start=nn.Identity())) == {}  # negative values enter

    def test_layers_that_are_to_keep_their_channels_are_not_removed(self) -> None:
        model = NETS["bottleneck"]()
        groups = find_channel_groups(model, IMAGE, ignore=["body.1.b"], verify=False)
        assert list(blocks_of(find_residual_blocks(model, groups, IMAGE))) == ["body.0"]

    def test_a_block_maps_one_tensor_to_one(self) -> None:
        class Pair(Residual):
            def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
                return (super().forward(x),)

        class First(nn.Module):
            def forward(self, xs: tuple[Tensor]) -> Tensor:
                return xs[0]

        assert found_in(Stacked(Pair(6, 4), First())) == {}

    def test_a_dead_stream_proves_nothing(self) -> None:
        model = Stacked(nn.Sequential(conv(6, 4), nn.ReLU(), conv(4, 6)))
        groups = find_channel_groups(model, IMAGE, verify=False)
        nn.init.constant_(model.stem[0].bias, -100)
        assert find_residual_blocks(model, groups, IMAGE) == groups

    def test_a_block_that_runs_twice_is_none(self) -> None:
        class Twice(Stacked):
            def forward(self, x: Tensor) -> Tensor:
                return head(self, self.body(self.body(self.stem(x))))

        assert found_in(Twice(Residual(6, 4))) == {}

    def test_blocks_that_share_a_layer_or_a_parameter_are_none(self) -> None:
        first, second, third = Residual(6, 4), Residual(6, 4), Residual(6, 4)
        second.norm_a = first.norm_a
        assert list(found_in(Stacked(first, second, third))) == ["body.2"]
        third.norm_a.weight = first.norm_a.weight
        assert found_in(Stacked(first, second, third)) == {}

    def test_a_block_is_an_element_of_a_sequential(self) -> None:
        class Single(Stacked):
            def __init__(self) -> None:
                super().__init__()
                self.body = Residual(6, 4)

        assert found_in(Single()) == {}

    def test_the_model_comes_back_as_it_was(self) -> None:
        model = NETS["residual"]().train()
        model.body[0].eval()
        model.body[0].a.weight.requires_grad_(False)
        before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        groups = find_channel_groups(model, IMAGE, verify=False)
        state = torch.get_rng_state()
        assert find_residual_blocks(model, groups, IMAGE) == find_residual_blocks(model, groups, IMAGE)
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules()] == modes
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["body.0.a.weight"]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_groups_survive_json_with_their_block_and_old_ones_without(self) -> None:
        for g in made("residual")[1]:
            data = json.loads(json.dumps(g.to_dict()))
            assert ChannelGroup.from_dict(data) == g
            del data["block"]
            assert ChannelGroup.from_dict(data).block is None


class TestWidths:
    def test_a_block_goes_as_a_whole(self) -> None:
        groups = made("bottleneck")[1]
        gone = {f"body.1.{name}": 0 for name in ("a", "b", "down")}
        check_widths(groups, gone)
        assert removed_blocks(groups, gone) == ("body.1",)
        assert removed_blocks(groups, {}) == ()
        with pytest.raises(WidthError, match=r"'body.1.a' has width 0, but 'body.1.b' has 4; give both 0"):
            check_widths(groups, {**gone, "body.1.b": 4})
        with pytest.raises(WidthError, match=r"'body.1.b' has width 0, but 'body.1.a' has 8"):
            check_widths(groups, {"body.1.b": 0, "body.1.down": 0})

    def test_only_groups_of_a_block_can_have_width_0(self) -> None:
        model, groups = made("residual")
        with pytest.raises(WidthError, match=r"'stem.0' cannot have 0 channels"):
            shrink(model, groups, {"stem.0": 0})
        plain = find_channel_groups(model, IMAGE, verify=False)
        with pytest.raises(WidthError, match=r"'body.0.a' cannot have 0 channels"):
            shrink(model, plain, {"body.0.a": 0})

    @pytest.mark.parametrize("wrong", [-1, False, 0.0])
    def test_what_is_no_width(self, wrong: object) -> None:
        with pytest.raises(WidthError):
            check_widths(made("residual")[1], {"body.0.a": wrong})  # type: ignore[dict-item]

    def test_removed_blocks_come_in_the_order_of_the_groups(self) -> None:
        groups = made("cifar")[1]
        assert removed_blocks(groups, {"stage3.1.conv1": 0, "stage1.2.conv1": 0}) == ("stage1.2", "stage3.1")


def silenced(model: nn.Module, groups: Iterable[ChannelGroup], widths: dict[str, int]) -> nn.Module:
    """The full model in which what removed blocks add to the stream is multiplied by zero."""
    groups = tuple(groups)
    full = copy.deepcopy(model)
    for block in removed_blocks(groups, widths):
        for layer in ("b", "norm_b", "c", "norm", "narrow", "bn2", "bn3", "conv.2", "conv.3", "first"):
            module = dict(full.named_modules()).get(f"{block}.{layer}")
            for parameter in () if module is None else module.parameters():
                nn.init.zeros_(parameter)
    return full


class TestCutting:
    @pytest.mark.parametrize("name", [*SMALL, "resnet18", "resnet50", "mobilenet_v2"])
    def test_a_removed_block_adds_nothing(self, name: str) -> None:
        """What is not removed is full here: the network is the original one with silent branches."""
        model, groups = made(name)
        model = randomised(copy.deepcopy(model))
        widths = {n: w for n, w in random_depth(groups).items() if w == 0}
        x = torch.randn(2, *IMAGE.shape[1:], dtype=torch.float64)
        assert_same_outputs(shrink(model, groups, widths), silenced(model, groups, widths), x)

    def test_the_block_becomes_the_identity(self) -> None:
        model, groups = made("residual")
        model = copy.deepcopy(model).train()
        model.body[0].eval()
        before = copy.deepcopy(model)
        small = shrink(model, groups, {"body.0.a": 0, "body.3.a": 0, "stem.0": 3})
        assert [type(m) for m in small.body] == [nn.Identity, nn.BatchNorm2d, nn.ReLU, nn.Identity]
        assert [m.training for m in small.body] == [False, True, True, True]
        assert small.stem[0].out_channels == 3
        assert [n for n, _ in small.named_modules()][-3:] == ["body.2", "body.3", "fc"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before.state_dict()[name])
        assert type(model.body[0]) is Residual

    def test_nothing_inside_a_removed_block_is_copied(self) -> None:
        class Uncopied(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x

            def __deepcopy__(self, memo: dict) -> Uncopied:
                raise AssertionError("copied")

        model, groups = copy.deepcopy(made("residual")[0]), made("residual")[1]
        model.body[0].a.extra = Uncopied()
        shrink(model, groups, {"body.0.a": 0})
        with pytest.raises(AssertionError, match="copied"):
            shrink(model, groups, {"body.3.a": 0})

    def test_groups_of_another_model_are_refused(self) -> None:
        other = Stacked(Residual(6, 4))
        with pytest.raises(WidthError, match=r"no layer 'body\.3"):
            shrink(other, made("residual")[1], {"body.3.a": 0})


def assert_costs_exact(model: nn.Module, name: str, seed: int) -> None:
    groups = made(name)[1]
    widths = random_depth(groups, seed)
    small = shrink(model, groups, widths, prefix_order(groups))
    flops, params = costs(name)
    assert flops(widths) == count_flops(small, IMAGE)
    assert params(widths) == count_parameters(small)


class TestCost:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("name", [*SMALL, "resnet18", "resnet50", "mobilenet_v2"])
    def test_costs_are_those_of_the_cut_model(self, name: str, seed: int) -> None:
        assert_costs_exact(made(name)[0], name, seed)

    @pytest.mark.parametrize("name", [*SMALL, "resnet50", "mobilenet_v2"])
    def test_batches_equal_single_costs(self, name: str) -> None:
        groups = made(name)[1]
        networks = [random_depth(groups, seed) for seed in range(10)] + [random_widths(groups, 0), {}]
        encoded = torch.stack([WidthSpace(groups).encode(widths) for widths in networks])
        for cost in costs(name):
            mixed = weighted_sum([cost, costs(name)[0]], [3, 2], 7)
            for c in (cost, mixed):
                assert c.batch(encoded).tolist() == [c(widths) for widths in networks]
                assert c.batch(encoded[-2:]).tolist() == [c(widths) for widths in networks[-2:]]

    def test_removed_layers_cost_nothing(self) -> None:
        groups = made("next")[1]
        widths = {"body.0.wide": 0}
        for cost in costs("next"):
            full, shares = cost.by_layer({}), cost.by_layer(widths)
            assert list(shares) == list(full)
            for layer, share in shares.items():
                assert share == (0 if layer.split(".")[:2] == ["body", "0"] else full[layer])
            for layer, alone in cost.layers().items():
                assert alone(widths) == shares[layer]
                assert alone.batch(WidthSpace(groups).encode(widths)[None]).item() == shares[layer]
        assert width_costs(groups)["body.0.wide"](widths) == 0
        assert width_costs(groups)["stem.0"](widths) == 6

    def test_gradient_of_batches_follows_the_cut_network(self) -> None:
        """With a block gone, the slope of the stream's width is that of what is left."""
        groups = made("doubled")[1]
        space = WidthSpace(groups)
        for cost in costs("doubled"):
            x = space.encode({"body.0.a": 0, "stem.0": 4})[None].requires_grad_()
            (slope,) = torch.autograd.grad(cost.batch(x).sum(), x)
            stream, gone = space.names.index("stem.0"), space.names.index("body.0.a")
            step = torch.eye(len(groups), dtype=torch.float64)[stream]
            difference = (cost.batch(x + step) - cost.batch(x - step)) / 2
            assert slope[0, stream].item() == difference.item()
            assert x[0, gone] == 0

    def test_products_in_a_block_go_with_it(self) -> None:
        class Products(Residual):
            def __init__(self) -> None:
                super().__init__(6, 4)
                self.register_buffer("matrix", torch.randn(5, 5))

            def branch(self, x: Tensor) -> Tensor:
                return super().branch(x) * (self.matrix @ self.matrix).mean()

        model = Stacked(Products(), Products())
        groups = find_residual_blocks(model, find_channel_groups(model, IMAGE), IMAGE)
        assert list(blocks_of(groups)) == ["body.0", "body.1"]
        cost = FlopsCost(model, IMAGE, groups)
        for widths in ({}, {"body.1.a": 0}, {"body.0.a": 0, "body.1.a": 0, "stem.0": 4}):
            assert cost(widths) == count_flops(shrink(model, groups, widths), IMAGE)
            assert cost.batch(WidthSpace(groups).encode(widths)[None]).item() == cost(widths)
        assert cost.by_layer({})["body.0"] == 125
        assert cost.by_layer({"body.0.a": 0})["body.0"] == 0

    def test_products_that_depend_on_widths_go_with_their_block(self) -> None:
        class Products(Residual):
            def branch(self, x: Tensor) -> Tensor:
                return super().branch(x) @ torch.ones(x.shape[-1], x.shape[-1])

        model = Stacked(Products(6, 4))
        groups = find_residual_blocks(model, find_channel_groups(model, IMAGE), IMAGE)
        assert list(blocks_of(groups)) == ["body.0"]
        cost = FlopsCost(model, IMAGE, groups)
        for widths in ({}, {"stem.0": 3, "body.0.a": 2}, {"body.0.a": 0, "stem.0": 4}):
            assert cost(widths) == count_flops(shrink(model, groups, widths), IMAGE)


class TestExpectedCost:
    """Random widths and, independently, random depth."""

    def enumerated(self, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor], list[float]]:
        """Mean, variance, presence, and the expectations of both costs, network by network."""
        groups = made(name)[1]
        choices = [(g.step, g.size) for g in groups]
        rng = np.random.default_rng(0)
        chances = [(p, 1 - p) for p in rng.uniform(0.2, 0.8, len(groups))]
        there = {block: float(p) for block, p in zip(blocks_of(groups), rng.uniform(size=9), strict=False)}
        totals = [0.0, 0.0]
        for picks in itertools.product((0, 1), repeat=len(groups)):
            for kept in itertools.product((False, True), repeat=len(there)):
                present = dict(zip(there, kept, strict=True))
                chance = math.prod(p[i] for p, i in zip(chances, picks, strict=True))
                chance *= math.prod(p if present[b] else 1 - p for b, p in there.items())
                widths = {
                    g.name: c[i] if g.block is None or present[g.block] else 0
                    for g, c, i in zip(groups, choices, picks, strict=True)
                }
                for i, cost in enumerate(costs(name)):
                    totals[i] += chance * cost(widths)
        p, c = torch.tensor(chances, dtype=torch.float64), torch.tensor(choices, dtype=torch.float64)
        mean = (p * c).sum(1)
        variance = (p * c**2).sum(1) - mean**2
        return mean[None], variance[None], {b: torch.tensor([p]) for b, p in there.items()}, totals

    @pytest.mark.parametrize("name", ["residual", "bottleneck", "next", "doubled"])
    def test_it_is_the_enumerated_one(self, name: str) -> None:
        mean, variance, present, totals = self.enumerated(name)
        double = {block: p.double() for block, p in present.items()}
        for cost, total in zip(costs(name), totals, strict=True):
            assert cost.expected(mean, variance, double).item() == pytest.approx(total, rel=1e-6)

    def test_blocks_that_are_not_named_are_there(self) -> None:
        mean, variance, present, _ = self.enumerated("doubled")
        sure = {block: torch.ones(1) for block in present}
        for cost in costs("doubled"):
            whole = cost.expected(mean, variance)
            assert torch.equal(cost.expected(mean, variance, {}), whole)
            assert torch.equal(cost.expected(mean, variance, sure), whole)
            half = cost.expected(mean, variance, {"body.1": torch.tensor([0.5])})
            gone = cost.expected(mean, variance, {"body.1": torch.zeros(1)})
            assert half.item() == pytest.approx((whole + gone).item() / 2, rel=1e-12)

    def test_chance_0_and_width_0_are_the_same(self) -> None:
        """Also for the variance of the stream's width, which a layer of `doubled` counts squared."""
        groups = made("doubled")[1]
        mean, variance, _, _ = self.enumerated("doubled")
        inside = torch.tensor([g.block == "body.0" for g in groups])
        gone_mean, gone_variance = mean.masked_fill(inside, 0), variance.masked_fill(inside, 0)
        for cost in costs("doubled"):
            expected = cost.expected(mean, variance, {"body.0": torch.zeros(1)}).item()
            assert cost.expected(gone_mean, gone_variance).item() == pytest.approx(expected, rel=1e-12)
            again = cost.expected(gone_mean, gone_variance, {"body.0": torch.tensor([0.3])})
            assert again.item() == pytest.approx(expected, rel=1e-12)

    def test_rows_have_their_own_chances(self) -> None:
        mean, variance, _, _ = self.enumerated("residual")
        chances = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
        for cost in costs("residual"):
            rows = cost.expected(mean.expand(3, -1), variance.expand(3, -1), {"body.0": chances})
            for row, p in zip(rows, chances, strict=True):
                assert cost.expected(mean, variance, {"body.0": p[None]}).item() == row.item()

    @pytest.mark.parametrize("name", ["bottleneck", "doubled"])
    def test_gradients_are_finite_differences(self, name: str) -> None:
        mean, variance, present, _ = self.enumerated(name)
        leaves = [mean, variance, *(p.double() for p in present.values())]
        for cost in costs(name):

            def expected(*given: Tensor, cost: PolynomialCost = cost) -> Tensor:
                chances = dict(zip(present, given[2:], strict=True))
                return cost.expected(given[0], given[1], chances) / cost.full

            assert torch.autograd.gradcheck(expected, [leaf.requires_grad_() for leaf in leaves])

    def test_unknown_blocks_are_refused(self) -> None:
        cost = costs("residual")[0]
        mean = torch.ones(1, len(cost.groups))
        with pytest.raises(WidthError, match=r"no residual block 'body.1'.*did you mean"):
            cost.expected(mean, mean, {"body.1": torch.ones(1)})


class TestSpace:
    def test_without_blocks(self) -> None:
        groups = made("bottleneck")[1]
        space = WidthSpace(groups, 0, 1)
        part = space.without(["body.1"])
        for g in groups:
            assert 0 not in space.choices(g.name)
            assert part.choices(g.name) == ((0,) if g.block == "body.1" else space.choices(g.name))
        gone = {f"body.1.{name}": 0 for name in ("a", "b", "down")}
        assert gone in part
        assert gone not in space
        assert {} not in part
        for widths in (part.smallest(), part.largest(), part.uniform(0.5), part.sample(torch.Generator())):
            assert widths in part
            assert removed_blocks(groups, widths) == ("body.1",)
            assert part.decode(part.encode(widths)) == widths
        assert not gone.keys() & part.to_nni().keys()
        assert part.without(["body.0"]).choices("body.1.a") == (0,)
        assert space.without([]).to_nni() == space.to_nni()
        with pytest.raises(WidthError, match=r"no residual block 'body.2'.*did you mean.*find_residual"):
            space.without(["body.2"])

    def test_among_offers_0_where_no_block_can_go_in_part(self) -> None:
        space = WidthSpace(made("residual")[1], 0, 1).among({"body.0.a": (2, 0)})
        assert space.choices("body.0.a") == (0, 2)
        assert space.smallest()["body.0.a"] == 0
        with pytest.raises(WidthError, match=r"'stem.0' cannot have 0 channels"):
            space.among({"stem.0": (0,)})
        space = WidthSpace(made("bottleneck")[1], 0, 1)
        for choices in ({"body.0.a": (0,)}, dict.fromkeys(["body.0.a", "body.0.b", "body.0.down"], (0, 2))):
            with pytest.raises(WidthError, match=r"'body.0' goes as a whole: offer 0.*body.0.down"):
                space.among(choices)

    def test_bounds_neither_bring_a_block_back_nor_lose_it(self) -> None:
        space = WidthSpace(made("residual")[1], 0, 1).without(["body.0"])
        assert space.within({"body.0.a": (0.0, 0.5)}).choices("body.0.a") == (0,)
        assert space.within({"body.3.a": (0.2, 0.5)}).choices("body.0.a") == (0,)
        with pytest.raises(WidthError, match=r"'body.0.a'.*no width between 50% and 80%"):
            space.within({"body.0.a": (0.5, 0.8)})

    @pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
    @pytest.mark.parametrize("name", ["cifar", "resnet50"])
    def test_projection_fills_the_budget_without_the_blocks(self, name: str, share: float) -> None:
        groups = made(name)[1]
        flops, params = costs(name)
        blocks = list(blocks_of(groups))[::3]
        space = WidthSpace(groups, 0.1, 1 if name == "cifar" else 8).without(blocks)
        bounds = Budget.parse({"flops": share, "params": 0.7}).bound({"flops": flops, "params": params})
        wishes = [random_depth(groups, seed) for seed in range(4)] + [{}]
        projected = project_batch(torch.stack([space.encode(w) for w in wishes]), space, bounds)
        for row, wish in zip(projected, wishes, strict=True):
            widths = space.decode(row)
            assert widths == project(wish, space, bounds)
            assert widths in space
            assert set(removed_blocks(groups, widths)) == set(blocks)
            assert bounds.fits(widths)
            assert not leaves_room(widths, space, bounds)
            for g in groups:
                wider = [w for w in space.choices(g.name) if w > widths[g.name]]
                assert not wider or not bounds.fits({**widths, g.name: wider[0]})

    def test_a_space_without_any_choice_is_projected_too(self) -> None:
        groups = made("residual")[1]
        space = WidthSpace(groups).within({"stem.0": (1, 1)}).without(["body.0", "body.3"])
        bounds = Budget.parse(0.9).bound({"flops": costs("residual")[0]})
        assert project({}, space, bounds) == Widths({"stem.0": 6, "body.0.a": 0, "body.3.a": 0})

    def test_blocks_can_come_and_go_in_a_projection(self) -> None:
        """With 0 among the choices of a block of one group, a tight budget removes it."""
        groups = made("residual")[1]
        space = WidthSpace(groups, 0, 1).among({"body.0.a": (0, 2, 4)})
        flops = costs("residual")[0]
        for removed, widths in (
            (True, space.smallest()),
            (False, Widths({**space.smallest(), "body.0.a": 2})),
        ):
            bounds = Budget.parse(flops(widths)).bound({"flops": flops})
            found = project(widths, space, bounds)
            assert found == widths
            assert bool(removed_blocks(groups, found)) is removed


def of_gradients(model: nn.Module) -> nn.Module:
    """A copy whose parameters are the gradients of the model's."""
    twin = copy.deepcopy(model)
    for parameter, own in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad.clone()
    return twin


class TestSupernet:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("name", [*SMALL, "mobilenet_v2"])
    def test_it_computes_as_the_cut_network(self, name: str, training: bool) -> None:
        model, groups = copy.deepcopy(made(name)[0]), made(name)[1]
        randomised(model).train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        order, x = random_order(groups), torch.randn(4, *IMAGE.shape[1:], dtype=torch.float64)
        supernet = Supernet(model, groups, order)
        for seed in range(2):
            widths = random_depth(groups, seed)
            small = shrink(model, groups, widths, order)
            before = copy.deepcopy(model.state_dict())
            with supernet.at(widths):
                out = model(x)
            expected = small(x)
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
            model.zero_grad()
            out.square().sum().backward()
            expected.square().sum().backward()
            for gradient, p in zip(
                shrink(of_gradients(model), groups, widths, order).parameters(),
                small.parameters(),
                strict=True,
            ):
                torch.testing.assert_close(gradient.data, p.grad, rtol=1e-8, atol=1e-8)
            after = shrink(model, groups, widths, order)
            for ours, theirs in zip(after.buffers(), small.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs)
            for block in removed_blocks(groups, widths):
                module = model.get_submodule(block)
                assert all(p.grad is None for p in module.parameters())
                for name_of, tensor in module.state_dict().items():
                    assert torch.equal(tensor, before[f"{block}.{name_of}"])

    def test_the_block_comes_back(self) -> None:
        model, groups = copy.deepcopy(made("residual")[0]).eval(), made("residual")[1]
        x = torch.randn(2, 3, 8, 8)
        full, keys = model(x), {m: set(vars(m)) for m in model.modules()}
        supernet = Supernet(model, groups)
        with supernet.at({"body.0.a": 0}):
            narrow = model(x)
            with supernet.at({}):
                assert torch.equal(model(x), full)
            assert torch.equal(model(x), narrow)
            assert type(copy.deepcopy(model).body[0]) is Residual
        assert not torch.equal(narrow, full)
        assert torch.equal(model(x), full)
        assert {m: set(vars(m)) for m in model.modules()} == keys

    def test_cuts_lie_outside_of_removed_blocks(self) -> None:
        model, groups = copy.deepcopy(made("residual")[0]).train(), made("residual")[1]
        cuts: list = []
        with Supernet(model, groups).at({"body.0.a": 0, "body.3.a": 2}, cuts):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
        used = {id(cut.parameter) for cut in cuts}
        inside = {id(p) for p in model.body[0].parameters()}
        assert used == {id(p) for p in model.parameters()} - inside
        assert all(cut.part.grad is not None for cut in cuts)

    def test_gates_cannot_remove_blocks(self) -> None:
        model, groups = made("residual")
        supernet = Supernet(model, groups)
        with pytest.raises(WidthError, match=r"gates cannot remove.*body.0 have width 0.*at\(\) or shrink"):
            supernet.gates_of({"body.0.a": 0})
        with pytest.raises(WidthError, match="gates cannot remove"), supernet.parallel([{}, {"body.0.a": 0}]):
            pass


class TestSlimmable:
    @pytest.mark.parametrize("name", SMALL)
    def test_the_small_network_trains_without_the_blocks(self, name: str) -> None:
        model, groups = copy.deepcopy(made(name)[0]), made(name)[1]
        randomised(model).train()
        widths, order = random_depth(groups), random_order(groups)
        pair, expected = Slimmable(model, groups, widths, order), shrink(model, groups, widths, order)
        x = torch.randn(4, *IMAGE.shape[1:], dtype=torch.float64)
        optimizer = torch.optim.SGD(pair.parameters(), lr=1e-3)
        full, small = pair(x)
        torch.testing.assert_close(small, expected(x), rtol=1e-10, atol=1e-10)
        (full.square().mean() + small.square().mean()).backward()
        assert all(p.grad is not None for p in pair.parameters())
        optimizer.step()
        kept = pair.eval().small().eval()
        torch.testing.assert_close(pair(x), kept(x), rtol=1e-10, atol=1e-10)
        for block in removed_blocks(groups, widths):
            assert isinstance(kept.get_submodule(block), nn.Identity)
        again = Slimmable(copy.deepcopy(made(name)[0]).double(), groups, widths)
        again.load_state_dict(pair.state_dict())
        assert torch.equal(again.eval()(x), pair(x))


class TestFiles:
    def test_a_network_without_blocks_comes_back(self, tmp_path: Path) -> None:
        model, groups = copy.deepcopy(made("bottleneck")[0]).eval(), made("bottleneck")[1]
        widths, order = random_depth(groups), random_order(groups)
        small = shrink(model, groups, widths, order)
        save_pruned(tmp_path, small, groups, widths, order)
        again = load_pruned(tmp_path, NETS["bottleneck"]().eval())
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(again(x), small(x))
        assert again.state_dict().keys() == small.state_dict().keys()
        assert load_groups(tmp_path) == groups
        assert load_widths(tmp_path / "widths.yaml") == widths
        with pytest.raises(ResultError, match="saved from another model"):
            load_pruned(tmp_path, NETS["cifar"]())

    @pytest.mark.parametrize("name", ["residual", "resnet50"])
    def test_pictures_show_removed_blocks(self, name: str) -> None:
        groups, flops = made(name)[1], costs(name)[0]
        widths = random_depth(groups)
        plot_widths({g.name: g.size for g in groups}, {g.name: widths[g.name] for g in groups})
        plot_widths({g.name: g.size for g in groups}, dict.fromkeys([g.name for g in groups], 0))
        many = {f"stage.{i}": 4 ** (i % 7) for i in range(50)}  # drawn on a log scale
        for kept in ({**many, "stage.3": 0}, dict.fromkeys(many, 0)):
            top, bottom = plot_widths(many, kept).axes
            assert 0 < top.get_ylim()[0] <= min((w for w in kept.values() if w), default=1)
            assert bottom.get_ylim() == (0, 1)
        plot_cost(flops.by_layer({}), flops.by_layer(widths))


class TestMasks:
    """NNI's masks leave the constants of a removed block; the exported model is right."""

    def test_masks_are_zero_and_users_are_told(self) -> None:
        class Shallow(UniformPruner):
            def _groups(self, model: nn.Module, inputs: Any, selected: Any) -> tuple[ChannelGroup, ...]:
                return find_residual_blocks(model, super()._groups(model, inputs, selected), inputs)

        model = copy.deepcopy(made("residual")[0]).eval()
        pruner = Shallow(model, [{"op_types": ["Conv2d"]}], budget=0.9, example_inputs=IMAGE, divisor=1)
        pruner.space = pruner.space.without(["body.0"])
        with pytest.warns(UserWarning, match=r"remove the residual blocks body.0, .*export\(\)"):
            _, masks = pruner.compress()
        assert removed_blocks(pruner.space.groups, pruner.widths) == ("body.0",)
        for layer in ("body.0.a", "body.0.norm_a"):
            assert masks[layer]["weight"].numel() and not masks[layer]["weight"].any()
        assert masks["body.3.a"]["weight"].any()
        small = pruner.export()
        assert isinstance(small.body[0], nn.Identity)
        x = torch.randn(2, 3, 8, 8)
        plain = copy.deepcopy(made("residual")[0]).eval()
        expected = shrink(plain, pruner.space.groups, pruner.widths, pruner.order)
        torch.testing.assert_close(small(x), expected(x))


ELEMENTS = {
    "BasicBlock": lambda m: m.downsample is None,
    "Bottleneck": lambda m: m.downsample is None,
    "InvertedResidual": lambda m: m.use_res_connect,
    "_InvertedResidual": lambda m: m.apply_residual,
    "MBConv": lambda m: m.use_res_connect,
    "FusedMBConv": lambda m: m.use_res_connect,
    "ResBottleneckBlock": lambda m: m.proj is None,
    "CNBlock": lambda m: True,
}
"""torchvision's residual blocks: class -> whether one has an identity shortcut."""


def own_groups_are_free(block: str, groups: Iterable[ChannelGroup]) -> bool:
    own = [g for g in groups if all(m.layer.startswith(f"{block}.") for m in g.members)]
    return bool(own) and all(g.frozen is None for g in own)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet34",
        "resnext50_32x4d",
        "mobilenet_v3_small",
        "mobilenet_v3_large",
        "mnasnet0_5",
        "efficientnet_b0",
        "efficientnet_v2_s",
        "regnet_x_400mf",
        "regnet_y_400mf",
        "convnext_tiny",
        "densenet121",
        "googlenet",
        "inception_v3",
        "squeezenet1_0",
        "vgg11",
        "alexnet",
    ],
)
def test_the_zoo(name: str) -> None:
    """torchvision's own blocks are found, and costs without a half of them are those of the cut model."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = get_model(name, weights=None, **options).eval()
    image = torch.zeros(1, 3, *([128, 128] if name == "inception_v3" else [96, 96]))
    plain = find_channel_groups(model, image)
    groups = find_residual_blocks(model, plain, image)
    inside = {
        block
        for block, module in model.named_modules()
        if type(module).__name__ in ELEMENTS and ELEMENTS[type(module).__name__](module)
        if own_groups_are_free(block, plain)
    }
    assert set(blocks_of(groups)) == inside
    if not inside:
        assert groups == plain
        return
    flops, params = FlopsCost(model, image, groups), ParamsCost(model, groups)
    for seed in range(2):
        widths = random_depth(groups, seed)
        small = shrink(model, groups, widths)
        assert flops(widths) == count_flops(small, image)
        assert params(widths) == count_parameters(small)
        x = torch.randn(1, *image.shape[1:])
        with Supernet(model, groups).at(widths), torch.no_grad():
            torch.testing.assert_close(model(x), small(x), rtol=1e-3, atol=1e-4)
