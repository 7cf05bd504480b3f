"""Running a model on example inputs, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def call(model: nn.Module, example_inputs: Inputs) -> Any:
    """Runs the model on a tensor, a sequence of positional inputs or a mapping of named ones."""
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of nested sequences, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors_in(getattr(value, name))]
    return []


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested sequences and mappings with `fn` applied to every tensor."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, fn) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_tensors(v, fn) for v in value]
    return value


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within the block these hooks are there; they are removed on exit."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Gives every module its mode and every parameter its `requires_grad` back on exit.

    Hooks that the forward pass registers stay, as after any other: modules remember that they have them.
    """
    modes = {m: m.training for m in model.modules()}
    grads = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, requires_grad in grads.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Keeps PyTorch's attention and its encoder layer off their fused kernels, which run no submodules."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
