"""The cut model computes what the full one does without the dropped channels, and shares nothing with it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CASES,
    Case,
    assert_same_outputs,
    entries,
    random_order,
    random_widths,
    randomised,
    zeroed,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model

from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    channel_order,
    find_channel_groups,
    kept_channels,
    prefix_order,
    shrink,
)

ZOO = ("resnet18", "mobilenet_v3_small", "densenet121", "regnet_y_400mf", "squeezenet1_1", "resnext50_32x4d")
EXACT = {name: case for name, case in CASES.items() if case.exact}
MIXING = {name: case for name, case in CASES.items() if not case.exact}


def zoo(name: str) -> tuple[nn.Module, Tensor, tuple[ChannelGroup, ...]]:
    model, x = get_model(name, weights=None), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    groups = find_channel_groups(model, x.float(), verify=False)
    return randomised(model), x, groups


def hand_made(name: str) -> tuple[nn.Module, Tensor, tuple[ChannelGroup, ...]]:
    model, x = CASES[name].build()
    return model, x, find_channel_groups(model, x, verify=False)


def half(groups: tuple[ChannelGroup, ...]) -> dict[str, int]:
    return {g.name: g.size // 2 // g.step * g.step for g in groups}


# --- what the cut model computes ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_equals_the_network_without_the_dropped_channels(case: Case, seed: int) -> None:
    model, x = case.build()
    groups = find_channel_groups(model, x, verify=False)
    widths, order = random_widths(groups, seed), random_order(groups, seed)
    small = shrink(model, groups, widths, order)
    assert_same_outputs(small, zeroed(model, groups, widths, order), x)


@pytest.mark.parametrize("name", ZOO)
def test_torchvision_equals_the_network_without_the_dropped_channels(name: str) -> None:
    model, x, groups = zoo(name)
    widths, order = random_widths(groups), random_order(groups)
    small = shrink(model, groups, widths, order)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert_same_outputs(small, zeroed(model, groups, widths, order), x)


@pytest.mark.parametrize("case", MIXING.values(), ids=MIXING)
def test_norms_over_channels_take_their_statistics_from_the_kept_ones(case: Case) -> None:
    """The reference normalises the kept channels by hand."""
    model, x = case.build()
    groups = find_channel_groups(model, x)
    (group,) = groups
    order = random_order(groups)
    kept = sorted(order["a"][: group.size // 2])
    small = shrink(model, groups, {"a": group.size // 2}, order)
    norm: Any = getattr(model, "ln", None) or model.gn
    affine = {k: v[kept] for k, v in norm.named_parameters()}
    with torch.no_grad():
        y = model.a(x)
        if isinstance(norm, nn.LayerNorm):
            y = F.layer_norm(y[..., kept], (len(kept),), **affine).relu()
        else:
            y = F.group_norm(y[:, kept], 2, **affine).relu().mean((2, 3))
        expected = F.linear(y, model.fc.weight[:, kept], model.fc.bias)
        torch.testing.assert_close(small(x), expected)


@pytest.mark.parametrize("name", ["resnet18", "concat_then_add", "layer_norm", "shared"])
def test_full_width_is_the_model_bit_for_bit(name: str) -> None:
    model, x, groups = zoo(name) if name in ZOO else hand_made(name)
    for widths in ({}, {g.name: g.size for g in groups}):
        same = shrink(model, groups, widths)
        state = same.state_dict()
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(same(x), model(x))
        assert str(same) == str(model)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers_tell_their_new_sizes(case: Case) -> None:
    """Every size attribute is one that a layer of this size, made afresh, would have."""
    model, x = case.build()
    groups = find_channel_groups(model, x, verify=False)
    small = shrink(model, groups, half(groups))
    for name, layer in small.named_modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            shape = (layer.out_channels, layer.in_channels // layer.groups)
        elif isinstance(layer, nn.ConvTranspose2d):
            shape = (layer.in_channels, layer.out_channels // layer.groups)
        elif isinstance(layer, nn.Linear):
            shape = (layer.out_features, layer.in_features)
        else:
            continue
        assert tuple(layer.weight.shape[:2]) == shape, name
    sizes = ("num_features", "num_channels", "num_parameters", "normalized_shape")
    for member in groups[0].members:
        layer, full = small.get_submodule(member.layer), model.get_submodule(member.layer)
        for attribute in sizes:
            if member.role == "through" and hasattr(layer, attribute):
                now, before = getattr(layer, attribute), getattr(full, attribute)
                now, before = (v[-1] if isinstance(v, tuple) else v for v in (now, before))
                cut = before - now
                assert 0 < cut <= before // 2


def test_depthwise_groups_follow() -> None:
    model, _, groups = hand_made("depthwise")
    small: Any = shrink(model, groups, {"a": 2})
    assert (small.dw.groups, small.dw.in_channels, small.dw.out_channels) == (2, 2, 2)


# --- which channels stay -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "concat", "grouped", "chunk_and_add", "flattened", "depthwise"])
def test_kept_rows_are_those_of_the_order_ascending(name: str) -> None:
    model, _, groups = hand_made(name)
    widths, order = half(groups), random_order(groups, 3)
    small = shrink(model, groups, widths, order)
    for g in groups:
        kept = set(order[g.name][: widths[g.name]])
        for member in g.producers:
            rows = [entry for entry, channel in sorted(entries(member)) if channel in kept]
            full = model.get_submodule(member.layer)
            cut = small.get_submodule(member.layer)
            assert torch.equal(cut.bias, full.bias[rows]) if full.bias is not None else cut.bias is None
            assert cut.weight.shape[0] == len(rows)
            if g is groups[0]:  # reads the image: all columns are there
                assert torch.equal(cut.weight, full.weight[rows])


def test_kept_channels_are_ascending() -> None:
    _, _, groups = hand_made("residual")
    kept = kept_channels(groups, {"stem": 3}, {"stem": [5, 0, 3, 1, 2, 4], "a": [3, 2, 1, 0]})
    assert {name: channels.tolist() for name, channels in kept.items()} == {
        "stem": [0, 3, 5],
        "a": [0, 1, 2, 3],
    }


def test_default_order_is_by_importance() -> None:
    model, x, groups = hand_made("residual")
    default = shrink(model, groups, half(groups))
    given = shrink(model, groups, half(groups), channel_order(model, groups))
    first = shrink(model, groups, half(groups), prefix_order(groups))
    assert torch.equal(default(x), given(x))
    assert not torch.equal(default(x), first(x))


def test_only_narrowed_groups_need_an_order() -> None:
    model, _, groups = hand_made("residual")
    small: Any = shrink(model, groups, {"a": 2}, {"a": [3, 1, 0, 2]})
    assert torch.equal(small.a.weight, model.a.weight[[1, 3]])


# --- the model and its copy --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "layer_scale", "depthwise", "shared"])
def test_model_is_untouched_and_shares_no_memory(name: str) -> None:
    model, x, groups = hand_made(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    versions = {k: v._version for k, v in model.state_dict().items()}
    expected = model(x)
    for widths in ({}, half(groups), {groups[0].name: 2}):
        small = shrink(model, groups, widths)
        theirs = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        ours = {t.untyped_storage().data_ptr() for t in small.state_dict().values()}
        assert not theirs & ours
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.zero_()
    assert {k: v._version for k, v in model.state_dict().items()} == versions
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_mode_and_requires_grad_are_kept(dtype: torch.dtype) -> None:
    model, _, groups = hand_made("plain")
    model.to(dtype).train()
    model.bn.eval()
    model.a.requires_grad_(False)
    small: Any = shrink(model, groups, half(groups))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in small.parameters())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert small.bn.num_batches_tracked.dtype == torch.int64


def test_device_is_kept() -> None:
    model, _, groups = hand_made("plain")
    small = shrink(model.to("meta"), groups, half(groups), prefix_order(groups))
    assert {t.device.type for t in small.state_dict().values()} == {"meta"}


def test_groups_fit_another_instance_of_the_architecture() -> None:
    _, _, groups = hand_made("grouped")
    other, x = CASES["grouped"].build()
    other = randomised(other)
    widths, order = random_widths(groups, 1), random_order(groups, 1)
    assert_same_outputs(shrink(other, groups, widths, order), zeroed(other, groups, widths, order), x)


def test_cut_model_trains_pickles_and_copies() -> None:
    model = get_model("mobilenet_v2", weights=None, num_classes=2)
    groups = find_channel_groups(model, torch.zeros(1, 3, 32, 32), verify=False)
    small = shrink(model, groups, half(groups)).train()
    x, target = torch.randn(8, 3, 32, 32), torch.tensor([0, 1] * 4)
    optimiser = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(small(x), target)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in small.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    small.eval()
    for again in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert torch.equal(again(x), small(x))


def test_a_cut_model_can_be_cut_again() -> None:
    model, x, groups = hand_made("residual")
    small = shrink(model, groups, {"stem": 4, "a": 3})
    again = find_channel_groups(small, x)
    assert {g.name: g.size for g in again} == {"stem": 4, "a": 3}
    widths, order = {"stem": 2, "a": 1}, random_order(again)
    assert_same_outputs(shrink(small, again, widths, order), zeroed(small, again, widths, order), x)


class Allocations(TorchDispatchMode):
    """Sizes of all tensors that operations give back, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.sizes.append(out.numel())
        return out


def test_full_weights_are_never_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 10))
    groups = find_channel_groups(model, torch.zeros(1, 3))
    with Allocations() as full:
        copy.deepcopy(model)
    assert max(full.sizes) == 400 * 500  # what a copy would look like
    with Allocations() as cut:
        small = shrink(model, groups, {"0": 40, "2": 50}, prefix_order(groups))
    assert max(cut.sizes) <= 400 * 50  # rows first, then columns
    kept = sum(p.numel() for p in small.parameters())
    assert sum(cut.sizes) <= kept + 400 * 50 + 10 * 500


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"aa": 2}, r"no channel group 'aa' in this model \(did you mean 'a'\?\)"),
        ({"a": 6}, r"group 'a' cannot have 6 channels, only multiples of 4 up to 16"),
        ({"a": 0}, r"group 'a' cannot have 0 channels"),
        ({"a": -4}, r"group 'a' cannot have -4 channels"),
        ({"a": 20}, r"group 'a' cannot have 20 channels"),
        ({"a": 4.5}, r"group 'a' cannot have 4.5 channels"),
    ],
)
def test_widths_that_do_not_fit(widths: dict, message: str) -> None:
    model, _, groups = hand_made("grouped")
    with pytest.raises(WidthError, match=message):
        shrink(model, groups, widths)


def test_frozen_groups_keep_their_width() -> None:
    model, x, groups = hand_made("residual")
    frozen = tuple(dataclasses.replace(g, frozen="for a reason") for g in groups)
    with pytest.raises(WidthError, match="'a' keeps its 4 channels: for a reason"):
        shrink(model, frozen, {"a": 2})
    assert torch.equal(shrink(model, frozen, {"a": 4})(x), model(x))


def test_groups_of_another_model() -> None:
    model, _, _ = hand_made("plain")
    _, _, groups = hand_made("residual")
    with pytest.raises(WidthError, match=r"no layer 'stem'.*groups were found on another model"):
        shrink(model, groups, half(groups), prefix_order(groups))


@pytest.mark.parametrize(("own", "other"), [("resnet18", "resnet50"), ("resnet50", "wide_resnet50_2")])
@pytest.mark.parametrize("swap", [False, True])
def test_groups_of_a_narrower_or_wider_model(own: str, other: str, swap: bool) -> None:
    if swap:
        own, other = other, own
    x = torch.zeros(1, 3, 64, 64)
    groups = find_channel_groups(get_model(other, weights=None), x, verify=False)
    with pytest.raises(WidthError, match="found on another model"):
        shrink(get_model(own, weights=None), groups, half(groups))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({}, "the channel order lacks group 'a'"),
        ({"a": [0, 1, 2]}, "not a permutation of 16"),
        ({"a": [0, *range(15)]}, "not a permutation of 16"),
        ({"a": np.arange(16)}, "must rank the 4 blocks of its grouped convolutions alike"),
    ],
)
def test_orders_that_do_not_fit(order: dict, message: str) -> None:
    model, _, groups = hand_made("grouped")
    with pytest.raises(WidthError, match=message):
        shrink(model, groups, {"a": 8}, order)


def test_the_cut_model_keeps_the_memory_layout() -> None:
    model, x = CASES["plain"].build()
    groups = find_channel_groups(model, x)
    model.to(memory_format=torch.channels_last)
    small = shrink(model, groups, {"a": 4, "b": 3})
    for layer in (small.a, small.b):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert not layer.weight.is_contiguous()
    assert_same_outputs(
        small, shrink(model.to(memory_format=torch.contiguous_format), groups, {"a": 4, "b": 3}), x
    )
