"""torch-pruning's importance criteria, for channel groups."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.group import Group
from torch_pruning.dependency.node import Node
from torch_pruning.pruner.function import PrunerBox

from torch_pruning_adapters.errors import WidthError
from torch_pruning_adapters.group import ChannelGroup, Member
from torch_pruning_adapters.importance import Importance


def from_torch_pruning(criterion: tp.importance.Importance) -> Importance:
    """A criterion of torch-pruning as an importance of channels.

    Use it for what is not in `torch_pruning_adapters.importance`: Taylor, Hessian, LAMP, FPGM, OBD-C. Those
    that need gradients want a `backward` on the model first. It sees the group's convolutions, linear layers
    and normalisations as torch-pruning would have grouped them.

        order = channel_order(model, groups, from_torch_pruning(tp.importance.GroupTaylorImportance()))

    Raises:
        WidthError: From the importance, for a group that the criterion gives no scores.
    """

    def importance(model: nn.Module, group: ChannelGroup) -> Tensor:
        found = criterion(_as_torch_pruning(model, group))
        if found is None or len(found) < group.size:
            raise WidthError(
                f"{type(criterion).__name__} gives group {group.name!r} no scores; does it need gradients, "
                "or layers of another kind?"
            )
        return torch.as_tensor(found)[: group.size]

    return importance


def _as_torch_pruning(model: nn.Module, group: ChannelGroup) -> Group:
    """The group's layers with their entries, and its channel behind each, as torch-pruning's group."""
    made = Group()
    for member in group.members:
        module = model.get_submodule(member.layer)
        kind = tp.ops.module2type(module)
        if member.tensors and kind in PrunerBox and member.kind != "parameter":
            box = PrunerBox[kind]
            prune = box.prune_in_channels if member.role == "consumer" else box.prune_out_channels
            node = Node(module, None, member.layer)
            index, channels = _entries(member)
            item = GroupItem(Dependency(prune, prune, node, node), index)
            item.root_idxs = channels
            made._group.append(item)
    return made


def _entries(member: Member) -> tuple[list[int], list[int]]:
    """Entries of the layer's axis, and the group's channel behind each."""
    index: list[int] = []
    channels: list[int] = []
    for s in member.spans:
        index += range(s.start, s.start + s.length * s.repeat)
        channels += [s.root + i for i in range(s.length) for _ in range(s.repeat)]
    return index, channels
