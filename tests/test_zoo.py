"""Every torchvision classification model is cut exactly, and trains as a supernet."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from nni_dbs import FlopsCost, ParamsCost, WidthSpace
from nni_dbs.cost import count_flops
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import ChannelGroup, channel_order, find_channel_groups, shrink

pytestmark = pytest.mark.slow

MODELS = list_models(module=torchvision.models)
SLOW_INITIALISATION = ("googlenet", "inception_v3", "vgg11", "vgg13", "vgg16", "vgg19")
INPUT_SIZES = {
    "inception_v3": 299,  # its auxiliary head needs the published size
    "maxvit_t": 224,
    **dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"), 224),
}
CLASSES = 1000


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    gc.collect()


def build(name: str) -> nn.Module:
    kwargs = {"init_weights": False} if name.startswith(SLOW_INITIALISATION) else {}
    return get_model(name, weights=None, **kwargs).eval()


def published(name: str) -> set[tuple[int, float]]:
    """Input size and multiply-adds (G) of every set of weights that torchvision publishes."""
    return {(w.transforms().crop_size[0], w.meta["_ops"]) for w in get_model_weights(name)}


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_classification_model_is_swept() -> None:
    assert len(MODELS) == 80


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_supported(name: str) -> None:
    model = build(name)
    size = INPUT_SIZES.get(name, 64)
    x = torch.randn(2, 3, size, size)
    groups = find_channel_groups(model, x[:1])
    frozen = {g.name for g in groups if g.frozen}
    assert frozen == {g.name for g in groups_of(name) if g.frozen}  # none by a trial
    assert not frozen or name.startswith(("shufflenet", "swin_v2"))

    whole = shrink(model, groups, {g.name: g.size for g in groups})
    state = whole.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(whole(x), model(x))
    del whole, state

    space = WidthSpace(groups, min_ratio=0, divisor=1)
    flops, params = FlopsCost(model, x[:1], groups), ParamsCost(model, groups)
    assert params.full == count_parameters(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        widths = space.sample(generator)
        small = shrink(model, groups, widths)
        y = small(x)
        assert y.shape == (2, CLASSES)
        assert y.isfinite().all()
        assert flops(widths) == count_flops(small, x[:1])
        assert params(widths) == count_parameters(small)


BATCHES = {"inception_v3": 4}  # its auxiliary head normalises 1x1 maps
NARROW = 0.5  # of each group at most, so that the sweep is quick
TOLERANCE = 1e-9


@functools.cache
def groups_of(name: str) -> tuple[ChannelGroup, ...]:
    size = INPUT_SIZES.get(name, 64)
    return find_channel_groups(build(name), torch.zeros(1, 3, size, size), verify=False)


def narrow_widths(groups: tuple[ChannelGroup, ...], seed: int) -> dict[str, int]:
    generator = torch.Generator().manual_seed(seed)
    widths = {}
    for g in groups:
        most = max(1, int(NARROW * g.size) // g.step)
        if g.frozen is None:
            widths[g.name] = g.step * int(torch.randint(1, most + 1, (), generator=generator))
    return widths


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that keep the scale of what passes, and statistics and offsets that hide no mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var") or tensor.dim() < 2 or "layer_scale" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)


@torch.no_grad()
def number(model: nn.Module) -> None:
    """Gives every entry of each real tensor its position, so that a cut tells what it kept."""
    for tensor in filter(Tensor.is_floating_point, model.state_dict().values()):
        torch.arange(tensor.numel(), out=tensor.view(-1))


def images(name: str) -> Tensor:
    size, generator = INPUT_SIZES.get(name, 64), torch.Generator().manual_seed(1)
    return torch.randn(BATCHES.get(name, 2), 3, size, size, generator=generator, dtype=torch.float64)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected value, which is not zero."""
    scale = float(expected.abs().max())
    assert scale > 0
    return float((found - expected).abs().max()) / scale


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_supernet_computes_as_the_cut_network(name: str) -> None:
    model, groups, x = build(name), groups_of(name), images(name)[:2]
    model.double()
    randomise(model)
    supernet = Supernet(model, groups)
    assert bool(supernet.inexact) == name.startswith(("convnext", "vit", "swin", "maxvit"))
    widths = narrow_widths(groups, 0)
    expected = shrink(model, groups, widths, supernet.order)(x)
    assert expected.isfinite().all()
    with supernet.at(widths):
        assert difference(model(x), expected) < TOLERANCE
    with supernet.gated(supernet.gates_of(widths)):
        found = difference(model(x), expected)
    assert found > TOLERANCE if supernet.inexact else found < TOLERANCE
    assert difference(model(x), expected) > 1e-3


def auxiliary_loss(outputs: Any) -> Tensor:
    """Cross entropy, and 0.3 times that of each auxiliary head."""
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    logits = [y for y in outputs if y is not None]
    targets = torch.arange(len(logits[0])) * 7
    losses = [F.cross_entropy(y, targets) for y in logits]
    return losses[0] + 0.3 * sum(losses[1:])


def seeded_loss(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return auxiliary_loss(model(x))


def checked_gradients(
    model: nn.Module, positions: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Compares and drops each gradient when it is complete, as full-size ones are large; what differs."""
    found: dict[str, float] = {}

    def check(name: str, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        assert name not in found
        flat, where = gradient.reshape(-1), positions[name].reshape(-1).long()
        found[name] = float((flat[where] - expected[name].reshape(-1)).abs().max())
        flat[where] = 0
        assert not flat.any(), f"{name}: a dropped entry has a gradient"

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(functools.partial(check, name))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_supernet_trains_as_the_cut_network(name: str) -> None:
    model, groups, x = build(name), groups_of(name), images(name)
    supernet = Supernet(model, groups, channel_order(model, groups))
    widths = narrow_widths(groups, 1)
    model.double()
    number(model)
    positions = shrink(model, groups, widths, supernet.order).state_dict()
    randomise(model)
    small = shrink(model, groups, widths, supernet.order).train()
    model.train()

    loss = seeded_loss(small, x)
    loss.backward()
    expected = {key: p.grad for key, p in small.named_parameters() if p.grad is not None}
    assert len(expected) == sum(1 for _ in model.parameters())
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-6
    found = checked_gradients(model, positions, expected)
    with supernet.at(widths):
        sliced = seeded_loss(model, x)
        sliced.backward()
    assert sliced.item() == pytest.approx(loss.item(), rel=1e-9)
    assert found.keys() == expected.keys()
    for key, worst in found.items():
        scale = float(expected[key].abs().max())
        assert worst <= TOLERANCE * scale + 1e-12 * largest, key

    statistics = dict(small.named_buffers())
    for key, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            assert torch.equal(buffer, statistics[key])
            continue
        kept = buffer.reshape(-1)[positions[key].reshape(-1).long()]
        torch.testing.assert_close(kept, statistics[key].reshape(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_published_flops(name: str) -> None:
    model = build(name)
    for size, giga in published(name):
        found = count_flops(model, torch.zeros(1, 3, size, size)) / 1e9
        assert found == pytest.approx(giga, rel=5e-3, abs=5e-4), f"at {size}x{size}"
