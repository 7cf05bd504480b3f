"""The pair computes and learns what two networks would whose common weights were kept equal by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, Net, conv, head, random_order, random_widths, randomised
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model

from examples.cifar_resnet import CifarResNet
from nni_dbs import Slimmable, Supernet
from nni_dbs.steps import kl_divergence, logits_of
from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    channel_order,
    find_channel_groups,
    prefix_order,
    shrink,
)

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: CifarResNet(8, widths=(4, 6, 8)),
    "resnet18": lambda: get_model("resnet18", weights=None, num_classes=10),
    "mobilenet_v2": lambda: get_model("mobilenet_v2", weights=None, num_classes=10, dropout=0.0),
}
SMALL = (*CASES, "resnet8")
ALL = (*CASES, *NETS)
WITH_BATCHNORM = ("plain", "concat", "depthwise", "one_dimension", "three_dimensions", "resnet8")
Made = tuple[nn.Module, Tensor, tuple[ChannelGroup, ...]]


@lru_cache
def groups_of(name: str) -> tuple[ChannelGroup, ...]:
    return find_channel_groups(NETS[name](), torch.zeros(1, 3, 32, 32), verify=False)


def make(name: str, seed: int = 0) -> Made:
    """In train mode and double precision."""
    if name in CASES:
        model, x = CASES[name].build()
        return model.train(), x, find_channel_groups(model, x, verify=False)
    torch.manual_seed(seed)
    x = torch.randn(4, 3, 16, 16) if name == "resnet8" else torch.randn(2, 3, 32, 32)
    return randomised(NETS[name]()).train(), x.double(), groups_of(name)


def pair(name: str) -> tuple[Slimmable, Tensor]:
    """Random widths and order, and private BatchNorm layers that are not those of the full network."""
    model, x, groups = make(name)
    net = Slimmable(model, groups, random_widths(groups), random_order(groups))
    with torch.no_grad():
        for tensor in (*net.skeleton.parameters(), *net.skeleton.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(torch.rand_like(tensor) + 0.5)
    return net, x


def by_hand(net: Slimmable) -> tuple[nn.Module, nn.Module]:
    """A copy of the full network, and the cut one with the private BatchNorm layers' values."""
    full = copy.deepcopy(net.model)
    small = shrink(full, net.groups, net.widths, net.order)
    private = dict(net.skeleton.named_modules())
    for name, module in small.named_modules():
        if isinstance(module, _BatchNorm):
            module.load_state_dict(private[name].state_dict())
    return full, small


def is_private(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), _BatchNorm)


def positions(net: Slimmable) -> dict[str, Tensor]:
    """Where each entry of the small network's parameters lies in the flattened full one."""
    numbered = copy.deepcopy(net.model)
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    cut = shrink(numbered, net.groups, net.widths, net.order)
    return {name: parameter.detach().long() for name, parameter in cut.named_parameters()}


def summed_gradients(net: Slimmable, full: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """Of two networks apart, by the names of the pair's parameters."""
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in small.named_parameters()}
    found = {}
    where = positions(net)
    for name, p in full.named_parameters():
        found[f"model.{name}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        if is_private(full, name):
            found[f"skeleton.{name}"] = theirs[name]
        else:
            found[f"model.{name}"].view(-1)[where[name].flatten()] += theirs[name].flatten()
    return found


def gradients(net: Slimmable) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative to the largest entry of all."""
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for t in expected.values())
    assert largest > 1e-9
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12 * largest, msg=name)


def mixed(full: Tensor, small: Tensor) -> Tensor:
    """A smooth loss that both outputs enter differently."""
    return full.sin().sum() + (2 * small).cos().mean() + small.square().mean()


def labels(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 10


# --- what the two networks compute -------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_those_of_two_networks(name: str) -> None:
    net, x = pair(name)
    full, small = by_hand(net)
    for _ in range(2):  # the second time with other running statistics
        outputs = net(x)
        assert torch.equal(outputs[0], full(x))
        assert torch.equal(outputs[1], small(x))
    net.eval(), small.eval()
    assert torch.equal(net(x), small(x))
    assert torch.equal(net.model(x), full.eval()(x))
    statistics = {f"model.{name}": buffer for name, buffer in full.named_buffers()}
    statistics |= {f"skeleton.{name}": buffer for name, buffer in small.named_buffers()}
    for key, buffer in net.named_buffers():
        assert torch.equal(buffer, statistics[key]), key


@pytest.mark.parametrize("name", SMALL)
def test_begins_with_the_kept_entries_of_the_full_network(name: str) -> None:
    model, x, groups = make(name)
    widths, order = random_widths(groups), random_order(groups)
    net = Slimmable(model, groups, widths, order).eval()
    assert torch.equal(net(x), shrink(model, groups, widths, order)(x))


@pytest.mark.parametrize("name", SMALL)
def test_both_outputs_are_equal_at_full_width(name: str) -> None:
    model, x, groups = make(name)
    full, small = Slimmable(model, groups, {g.name: g.size for g in groups})(x)
    assert torch.equal(full, small)


@pytest.mark.parametrize("name", ALL)
def test_the_cut_out_network_equals_eval_mode(name: str) -> None:
    net, x = pair(name)
    small = net.small()
    assert type(small) is type(net.model)
    assert small.training
    assert torch.equal(small.eval()(x), net.eval()(x))
    cut = shrink(net.model, net.groups, net.widths, net.order)
    assert {k: v.shape for k, v in small.state_dict().items()} == {
        k: v.shape for k, v in cut.state_dict().items()
    }
    ours = {t.untyped_storage().data_ptr() for t in small.state_dict().values()}
    assert not ours & {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}


def test_order_is_by_importance_unless_given() -> None:
    model, x, groups = make("residual")
    widths = {"stem": 3, "a": 2}
    default = Slimmable(model, groups, widths).eval()
    assert torch.equal(default(x), shrink(model, groups, widths, channel_order(model, groups))(x))
    first = Slimmable(model, groups, widths, prefix_order(groups)).eval()
    assert torch.equal(first(x), shrink(model, groups, widths, prefix_order(groups))(x))
    assert not torch.equal(default(x), first(x))


def test_order_is_frozen_when_the_weights_change() -> None:
    model, x, groups = make("plain")
    net = Slimmable(model, groups, {"a": 2}).eval()
    order = channel_order(model, groups)
    with torch.no_grad():
        model.a.weight[order["a"][-1]] *= 100
    assert channel_order(model, groups)["a"][0] == order["a"][-1]
    expected = shrink(model, groups, {"a": 2}, order)
    assert torch.equal(net(x), expected(x))
    assert torch.equal(net.small()(x), expected(x))


@pytest.mark.parametrize("name", ["plain", "layer_scale", "resnet8"])
def test_keyword_arguments_and_memory_layout_reach_both(name: str) -> None:
    net, x = pair(name)
    net.to(memory_format=torch.channels_last)
    expected = net(x)
    torch.manual_seed(0)
    with pytest.raises(TypeError):
        net(y=x)
    assert all(torch.equal(a, b) for a, b in zip(net(x=x), expected, strict=True))
    net.eval()
    assert torch.equal(net(x=x), net.small()(x))


# --- gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_both_networks_meet(name: str) -> None:
    net, x = pair(name)
    full, small = by_hand(net)
    mixed(*net(x)).backward()
    mixed(full(x), small(x)).backward()
    assert_all_close(gradients(net), summed_gradients(net, full, small))


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_the_small_network_are_those_of_a_supernet(name: str) -> None:
    model, x, groups = make(name)
    widths, order = random_widths(groups, 1), random_order(groups, 1)
    net = Slimmable(model, groups, widths, order)
    twin = copy.deepcopy(model)
    with Supernet(twin, groups, order).at(widths):
        twin(x).sin().mean().backward()
    net(x)[1].sin().mean().backward()
    shared = {n: p for n, p in model.named_parameters() if not is_private(model, n)}
    assert_all_close(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in shared.items()},
        {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in twin.named_parameters()
            if n in shared
        },
    )
    assert all(p.grad is None for n, p in model.named_parameters() if n not in shared)


@pytest.mark.parametrize("name", ["plain", "concat", "depthwise", "grouped", "resnet8"])
def test_gradients_are_finite_differences(name: str) -> None:
    net, x = pair(name)
    mixed(*net(x)).backward()
    step = 1e-6
    generator = torch.Generator().manual_seed(0)
    for key, parameter in net.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                parameter += sign * step * direction
                losses.append(float(mixed(*net(x))))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert parameter.grad is not None
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", WITH_BATCHNORM)
def test_the_teacher_learns_from_the_labels_alone(name: str) -> None:
    alone, x = pair(name)
    student, distilled = copy.deepcopy(alone), copy.deepcopy(alone)
    F.cross_entropy(alone(x)[0], labels(x)).backward()

    full, small = student(x)
    kl_divergence(small, full).backward()
    ours = dict(student.named_parameters())
    assert all(p.grad is None for n, p in ours.items() if n.startswith("model.") and is_private(student, n))
    student.zero_grad()
    full, small = student(x)
    kl_divergence(small, full.detach().clone()).backward()

    full, small = distilled(x)
    (F.cross_entropy(full, labels(x)) + kl_divergence(small, full)).backward()
    parts = gradients(alone), gradients(student)
    assert_all_close(gradients(distilled), {key: parts[0][key] + parts[1][key] for key in parts[0]})


def test_at_full_width_both_networks_have_the_same_gradients() -> None:
    model, x, groups = make("plain")
    net = Slimmable(model, groups, {})
    full, small = net(x)
    (full.sin().sum() - small.sin().sum()).backward()
    found = gradients(net)
    for name, _ in model.named_parameters():
        if is_private(model, name):
            assert torch.equal(found[f"model.{name}"], -found[f"skeleton.{name}"])
        else:
            assert found[f"model.{name}"].abs().max() < 1e-12


# --- training ----------------------------------------------------------------------------------------


def set_shared_weights(net: Slimmable, full: nn.Module, small: nn.Module) -> None:
    """Of the cut network, to those of the full one."""
    cut = dict(shrink(full, net.groups, net.widths, net.order).named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if not is_private(small, name):
                parameter.copy_(cut[name])


@pytest.mark.parametrize("name", WITH_BATCHNORM)
def test_training_is_that_of_two_networks_kept_equal_by_hand(name: str) -> None:
    net, x = pair(name)
    full, small = by_hand(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(3):
        batch = x.roll(step, dims=-1)
        teacher, student = net(batch)
        optimizer.zero_grad()
        (F.cross_entropy(teacher, labels(x)) + kl_divergence(student, teacher)).backward()
        optimizer.step()

        full.zero_grad(), small.zero_grad()
        output = full(batch)
        F.cross_entropy(output, labels(x)).backward()
        kl_divergence(small(batch), output).backward()
        found = summed_gradients(net, full, small)
        with torch.no_grad():
            for key, parameter in full.named_parameters():
                parameter -= 0.01 * found[f"model.{key}"]
            for key, parameter in small.named_parameters():
                if is_private(small, key):
                    parameter -= 0.01 * found[f"skeleton.{key}"]
        set_shared_weights(net, full, small)

    expected = {f"model.{key}": tensor for key, tensor in full.state_dict().items()}
    expected |= {
        f"skeleton.{key}": tensor for key, tensor in small.state_dict().items() if is_private(small, key)
    }
    state = net.state_dict()
    del state["_extra_state"]
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-8, atol=1e-10, msg=key)
    assert torch.equal(net.small().eval()(x), net.eval()(x))
    torch.testing.assert_close(net(x), small.eval()(x), rtol=1e-8, atol=1e-9)


class Outputs(NamedTuple):
    logits: Tensor
    auxiliary: Tensor | None


def with_auxiliary_head() -> Net:
    def forward(net: Net, x: Tensor) -> Outputs:
        x = net.bn(net.a(x)).relu()
        logits = head(net, net.b(x).relu())
        return Outputs(logits, net.side(x.mean((2, 3))) if net.training else None)

    return Net(
        forward,
        a=conv(3, 6),
        bn=nn.BatchNorm2d(6),
        b=conv(6, 5),
        side=nn.Linear(6, 10),
        fc=nn.Linear(5, 10),
    )


def test_auxiliary_outputs_pass_through() -> None:
    torch.manual_seed(0)
    model = randomised(with_auxiliary_head()).train()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    groups = find_channel_groups(model, x, verify=False)
    net = Slimmable(model, groups, {"a": 3, "b": 2}, random_order(groups))
    teacher, student = by_hand(net)
    full, small = net(x)
    assert type(full) is type(small) is Outputs
    assert all(torch.equal(a, b) for a, b in zip((*full, *small), (*teacher(x), *student(x)), strict=True))
    loss = F.cross_entropy(logits_of(full), labels(x)) + 0.3 * F.cross_entropy(full.auxiliary, labels(x))
    (loss + kl_divergence(logits_of(small), logits_of(full))).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval()(x).auxiliary is None


# --- what is registered ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_parameters_are_the_models_own_and_the_private_ones(name: str) -> None:
    model, _, groups = make(name)
    own = list(model.parameters())
    keys = list(model.state_dict())
    net = Slimmable(model, groups, random_widths(groups))
    norms = [m for m in net.skeleton.modules() if isinstance(m, _BatchNorm)]
    private = [p for norm in norms for p in norm.parameters()]
    assert [id(p) for p in net.parameters()] == [id(p) for p in (*own, *private)]
    assert set(net.state_dict()) == {
        "_extra_state",
        *(f"model.{key}" for key in keys),
        *(f"skeleton.{key}" for key in keys if is_private(model, key)),
    }
    buffers = [b for norm in norms for b in norm.buffers()]
    assert [id(b) for b in net.buffers()] == [id(b) for b in (*model.buffers(), *buffers)]


@pytest.mark.parametrize("name", ["plain", "grouped", "resnet8"])
def test_state_goes_into_a_pair_with_other_weights_and_order(name: str) -> None:
    net, x = pair(name)
    net(x)
    state = net.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    model, _, groups = make(name, seed=1)
    other = Slimmable(model, groups, net.widths, prefix_order(groups))
    assert other.load_state_dict(state).missing_keys == []
    assert other.order.keys() == net.order.keys()
    assert all(np.array_equal(other.order[key], net.order[key]) for key in net.order)
    assert all(torch.equal(a, b) for a, b in zip(other(x), net(x), strict=True))
    assert torch.equal(other.eval()(x), net.eval()(x))
    assert torch.equal(other.small().eval()(x), net(x))


def test_state_at_full_width_round_trips() -> None:
    model, x, groups = make("plain")
    net = Slimmable(model, groups, {})
    net(x)
    other = Slimmable(make("plain")[0], groups, {})
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))


@pytest.mark.parametrize("widths", [{}, {"b": 2}, {"a": 2, "b": 2}])
def test_state_of_other_groups_is_refused(widths: dict[str, int]) -> None:
    model, _, groups = make("plain")
    state = Slimmable(model, groups, {"a": 3}).state_dict()
    with pytest.raises(WidthError, match="narrows other channel groups"):
        Slimmable(model, groups, widths).load_state_dict(state)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_a_pair_of_its_own(again: Callable[[Slimmable], Slimmable]) -> None:
    torch.manual_seed(0)
    layers = conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 5), nn.Flatten(), nn.Linear(320, 10)
    model, x = nn.Sequential(*layers).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net = Slimmable(model, find_channel_groups(model, x, verify=False), {"0": 3, "3": 2})
    mixed(*net(x)).backward()
    before = [output.clone() for output in net(x)]
    twin = again(net)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(twin(x), before, strict=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(net(x), before, strict=True))
    full, small = by_hand(twin)
    assert all(torch.equal(a, b) for a, b in zip(twin(x), (full(x), small(x)), strict=True))


def test_precision_and_device_follow_the_pair() -> None:
    net, x = pair("depthwise")
    net.float()
    outputs = net(x.float())
    assert {o.dtype for o in outputs} == {torch.float32}
    assert {t.dtype for t in net.small().state_dict().values()} == {torch.float32, torch.int64}
    net.double()
    full, small = by_hand(net)
    assert all(torch.equal(a, b) for a, b in zip(net(x), (full(x), small(x)), strict=True))
    net.to("meta")
    assert {o.device.type for o in net(x.to("meta"))} == {"meta"}
    assert {t.device.type for t in net.small().state_dict().values()} == {"meta"}


def test_frozen_parameters_stay_frozen_in_both() -> None:
    model, x, groups = make("plain")
    model.a.requires_grad_(False)
    model.bn.weight.requires_grad_(False)
    net = Slimmable(model, groups, {"a": 3})
    mixed(*net(x)).backward()
    frozen = {"model.a.weight", "model.a.bias", "model.bn.weight", "skeleton.bn.weight"}
    assert {name for name, p in net.named_parameters() if p.grad is None} == frozen
    assert not net.small().a.weight.requires_grad
    model.b.requires_grad_(False)  # later
    net.zero_grad()
    mixed(*net(x)).backward()
    assert {n for n, p in net.named_parameters() if p.grad is None} == frozen | {"model.b.weight"}


def test_begins_in_the_mode_of_the_model() -> None:
    model, x, groups = make("plain")
    net = Slimmable(model.eval(), groups, {"a": 3})
    assert not any(module.training for module in net.modules())
    assert isinstance(net(x), Tensor)
    assert all(module.training for module in net.train().modules())
    net.model.bn.eval()  # frozen statistics of the full network alone
    before = copy.deepcopy(net.state_dict())
    net(x)
    after = net.state_dict()
    assert torch.equal(after["model.bn.running_mean"], before["model.bn.running_mean"])
    assert not torch.equal(after["skeleton.bn.running_mean"], before["skeleton.bn.running_mean"])


# --- other layers and tensors ------------------------------------------------------------------------


class Counted(nn.Module):
    """Adds a buffer to its input and counts its calls in another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.ones(8, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.shift


def test_other_buffers_are_shared() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.b(net.count(net.a(x))).relu())

    torch.manual_seed(0)
    model = randomised(Net(forward, a=conv(3, 6), count=Counted(), b=conv(6, 5), fc=nn.Linear(5, 10))).train()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    groups = find_channel_groups(model, x, verify=False)
    model.count.calls.zero_()
    net = Slimmable(model, groups, {"a": 3, "b": 2})
    net(x)
    assert int(model.count.calls) == 2
    model.count.shift.fill_(7)
    full, small = by_hand(net)
    assert all(torch.equal(a, b) for a, b in zip(net(x), (full(x), small(x)), strict=True))
    assert [key for key in net.state_dict() if "count" in key] == ["model.count.calls"]


def test_running_statistics_of_other_norms_are_private_too() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.norm(net.b(net.a(x).relu())).relu())

    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    model = randomised(Net(forward, a=conv(3, 6), b=conv(6, 6), norm=norm, fc=nn.Linear(6, 10))).train()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    groups = find_channel_groups(model, x, verify=False)
    net = Slimmable(model, groups, {"a": 4, "b": 3})
    full, small = by_hand(net)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(net(x), (full(x), small(x)), strict=True))
    assert torch.equal(net.eval()(x), small.eval()(x))
    assert torch.equal(net.small()(x), small(x))
    assert torch.equal(net.model(x), full.eval()(x))


def test_recurrent_layers_compute_with_the_shared_weights() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.b(net.a(x).relu()).mean(2).transpose(1, 2)  # (B, W, C)
        return net.fc(net.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    rnn = nn.LSTM(5, 4, batch_first=True)
    model = Net(forward, a=conv(3, 6), b=conv(6, 5), rnn=rnn, fc=nn.Linear(4, 10))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    groups = find_channel_groups(model, x.float(), verify=False)
    randomised(model).train()
    net = Slimmable(model, groups, {"a": 3})
    for _ in range(2):
        net.zero_grad()
        full, small = by_hand(net)
        mixed(*net(x)).backward()
        mixed(full(x), small(x)).backward()
        assert_all_close(gradients(net), summed_gradients(net, full, small))
        with torch.no_grad():
            model.rnn.weight_ih_l0.add_(1)
    twin = copy.deepcopy(net)
    assert all(torch.equal(a, b) for a, b in zip(twin(x), net(x), strict=True))


def test_tied_weights_stay_tied() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).relu()
        return head(net, net.again(x + net.a(x).relu() + net.b(x).relu()))

    torch.manual_seed(0)
    layers = {"stem": conv(3, 6), "a": conv(6, 6), "b": conv(6, 6)}
    layers["b"].weight = layers["a"].weight
    model = randomised(Net(forward, **layers, again=layers["a"], fc=nn.Linear(6, 10))).train()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (group,) = groups = find_channel_groups(model, x)
    assert group.frozen is None
    net = Slimmable(model, groups, {"stem": 3}, random_order(groups))
    for _ in range(2):
        net.zero_grad()
        full, small = by_hand(net)
        mixed(*net(x)).backward()
        mixed(full(x), small(x)).backward()
        assert_all_close(gradients(net), summed_gradients(net, full, small))
    small: Any = net.small()
    assert small.b.weight is small.a.weight
    assert small.again is small.a


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"aa": 2}, r"no channel group 'aa' in this model \(did you mean 'a'\?\)"),
        ({"a": 6}, r"group 'a' cannot have 6 channels, only multiples of 4 up to 16"),
        ({"a": 0}, r"group 'a' cannot have 0 channels"),
        ({"a": "8"}, r"group 'a' cannot have '8' channels"),
        ({"a": 20}, r"group 'a' cannot have 20 channels"),
    ],
)
def test_widths_that_do_not_fit(widths: dict, message: str) -> None:
    model, _, groups = make("grouped")
    with pytest.raises(WidthError, match=message):
        Slimmable(model, groups, widths)


def test_groups_of_another_model_and_orders_that_are_none() -> None:
    model, _, groups = make("plain")
    with pytest.raises(WidthError, match="found on another model"):
        Slimmable(make("residual")[0], groups, {"b": 2})
    with pytest.raises(WidthError, match="the channel order lacks group 'a'"):
        Slimmable(model, groups, {"a": 2}, {"b": range(5)})
    with pytest.raises(WidthError, match="not a permutation of 6"):
        Slimmable(model, groups, {"a": 2}, {"a": [0, 1]})
