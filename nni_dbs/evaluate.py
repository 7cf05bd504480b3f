"""BatchNorm statistics of a sub-network, re-estimated before it is judged.

A network that got narrower keeps the running statistics of the wide one; they no longer describe its
activations, and its accuracy cannot be read before they are estimated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def cumulative_batchnorm(model: nn.Module) -> Iterator[tuple[_BatchNorm, ...]]:
    """Make the running statistics of `model` the plain average over the training batches seen inside.

    Use it around forward passes in train mode; the mode is the caller's choice, and the caller's modes,
    momenta and module flags are back on exit. Yields the BatchNorm layers that keep running statistics.
    A layer that saw no batch gets its old statistics back, and all layers do if an exception passes.
    """
    layers = tuple(m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None)
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    old = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    completed = False
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield layers
        completed = True
    finally:
        for layer, momentum, statistics in zip(layers, momenta, old, strict=True):
            layer.momentum = momentum
            if not (completed and saw_batches(layer)):
                for name, value in statistics.items():
                    layer.get_buffer(name).copy_(value)
        for module, training in modes.items():
            module.training = training


def saw_batches(layer: _BatchNorm) -> bool:
    """Whether a layer's running statistics hold at least one batch since they were last reset."""
    return layer.num_batches_tracked is not None and bool(layer.num_batches_tracked > 0)


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate the BatchNorm statistics of `model` as the exact average over `batches`.

    Only the BatchNorm layers run in train mode (dropout stays off); weights, gradients and modes stay as
    they are. A model without BatchNorm is left alone and `batches` is not read.

    Raises:
        ValueError: `batches` is empty.
    """
    with cumulative_batchnorm(model) as layers:
        if not layers:
            return
        model.eval()
        for layer in layers:
            layer.train()
        seen = 0
        for batch in batches:
            model(batch)
            seen += 1
        if seen == 0:
            raise ValueError("no batches to recalibrate BatchNorm from; give at least one")
