"""Scores of channels, checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import CASES, Net, conv, head
from torch import nn

from torch_pruning_adapters import (
    ChannelGroup,
    Member,
    Span,
    WidthError,
    bn_scale,
    channel_order,
    find_channel_groups,
    l1_norm,
    l2_norm,
    prefix_order,
)

ROWS = torch.tensor([[3.0, -4.0], [1.0, 1.0], [0.0, -2.0]])
X = torch.zeros(1, 2, 4, 4)


def two_producers() -> tuple[Any, ChannelGroup]:
    """`a` and `b` compute three channels together; only `a` is followed by a norm."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return head(net, net.bn(net.a(x)) + net.b(x))

    net = Net(forward, a=conv(2, 3, 1), bn=nn.BatchNorm2d(3), b=conv(2, 3, 1), fc=nn.Linear(3, 10))
    with torch.no_grad():
        net.a.weight.copy_(ROWS[:, :, None, None])
        net.b.weight.copy_(-2 * ROWS.flip(0)[:, :, None, None])
        net.bn.weight.copy_(torch.tensor([0.5, -3.0, 1.0]))
    (group,) = find_channel_groups(net, X)
    return net, group


def test_values_by_hand() -> None:
    net, group = two_producers()
    assert l1_norm(net, group).tolist() == [7 + 4, 2 + 4, 2 + 14]
    assert l2_norm(net, group).tolist() == pytest.approx([(25 + 16) ** 0.5, (2 + 8) ** 0.5, (4 + 100) ** 0.5])
    assert bn_scale(net, group).tolist() == [0.5, 3.0, 1.0]


@pytest.mark.parametrize(
    ("importance", "expected"), [(l1_norm, [2, 0, 1]), (l2_norm, [2, 0, 1]), (bn_scale, [1, 2, 0])]
)
def test_order_puts_the_largest_first(importance: Any, expected: list[int]) -> None:
    net, group = two_producers()
    assert channel_order(net, [group], importance)[group.name].tolist() == expected


def test_bn_scale_without_affine_norm_falls_back() -> None:
    net, group = two_producers()
    net.bn = nn.BatchNorm2d(3, affine=False)
    assert torch.equal(bn_scale(net, group), l2_norm(net, group))


@pytest.mark.parametrize(
    ("case", "group", "rows"),
    [("transposed", "up", lambda w: w.abs().sum((0, 2, 3))), ("flattened", "fc1", lambda w: w.abs().sum(1))],
)
def test_other_producers(case: str, group: str, rows: Any) -> None:
    net, x = CASES[case].build()
    found = {g.name: g for g in find_channel_groups(net, x, verify=False)}[group]
    torch.testing.assert_close(l1_norm(net, found), rows(net.get_submodule(group).weight.detach()))


def test_producer_that_holds_a_channel_twice() -> None:
    net, x = CASES["chunk_and_add"].build()
    group = find_channel_groups(net, x, verify=False)[0]
    rows = net.a.weight.detach().abs().sum((1, 2, 3))
    torch.testing.assert_close(l1_norm(net, group), rows[:4] + rows[4:])


def test_norm_behind_a_concatenation() -> None:
    net, x = CASES["concat"].build()
    groups = find_channel_groups(net, x, verify=False)
    torch.testing.assert_close(bn_scale(net, groups[1]), net.bn.weight.detach()[4:].abs())


def test_grouped_transposed_producer() -> None:
    """Channel c of `up` is column c % 3 of the rows of block c // 3."""
    net, x = CASES["transposed_grouped"].build()
    group = find_channel_groups(net, x, verify=False)[1]
    weight = net.up.weight.detach().abs().sum((2, 3))
    expected = torch.stack([weight[c // 3 * 4 : c // 3 * 4 + 4, c % 3].sum() for c in range(6)])
    torch.testing.assert_close(l1_norm(net, group), expected)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.tensor([1.0, float("nan"), 0.0]), r"shape \(3,\) with NaN"),
        (torch.ones(4), r"expected 3 finite scores, got shape \(4,\)"),
        (torch.ones(3, 1), r"got shape \(3, 1\)"),
    ],
)
def test_bad_scores(score: torch.Tensor, message: str) -> None:
    net, group = two_producers()
    with pytest.raises(WidthError, match=message):
        channel_order(net, [group], lambda *_: score)


def test_blocks_are_ranked_together() -> None:
    """16 channels in 4 blocks: position p of all blocks has the score of its sum."""
    net, x = CASES["grouped"].build()
    group = find_channel_groups(net, x, verify=False)[0]
    score = torch.zeros(4, 4)
    score[:, 2] = 1.0
    score[3, 1] = 9.0
    order = channel_order(net, [group], lambda *_: score.flatten())["a"]
    assert order.tolist() == [1, 5, 9, 13, 2, 6, 10, 14, 0, 4, 8, 12, 3, 7, 11, 15]
    assert prefix_order([group])["a"].tolist() == np.arange(16).reshape(4, 4).T.flatten().tolist()


def test_many_ties_keep_the_networks_order() -> None:
    member = Member("a", "producer", "conv", (("weight", 0),), 64, (Span(0, 0, 64),))
    group = ChannelGroup("a", 64, 1, (member,))
    score = torch.arange(64) % 2
    order = channel_order(nn.Identity(), [group], lambda *_: score)["a"]
    assert order.tolist() == [*range(1, 64, 2), *range(0, 64, 2)]


def test_ties_keep_the_networks_order() -> None:
    net, group = two_producers()
    for _ in range(2):
        order = channel_order(net, [group], lambda *_: torch.tensor([1.0, 2.0, 1.0]))
        assert order[group.name].tolist() == [1, 0, 2]
    assert channel_order(net, [group], lambda *_: [1, 2, 1])[group.name].tolist() == [1, 0, 2]
