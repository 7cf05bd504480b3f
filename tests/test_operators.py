"""What operators tie: one small network for each rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import Net, conv, head
from torch import Tensor, nn

from torch_pruning_adapters import find_channel_groups


def found(net: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """Group name -> (size, step); every group can be cut, and verification agrees."""
    groups = find_channel_groups(net, x)
    assert [g.frozen for g in groups] == [None] * len(groups)
    assert groups == find_channel_groups(net, x, verify=False)
    assert len({g.name for g in groups}) == len(groups)
    return {g.name: (g.size, g.step) for g in groups}


def test_parameters_of_one_module_are_told_apart() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, F.conv2d(F.conv2d(x, net.first).relu(), net.second).relu())

    first, second = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(4, 4, 1, 1))
    net = Net(forward, first=first, second=second, fc=nn.Linear(4, 5))
    assert found(net, torch.randn(1, 3, 8, 8)) == {"first": (4, 1), "second": (4, 1)}


def test_one_filter_for_each_group_is_not_depthwise() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return head(net, net.g(net.a(x).relu()))

    net = Net(forward, a=conv(3, 8), g=conv(8, 2, groups=2), fc=nn.Linear(2, 5))
    groups = {g.name: g for g in find_channel_groups(net, torch.randn(1, 3, 8, 8))}
    assert (groups["a"].size, groups["a"].step, groups["a"].frozen) == (8, 2, None)
    assert groups["g"].frozen == "its 2 channels can only be cut together"
