"""Models by name: torchvision's, or anything that a callable makes."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from nni_dbs.errors import ModelError
from torch_pruning_adapters.calls import Inputs
from torch_pruning_adapters.errors import nearest


def build_model(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The model called `name`: a torchvision name (`resnet18`) or `package.module:callable`.

    Modules are also looked for in the working directory.

    Args:
        name: See above.
        arguments: Keyword arguments of torchvision's builder, or of the callable.

    Raises:
        ModelError: No such model, or it cannot be built with these arguments.
    """
    if not isinstance(name, str):
        raise ModelError(f"a model is named by a text such as resnet18, not {name!r}")
    build = _callable(name) if ":" in name else _torchvision_builder(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet and Inception, on their initialisation
            model = build(**(arguments or {}))
    except Exception as error:
        raise ModelError(f"cannot build {name!r} with {arguments or {}}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def model_and_input(name: str, shape: Sequence[int]) -> tuple[nn.Module, Inputs]:
    """A model to look at, not to use: without pretrained parts, and one sample as its forward pass takes it.

    Torchvision's detectors take a list of images, its optical flow networks two of them.

    Args:
        name: As for `build_model`.
        shape: Of one sample, such as (3, 224, 224).
    """
    if name in torchvision.models.list_models(module=torchvision.models.detection):
        return build_model(name, {"weights_backbone": None}), ([torch.zeros(*shape)],)
    sample = torch.zeros(1, *shape)
    if name in torchvision.models.list_models(module=torchvision.models.segmentation):
        return build_model(name, {"weights_backbone": None}), sample
    if name in torchvision.models.list_models(module=torchvision.models.optical_flow):
        return build_model(name), (sample, sample)
    return build_model(name), sample


def _torchvision_builder(name: str) -> Any:
    known = torchvision.models.list_models()
    if name not in known:
        raise ModelError(
            f"torchvision has no model {name!r}{nearest(name, known)}; "
            "your own model is named as package.module:callable"
        )
    return torchvision.models.get_model_builder(name)


def _callable(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f"cannot import the model {name!r}: {error}") from error
