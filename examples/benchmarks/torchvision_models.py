"""torchvision's models by name, each with the smallest inputs that its architecture takes."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model, list_models

from examples.benchmarks.detection_heads import before_suppression
from torch_pruning_adapters.calls import Inputs

FAMILIES: dict[str, list[str]] = {
    "classification": list_models(module=torchvision.models),
    "segmentation": list_models(module=torchvision.models.segmentation),
    "detection": list_models(module=torchvision.models.detection),
    "video": list_models(module=torchvision.models.video),
    "optical flow": list_models(module=torchvision.models.optical_flow),
}
SHAPES = {  # of one input
    "classification": (3, 64, 64),
    "segmentation": (3, 64, 64),
    "detection": (3, 128, 128),
    "video": (3, 8, 112, 112),
    "optical flow": (3, 128, 128),
}
LARGER = {  # by the beginning of a name: what takes no smaller input
    "inception": (3, 299, 299),  # for its auxiliary head
    "vit": (3, 224, 224),
    "maxvit": (3, 224, 224),
    "ssd300": (3, 300, 300),
    "ssdlite320": (3, 320, 320),
    "s3d": (3, 16, 224, 224),
    "mvit": (3, 16, 224, 224),
}
SLOW_INITIALISATION = ("googlenet", "inception_v3", "vgg")


def family_of(name: str) -> str:
    """The family of a known model."""
    return next(family for family, names in FAMILIES.items() if name in names)


def build(name: str) -> nn.Module:
    """The model with its initial weights, in eval mode."""
    family = family_of(name)
    arguments: dict[str, Any] = {}
    if name.startswith(SLOW_INITIALISATION):
        arguments["init_weights"] = False
    if family in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    if family == "detection" and not name.startswith("ssd"):
        arguments["min_size"] = arguments["max_size"] = inputs_of(name)[0].shape[-1]  # it resizes to that
    return get_model(name, weights=None, **arguments).eval()


def training_batch(name: str) -> tuple[Tensor, ...]:
    """As `inputs_of`, as many as normalisation over a batch needs."""
    return inputs_of(name, 4 if name == "inception_v3" else 2)  # its auxiliary head normalises 1x1 maps


def inputs_of(name: str, batch: int = 1) -> tuple[Tensor, ...]:
    """Random inputs of the module whose outputs are compared."""
    larger = [shape for start, shape in LARGER.items() if name.startswith(start)]
    shape = larger[0] if larger else SHAPES[family_of(name)]
    generator = torch.Generator().manual_seed(1)
    count = 2 if family_of(name) == "optical flow" else 1
    return tuple(torch.randn(batch, *shape, generator=generator) for _ in range(count))


def example_of(name: str) -> Inputs:
    """Inputs of the model's own forward pass."""
    inputs = inputs_of(name)
    return (list(inputs[0].sigmoid()),) if family_of(name) == "detection" else inputs


def comparable(name: str, model: nn.Module) -> nn.Module:
    """The model, or the part of a detector whose outputs can be compared."""
    return before_suppression(model) if family_of(name) == "detection" else model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that keep the scale of what passes, and statistics and offsets that hide no mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var") or tensor.dim() < 2 or "layer_scale" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)


@torch.no_grad()
def settle(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Moves the running statistics half of the way to those of a batch.

    Activations keep their scale then; where they grow from layer to layer, rounding in float32 does too.
    """
    norms = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    for norm in norms:
        norm.momentum = 0.5
    torch.manual_seed(0)
    model.train()(*inputs)
    model.eval()
    for norm, momentum in norms.items():
        norm.momentum = momentum
