"""torch-pruning's `DependencyGraph`, read safely.

The graph says which channel axes are tied to each other and by which index maps. This module builds it
without touching the user's model and within bounds, and reads it as arrays, where torch-pruning walks
lists of one Python object per channel. Defects of torch-pruning 1.6.1 that are kept from the caller here:

* it leaves the model in eval mode and loses the graph behind parameters with `requires_grad=False`;
* shape inference (`shape_infer`) and the search for class tokens in `_trace` visit every *path* of the
  graph, which never ends on attention models: both are bounded or left out;
* it guesses the channel dimension of bare parameters: here it is the one whose length fits the group;
* ties to the network's input and output are not marked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.node import Node

from torch_pruning_adapters.errors import UnsupportedModelError
from torch_pruning_adapters.group import Role

# DenseNet-201, the largest of torchvision's supported models in this respect, needs 1.4e5 look-ups.
MAX_LOOKUPS = 3_000_000
MAX_TIES = 32
MAX_VISITS = 20  # of a node in one walk, on average
MAX_SPREAD = 256  # entries of a flattened axis for each channel of the widest layer

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass
class Axis:
    """A layer's channel axis as the graph sees it, and the producers' channels found on it.

    `index` and `source` list pairs: entry `index` of this axis is tied to channel `source` of the axis
    `root` of the walk that found it.
    """

    layer: str
    module: nn.Module | nn.Parameter
    role: Role
    size: int
    index: list[np.ndarray] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)
    root: list[int] = field(default_factory=list)


@dataclass
class Traced:
    """All channel axes reached from the model's convolutions and linear layers.

    `blocked` holds, for an axis (by position), why channels reached from it cannot be cut.
    `reaches_output` holds the axes whose channels are the network's output.
    """

    axes: list[Axis]
    blocked: dict[int, str]
    reaches_output: set[int]


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
def preserved(model: nn.Module) -> Iterator[None]:
    """Gives every module its mode and hooks and every parameter its `requires_grad` back on exit."""
    modes = {m: m.training for m in model.modules()}
    hooks = {m: set(m._forward_hooks) for m in model.modules()}
    grads = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, known in hooks.items():  # torch-pruning leaves its own where the forward pass fails
            for hook in set(module._forward_hooks) - known:
                del module._forward_hooks[hook]
        for parameter, requires_grad in grads.items():
            parameter.requires_grad_(requires_grad)


def trace(model: nn.Module, example_inputs: Inputs) -> Traced:
    """Builds the dependency graph and walks it from every convolution and linear layer.

    Raises:
        UnsupportedModelError: The graph cannot be built, or only wrongly; the message names the cause.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("the model went through torch.compile: give the one from before it")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise UnsupportedModelError(
                f"{name!r} is a MultiheadAttention: its heads split the channels inside the layer, "
                "which is not followed"
            )
    graph = _BoundedGraph()
    with preserved(model), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning warns of what is checked here
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            graph.build_dependency(
                model, example_inputs, forward_fn=graph.run, output_transform=list, verbose=False
            )
        except UnsupportedModelError:
            raise
        except RecursionError as error:
            raise UnsupportedModelError("the model's graph is nested too deeply to be traced") from error
        except Exception as error:
            raise UnsupportedModelError(
                f"torch-pruning cannot build this model's graph: {type(error).__name__}: {error}"
            ) from error
        return _walk_all(graph)


class _BoundedGraph(tp.DependencyGraph):
    """torch-pruning's graph, bounded in time and aware of the network's ends and bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lookups = 0
        self.widest = 0  # longest channel axis of the model
        self.inputs: list[Tensor] = []
        self.outputs: list[Any] = []  # grad_fn of each output
        self.owners: set[nn.Module] = set()  # modules with parameters of their own
        self.called: set[nn.Module] = set()  # those of them that the forward pass called
        self.blocked: dict[Node, str] = {}

    def run(self, model: nn.Module, example_inputs: Inputs) -> list[Tensor]:
        """The forward pass that is traced; returns the outputs that depend on a parameter."""
        self.inputs = []

        def leaf(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            copy = t.detach().clone().requires_grad_()
            self.inputs.append(copy)
            return copy

        hooks = [m.register_forward_hook(lambda module, *_: self.called.add(module)) for m in self.owners]
        try:
            out = self._run_with_auxiliary_heads(model, map_tensors(example_inputs, leaf))
        finally:
            for hook in hooks:
                hook.remove()
        found = [t for t in tensors_in(out) if t.grad_fn is not None]
        if not found:
            raise UnsupportedModelError(
                "the model's output does not depend on its parameters: nothing to trace"
            )
        self.outputs = [t.grad_fn for t in found]
        self._check_calls()
        return found

    def _run_with_auxiliary_heads(self, model: nn.Module, example_inputs: Inputs) -> Any:
        """Runs in eval mode, but lets containers take their training branch where they can.

        Auxiliary heads (GoogLeNet, Inception) run only in training; their layers read channels too.
        Layers without children (normalisation, dropout, stochastic depth) stay in eval mode.
        """
        model.eval()
        plain = call(model, example_inputs)
        if self.called.issuperset(self.owners):
            return plain
        for module in model.modules():
            module.training = next(module.children(), None) is not None
        try:
            return call(model, example_inputs)
        except Exception:  # a training branch that wants targets: the eval branch is what there is
            model.eval()
            return call(model, example_inputs)

    def _detect_unwrapped_parameters(self, unwrapped_parameters: Any) -> tuple[dict, list]:
        self._owned = {
            id(p) for m in self.model.modules() if isinstance(m, _LAYERS) for p in m.parameters(recurse=False)
        }
        self.widest = max((n for p in self.model.parameters() for n in p.shape[:2]), default=0)
        self._owner = {p: (m, n) for m in self.model.modules() for n, p in m.named_parameters(recurse=False)}
        self.owners = {m for m, _ in self._owner.values()}
        return {}, []

    def _trace(self, *args: Any, **kwargs: Any) -> dict[Any, Node]:
        nodes = super()._trace(*args, **kwargs)
        inputs = {id(t) for t in self.inputs}
        for node in list(nodes.values()):
            traced = 0
            for fn, _ in getattr(node.grad_fn, "next_functions", ()):
                leaf = getattr(fn, "variable", None)
                if leaf is not None and id(leaf) in inputs:
                    self.blocked[node] = "tied to the network's input"
                elif isinstance(leaf, nn.Parameter) and id(leaf) not in self._owned:
                    _add_parameter(nodes, node, leaf, fn)
                    traced += 1
                elif fn is not None:
                    traced += 1
            if node.type == tp.ops.OPTYPE.CONCAT and traced < len(node.grad_fn.next_functions):
                self.blocked.setdefault(node, "concatenated with a constant")
        return nodes

    def get_out_channels(self, module_or_node: Any) -> int | None:
        self._look_up()
        return super().get_out_channels(module_or_node)

    def get_in_channels(self, module_or_node: Any) -> int | None:
        self._look_up()
        return super().get_in_channels(module_or_node)

    def _look_up(self) -> None:
        self.lookups += 1
        if self.lookups > MAX_LOOKUPS:
            raise UnsupportedModelError(
                "torch-pruning's shape inference does not end on this model (it follows every path "
                "through its reshapes and branches)"
            )

    def _check_calls(self) -> None:
        """Refuses layers whose weights are used without calling the layer."""
        leaves = set()
        stack, seen = list(self.outputs), set()
        while stack:
            fn = stack.pop()
            if fn is None or fn in seen:
                continue
            seen.add(fn)
            leaves.add(id(getattr(fn, "variable", None)))
            stack.extend(f for f, _ in fn.next_functions)
        for name, module in self.model.named_modules():
            if isinstance(module, _LAYERS) and module not in self.called:
                for parameter in module.parameters(recurse=False):
                    if id(parameter) in leaves:
                        raise UnsupportedModelError(
                            f"{name!r} is not called as a layer: the model uses its weights directly, "
                            "so its channels cannot be followed"
                        )


_LAYERS = (
    _ConvNd,
    nn.Linear,
    _BatchNorm,
    _InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.Embedding,
)


def _add_parameter(nodes: dict[Any, Node], user: Node, parameter: nn.Parameter, grad_fn: Any) -> None:
    node = nodes.get(parameter)
    if node is None:
        node = nodes[parameter] = Node(parameter, grad_fn)
        wide = [d for d, n in enumerate(parameter.shape) if n > 1]
        node.pruning_dim = wide[-1] if wide else 0
    user.add_input(node)
    node.add_output(user)


def is_depthwise(module: nn.Module) -> bool:
    """One filter for each channel, as torch-pruning decides it."""
    return isinstance(module, _ConvNd) and module.groups == module.out_channels and module.out_channels > 1


def _is_producer(module: Any) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear)) and not is_depthwise(module)


def _walk_all(graph: _BoundedGraph) -> Traced:
    """Walks the graph from every producer whose channels no earlier walk has reached completely."""
    nodes: dict[Any, Node] = graph.module2node
    names = {m: n for n, m in graph.model.named_modules()}
    outputs = set(graph.outputs)
    ends = {n for n in nodes.values() if n.type == tp.ops.OPTYPE.OUTPUT or n.grad_fn in outputs}

    axes: list[Axis] = []
    position: dict[tuple[Node, bool], int] = {}
    traced = Traced(axes, {}, set())

    def axis_of(node: Node, out: bool) -> int | None:
        if not isinstance(node.module, (*_LAYERS, nn.Parameter)):
            return None
        separate = _is_producer(node.module)
        key = (node, out or not separate)
        if key not in position:
            module = node.module
            if isinstance(module, nn.Parameter):
                owner, attribute = graph._owner[module]
                layer = f"{names[owner]}.{attribute}".lstrip(".")
            else:
                layer = names[module]
            role: Role = "through" if not separate else "producer" if out else "consumer"
            position[key] = len(axes)
            axes.append(Axis(layer, module, role, _axis_size(node, out)))
        return position[key]

    in_model_order = [nodes[m] for m in graph.model.modules() if m in nodes and _is_producer(m)]
    for node in in_model_order:
        start = axis_of(node, out=True)
        assert start is not None
        reached = np.zeros(axes[start].size, dtype=bool)
        for found in axes[start].index:
            reached[found] = True
        if reached.all():
            continue
        for (target, out), pairs in _walk(graph, node, axes[start].size).items():
            if target in ends and (out or not _is_producer(target.module)):
                traced.reaches_output.add(start)
            if target in graph.blocked and not (out and _is_producer(target.module)):
                traced.blocked[start] = graph.blocked[target]
            if isinstance(target.module, nn.PReLU) and target.module.num_parameters == 1:
                continue
            at = axis_of(target, out)
            if at is not None and pairs[:, 0].max() >= axes[at].size:
                traced.blocked[start] = f"is reshaped on its way to {axes[at].layer!r}, which is not followed"
            elif at is not None:
                axes[at].index.append(pairs[:, 0])
                axes[at].source.append(pairs[:, 1])
                axes[at].root.append(start)
            elif target.module in names:
                traced.blocked[start] = (
                    f"reaches {names[target.module]!r}, a {type(target.module).__name__}, which cannot be cut"
                )
    return traced


def _axis_size(node: Node, out: bool) -> int:
    module = node.module
    if isinstance(module, nn.Parameter):
        return module.shape[node.pruning_dim]
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    pruner = tp.pruner.function.PrunerBox[tp.ops.module2type(module)]
    size = pruner.get_out_channels(module) if out else pruner.get_in_channels(module)
    return 1 if size is None else size


def _walk(graph: _BoundedGraph, root: Node, size: int) -> dict[tuple[Node, bool], np.ndarray]:
    """All axes tied to the root's output channels, as (entry of the axis, root channel) pairs (N, 2).

    The keys are node and side: True for the output side of a layer that has two.
    """
    everything = np.repeat(np.arange(size)[:, None], 2, axis=1)
    start = graph.get_pruner_of_module(root.module).prune_out_channels
    found: dict[tuple[Node, bool], np.ndarray] = {(root, True): everything}
    stack = [(root, start, everything)]
    steps = 0
    while stack:
        node, pruning_fn, pairs = stack.pop()
        steps += 1
        if steps > MAX_VISITS * len(graph.module2node) or pairs[:, 0].max() >= MAX_SPREAD * graph.widest:
            raise UnsupportedModelError(
                f"the channels of {root._name!r} run in a circle through reshapes, which is not followed"
            )
        for dep in node.dependencies:
            if not dep.is_triggered_by(pruning_fn):
                continue
            mapped = pairs
            for mapping in dep.index_mapping:
                if mapping is not None:
                    mapped = _map(mapping, mapped)
            key = (dep.target, graph.is_out_channel_pruning_fn(dep.handler))
            if key in found:
                known = found[key]
                if np.array_equal(mapped, known):
                    continue
                new = mapped[~np.isin(_code(mapped, size), _code(known, size))]
                found[key] = np.concatenate([known, new])
                _refuse_mixing(found[key], size, root)
            else:
                new = found[key] = mapped
            if len(new):
                stack.append((dep.target, dep.handler, new))
    return {key: pairs for key, pairs in found.items() if len(pairs)}


def _refuse_mixing(pairs: np.ndarray, size: int, root: Node) -> None:
    """Refuses graphs whose reshapes tie (nearly) every channel to every other, window attention's say."""
    if len(pairs) > MAX_TIES * size and len(pairs) > MAX_TIES * len(np.unique(pairs[:, 0])):
        raise UnsupportedModelError(
            f"reshapes behind {root._name!r} mix its channels: each is tied to more than {MAX_TIES} others"
        )


def _code(pairs: np.ndarray, size: int) -> np.ndarray:
    return pairs[:, 0] * size + pairs[:, 1]


def _map(mapping: Any, pairs: np.ndarray) -> np.ndarray:
    """Applies one of torch-pruning's index maps to (entry, root channel) pairs (N, 2)."""
    index, root = pairs[:, 0], pairs[:, 1]
    if isinstance(mapping, index_mapping._FlattenIndexMapping):
        n = mapping._stride
        if mapping.reverse:
            return np.unique(np.stack([index // n, root], axis=1), axis=0)
        entries = (index[:, None] * n + np.arange(n)).reshape(-1)
        return np.stack([entries, np.repeat(root, n)], axis=1)
    if isinstance(mapping, (index_mapping._ConcatIndexMapping, index_mapping._SplitIndexMapping)):
        low, high = mapping.offset
        into_part = mapping.reverse == isinstance(mapping, index_mapping._ConcatIndexMapping)
        if not into_part:
            return np.stack([index + low, root], axis=1)
        inside = (index >= low) & (index < high)
        return np.stack([index[inside] - low, root[inside]], axis=1)
    mapped = mapping([_HybridIndex(idx=int(i), root_idx=int(r)) for i, r in pairs])
    return np.array([(i.idx, i.root_idx) for i in mapped], dtype=int).reshape(-1, 2)
