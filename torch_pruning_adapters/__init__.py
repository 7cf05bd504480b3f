"""Channel groups, importance orders and surgery for PyTorch models.

Useful on its own: neither NNI nor `nni_dbs` is needed.

    groups = find_channel_groups(model, torch.zeros(1, 3, 224, 224))
    small = shrink(model, groups, {g.name: g.size // 2 for g in groups if g.frozen is None})
"""

from torch_pruning_adapters.blocks import find_residual_blocks
from torch_pruning_adapters.channels import Channels
from torch_pruning_adapters.criteria import from_torch_pruning
from torch_pruning_adapters.errors import UnsupportedModelError, WidthError
from torch_pruning_adapters.group import ChannelGroup, Member, Product, Span
from torch_pruning_adapters.groups import find_channel_groups
from torch_pruning_adapters.importance import (
    bn_scale,
    channel_order,
    l1_norm,
    l2_norm,
    mirrored_order,
    prefix_order,
)
from torch_pruning_adapters.surgery import check_width, check_widths, kept_channels, removed_blocks, shrink
from torch_pruning_adapters.trace import register

__all__ = [
    "ChannelGroup",
    "Channels",
    "Member",
    "Product",
    "Span",
    "UnsupportedModelError",
    "WidthError",
    "bn_scale",
    "channel_order",
    "check_width",
    "check_widths",
    "find_channel_groups",
    "find_residual_blocks",
    "from_torch_pruning",
    "kept_channels",
    "l1_norm",
    "l2_norm",
    "mirrored_order",
    "prefix_order",
    "register",
    "removed_blocks",
    "shrink",
]
