"""Residual blocks whose branch can be removed as a whole."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_pruning_adapters.calls import Inputs, call, hooked, map_tensors, preserved
from torch_pruning_adapters.group import ChannelGroup, lies_in


def find_residual_blocks(
    model: nn.Module, groups: Iterable[ChannelGroup], example_inputs: Inputs
) -> tuple[ChannelGroup, ...]:
    """The same groups; those inside of an identity-residual block name it and may have width 0.

    Use it to search depth too: all groups of a block at width 0 remove the block's branch, and the block
    becomes the identity. A block is an element of an `nn.Sequential` that runs once, maps one tensor to one
    of the same shape, has groups of its own, all of which can be cut, shares no layer with the rest, and
    returns its input exactly (in eval mode, on what reaches it for a random input) when the layers in it that
    write the residual stream are zero. Blocks do not contain each other; the innermost count. The model comes
    back as it was.

    Args:
        model: The model that `groups` were found on.
        groups: From `find_channel_groups`.
        example_inputs: As for `find_channel_groups`.
    """
    groups = tuple(groups)
    modules = dict(model.named_modules())
    shared = _shared_names(model)
    candidates = {
        name: module
        for name, module in _elements(modules)
        if _can_vanish(_inner(name, groups)) and not any(lies_in(other, [name]) for other in shared)
    }
    with preserved(model), torch.no_grad():
        model.eval()
        inputs = _inputs_of(model, candidates, example_inputs)
        found = [name for name, x in inputs.items() if _is_residual(name, candidates[name], groups, x)]
    innermost = [name for name in found if not any(b != name and lies_in(b, [name]) for b in found)]
    block_of = {g.name: name for name in innermost for g in _inner(name, groups)}
    return tuple(dataclasses.replace(g, block=block_of.get(g.name)) for g in groups)


def _elements(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The elements of every `nn.Sequential`, by dotted name."""
    for name, module in modules.items():
        if name and isinstance(modules[name.rpartition(".")[0]], nn.Sequential):
            yield name, module


def _inner(block: str, groups: Iterable[ChannelGroup]) -> list[ChannelGroup]:
    """The groups that lie in the block with all of their layers."""
    return [g for g in groups if all(lies_in(m.layer, [block]) for m in g.members)]


def _can_vanish(inner: Iterable[ChannelGroup]) -> bool:
    frozen = [g.frozen is not None for g in inner]
    return bool(frozen) and not any(frozen)


def _shared_names(model: nn.Module) -> list[str]:
    """All names of modules and parameters that have several."""
    named = [
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
    ]
    count = Counter(id(part) for _, part in named)
    return [name for name, part in named if count[id(part)] > 1]


def _inputs_of(
    model: nn.Module, candidates: Mapping[str, nn.Module], example_inputs: Inputs
) -> dict[str, Tensor]:
    """What reaches each candidate that runs once and on one tensor, for a random input."""
    generator = torch.Generator().manual_seed(0)
    entered: dict[str, list[Tensor | None]] = {name: [] for name in candidates}

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t

    def enter(name: str, args: Any, kwargs: Any) -> None:
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        entered[name].append(args[0].clone() if one else None)  # later layers may write into it

    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
        )
        for name, module in candidates.items()
    ]
    with hooked(handles):
        call(model, map_tensors(example_inputs, noise))
    return {name: xs[0] for name, xs in entered.items() if len(xs) == 1 and xs[0] is not None}


def _is_residual(name: str, block: nn.Module, groups: Iterable[ChannelGroup], x: Tensor) -> bool:
    """Whether the block returns `x` when its layers that write channels of outer groups are zero."""
    if not bool(x.any()):  # anything maps zeros to zeros
        return False
    inner = {g.name for g in _inner(name, groups)}
    outer = [m for g in groups if g.name not in inner for m in g.members]
    writers = {m.layer for m in outer if m.role != "consumer" and lies_in(m.layer, [name])}
    zeros = {
        parameter: torch.zeros_like(tensor)
        for parameter, tensor in block.named_parameters()
        if f"{name}.{parameter}".rpartition(".")[0] in writers
    }
    out = functional_call(block, zeros, (x.clone(),))
    return isinstance(out, Tensor) and out.dtype == x.dtype and torch.equal(out, x)
