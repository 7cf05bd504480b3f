"""Every torchvision classification model: 64 are cut exactly, the other 16 are refused in bounded time."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from nni_dbs import FlopsCost, ParamsCost, WidthSpace
from nni_dbs.cost import count_flops
from torch_pruning_adapters import find_channel_groups, shrink

pytestmark = pytest.mark.slow

SUPPORTED = (
    "alexnet",
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"efficientnet_b{i}" for i in range(8)),
    *(f"efficientnet_v2_{size}" for size in "sml"),
    "googlenet",
    "inception_v3",
    *(f"mnasnet{width}" for width in ("0_5", "0_75", "1_0", "1_3")),
    "mobilenet_v2",
    *(f"mobilenet_v3_{size}" for size in ("small", "large")),
    *(f"regnet_x_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")),
    *(f"regnet_y_{size}" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf", "128gf")),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "resnext50_32x4d",
    *(f"resnext101_{kind}" for kind in ("32x8d", "64x4d")),
    *(f"squeezenet1_{minor}" for minor in (0, 1)),
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    *(f"wide_resnet{depth}_2" for depth in (50, 101)),
)
MIXED = "torch-pruning cannot build this model's graph"
WINDOWS = "mix its channels"
ATTENTION = "is a MultiheadAttention"
DIRECT = "uses its weights directly"
REFUSED = {
    **{f"shufflenet_v2_x{width}": MIXED for width in ("0_5", "1_0", "1_5", "2_0")},
    **{f"swin_{size}": DIRECT for size in "tsb"},
    **{f"swin_v2_{size}": DIRECT for size in "tsb"},
    **{f"vit_{kind}": ATTENTION for kind in ("b_16", "b_32", "l_16", "l_32", "h_14")},
    "maxvit_t": WINDOWS,
}
REFUSAL_SECONDS = 60
REFUSAL_MEGABYTES = 2000

SLOW_INITIALISATION = ("googlenet", "inception_v3", "vgg11", "vgg13", "vgg16", "vgg19")
INPUT_SIZES = {"inception_v3": 299}  # its auxiliary head needs the published size
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


def test_every_classification_model_is_listed_once() -> None:
    assert len(SUPPORTED) == 64
    assert len(REFUSED) == 16
    assert {*SUPPORTED, *REFUSED} == set(list_models(module=torchvision.models))


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_supported(name: str) -> None:
    model = build(name)
    size = INPUT_SIZES.get(name, 64)
    x = torch.randn(2, 3, size, size)
    groups = find_channel_groups(model, x[:1])
    assert [g.name for g in groups if g.frozen] == []

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


@pytest.mark.parametrize("name", SUPPORTED)
def test_published_flops(name: str) -> None:
    model = build(name)
    for size, giga in published(name):
        found = count_flops(model, torch.zeros(1, 3, size, size)) / 1e9
        assert found == pytest.approx(giga, rel=5e-3, abs=5e-4), f"at {size}x{size}"


REFUSE = """
import json, resource, sys, time
import torch
from torchvision.models import get_model
from torch_pruning_adapters import UnsupportedModelError, find_channel_groups

torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model, x = get_model(sys.argv[1], weights=None), torch.zeros(1, 3, 224, 224)
modes = [m.training for m in model.modules()]
before, start = peak(), time.monotonic()
try:
    find_channel_groups(model, x)
except UnsupportedModelError as error:
    message = str(error)
else:
    message = None
seconds, megabytes = time.monotonic() - start, peak() - before
same = modes == [m.training for m in model.modules()] and all(p.requires_grad for p in model.parameters())
print(json.dumps({"message": message, "seconds": seconds, "megabytes": megabytes, "same": same}))
"""


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_bounded_time_and_memory(name: str) -> None:
    """In a process of its own, whose peak memory is its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REFUSE, name],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["message"] is not None
    assert REFUSED[name] in found["message"]
    assert found["seconds"] < REFUSAL_SECONDS
    assert found["megabytes"] < REFUSAL_MEGABYTES
    assert found["same"]
