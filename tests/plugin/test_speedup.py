"""NNI's own ModelSpeedup takes our masks and ends where `export` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from nni.compression.speedup import ModelSpeedup
from torch import nn

from nni_dbs import UniformPruner


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "build",
    [
        tiny,
        *(
            pytest.param(getattr(torchvision.models, name), marks=pytest.mark.slow)
            for name in ("resnet18", "resnet50", "mobilenet_v2", "regnet_y_400mf", "resnext50_32x4d")
        ),
    ],
    ids=lambda build: build.__name__,
)
@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_same_parameter_count(build: Any, budget: float) -> None:
    model = build().eval()
    images = torch.rand(2, 3, 64, 64)
    full = parameter_count(model)
    pruner = UniformPruner(
        model,
        [{"op_types": ["Conv2d", "Linear"]}],
        budget=budget,
        example_inputs=images,
        min_ratio=0,
        divisor=4,
    )
    _, masks = pruner.compress()
    small = pruner.export().eval()
    pruner.unwrap_model()

    graph = torch.fx.symbolic_trace(model)
    ModelSpeedup(model, images, masks, graph_module=graph).speedup_model()

    assert parameter_count(model) == parameter_count(small) == pruner.result.params < full
    assert model.eval()(images).shape == small(images).shape
