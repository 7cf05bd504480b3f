"""Batches of any form: tensors in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from torch_pruning_adapters.calls import tensors_in


def batch_size(batch: Any) -> int:
    """Samples of a batch, by its first tensor, or else its first list; 0 if it has neither."""
    parts = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    parts = list(batch) if isinstance(batch, (list, tuple)) else parts
    lengths = [len(part) for part in parts if isinstance(part, Tensor) and part.dim()]
    lengths += [len(part) for part in parts if isinstance(part, (list, tuple))]
    return next(iter(lengths or [len(t) for t in tensors_in(parts) if t.dim()]), 0)


def part_of(batch: Any, size: int, samples: slice) -> Any:
    """Some samples of a batch: of tensors as long as it, and of lists with an entry for each sample."""

    def whole(part: Any) -> bool:
        return isinstance(part, Tensor) and part.dim() > 0 and len(part) == size

    def divisible(part: Any) -> bool:
        listed = isinstance(part, (list, tuple)) and part is not batch and len(part) == size
        return whole(part) or (listed and not all(map(whole, part)))

    return mapped(batch, lambda part: part[samples], divisible)


def _is_tensor(part: Any) -> bool:
    return isinstance(part, Tensor)


def mapped(batch: Any, fn: Callable[[Any], Any], where: Callable[[Any], bool] = _is_tensor) -> Any:
    """A copy of nested containers, each of its own type, with `fn` applied where `where` says so."""
    if where(batch):
        return fn(batch)
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)
        copied.update({name: mapped(part, fn, where) for name, part in batch.items()})
        return copied
    if isinstance(batch, (list, tuple)):
        parts = [mapped(part, fn, where) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [f.name for f in dataclasses.fields(batch)]
        return dataclasses.replace(batch, **{name: mapped(getattr(batch, name), fn, where) for name in names})
    return batch
