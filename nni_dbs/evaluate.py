"""Scoring a sub-network, with BatchNorm statistics re-estimated before it is judged.

A network that got narrower keeps the running statistics of the wide one; they no longer describe its
activations, and its accuracy cannot be read before they are estimated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_dbs.supernet import Supernet

CALIBRATION_IMAGES = 2048


def score(
    supernet: Supernet,
    widths: Mapping[str, int],
    evaluate: Callable[[nn.Module], float],
    batches: Iterable[Tensor | Sequence[Tensor]],
    images: int = CALIBRATION_IMAGES,
    *,
    last: bool = False,
) -> float:
    """What `evaluate` says of the supernet at `widths`, after its BatchNorm was recalibrated.

    The supernet is as before afterwards: statistics, modes and weights. To score in several threads, give
    each a copy of the supernet.

    Args:
        supernet: The trained supernet.
        widths: Group name -> channels.
        evaluate: Gets the model, which computes at these widths meanwhile.
        batches: Of training images, iterated anew for every score; as `recalibrate_batchnorm`.
        images: As `recalibrate_batchnorm`.
        last: As `Supernet.at`.
    """
    with supernet.at(widths, last=last) as model, _kept(model):
        recalibrate_batchnorm(model, batches, images)
        with torch.no_grad():
            return evaluate(model)


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Gives modules their modes and buffers back."""
    modes = {module: module.training for module in model.modules()}
    buffers = list(model.buffers())
    old = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, old, strict=True):
            buffer.copy_(value)
        for module, training in modes.items():
            module.training = training


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
def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]], images: int = CALIBRATION_IMAGES
) -> None:
    """Re-estimate the BatchNorm statistics of `model` as the exact average over batches.

    Only the BatchNorm layers run in train mode (dropout stays off); weights, gradients and modes stay as
    they are. A model without BatchNorm is left alone and `batches` is not read.

    Args:
        model: The network as it will be used, so a supernet inside of `Supernet.at`.
        batches: Training images (B, ...) on the model's device, augmented and in batches as in training; of
            pairs such as (images, labels), the first part is taken. A list or loader, for reuse.
        images: Stop when at least so many were seen (fewer if `batches` ends). With too few, scores carry
            the luck of the draw.

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
            inputs = batch if isinstance(batch, Tensor) else batch[0]
            model(inputs)
            seen += len(inputs)
            if seen >= images:
                break
        if seen == 0:
            raise ValueError("no batches to recalibrate BatchNorm from; give at least one")


def use_batch_statistics(model: nn.Module) -> None:
    """Make the BatchNorm layers of `model` normalise by each batch's own statistics, in eval mode too.

    For good: they lose their running statistics, so use it on a copy. Outputs then depend on what shares a
    batch, which should be large and not sorted by class; a single image whose feature map is one pixel has
    no statistics (PyTorch raises ValueError). AutoSlim scores its networks so (arXiv 1903.11728).
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False
