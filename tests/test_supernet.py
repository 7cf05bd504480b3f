"""The supernet computes what the cut networks compute, trains what they train, and leaves the model alone."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, Net, conv, head, random_order, random_widths, randomised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model
from torchvision.ops import stochastic_depth

from examples.cifar_resnet import resnet20
from nni_dbs import FlopsCost
from nni_dbs.cost import count_flops
from nni_dbs.errors import DataError
from nni_dbs.supernet import Cut, Supernet
from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    channel_order,
    find_channel_groups,
    mirrored_order,
    prefix_order,
    shrink,
)

Made = tuple[nn.Module, Tensor, tuple[ChannelGroup, ...]]

# --- more networks -----------------------------------------------------------------------------------


def sigmoid() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.b(net.bn(net.a(x)).sigmoid()).sigmoid())

    return Net(forward, a=conv(3, 6), bn=nn.BatchNorm2d(6), b=conv(6, 5), fc=nn.Linear(5, 10))


def dense() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = torch.cat([x, net.a(net.bn1(x).relu())], 1)
        x = torch.cat([x, net.b(net.bn2(x).sigmoid())], 1)
        return head(net, net.bn3(x).sigmoid())

    return Net(
        forward,
        stem=conv(3, 4),
        bn1=nn.BatchNorm2d(4),
        a=conv(4, 3),
        bn2=nn.BatchNorm2d(7),
        b=conv(7, 5),
        bn3=nn.BatchNorm2d(12),
        fc=nn.Linear(12, 10),
    )


def noisy() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.bn(net.stem(x)).relu()
        x = x + stochastic_depth(net.b(net.drop(net.a(x).relu())), 0.5, "row", net.training)
        return net.fc(net.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))

    return Net(
        forward,
        stem=conv(3, 6),
        bn=nn.BatchNorm2d(6),
        a=conv(6, 4),
        b=conv(4, 6),
        drop=nn.Dropout(0.3),
        fc=nn.Linear(6, 10),
    )


def checkpointed() -> Net:
    def block(net: Net, x: Tensor) -> Tensor:
        return net.drop(net.b(net.bn(net.a(x)).relu()).relu())

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).relu()
        return head(
            net, checkpoint(block, net, x, use_reentrant=False) if net.checkpointing else block(net, x)
        )

    net = Net(
        forward,
        stem=conv(3, 6),
        a=conv(6, 6),
        bn=nn.BatchNorm2d(6),
        b=conv(6, 4),
        drop=nn.Dropout(0.3),
        fc=nn.Linear(4, 10),
    )
    net.checkpointing = False
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": sigmoid,
    "dense": dense,
    "noisy": noisy,
    "checkpointed": checkpointed,
    "resnet20": resnet20,
    "mobilenet_v2": lambda: get_model("mobilenet_v2", weights=None, num_classes=10),
}
INEXACT = [name for name, case in CASES.items() if not case.exact]
EXACT = [*(name for name, case in CASES.items() if case.exact), "sigmoid", "dense"]
SMALL = [*EXACT, *INEXACT]
ALL = [*SMALL, "noisy", "resnet20", "mobilenet_v2"]
ORDERS = ("random", "prefix")


def made(name: str) -> Made:
    """A network in double precision and eval mode, a batch, and the groups."""
    if name in CASES:
        model, x = CASES[name].build()
    else:
        torch.manual_seed(0)
        model = randomised(NETS[name]())
        x = torch.randn(4, 3, 32, 32) if name in ("resnet20", "mobilenet_v2") else torch.randn(2, 3, 8, 8)
        x = x.double()
    return model, x, find_channel_groups(model, x[:1] if name == "resnet20" else x, verify=False)


def supernet_of(model: nn.Module, groups: Sequence[ChannelGroup], order: str, seed: int = 0) -> Supernet:
    return Supernet(model, groups, prefix_order(groups) if order == "prefix" else random_order(groups, seed))


def make(name: str, order: str = "random") -> tuple[Supernet, nn.Module, Tensor]:
    model, x, groups = made(name)
    return supernet_of(model, groups, order), model, x


def cut_of(supernet: Supernet, widths: Mapping[str, int]) -> nn.Module:
    return shrink(supernet.model, supernet.groups, widths, supernet.order)


def full(supernet: Supernet) -> dict[str, int]:
    return {g.name: g.size for g in supernet.groups}


def narrow(supernet: Supernet, seed: int = 0) -> dict[str, int]:
    """Random widths below the full one wherever a group can be narrower."""
    rng = np.random.default_rng(seed)
    return {g.name: g.step * int(rng.integers(1, max(2, g.size // g.step))) for g in supernet.groups}


def batch_gates(supernet: Supernet, networks: Sequence[Mapping[str, int]], each: int) -> dict[str, Tensor]:
    """Gates (B, C) of the networks, `each` samples for one after another."""
    hard = [supernet.gates_of(widths) for widths in networks]
    return {name: torch.stack([gate[name] for gate in hard]).repeat_interleave(each, 0) for name in hard[0]}


def close(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Up to rounding, relative to the tensor's largest value; shapes and non-zero values are checked too."""
    assert found.abs().max() > 1e-12
    atol = rtol * expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# --- training two networks alike ---------------------------------------------------------------------


def positions(supernet: Supernet, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Where each entry of the cut network's tensors lies in the full ones, flattened: a cut of numbers."""
    numbers = copy.deepcopy(supernet.model).double()
    for tensor in numbers.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    cut = shrink(numbers, supernet.groups, widths, supernet.order)
    return {name: tensor.long().flatten() for name, tensor in cut.state_dict().items()}


def dropped(tensor: Tensor, where: Tensor) -> Tensor:
    """The flattened entries of `tensor` other than those at `where`."""
    mask = torch.ones(tensor.numel(), dtype=torch.bool)
    mask[where] = False
    return tensor.detach().flatten()[mask]


def loss_of(model: nn.Module, x: Tensor, seed: int = 7) -> Tensor:
    """Cross entropy with mixed targets, dropout seeded."""
    torch.manual_seed(seed)
    y = model(x).flatten(0, -2)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.cross_entropy(y.double(), weights.softmax(-1))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients by name, which are dropped from the model."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_scattered(
    supernet: Supernet,
    widths: Mapping[str, int],
    found: Mapping[str, Tensor | None],
    cut: Mapping[str, Tensor | None],
    rtol: float = 1e-9,
) -> None:
    """`found` is `cut` at the kept entries and exactly zero elsewhere; some of it is not zero."""
    where = positions(supernet, widths)
    assert found.keys() == cut.keys()
    largest = max(float(g.abs().max()) for g in cut.values() if g is not None)
    assert largest > 1e-9
    for name, gradient in found.items():
        expected = cut[name]
        assert (gradient is None) == (expected is None), name
        if gradient is None or expected is None:
            continue
        kept = gradient.flatten()[where[name]].view(expected.shape)
        torch.testing.assert_close(kept, expected, rtol=rtol, atol=1e-14 * largest)
        assert not dropped(gradient, where[name]).any(), name


# --- what the network computes -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_sliced_is_the_cut_network(name: str, order: str, seed: int) -> None:
    model, x, groups = made(name)
    supernet = supernet_of(model, groups, order, seed)
    for widths in (random_widths(groups, seed), narrow(supernet, seed)):
        with supernet.at(widths) as running:
            assert running is model
            y = model(x)
        close(y, cut_of(supernet, widths)(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_the_last_channels_are_those_of_the_mirrored_order(name: str, order: str) -> None:
    model, x, groups = made(name)
    supernet = supernet_of(model, groups, order, 0)
    widths = narrow(supernet, 0)
    for g in groups:
        first = set(supernet.order[g.name][: g.size - widths[g.name]])
        kept = mirrored_order(groups, supernet.order)[g.name][: widths[g.name]]
        assert sorted([*first, *kept]) == list(range(g.size))
    mirrored = Supernet(model, groups, mirrored_order(groups, supernet.order))
    with supernet.at(widths, last=True):
        y = model(x)
    close(y, cut_of(mirrored, widths)(x))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*EXACT, "noisy", "resnet20", "mobilenet_v2"])
@torch.no_grad()
def test_hard_gates_give_the_narrow_network(name: str, order: str) -> None:
    model, x, groups = made(name)
    for seed in range(2):
        supernet = supernet_of(model, groups, order, seed)
        assert supernet.inexact == {}
        widths = narrow(supernet, seed)
        with supernet.at(widths):
            expected = model(x)
        with supernet.gated(supernet.gates_of(widths)):
            close(model(x), expected)
        assert (expected - model(x)).abs().max() > 1e-6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*EXACT, "noisy", "resnet20", "mobilenet_v2"])
@torch.no_grad()
def test_each_part_of_a_parallel_batch_runs_its_own_network(name: str, order: str) -> None:
    supernet, model, x = make(name, order)
    networks = [narrow(supernet, 1), full(supernet), narrow(supernet, 2)]
    with supernet.parallel(networks):
        parts = model(torch.cat([x, x.flip(0), 2 * x])).chunk(3)
    for widths, part, y in zip(networks, (x, x.flip(0), 2 * x), parts, strict=True):
        with supernet.at(widths):
            close(y, model(part))


@pytest.mark.parametrize("name", INEXACT)
@torch.no_grad()
def test_norms_over_channels_are_named_as_inexact(name: str) -> None:
    supernet, model, x = make(name)
    (group,) = supernet.groups
    norm = "gn" if "group" in name else "ln"
    assert list(supernet.inexact) == [group.name]
    assert repr(norm) in supernet.inexact[group.name]
    widths = narrow(supernet)
    with supernet.at(widths):
        expected = model(x)
    with supernet.gated(supernet.gates_of(widths)):
        assert (model(x) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["sigmoid", "dense", "squeeze_excite"])
@torch.no_grad()
def test_gating_the_writers_instead_would_be_wrong(name: str) -> None:
    """The networks above tell where channels are gated: f(0) != 0 between writer and reader."""
    supernet, model, x = make(name)
    group = supernet.groups[0]
    gates = supernet.gates_of({group.name: group.step})
    with supernet.at({group.name: group.step}):
        expected = model(x)
    writer = model.get_submodule(group.producers[0].layer)
    hook = writer.register_forward_hook(lambda _, inputs, y: y * gates[group.name][:, None, None])
    y = model(x)
    hook.remove()
    if name == "squeeze_excite":  # a product with the writer's output is zero as well
        close(y, expected)
    else:
        assert (y - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.no_grad()
def test_default_order_is_by_importance_and_frozen() -> None:
    model, x, groups = made("resnet20")
    ranked = channel_order(model, groups)
    supernet = Supernet(model, groups)
    assert all(np.array_equal(supernet.order[g.name], ranked[g.name]) for g in groups)
    for parameter in model.parameters():
        parameter.copy_(parameter.flip(0))
    assert any(not np.array_equal(ranked[name], o) for name, o in channel_order(model, groups).items())
    widths = narrow(supernet)
    small = shrink(model, groups, widths, ranked)
    with supernet.at(widths):
        close(model(x), small(x))


@torch.no_grad()
def test_groups_without_a_width_keep_all_channels() -> None:
    supernet, model, x = make("resnet20")
    name = supernet.groups[1].name
    with supernet.at({name: 3}):
        y = model(x)
    close(y, cut_of(supernet, {**full(supernet), name: 3})(x))


@torch.no_grad()
def test_a_wrapped_model_runs_narrow_too() -> None:
    supernet, model, x = make("resnet20")
    wrapped = nn.Sequential(nn.Identity(), model)
    widths = narrow(supernet)
    with supernet.at(widths):
        y = wrapped(x)
    close(y, cut_of(supernet, widths)(x))


# --- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ALL)
def test_training_mode_equals_the_cut_network(name: str, order: str) -> None:
    supernet, model, x = make(name, order)
    model.train()
    x = x.requires_grad_()
    for seed in range(2):
        widths = narrow(supernet, seed)
        where, small = positions(supernet, widths), cut_of(supernet, widths)
        before = {key: b.clone() for key, b in model.named_buffers()}

        expected = loss_of(small, x)
        (gradient,) = torch.autograd.grad(expected, x, retain_graph=True)
        expected.backward()
        with supernet.at(widths):
            loss = loss_of(model, x)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        close(torch.autograd.grad(loss, x, retain_graph=True)[0], gradient)
        loss.backward()
        assert_scattered(supernet, widths, gradients(model), gradients(small))

        statistics = dict(small.named_buffers())
        for key, buffer in model.named_buffers():
            kept = buffer.flatten()[where[key]].view(statistics[key].shape)
            torch.testing.assert_close(kept, statistics[key], rtol=1e-12, atol=0)
            assert torch.equal(dropped(buffer, where[key]), dropped(before[key], where[key])), key
            if key.endswith("num_batches_tracked"):
                assert buffer == before[key] + 1
            elif buffer.numel() > 1:
                assert not torch.equal(buffer, before[key]), key


@pytest.mark.parametrize("name", ["noisy", "mobilenet_v2"])
def test_the_noise_of_the_networks_under_test_matters(name: str) -> None:
    supernet, model, x = make(name)
    model.train()
    with supernet.at(narrow(supernet)):
        assert abs(loss_of(model, x, 7) - loss_of(model, x, 7)) < 1e-12
        torch.manual_seed(1)
        a = model(x)
        torch.manual_seed(2)
        assert (model(x) - a).abs().max() > 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("running", ["at", "gated", "parallel"])
def test_frozen_parameters_get_no_gradient(order: str, running: str) -> None:
    supernet, model, x = make("resnet20", order)
    model.train()
    frozen = [model.conv1.weight, model.stage2[0].bn1.bias, model.stage3[1].conv2.weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    widths = narrow(supernet)
    block = {
        "at": lambda: supernet.at(widths),
        "gated": lambda: supernet.gated(supernet.gates_of(widths)),
        "parallel": lambda: supernet.parallel([widths, widths]),
    }[running]
    with block():
        loss_of(model, x).backward()
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.grad is not None for p in model.parameters() if all(p is not f for f in frozen))
    cuts: list[Cut] = []
    with supernet.at(widths, cuts):
        loss_of(model, x)
    assert cuts
    assert not any(cut.parameter is f for cut in cuts for f in frozen)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["resnet20", "shared", "grouped", "transposed_grouped", "layer_scale"])
def test_cuts_are_the_active_parts_at_each_use(name: str, order: str) -> None:
    supernet, model, x = make(name, order)
    widths = narrow(supernet)
    cuts: list[Cut] = []
    with supernet.at(widths, cuts):
        loss = loss_of(model, x)
    where = positions(supernet, widths)
    names = {id(p): key for key, p in model.named_parameters()}
    for cut in cuts:
        assert torch.equal(cut.part, cut.parameter[cut.index])
        kept = cut.parameter.flatten()[where[names[id(cut.parameter)]]]
        assert torch.equal(cut.part.flatten(), kept)
    cut_names = [names[id(cut.parameter)] for cut in cuts]
    assert set(cut_names) == set(dict(model.named_parameters()))
    uses = {key: cut_names.count(key) for key in set(cut_names)}
    assert set(uses.values()) == ({1, 2} if name == "shared" else {1})
    loss.backward()
    ended = gradients(model)
    with supernet.at(widths):
        loss_of(model, x).backward()
    for key, p in model.named_parameters():
        assert ended[key] is None
        whole = torch.zeros_like(p)
        for cut in cuts:
            if cut.parameter is p:
                assert cut.part.is_leaf
                with torch.no_grad():
                    whole[cut.index] += cut.part.grad
        torch.testing.assert_close(p.grad, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["plain", "resnet20", "mobilenet_v2", "layer_norm", "shared"])
def test_full_width_is_the_model_bit_for_bit(name: str) -> None:
    supernet, model, x = make(name)
    model.train()
    twin = copy.deepcopy(model)
    expected = loss_of(twin, x)
    expected.backward()
    for widths in ({}, full(supernet)):
        model.load_state_dict(made(name)[0].state_dict())
        with supernet.at(widths):
            assert not any("forward" in vars(module) for module in model.modules())
            loss = loss_of(model, x)
            loss.backward()
        assert torch.equal(loss, expected)
        for key, gradient in gradients(model).items():
            assert torch.equal(gradient, twin.get_parameter(key).grad)
        assert all(torch.equal(b, twin.get_buffer(key)) for key, b in model.named_buffers())


# --- the model stays as it is ------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def snapshot(model: nn.Module, inside: bool = False) -> dict[str, Any]:
    """All that a user can see of a model; within a block, `forward` is the library's business."""
    skipped = {"forward"} if inside else set()
    return {
        "state": [
            (key, v.data_ptr(), tuple(v.shape), v.numpy().tobytes()) for key, v in model.state_dict().items()
        ],
        "parameters": [
            (key, id(p), type(p), p.requires_grad, p.is_leaf) for key, p in model.named_parameters()
        ],
        "buffers": [(key, id(b)) for key, b in model.named_buffers()],
        "classes": [(key, type(m)) for key, m in model.named_modules()],
        "keys": [[key for key in vars(m) if key not in skipped] for m in model.modules()],
        "attributes": [
            {
                key: value
                for key, value in vars(m).items()
                if isinstance(value, (bool, int, float, str, tuple, type(None)))
            }
            for m in model.modules()
        ],
        "hooks": [[list(vars(m)[h].items()) for h in HOOKS] for m in model.modules()],
        "text": str(model),
    }


def blocks(supernet: Supernet) -> dict[str, Callable[[], Any]]:
    widths, other, third = (narrow(supernet, seed) for seed in (1, 2, 3))
    return {
        "at": lambda: supernet.at(widths),
        "gated": lambda: supernet.gated(supernet.gates_of(third)),
        "parallel": lambda: supernet.parallel([widths, other]),
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", ["at", "gated", "parallel"])
@pytest.mark.parametrize("name", [*SMALL, "resnet20"])
def test_nothing_about_the_model_changes(name: str, block: str, order: str) -> None:
    supernet, model, x = make(name, order)
    for module in model.modules():
        module.register_forward_hook(lambda m, inputs, y: None)
    before, inside_before = snapshot(model), snapshot(model, inside=True)
    with blocks(supernet)[block]():
        assert snapshot(model, inside=True) == inside_before
        model(x)
        assert snapshot(model, inside=True) == inside_before
        loss_of(model, x).backward()
        assert snapshot(model, inside=True) == inside_before
    assert snapshot(model) == before


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", ["at", "gated", "parallel"])
def test_training_changes_only_statistics(block: str, order: str) -> None:
    supernet, model, x = make("resnet20", order)
    model.train()
    before = snapshot(model)
    with blocks(supernet)[block]():
        loss_of(model, x).backward()
    after = snapshot(model)
    assert {key: v for key, v in after.items() if key != "state"} == {
        key: v for key, v in before.items() if key != "state"
    }
    for (key, *rest), (key_before, *rest_before) in zip(after["state"], before["state"], strict=True):
        assert key == key_before
        assert rest[:2] == rest_before[:2]
        if "running" not in key and "tracked" not in key:
            assert rest == rest_before


class Failure(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", ["at", "gated", "parallel"])
@pytest.mark.parametrize("where", ["layer", "reader", "norm", "body"])
def test_exceptions_leave_the_model_as_it_was(where: str, block: str, order: str) -> None:
    supernet, model, x = make("resnet20", order)
    layer = {
        "layer": model.stage2[1].conv1,
        "reader": model.fc,
        "norm": model.stage3[0].bn1,
        "body": None,
    }[where]

    def forward(*args: Any) -> Any:
        raise Failure

    if layer is not None:
        layer.forward = forward
    before, inside_before = snapshot(model), snapshot(model, inside=True)
    versions = [t._version for t in model.state_dict().values()]
    with pytest.raises(Failure), blocks(supernet)[block]():
        with pytest.raises(Failure):
            model(x)
            raise Failure
        assert snapshot(model, inside=True) == inside_before
        raise Failure
    assert snapshot(model) == before
    assert [t._version for t in model.state_dict().values()] == versions
    if layer is not None:
        del layer.forward
    widths = narrow(supernet)
    small = cut_of(supernet, widths)
    with torch.no_grad(), supernet.at(widths):
        close(model(x), small(x))


@pytest.mark.parametrize("block", ["at", "gated", "parallel"])
def test_errors_before_the_block_leave_the_model_as_it_was(block: str) -> None:
    supernet, model, _ = make("resnet20")
    before = snapshot(model)
    start: Callable[[], Any] = {
        "at": lambda: supernet.at({"nothing": 1}),
        "gated": lambda: supernet.gated({"nothing": torch.ones(1)}),
        "parallel": lambda: supernet.parallel([{"nothing": 1}]),
    }[block]
    with supernet.at(narrow(supernet)):
        inside = [vars(m).get("forward") for m in model.modules()]
        with pytest.raises(WidthError, match="no channel group 'nothing'"), start():
            raise AssertionError
        assert [vars(m).get("forward") for m in model.modules()] == inside
    assert snapshot(model) == before


@pytest.mark.parametrize("block", ["at", "gated", "parallel"])
def test_hooks_of_the_user_run(block: str) -> None:
    supernet, model, x = make("resnet20")
    seen: list[str] = []
    layers = [model.conv1, model.stage1[0].bn1, model.stage2[0].conv2, model.fc]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, inputs, i=i: seen.append(f"before {i}"))
        layer.register_forward_hook(lambda m, inputs, y, i=i: seen.append(f"after {i} {tuple(y.shape)[1]}"))
        layer.register_full_backward_hook(lambda m, inputs, outputs, i=i: seen.append(f"backward {i}"))
    width = next(g for g in supernet.groups if g.name == "conv1").size - 5
    with blocks(supernet)[block]() if block != "at" else supernet.at({"conv1": width}):
        loss_of(model, x.requires_grad_()).backward()
    channels = [width if block == "at" else 16, 16, 32, 10]
    assert seen == [
        *(f"{text}" for i, c in enumerate(channels) for text in (f"before {i}", f"after {i} {c}")),
        *(f"backward {i}" for i in reversed(range(4))),
    ]


@pytest.mark.parametrize("block", ["at", "gated", "parallel"])
def test_a_forward_of_the_user_survives_and_runs(block: str) -> None:
    supernet, model, x = make("resnet20")
    with blocks(supernet)[block]():
        expected = model(x)
    calls: list[str] = []

    def override(layer: nn.Module, name: str) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            calls.append(name)
            return type(layer).forward(layer, *args) * 2

        layer.forward = forward
        return forward

    own = {
        name: override(model.get_submodule(name), name)
        for name in ("conv1", "fc", "stage1.1.bn2", "stage3.0")
    }
    with blocks(supernet)[block]():
        assert not torch.equal(model(x), expected)
    runs = dict.fromkeys(own, 1)
    assert {name: calls.count(name) for name in own} == runs
    assert {n: vars(m)["forward"] for n, m in model.named_modules() if "forward" in vars(m)} == own
    for name in own:
        del model.get_submodule(name).forward
    with blocks(supernet)[block]():
        assert torch.equal(model(x), expected)


def test_an_overridden_forward_runs_on_the_active_part() -> None:
    supernet, model, x = make("plain")
    shapes: list[tuple[int, ...]] = []

    def forward(x: Tensor) -> Tensor:
        shapes.append(tuple(model.b.weight.shape))
        return type(model.b).forward(model.b, x)

    model.b.forward = forward
    with supernet.at({"a": 4, "b": 2}):
        model(x)
        assert model.b.weight.shape == (5, 6, 3, 3)
    assert shapes == [(2, 4, 3, 3)]


# --- blocks inside of blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_the_innermost_block_alone_applies(order: str) -> None:
    supernet, model, x = make("dense", order)
    before = snapshot(model)
    kinds: dict[str, Callable[[], Any]] = {
        **blocks(supernet),
        "other": lambda: supernet.at(narrow(supernet, 4)),
        "full": lambda: supernet.at({}),
    }
    alone = {}
    for kind, block in kinds.items():
        with block():
            alone[kind] = model(x)
    assert len({y.sum().item() for y in alone.values()}) == len(kinds)
    assert torch.equal(alone["full"], model(x))

    def check(kind: str) -> None:
        assert torch.equal(model(x), alone[kind])

    for outer in kinds:
        for inner in kinds:
            with kinds[outer]():
                check(outer)
                with kinds[inner]():
                    check(inner)
                    with kinds[outer]():
                        check(outer)
                    check(inner)
                check(outer)
                with pytest.raises(Failure), kinds[inner]():
                    check(inner)
                    raise Failure
                check(outer)
            assert snapshot(model) == before


@torch.no_grad()
def test_two_supernets_of_one_model_take_turns() -> None:
    model, x, groups = made("resnet20")
    a, b = supernet_of(model, groups, "random", 1), supernet_of(model, groups, "prefix")
    widths = narrow(a)
    cut_a, cut_b, expected = cut_of(a, widths), cut_of(b, widths), model(x)
    with a.at(widths):
        with b.at(widths):
            close(model(x), cut_b(x))
        close(model(x), cut_a(x))
    assert torch.equal(model(x), expected)


# --- graphs and optimisers ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "layer_scale"])
def test_optimiser_steps_inside_a_block_train_the_cut_network(name: str, order: str) -> None:
    supernet, model, x = make(name, order)
    model.train()
    before = {key: v.clone() for key, v in model.state_dict().items()}
    widths = narrow(supernet)
    small, where = cut_of(supernet, widths), positions(supernet, widths)
    last = [key for key, _ in model.named_parameters()][-1]

    def train(net: nn.Module) -> None:
        optimiser = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        for seed in range(3):
            optimiser.zero_grad()
            loss_of(net, x, seed).backward()
            optimiser.step()

    train(small)
    with supernet.at(widths):
        train(model)
    trained = small.state_dict()
    for key, tensor in model.state_dict().items():
        kept = tensor.flatten()[where[key]].view(trained[key].shape)
        torch.testing.assert_close(kept, trained[key], rtol=1e-8, atol=1e-10)
        assert torch.equal(dropped(tensor, where[key]), dropped(before[key], where[key]))
    assert not torch.equal(model.get_parameter(last), before[last])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet20", "dense"])
def test_graphs_of_several_widths_live_at_once(name: str, training: bool, order: str) -> None:
    supernet, model, x = make(name, order)
    model.train(training)
    networks = [narrow(supernet, 1), full(supernet), narrow(supernet, 2)]
    expected: dict[str, Tensor] = {}
    for widths in networks:
        with supernet.at(widths):
            loss_of(model, x).backward()
        for key, gradient in gradients(model).items():
            expected[key] = gradient if key not in expected else expected[key] + gradient
    losses = []
    for widths in networks:
        with supernet.at(widths):
            losses.append(loss_of(model, x))
    torch.stack(losses).sum().backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_checkpointing_recomputes_at_the_same_widths(order: str) -> None:
    supernet, model, x = make("checkpointed", order)
    model.train()
    widths = narrow(supernet)
    small = cut_of(supernet, widths)
    loss_of(small, x).backward()
    before = snapshot(model)["attributes"]
    model.checkpointing = True
    with supernet.at(widths):
        loss_of(model, x).backward()
    assert_scattered(supernet, widths, gradients(model), gradients(small))
    model.checkpointing = False
    assert snapshot(model)["attributes"] == before
    assert model.bn.num_batches_tracked == 2  # as without a supernet: each recomputation counts


# --- precisions and modes ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["resnet20", "squeeze_excite", "layer_norm", "flattened"])
def test_autocast_equals_the_cut_network(name: str, order: str) -> None:
    supernet, model, x = make(name, order)
    x = x.float()
    model.float().train()
    widths = narrow(supernet)
    small = cut_of(supernet, widths)
    with torch.autocast("cpu", torch.bfloat16):
        expected = small(x)
        with supernet.at(widths):
            y = model(x)
        with supernet.gated(supernet.gates_of(widths)):
            gated = model(x)
    assert y.dtype == gated.dtype == torch.bfloat16
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(y, expected, rtol=0, atol=2**-6 * scale)
    if not supernet.inexact:
        torch.testing.assert_close(gated, expected, rtol=0, atol=2**-4 * scale)
    expected.float().pow(2).mean().backward()
    y.float().pow(2).mean().backward()
    where, cut = positions(supernet, widths), gradients(small)
    for key, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert not dropped(gradient, where[key]).any()
        kept = gradient.flatten()[where[key]].view(cut[key].shape)
        largest = float(cut[key].abs().max())
        torch.testing.assert_close(kept, cut[key], rtol=0, atol=2**-5 * largest + 1e-6)


def test_autocast_keeps_no_weights_of_other_widths() -> None:
    """Inside one autocast block, whose cache lives as long, weights and widths change."""
    supernet, model, x = make("plain")
    model.float()
    x = x.float()
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(4):
            widths = random_widths(supernet.groups, seed)
            small = cut_of(supernet, widths)
            with supernet.at(widths):
                y = model(x)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                expected = small(x)
            torch.testing.assert_close(y, expected, rtol=0, atol=2**-6 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_modes_without_gradients(training: bool, order: str, mode: Callable[[], Any]) -> None:
    supernet, model, x = make("resnet20", order)
    model.train(training)
    widths, other = narrow(supernet, 1), narrow(supernet, 2)
    small = cut_of(supernet, widths)
    with mode():
        expected = small(x)
        with supernet.at(widths):
            y = model(x)
        with supernet.gated(supernet.gates_of(widths)):
            gated = model(x)
        with supernet.parallel([widths, other]):
            parallel = model(x)
    for found in (y, gated, parallel):
        assert not found.requires_grad
    close(y, expected)
    close(gated, expected)
    assert parallel.shape == expected.shape
    with supernet.at(widths):  # the model still trains
        loss_of(model, x).backward()
    assert all(gradient is not None for gradient in gradients(model).values())
    assert not any(buffer.is_inference() for buffer in model.buffers())


# --- copies and threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
@torch.no_grad()
def test_copies_run_in_threads(fresh: bool) -> None:
    supernet, model, x = make("resnet20")
    networks = [narrow(supernet, seed) for seed in range(4)]
    serial = []
    for widths in networks:
        with supernet.at(widths):
            serial.append(model(x))

    def copied() -> Supernet:
        if fresh:
            return Supernet(copy.deepcopy(model), supernet.groups, supernet.order)
        return copy.deepcopy(supernet)

    def run(own: Supernet, first: int) -> list[Tensor]:
        outputs = []
        with torch.no_grad():
            for i in range(12):
                with own.at(networks[(first + i) % 4]):
                    outputs.append(own.model(x))
        return outputs

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(run, copied(), first) for first in range(4)]
    for first, future in enumerate(runs):
        for i, y in enumerate(future.result()):
            assert torch.equal(y, serial[(first + i) % 4])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@torch.no_grad()
def test_copies_are_independent(again: Callable[[Supernet], Supernet]) -> None:
    supernet, model, x = make("resnet20")
    widths = narrow(supernet)
    with supernet.at(widths):
        expected = model(x)
    other = again(supernet)
    assert other.groups == supernet.groups
    assert not {id(p) for p in other.model.parameters()} & {id(p) for p in model.parameters()}
    with other.at(widths):
        assert torch.equal(other.model(x), expected)
        assert not torch.equal(model(x), expected)
    for parameter in other.model.parameters():
        parameter.zero_()
    with supernet.at(widths):
        assert torch.equal(model(x), expected)


# --- gates -------------------------------------------------------------------------------------------


def random_gates(supernet: Supernet, batch: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    return {
        g.name: torch.rand(*lead, g.size, generator=generator, dtype=torch.float64) + 0.1
        for g in supernet.groups
    }


GATED = ["plain", "concat", "squeeze_excite", "grouped", "transposed_grouped", "flattened", "chunk_and_add"]


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("name", [*GATED, "layer_norm"])
def test_gradients_of_gates_are_finite_differences(name: str, batch: int | None) -> None:
    model, x, groups = made(name)
    supernet = supernet_of(model, groups, "random")
    gates = random_gates(supernet, batch)

    def outputs(*factors: Tensor) -> Tensor:
        with supernet.gated(dict(zip(gates, factors, strict=True))):
            return model(x).sum(-1)

    assert torch.autograd.gradcheck(outputs, [g.requires_grad_() for g in gates.values()])
    for gradient in torch.autograd.grad(outputs(*gates.values()).pow(2).sum(), list(gates.values())):
        assert gradient.abs().max() > 1e-9


@pytest.mark.parametrize("name", [*SMALL, "dense", "resnet20", "mobilenet_v2"])
@torch.no_grad()
def test_a_gate_for_each_sample(name: str) -> None:
    supernet, model, x = make(name)
    gates = random_gates(supernet, len(x))
    with supernet.gated(gates):
        y = model(x)
    for i in range(len(x)):
        with supernet.gated({key: gate[i] for key, gate in gates.items()}):
            close(y[i : i + 1], model(x[i : i + 1]))


@pytest.mark.parametrize("name", ["concat", "concat_then_add", "dense", "grouped"])
@torch.no_grad()
def test_one_axis_takes_gates_of_both_shapes(name: str) -> None:
    supernet, model, x = make(name)
    each, one = random_gates(supernet, len(x), 1), random_gates(supernet, None, 2)
    for first in (0, 1):
        mixed = {g.name: (each if i % 2 == first else one)[g.name] for i, g in enumerate(supernet.groups)}
        same = {key: gate.expand(len(x), -1) for key, gate in mixed.items()}
        with supernet.gated(same):
            expected = model(x)
        with supernet.gated(mixed):
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", [*SMALL, "resnet20"])
@torch.no_grad()
def test_open_or_missing_gates_are_the_identity(name: str) -> None:
    supernet, model, x = make(name)
    expected = model(x)
    for gates in ({}, {g.name: torch.ones(g.size) for g in supernet.groups}, supernet.gates_of({})):
        with supernet.gated(gates):
            assert torch.equal(model(x), expected)
    some = random_gates(supernet)
    for g in supernet.groups:
        ones = {h.name: torch.ones(h.size, dtype=torch.float64) for h in supernet.groups}
        with supernet.gated({**ones, g.name: some[g.name]}):
            expected = model(x)
        with supernet.gated({g.name: some[g.name]}):
            assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_residual_stream_is_gated_at_each_reader_or_at_all_writers() -> None:
    supernet, model, x = make("residual")
    gate = torch.full((6,), 0.5, dtype=torch.float64)
    gate[2] = 0.25
    g = gate[:, None, None]
    with supernet.gated({"stem": gate}):
        found = model(x)
    y = model.stem(x).relu()
    readers = y + model.b(model.a(y * g).relu())
    close(found, model.fc(F.adaptive_avg_pool2d(readers, 1).flatten(1) * gate))
    y = g * model.stem(x).relu()
    close(found, head(model, y + g * model.b(model.a(y).relu())))


def test_layers_called_with_a_keyword_are_gated() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.fc(input=F.adaptive_avg_pool2d(net.a(input=x).relu(), 1).flatten(1))

    model = randomised(Net(forward, a=conv(3, 6), fc=nn.Linear(6, 10)))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    supernet = Supernet(model, find_channel_groups(model, x))
    widths = narrow(supernet)
    with supernet.at(widths):
        expected = model(x)
    with supernet.gated(supernet.gates_of(widths)):
        close(model(x), expected)


@pytest.mark.parametrize("name", ["grouped", "residual", "resnet20"])
def test_factors_by_rank_follow_the_order(name: str) -> None:
    supernet, _, _ = make(name)
    widths = narrow(supernet)
    gates = supernet.gates_of(widths)
    assert list(gates) == [g.name for g in supernet.groups]
    for g in supernet.groups:
        order = list(supernet.order[g.name])
        factors = torch.rand(3, g.size, dtype=torch.float64)
        found = supernet.by_rank(g.name, factors)
        assert found.shape == factors.shape
        for rank, channel in enumerate(order):
            assert torch.equal(found[:, channel], factors[:, rank])
        first = (torch.arange(g.size) < widths[g.name]).double()
        assert torch.equal(supernet.by_rank(g.name, first), gates[g.name])
        assert sorted(order[: widths[g.name]]) == gates[g.name].nonzero().flatten().tolist()
        assert gates[g.name].dtype == torch.float64
        leaf = torch.rand(g.size, requires_grad=True)
        supernet.by_rank(g.name, leaf).dot(torch.arange(float(g.size))).backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == [float(channel) for channel in order]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"aa": (16,)}, r"no channel group 'aa' in this model \(did you mean 'a'\?\)"),
        ({"a": (15,)}, r"the gate of group 'a' must have shape \(16,\) or \(batch, 16\), not \(15,\)"),
        ({"a": (16, 1)}, r"must have shape \(16,\) or \(batch, 16\), not \(16, 1\)"),
        ({"a": (1, 1, 16)}, r"must have shape \(16,\) or \(batch, 16\), not \(1, 1, 16\)"),
        ({"a": ()}, r"must have shape \(16,\) or \(batch, 16\), not \(\)"),
    ],
)
def test_gates_that_do_not_fit(gates: dict[str, tuple[int, ...]], message: str) -> None:
    supernet, model, _ = make("grouped")
    before = snapshot(model)
    with (
        pytest.raises(WidthError, match=message),
        supernet.gated({k: torch.ones(v) for k, v in gates.items()}),
    ):
        raise AssertionError
    assert snapshot(model) == before


def test_frozen_groups_take_no_gate_and_no_width() -> None:
    model, x, groups = made("residual")
    frozen = [dataclasses.replace(g, frozen="for a reason") if g.name == "a" else g for g in groups]
    supernet = Supernet(model, frozen)
    message = "'a' keeps its 4 channels: for a reason"
    with pytest.raises(WidthError, match=message), supernet.gated({"a": torch.ones(4)}):
        raise AssertionError
    with pytest.raises(WidthError, match=message), supernet.at({"a": 2}):
        raise AssertionError
    with pytest.raises(WidthError, match=message), supernet.parallel([{"a": 2}]):
        raise AssertionError
    small = cut_of(supernet, {"stem": 3})
    with torch.no_grad(), supernet.at({"stem": 3, "a": 4}):
        close(model(x), small(x))


@pytest.mark.parametrize("name", ["residual", "concat"])
def test_gates_for_another_batch(name: str) -> None:
    supernet, model, x = make(name)
    before = snapshot(model)
    with (
        pytest.raises(DataError, match=r"gates for a batch of 3 met 2 samples at layer '\w+'"),
        supernet.gated(random_gates(supernet, 3)),
    ):
        model(x)
    assert snapshot(model) == before


def test_gates_of_two_batch_sizes_on_one_axis() -> None:
    supernet, model, x = make("concat")
    gates = {**random_gates(supernet, 2), "a": torch.ones(3, 4, dtype=torch.float64)}
    with pytest.raises(DataError, match="gates for a batch of 3 met 2 samples"), supernet.gated(gates):
        model(x)


# --- networks in parallel ----------------------------------------------------------------------------

NORMED = ["plain", "concat", "depthwise", "dense", "sigmoid", "one_dimension", "resnet20"]


def parallel_batch(model: nn.Module, x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = torch.randn(4 * parts, *x.shape[1:], generator=generator, dtype=torch.float64)
    batch += torch.arange(4 * parts).div(4, rounding_mode="floor").view(-1, *[1] * (x.dim() - 1))
    return batch, torch.randint(10, (4 * parts,), generator=generator)


def largest_difference(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> float:
    """Relative to the largest entry of all gradients."""
    scale = max(float(g.abs().max()) for g in b.values() if g is not None)
    return max(float((a[key] - b[key]).abs().max()) for key in b) / scale  # type: ignore[operator]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NORMED)
def test_parallel_gradient_is_the_mean_of_the_serial_ones(name: str, order: str) -> None:
    supernet, model, x = make(name, order)
    model.train()
    networks = [narrow(supernet, 1), narrow(supernet, 2), narrow(supernet, 3)]
    images, targets = parallel_batch(model, x, 3)
    mean = 0.0
    for widths, part, target in zip(networks, images.chunk(3), targets.chunk(3), strict=True):
        with supernet.at(widths):
            loss = F.cross_entropy(model(part), target) / 3
        loss.backward()
        mean += loss.item()
    serial = gradients(model)

    with supernet.parallel(networks):
        loss = F.cross_entropy(model(images), targets)
    loss.backward()
    assert loss.item() == pytest.approx(mean, rel=1e-12)
    parallel = gradients(model)
    assert largest_difference(parallel, serial) < 1e-9

    most = {key: max(widths[key] for widths in networks) for key in networks[0]}
    where = positions(supernet, most)
    surplus = 0
    for key, gradient in parallel.items():
        assert gradient is not None
        unused = dropped(gradient, where[key])
        assert not unused.any(), key
        surplus += len(unused)
    assert surplus > 0

    with supernet.gated(batch_gates(supernet, networks, 4)):  # BatchNorm over the whole batch
        F.cross_entropy(model(images), targets).backward()
    assert largest_difference(gradients(model), serial) > 1e-3


@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "instance_norm", "grouped", "flattened"])
def test_without_batchnorm_parallel_is_a_gate_for_each_sample(name: str) -> None:
    supernet, model, x = make(name)
    model.train()
    networks = [narrow(supernet, 1), full(supernet)]
    images, targets = parallel_batch(model, x, 2)
    with supernet.parallel(networks):
        F.cross_entropy(model(images), targets).backward()
    expected = gradients(model)
    with supernet.gated(batch_gates(supernet, networks, 4)):
        F.cross_entropy(model(images), targets).backward()
    assert largest_difference(gradients(model), expected) < 1e-14


def test_parallel_counts_every_part_in_the_running_statistics() -> None:
    supernet, model, x = make("plain")
    images, _ = parallel_batch(model, x, 2)
    model.train()
    twin = copy.deepcopy(model)
    with supernet.parallel([narrow(supernet, 1), narrow(supernet, 2)]):
        model(images)
    for part in images.chunk(2):  # its input, the first convolution's output, depends on no width
        twin(part)
    assert model.bn.num_batches_tracked == 2
    close(model.bn.running_mean, twin.bn.running_mean)
    close(model.bn.running_var, twin.bn.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_that_cannot_be_split(training: bool) -> None:
    supernet, model, _ = make("resnet20")
    model.train(training)
    before = snapshot(model)
    with (
        pytest.raises(DataError, match=r"batch of 5 .*among 2 sub-networks.*drop_last=True"),
        supernet.parallel([narrow(supernet, 1), narrow(supernet, 2)]),
    ):
        model(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert snapshot(model) == before


def test_parallel_needs_a_network() -> None:
    supernet, _, _ = make("plain")
    with pytest.raises(WidthError, match="at least one network"), supernet.parallel([]):
        raise AssertionError


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"aa": 4}, r"no channel group 'aa' in this model \(did you mean 'a'\?\)"),
        ({"a": 6}, "group 'a' cannot have 6 channels, only multiples of 4 up to 16"),
        ({"a": 0}, "group 'a' cannot have 0 channels"),
        ({"a": 20}, "group 'a' cannot have 20 channels"),
        ({"a": 4.0}, "only a whole number"),
    ],
)
def test_widths_that_do_not_fit(widths: dict[str, Any], message: str) -> None:
    supernet, _, _ = make("grouped")
    for block in (supernet.at(widths), supernet.parallel([{}, widths])):
        with pytest.raises(WidthError, match=message), block:
            raise AssertionError
    with pytest.raises(WidthError, match=message):
        supernet.gates_of(widths)


def test_groups_of_another_model() -> None:
    model, _, _ = made("plain")
    _, _, groups = made("residual")
    with pytest.raises(WidthError, match=r"no layer 'stem'.*found on another model"):
        Supernet(model, groups, prefix_order(groups))
    with pytest.raises(WidthError, match="found on another model"):
        Supernet(model, groups)


def test_groups_of_a_wider_model() -> None:
    _, _, groups = made("resnet20")
    with pytest.raises(WidthError, match=r"expect 16 in dimension 0.*found on another model"):
        Supernet(resnet20(widths=(8, 32, 64)), groups)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ({}, "the channel order lacks group 'a'"),
        ({"a": np.arange(16).reshape(4, 4).T.flatten()}, "the channel order lacks group 'g'"),
        ({"a": [0, 1, 2]}, "'a' is not a permutation of 16"),
        ({"a": [0, *range(15)]}, "'a' is not a permutation of 16"),
        ({"a": range(1, 17)}, "'a' is not a permutation of 16"),
        ({"a": np.arange(16)}, "must rank the 4 blocks of its grouped convolutions alike"),
    ],
)
def test_orders_that_do_not_fit(order: dict[str, Any], message: str) -> None:
    model, _, groups = made("grouped")
    if "lacks" not in message:
        order = {**prefix_order(groups), **order}
    with pytest.raises(WidthError, match=message):
        Supernet(model, groups, order)


# --- cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*SMALL, "resnet20", "mobilenet_v2"])
def test_a_sliced_pass_does_the_work_of_the_narrow_network(name: str, order: str) -> None:
    supernet, model, x = make(name, order)
    flops = FlopsCost(model, x, supernet.groups)
    for seed in range(1 if name == "mobilenet_v2" else 2):
        widths = narrow(supernet, seed)
        small = cut_of(supernet, widths)
        with supernet.at(widths):
            assert count_flops(model, x) == flops(widths) < flops.full
        with FlopCounterMode(display=False) as expected:
            loss_of(small, x).backward()
        with FlopCounterMode(display=False) as found, supernet.at(widths):
            loss_of(model, x).backward()
        assert found.get_total_flops() == expected.get_total_flops()


def test_a_copy_made_inside_of_the_block_is_the_whole_network() -> None:
    supernet, model, x = make("residual")
    expected = model(x)
    with supernet.at(random_widths(supernet.groups, 3)) as narrow:
        copies = [copy.deepcopy(narrow), shrink(narrow, supernet.groups, {}, supernet.order)]
    for whole in copies:
        assert torch.equal(whole(x), expected)


def test_a_model_pickled_inside_of_the_block_is_the_whole_network() -> None:
    model = resnet20().eval()
    x = torch.randn(2, 3, 32, 32)
    groups = find_channel_groups(model, x[:1])
    with Supernet(model, groups).at({g.name: g.size // 2 for g in groups}):
        text = pickle.dumps(model)
    assert torch.equal(pickle.loads(text)(x), model(x))


def test_a_frozen_group_runs_in_full() -> None:
    model, x, groups = made("residual")
    frozen = tuple(
        dataclasses.replace(g, frozen="reaches the output") if g.name == "a" else g for g in groups
    )
    supernet = Supernet(model, frozen)
    gates = supernet.gates_of({"stem": 3})
    assert list(gates) == ["stem"]
    small = shrink(model, frozen, {"stem": 3}, supernet.order)
    for block in (supernet.at({"stem": 3}), supernet.gated(gates), supernet.parallel([{"stem": 3}])):
        with block:
            torch.testing.assert_close(model(x), small(x), rtol=1e-9, atol=1e-12)


def test_an_unbatched_image_is_gated_along_its_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(3, 10, 10, dtype=torch.float64)
    supernet = Supernet(model, find_channel_groups(model, x[None]))
    with supernet.at({"0": 3}):
        expected = model(x)
    with supernet.gated(supernet.gates_of({"0": 3})):
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-14)


def test_supernets_of_a_module_and_of_its_part_do_not_mix() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    outer = nn.Sequential(inner, nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 6, 6)
    of_inner = Supernet(inner, find_channel_groups(inner, x))
    of_outer = Supernet(outer, find_channel_groups(outer, x))
    expected = outer(x)
    with (
        of_outer.at({"0.0": 4}),
        pytest.raises(RuntimeError, match="leave that first"),
        of_inner.at({"0": 2}),
    ):
        pass
    assert torch.equal(outer(x), expected)
    with of_inner.at({"0": 2}):
        inner(x)
    assert torch.equal(outer(x), expected)


def test_parts_have_statistics_of_their_own_where_none_are_kept() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 2, 1)).double().eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    supernet = Supernet(model, find_channel_groups(model, x, verify=False))
    networks = [{"0": 3}, {"0": 5}]
    with supernet.parallel(networks):
        found = model(x).chunk(2)
    for widths, part, images in zip(networks, found, x.chunk(2), strict=True):
        with supernet.at(widths):
            torch.testing.assert_close(part, model(images), rtol=1e-12, atol=1e-14)


def test_the_default_order_leaves_frozen_groups_alone() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),  # frozen: parametrized
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(4, 2, 1),
    )
    x = torch.randn(2, 3, 6, 6)
    groups = find_channel_groups(model, x)
    frozen = [g for g in groups if g.frozen is not None]
    assert frozen
    supernet = Supernet(model, groups)
    assert supernet.order[frozen[0].name].tolist() == list(range(frozen[0].size))


def test_a_forward_that_was_set_inside_of_the_block_stays() -> None:
    supernet, model, _ = make("residual")
    with supernet.at({"stem": 3}):
        model.a.forward = lambda x: x
    assert vars(model.a)["forward"](1) == 1
    assert "forward" not in vars(model.stem)
