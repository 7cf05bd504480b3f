"""Groups and scores against torch-pruning's own, where its graph holds."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from helpers import CASES
from torch import nn
from torchvision.models import get_model

from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    channel_order,
    find_channel_groups,
    from_torch_pruning,
)

MODELS = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "efficientnet_b0",
    "squeezenet1_1",
    "vgg11_bn",
    "convnext_tiny",
)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
Axis = dict[tuple[str, bool], set[tuple[int, int]]]
IMAGE = torch.zeros(1, 3, 64, 64)


def ours(group: ChannelGroup) -> Axis:
    """(layer, whether its output side) -> (entry, channel) pairs."""
    kinds = ("conv", "linear", "depthwise", "norm", "layernorm")
    return {
        (m.layer, m.role != "consumer"): {
            (s.start + i * s.repeat + r, s.root + i)
            for s in m.spans
            for i in range(s.length)
            for r in range(s.repeat)
        }
        for m in group.members
        if m.kind in kinds
    }


def theirs(graph: tp.DependencyGraph, model: nn.Module, group: ChannelGroup) -> Axis:
    names = {m: n for n, m in model.named_modules()}
    root = model.get_submodule(group.name)
    prune = graph.get_pruner_of_module(root).prune_out_channels
    axes: Axis = {}
    found = graph.get_pruning_group(root, prune, list(range(group.size)))
    for item, (dep, idxs) in zip(found.items, found, strict=True):
        if isinstance(dep.target.module, LAYERS):
            depthwise = dep.target.type == tp.ops.OPTYPE.DEPTHWISE_CONV
            side = depthwise or graph.is_out_channel_pruning_fn(dep.handler)
            pairs = zip(idxs, item.root_idxs, strict=True)
            axes.setdefault((names[dep.target.module], side), set()).update(pairs)
    return axes


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_of_its_graph(name: str) -> None:
    model = get_model(name, weights=None, **({"init_weights": False} if name.startswith("vgg") else {}))
    groups = find_channel_groups(model, IMAGE, verify=False)
    graph = tp.DependencyGraph().build_dependency(model.eval(), IMAGE)
    assert groups
    for group in groups:
        assert ours(group) == theirs(graph, model, group)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_scores_are_its_own(name: str) -> None:
    torch.manual_seed(0)
    model = get_model(name, weights=None)
    groups = find_channel_groups(model, IMAGE, verify=False)
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    criterion = tp.importance.GroupMagnitudeImportance(p=2)
    importance = from_torch_pruning(criterion)
    for group in groups:
        root = model.get_submodule(group.name)
        whole = graph.get_pruning_group(root, tp.prune_conv_out_channels, list(range(group.size)))
        torch.testing.assert_close(importance(model, group), criterion(whole))


@pytest.mark.parametrize("case", ["plain", "concat", "grouped", "depthwise", "layer_norm", "chunk_and_add"])
def test_gradients_score_channels(case: str) -> None:
    model, x = CASES[case].build()
    groups = find_channel_groups(model, x)
    model(x).square().sum().backward()
    order = channel_order(model, groups, from_torch_pruning(tp.importance.GroupTaylorImportance()))
    for group in groups:
        assert sorted(order[group.name]) == list(range(group.size))


def test_a_criterion_without_scores_says_so() -> None:
    model, x = CASES["plain"].build()
    groups = find_channel_groups(model, x)
    nothing = from_torch_pruning(lambda group: None)
    with pytest.raises(WidthError, match="gives group 'a' no scores; does it need gradients"):
        channel_order(model, groups, nothing)
