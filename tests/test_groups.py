"""Which channels are tied, what must not be offered, and that the user's model comes back as it was."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from helpers import CASES, Case, Net, assert_same_outputs, conv, head, random_order, random_widths, zeroed
from torch import Tensor, nn
from torch.utils.dlpack import to_dlpack
from torchvision.models import get_model

from torch_pruning_adapters import (
    ChannelGroup,
    Span,
    UnsupportedModelError,
    find_channel_groups,
    shrink,
)

ZOO_GROUPS = {
    "resnet18": 12,
    "resnet50": 37,
    "mobilenet_v2": 25,
    "regnet_y_400mf": 53,
    "resnext50_32x4d": 37,
    "googlenet": 61,
    "squeezenet1_1": 25,
}


def zoo(name: str, **kwargs: Any) -> nn.Module:
    if name == "googlenet":
        kwargs["init_weights"] = False
    return get_model(name, weights=None, **kwargs)


def groups_of(name: str) -> dict[str, ChannelGroup]:
    return {g.name: g for g in find_channel_groups(zoo(name), torch.zeros(1, 3, 64, 64), verify=False)}


def layers(group: ChannelGroup, role: str) -> list[str]:
    return [m.layer for m in group.members if m.role == role]


def one(net: Net, x: Tensor, **kwargs: Any) -> dict[str, ChannelGroup]:
    return {g.name: g for g in find_channel_groups(net, x, **kwargs)}


# --- structure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), ZOO_GROUPS.items())
def test_number_of_groups(name: str, count: int) -> None:
    model = zoo(name)
    groups = find_channel_groups(model, torch.zeros(1, 3, 64, 64))
    assert len(groups) == count
    assert [g.frozen for g in groups] == [None] * count
    in_model_order = [n for n, _ in model.named_modules()]
    ranks = [in_model_order.index(g.name) for g in groups]
    assert ranks == sorted(set(ranks))
    assert [g.name for g in groups] == [g.producers[0].layer for g in groups]


def test_resnet18_stage_group() -> None:
    group = groups_of("resnet18")["layer2.0.conv2"]
    assert (group.size, group.step) == (128, 1)
    assert layers(group, "producer")[0] == group.name
    assert sorted(layers(group, "producer")) == ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    assert sorted(layers(group, "through")) == ["layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2"]
    assert sorted(layers(group, "consumer")) == ["layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0"]
    assert all(m.spans == (Span(0, 0, 128),) for m in group.members)
    norm = next(m for m in group.members if m.layer == "layer2.0.bn2")
    assert norm.tensors == (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))


def test_resnet50_stage_producers() -> None:
    groups = groups_of("resnet50")
    producers = {g.size: len(g.producers) for g in groups.values() if len(g.producers) > 1}
    assert producers == {256: 4, 512: 5, 1024: 7, 2048: 4}


def test_regnet_y_steps() -> None:
    """Both sides of every grouped convolution move in blocks of its number of groups."""
    groups = groups_of("regnet_y_400mf")
    model = zoo("regnet_y_400mf")
    steps = [g.step for g in groups.values() if g.step > 1]
    expected = [m.groups for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert sorted(steps) == sorted(expected * 2)
    assert set(steps) == {6, 13, 26, 55}


def test_resnext50_steps() -> None:
    groups = groups_of("resnext50_32x4d")
    stepped = {name for name, g in groups.items() if g.step == 32}
    assert len(stepped) == 32
    assert {g.step for name, g in groups.items() if name not in stepped} == {1}


def test_auxiliary_heads_read_channels() -> None:
    model = zoo("googlenet").train()
    x = torch.randn(2, 3, 64, 64)
    groups = find_channel_groups(model, x)
    by_name = {g.name: g for g in groups}
    assert "aux1.conv.conv" in layers(by_name["inception4a.branch1.conv"], "consumer")
    assert {"aux1.conv.conv", "aux1.fc1", "aux2.conv.conv", "aux2.fc1"} <= by_name.keys()
    small = shrink(model, groups, random_widths(groups)).train()
    outputs = small(x)
    assert [tuple(y.shape) for y in outputs] == [(2, 1000)] * 3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hand_made_structure(case: Case) -> None:
    """Tracing alone must be right: verification has nothing to add."""
    net, x = case.build()
    traced = find_channel_groups(net, x, verify=False)
    assert {g.name: (g.size, g.step) for g in traced} == case.groups
    assert find_channel_groups(net, x, verify=True) == traced
    assert [g.frozen for g in traced] == [None] * len(traced)


@pytest.mark.parametrize(
    ("case", "group", "layer", "role", "spans"),
    [
        ("concat", "b", "bn", "through", (Span(4, 0, 6),)),
        ("concat", "b", "c", "consumer", (Span(4, 0, 6),)),
        ("flattened", "a", "fc1", "consumer", (Span(0, 0, 4, 64),)),
        ("chunk_and_add", "a", "a", "producer", (Span(0, 0, 4), Span(4, 0, 4))),
        ("concat_then_add", "c[4:10]", "c", "producer", (Span(4, 0, 6),)),
        ("concat_then_add", "c[4:10]", "b", "producer", (Span(0, 0, 6),)),
        ("squeeze_excite", "a", "up", "producer", (Span(0, 0, 8),)),
        ("depthwise", "a", "dw", "through", (Span(0, 0, 6),)),
        ("shared", "a", "s", "consumer", (Span(0, 0, 6),)),
        ("shared", "a", "s", "producer", (Span(0, 0, 6),)),
    ],
)
def test_spans(case: str, group: str, layer: str, role: str, spans: tuple[Span, ...]) -> None:
    net, x = CASES[case].build()
    members = one(net, x)[group].members
    assert [m.spans for m in members if (m.layer, m.role) == (layer, role)] == [spans]


def test_bare_parameter() -> None:
    net, x = CASES["layer_scale"].build()
    member = next(m for m in one(net, x)["stem"].members if m.kind == "parameter")
    assert (member.layer, member.tensors) == ("", (("gamma", 0),))


def test_grouped_convolution_reads_one_pattern_per_block() -> None:
    net, x = CASES["grouped"].build()
    groups = one(net, x)
    consumer = groups["a"].consumers[0]
    assert (consumer.blocks, consumer.per_block, consumer.tensors) == (4, True, (("weight", 1),))
    producer = groups["g"].producers[0]
    assert (producer.blocks, producer.per_block) == (4, False)


@pytest.mark.parametrize("case", ["concat_then_add", "grouped", "flattened", "layer_scale"])
def test_groups_survive_pickling_and_yaml(case: str) -> None:
    net, x = CASES[case].build()
    for group in find_channel_groups(net, x):
        assert pickle.loads(pickle.dumps(group)) == group
        text = yaml.safe_dump(group.to_dict())
        assert ChannelGroup.from_dict(yaml.safe_load(text)) == group
        assert ChannelGroup.from_dict(json.loads(json.dumps(group.to_dict()))) == group


def test_frozen_reason_survives_yaml() -> None:
    net, x = CASES["plain"].build()
    group = one(net, x, ignore=["a"])["a"]
    assert group.frozen
    assert ChannelGroup.from_dict(yaml.safe_load(yaml.safe_dump(group.to_dict()))) == group


# --- inputs ------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 6), conv(2, 6), nn.Linear(6, 10)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Any]:
        x = (self.a(image) + self.b(depth)).relu()
        return {"logits": [self.fc(x.mean((2, 3)))]}


@pytest.mark.parametrize("named", [False, True])
def test_several_inputs_and_nested_outputs(named: bool) -> None:
    image, depth = torch.randn(1, 3, 8, 8), torch.randn(1, 2, 8, 8)
    inputs = {"depth": depth, "image": image} if named else (image, depth)
    (group,) = find_channel_groups(TwoInputs(), inputs)
    assert layers(group, "producer") == ["a", "b"]
    assert group.frozen is None


# --- what must not be offered ------------------------------------------------------------------------


def test_output_layers_form_no_group() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = net.a(x).relu()
        return net.segmentation(x), head(net, x)

    net = Net(forward, a=conv(3, 6), segmentation=conv(6, 4, 1), fc=nn.Linear(6, 10))
    assert list(one(net, torch.randn(1, 3, 8, 8))) == ["a"]


def test_features_that_are_an_output_too_are_frozen() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = net.a(x).relu()
        return x, head(net, net.b(x))

    net = Net(forward, a=conv(3, 6), b=conv(6, 5), fc=nn.Linear(5, 10))
    groups = one(net, torch.randn(1, 3, 8, 8))
    assert groups["a"].frozen == "reaches the network's output"
    assert groups["b"].frozen is None


def input_residual(net: Net, x: Tensor) -> Tensor:
    return head(net, net.b(x + net.a(x)))


def input_concat(net: Net, x: Tensor) -> Tensor:
    return head(net, net.b(torch.cat([net.a(x), x], 1)))


def constant_concat(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return head(net, net.b(torch.cat([y, torch.ones_like(x)], 1)))


@pytest.mark.parametrize(
    ("forward", "read", "reason"),
    [
        (input_residual, 3, "tied to the network's input"),
        (input_concat, 6, None),
        (constant_concat, 6, None),
    ],
)
def test_ties_to_the_input_are_frozen(forward: Callable, read: int, reason: str | None) -> None:
    """Beside the input, in a concatenation, channels can be cut; added to it they cannot."""
    net = Net(forward, a=conv(3, 3), b=conv(read, 5), fc=nn.Linear(5, 10))
    for verify in (False, True):
        groups = one(net, torch.randn(1, 3, 8, 8), verify=verify)
        assert {n: g.frozen for n, g in groups.items()} == {"a": reason, "b": None}


def test_channels_that_a_product_contracts_can_be_cut() -> None:
    """A similarity of positions, taken over the channels that are left."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.b(net.a(x)).flatten(2)
        return net.fc((y.transpose(1, 2) @ y).mean(1))

    net = Net(forward, a=conv(3, 5), b=conv(5, 6), fc=nn.Linear(64, 10))
    groups = one(net, torch.randn(1, 3, 8, 8), verify=False)
    assert [g.frozen for g in groups.values()] == [None, None]
    assert [m.kind for m in groups["b"].members] == ["conv", "statistics"]


def test_a_single_channel_is_frozen() -> None:
    net = Net(
        CASES["plain"].build()[0]._run, a=conv(3, 1), bn=nn.BatchNorm2d(1), b=conv(1, 5), fc=nn.Linear(5, 2)
    )
    groups = one(net, torch.randn(1, 3, 8, 8))
    assert {n: g.frozen for n, g in groups.items()} == {"a": "a single channel", "b": None}


@pytest.mark.parametrize(
    ("ignore", "frozen"),
    [
        ((), set()),
        (("layer2.0.conv2",), {"layer2.0.conv2"}),
        (("layer1",), {"conv1", "layer1.0.conv1", "layer1.1.conv1"}),
    ],
)
def test_ignored_layers_keep_their_outputs(ignore: tuple[str, ...], frozen: set[str]) -> None:
    groups = find_channel_groups(zoo("resnet18"), torch.zeros(1, 3, 64, 64), ignore, verify=False)
    assert {g.name for g in groups if g.frozen} == frozen
    assert all(g.frozen.startswith("ignored: ") for g in groups if g.frozen)


def test_unknown_ignored_layer_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no layer 'layer2\.0\.conv3'.*did you mean 'layer2\.0\.conv"):
        find_channel_groups(zoo("resnet18"), torch.zeros(1, 3, 64, 64), ["layer2.0.conv3"])


# --- verification ------------------------------------------------------------------------------------


def by_width(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return head(net, net.b(x * (1 + len(x[0]) % 8)).relu())


def only_of_one_width(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    if x.shape[1] != 8:
        raise ValueError(f"{x.shape[1]} channels")
    return head(net, net.b(x).relu())


def first_channel(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return head(net, net.b(x * torch.from_dlpack(to_dlpack(x.detach())).sum()).relu())


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (only_of_one_width, "the cut model fails: ValueError"),
        (by_width, "computes something else"),
        (first_channel, "computes something else"),
    ],
)
def test_wrong_cuts_are_found_and_the_rest_goes_on(forward: Callable, reason: str) -> None:
    """What no operator shows."""
    net = Net(forward, a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 10)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert one(net, x, verify=False)["a"].frozen is None
    groups = one(net, x)
    assert reason in groups["a"].frozen
    assert groups["b"].frozen is None
    order, widths = random_order(groups.values()), {"b": 3}
    assert_same_outputs(
        shrink(net, groups.values(), widths, order), zeroed(net, groups.values(), widths, order), x
    )


def fixed_number(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return head(net, net.b(x.view(x.shape[0], 8, *x.shape[2:])).relu())


def fixed_factor(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return head(net, net.b(x * torch.linspace(0, 1, 8).view(8, 1, 1)).relu())


def fixed_place(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return head(net, net.b(x + x[:, :1]).relu())


def summed(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    return head(net, net.b(x + x.sum(1, keepdim=True)).relu())


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (fixed_number, "is reshaped to a fixed length, 8"),
        (fixed_factor, "tied to a tensor of fixed size"),
        (fixed_place, "is cut at a fixed position"),
        (summed, "aten.sum runs over its channels, which changes with their number"),
    ],
)
def test_what_cannot_be_cut_is_seen_without_a_trial(forward: Callable, reason: str) -> None:
    net = Net(forward, a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 10))
    groups = one(net, torch.randn(2, 3, 8, 8), verify=False)
    assert {n: g.frozen for n, g in groups.items()} == {"a": reason, "b": None}


def test_groups_that_fail_only_together_are_frozen() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = net.a(x).relu(), net.b(x).relu()
        if a.shape[1] < 6 and b.shape[1] < 6:
            raise ValueError("too narrow")
        return head(net, net.c(a)) + net.fc2(net.d(b).mean((2, 3)))

    net = Net(
        forward,
        a=conv(3, 6),
        b=conv(3, 6),
        c=conv(6, 5),
        d=conv(6, 5),
        fc=nn.Linear(5, 10),
        fc2=nn.Linear(5, 10),
    )
    groups = one(net, torch.randn(1, 3, 8, 8))
    assert {n: bool(g.frozen) for n, g in groups.items()} == {"a": True, "b": True, "c": False, "d": False}
    assert "ValueError: too narrow (cut together with others)" in groups["a"].frozen


def test_tied_weights_are_frozen() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.b(net.mid(net.a(net.stem(x)))))

    net = Net(forward, stem=conv(3, 4), a=conv(4, 4), mid=conv(4, 4), b=conv(4, 4), fc=nn.Linear(4, 10))
    net.b.weight = net.a.weight
    groups = one(net, torch.randn(1, 3, 8, 8))
    assert {n for n, g in groups.items() if g.frozen is None} <= {"stem", "a", "mid", "b"}
    for name, g in groups.items():
        if g.frozen is None:
            small = shrink(net, groups.values(), {name: 2})
            assert small(torch.randn(1, 3, 8, 8)).shape == (1, 10)


# --- the model comes back as it was ------------------------------------------------------------------


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything of a model that tracing might leave changed."""
    state = []
    for name, m in model.named_modules():
        hooks = [list(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")]
        tensors = [
            (n, id(t), t._version, t.requires_grad, t.grad, sorted(vars(t)))
            for n, t in (*m._parameters.items(), *m._buffers.items())
            if t is not None
        ]
        state.append((name, m.training, sorted(vars(m)), hooks, m.extra_repr(), tensors))
    return state


def seen(*_: Any) -> None:
    """A hook of the user."""


def disturbed(model: nn.Module) -> nn.Module:
    """Mixed modes, frozen parameters and hooks of the user's own."""
    model.train()
    for i, module in enumerate(model.modules()):
        if i % 3 == 1:
            module.training = False
        if i % 4 == 1:
            module.register_forward_hook(seen)
            module.register_forward_pre_hook(seen)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    return model


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v2"])
def test_model_comes_back_as_it_was(name: str) -> None:
    model = disturbed(zoo(name))
    before, state = fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    find_channel_groups(model, torch.randn(1, 3, 64, 64))
    assert fingerprint(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def failing(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x))  # takes 6 channels, gets 4


def ends_in_nothing(net: Net, x: Tensor) -> Tensor:
    net.a(x)
    return torch.zeros(len(x), 10)


@pytest.mark.parametrize(
    ("forward", "cause"),
    [
        (failing, "RuntimeError"),
        (ends_in_nothing, "does not depend on its parameters"),
    ],
)
def test_refused_model_comes_back_as_it_was(forward: Callable, cause: str) -> None:
    net = disturbed(Net(forward, a=conv(3, 4), b=conv(6, 5), fc=nn.Linear(5, 10)))
    before = fingerprint(net)
    with pytest.raises(UnsupportedModelError, match=cause):
        find_channel_groups(net, torch.randn(1, 3, 8, 8))
    assert fingerprint(net) == before


@pytest.mark.parametrize("part", ["all", "stem"])
def test_frozen_parameters_hide_nothing(part: str) -> None:
    model, x = zoo("resnet18"), torch.zeros(1, 3, 64, 64)
    unfrozen = find_channel_groups(model, x)
    stem = (model.conv1, model.bn1, model.layer1, model.layer2)
    for module in (model,) if part == "all" else stem:
        module.requires_grad_(False)
    assert find_channel_groups(model, x) == unfrozen


def test_frozen_bare_parameters_are_seen() -> None:
    net, x = CASES["layer_scale"].build()
    expected = find_channel_groups(net, x, verify=False)
    assert find_channel_groups(net.requires_grad_(False), x, verify=False) == expected


def test_grad_mode_of_the_caller_does_not_matter() -> None:
    net, x = CASES["plain"].build()
    expected = find_channel_groups(net, x)
    with torch.no_grad():
        assert find_channel_groups(net, x) == expected
    with torch.inference_mode():
        assert find_channel_groups(net, x.clone()) == expected


FRESH = """
import sys, json, torch
from torchvision.models import resnet18
from torch_pruning_adapters import find_channel_groups
print(json.dumps([g.to_dict() for g in find_channel_groups(resnet18(), torch.zeros(1, 3, 64, 64))]))
"""


def test_no_state_between_calls() -> None:
    find_channel_groups(zoo("resnext50_32x4d"), torch.zeros(1, 3, 64, 64), verify=False)
    groups = find_channel_groups(zoo("resnet18"), torch.zeros(1, 3, 64, 64))
    fresh = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH], capture_output=True, text=True, check=True
    )
    assert [ChannelGroup.from_dict(g) for g in json.loads(fresh.stdout)] == list(groups)


# --- models that are not followed, or not wholly -------------------------------------------------------


def test_parametrized_weights_are_frozen() -> None:
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), parametrized, nn.ReLU(), nn.Conv2d(8, 4, 1))
    groups = find_channel_groups(net, torch.zeros(1, 3, 16, 16))
    assert {g.frozen for g in groups} == {"'1' is parametrized"}


def test_a_model_may_keep_an_activation() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = self.a(x)
            return self.b(self.kept)

    (group,) = find_channel_groups(Keeps(), torch.zeros(1, 3, 16, 16))
    assert group.frozen is None


def test_a_model_that_cannot_be_copied_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    model.kept = model(torch.zeros(1, 3, 16, 16))
    with pytest.raises(UnsupportedModelError, match="keep a tensor of its last forward pass"):
        find_channel_groups(model, torch.zeros(1, 3, 16, 16))


def test_a_model_without_layers_has_no_groups() -> None:
    assert find_channel_groups(nn.ReLU(), torch.zeros(1, 3, 8, 8)) == ()
