"""Final training of a pruned network inside of the full one, by in-place distillation.

The rows marked `*` in the tables of DMCP (Guo et al., 2020) and DBS: the full network learns from the labels,
the small one, on slices of the same weights, from the full one's outputs (Yu & Huang, "Universally Slimmable
Networks", 2019), and each normalises with BatchNorm layers of its own (Yu et al., "Slimmable Neural
Networks", 2019). AutoSlim (Yu & Huang, 2019) trains its results so too, three at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    channel_order,
    check_widths,
    kept_channels,
    removed_blocks,
    shrink,
)
from torch_pruning_adapters.group import lies_in
from torch_pruning_adapters.importance import Order, check_orders
from torch_pruning_adapters.surgery import check_model, keep_mask, kept_entries, layer_axes, select


class Slimmable(nn.Module):
    """A network and the smaller one inside of it: shared weights, BatchNorm layers of their own.

    Use it to train a searched network together with the trained full one, instead of fine-tuning it alone. A
    step costs a pass of each. Give the optimizer `slimmable.parameters()`:

        full, small = slimmable(images)
        loss = cross_entropy(full, labels) + kl_divergence(small, full)  # no gradient reaches the teacher

    In eval mode the output is that of the small network: what evaluates a model scores what will be kept.
    Outputs are the model's own; where there are several (GoogLeNet in train mode), distil
    `nni_dbs.steps.logits_of(small)` from `logits_of(full)`.

    Weights of the small network are slices of the model's Parameters, taken anew in every pass; there the
    gradients of both networks meet. Private are BatchNorm layers and others that keep running statistics;
    they begin with the kept entries of the full network's. Other buffers are the model's.

    Change the model's structure before it is given here. SyncBatchNorm and `DistributedDataParallel` may be
    put around it. Switch off what runs layers again in `backward` (`torch.utils.checkpoint`), which fails.

    Args:
        model: The trained full network. Not a copy: it is trained.
        groups: From `find_channel_groups` on this model.
        widths: Group name -> channels of the small network; a missing group keeps its full width.
        order: As for `shrink`, and the same default, ranked now and frozen. Give that of the search.

    Attributes:
        model: The full network.
        skeleton: The small network without its shared tensors: registers the private layers.
        groups, widths, order: As above. The order is part of `state_dict`, so that a loaded state keeps its
            channels.

    Raises:
        WidthError: As `shrink`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        widths: Mapping[str, int],
        order: Order | None = None,
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.widths = dict(widths)
        check_widths(self.groups, self.widths)
        self._narrowed = [g for g in self.groups if self.widths.get(g.name, g.size) < g.size]
        self._removed = removed_blocks(self.groups, self.widths)
        check_model(dict(model.named_modules()), self._narrowed)
        self.order = check_orders(
            self._narrowed, channel_order(model, self._narrowed) if order is None else order
        )
        self.training = model.training
        self.model = model
        self.skeleton = shrink(model, self.groups, self.widths, self.order)
        self._private = tuple(name for name, m in self.skeleton.named_modules() if _is_private(m))
        for name, module in self.skeleton.named_modules():
            if name not in self._private:
                module._parameters.update(dict.fromkeys(module._parameters))
                module._buffers.update(dict.fromkeys(module._buffers))
        self._entries = self._find_entries()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In train mode (output of the full network, output of the small one), in eval mode the latter."""
        if not self.training:
            return self._run_small(args, kwargs)
        full = self.model(*args, **kwargs)
        return full, self._run_small(args, kwargs)

    def small(self) -> nn.Module:
        """The small network as a plain module with tensors of its own: what you keep."""
        small = shrink(self.model, self.groups, self.widths, self.order)
        for name in self._private:
            private = self.skeleton.get_submodule(name)
            small.get_submodule(name).load_state_dict(private.state_dict())
        return small

    def get_extra_state(self) -> Tensor:
        """The order of all narrowed groups, one after another."""
        return torch.from_numpy(np.concatenate([np.zeros(0, int), *self.order.values()]))

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the order of a saved state.

        Raises:
            WidthError: It is of other groups.
        """
        sizes = [g.size for g in self._narrowed]
        if len(state) != sum(sizes):
            raise WidthError("the state narrows other channel groups; build Slimmable with the same widths")
        parts = np.split(state.cpu().numpy(), np.cumsum(sizes))
        order = {g.name: part for g, part in zip(self._narrowed, parts, strict=False)}
        self.order = check_orders(self._narrowed, order)
        self._entries = self._find_entries()

    def _run_small(self, args: Any, kwargs: Any) -> Any:
        shared = {
            name: select(tensor, self._entries[name]) if name in self._entries else tensor
            for name, tensor in self._shared_tensors()
        }
        return functional_call(self.skeleton, shared, args, kwargs, tie_weights=False)

    def _shared_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of the full network that the small one has none of its own for."""
        for layer, module in self.model.named_modules():
            if layer not in self._private and not lies_in(layer, self._removed):
                for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None:
                        yield _full_name(layer, name), tensor

    def _find_entries(self) -> dict[str, dict[int, np.ndarray]]:
        """What the small network keeps of each tensor: name -> dimension -> entries, ascending."""
        kept = kept_channels(self._narrowed, self.widths, self.order)
        layers = kept_entries(layer_axes(self._narrowed), keep_mask(self._narrowed, kept))
        return {
            _full_name(layer, name): entries
            for layer, tensors in layers.items()
            for name, entries in tensors.items()
        }


def _full_name(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _is_private(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or getattr(module, "running_mean", None) is not None
