"""Following a model's channels through one forward pass.

The pass runs as it is. Every operator that it dispatches is seen with its arguments and its result, so
functional calls, reused and nested modules, and tensors made on the way are followed like layers, at the
cost of the operators that really run: no path through the graph is walked twice. `shape`s that the pass
reads, and the integers that it takes from modules, are `Length`s.

torch-pruning's `DependencyGraph` was used here before. It guesses how reshapes move channels and visits every
path, so that it fails on channel shuffles, windowed attention and the heads of detectors; the tests still
compare the groups with its own where it has them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_pruning_adapters import operators
from torch_pruning_adapters.calls import (
    Inputs,
    call,
    hooked,
    map_tensors,
    preserved,
    tensors_in,
    unfused_attention,
)
from torch_pruning_adapters.channels import OUTPUT, Channels, Facts
from torch_pruning_adapters.errors import UnsupportedModelError
from torch_pruning_adapters.lengths import Length

Handler = Callable[[Any, tuple[Any, ...], Any, Channels], None]
"""Called after a module ran: with it, its inputs in the order of its signature, its output, the channels."""

_HANDLERS: dict[type[nn.Module], Handler] = {}


def register(kind: type[nn.Module]) -> Callable[[Handler], Handler]:
    """Teaches `find_channel_groups` a module type whose forward pass it cannot follow, as a decorator.

    Use it for modules that call kernels of their own, or that mix channels in a way that their operators do
    not show. What happens inside of them is then not looked at; the handler says what it does to channels:

        @register(PerChannelScale)
        def per_channel_scale(module, inputs, output, channels):
            channels.tie((inputs[0], 1), (module.scale, 0))
            channels.carry((inputs[0], 1), (output, 1))
            channels.resize(module, "num_channels", (output, 1))

    It applies to instances of the type and of its subclasses that have no handler of their own.
    """

    def add(handler: Handler) -> Handler:
        _HANDLERS[kind] = handler
        return handler

    return add


def trace(model: nn.Module, example_inputs: Inputs) -> Channels:
    """Runs the model once and follows its channels; twice where a part of it runs in training only.

    Raises:
        UnsupportedModelError: The model does not run, or its outputs do not depend on its parameters.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("the model went through torch.compile: give the one from before it")
    channels = Channels(model)
    with preserved(model), _sizes_followed(model, channels):
        _run(model, example_inputs, channels)
    return channels


def _run(model: nn.Module, example_inputs: Inputs, channels: Channels) -> None:
    """Runs in eval mode, then lets containers take their training branch, if that uses more parameters.

    Auxiliary heads (GoogLeNet, Inception) run only in training; their layers read channels too. Layers
    without children (normalisation, dropout, stochastic depth) stay in eval mode.
    """
    model.eval()
    out = _follow(model, example_inputs, channels)
    facts = [channels.facts(t) for t in out if t.numel()]  # a detector may have found nothing
    if not out or (facts and not any(f.blocks or f.from_input for f in facts)):
        raise UnsupportedModelError("the model's output does not depend on its parameters: nothing to trace")
    if all(channels.is_seen(p) for p in model.parameters()):
        return
    for module in model.modules():
        module.training = next(module.children(), None) is not None
    frozen, counts = list(channels.frozen), list(channels.counts)
    try:
        _follow(model, example_inputs, channels)
    except UnsupportedModelError:  # a training branch that wants targets: the eval branch is what there is
        channels.frozen = frozen
    channels.counts = counts  # what a network costs, it costs in eval mode


def _follow(model: nn.Module, example_inputs: Inputs, channels: Channels) -> list[Tensor]:
    """One forward pass; the outputs."""

    def leaf(t: Tensor) -> Tensor:
        copied = t.detach().clone()
        channels.learn(copied, Facts([], True))
        return copied

    channels.stack.clear()
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        inputs = map_tensors(example_inputs, leaf)
        operations = _Operators(channels)
        stack.enter_context(_modules_followed(model, channels))
        stack.enter_context(_handled(model, channels, operations))
        stack.enter_context(_scripts_frozen(model, channels, operations))
        stack.enter_context(_functions_open())
        stack.enter_context(unfused_attention())
        stack.enter_context(operations)
        stack.enter_context(_Shapes(channels, operations))
        try:
            out = tensors_in(call(model, inputs))
        except UnsupportedModelError:
            raise
        except RecursionError as error:
            raise UnsupportedModelError("the model is nested too deeply to be traced") from error
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise UnsupportedModelError(f"the model does not run: {type(error).__name__}: {first}") from error
    for t in out:
        for block in channels.facts(t).blocks:
            channels.fix(block.numbers, OUTPUT)
    return out


class _Operators(TorchDispatchMode):
    """Shows every operator to its rule."""

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        self.channels = channels
        self.function = ""
        self.integers: list[int] = []
        self.paused = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if not self.paused:
            operation = operators.Operation(op, args, kwargs, out, self.function, self.integers)
            operators.apply(self.channels, operation)
        return out


class _Shapes(TorchFunctionMode):
    """Hands out shapes as `Length`s, and notes the integers that functions are called with."""

    def __init__(self, channels: Channels, operations: _Operators) -> None:
        super().__init__()
        self.channels = channels
        self.operations = operations

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operations = self.operations
        if operations.paused:
            return function(*args, **kwargs)
        outer = operations.function, operations.integers
        operations.function = getattr(function, "__name__", "")
        operations.integers = _integers((args[1:] if _is_method(args) else args, kwargs))
        try:
            out = function(*args, **kwargs)
        finally:
            operations.function, operations.integers = outer
        if function in _LEAVING:
            self.channels.fix_all(args[:1], f"leaves PyTorch through {function.__name__}()")
        if function == Tensor.numel:
            return math.prod(self._length(args[0], d, n) for d, n in enumerate(args[0].shape))
        if function == _SHAPE or function == Tensor.size:
            dim = args[1] if len(args) > 1 and function == Tensor.size else kwargs.get("dim")
            if dim is not None:
                return self._length(args[0], dim % args[0].dim(), out)
            return torch.Size([self._length(args[0], d, n) for d, n in enumerate(out)])
        return out

    def _length(self, tensor: Tensor, dim: int, value: int) -> int:
        block = self.channels.facts(tensor).at(dim)
        if block is None or self.channels.is_rigid(block, dim):
            return value
        return Length(value, block.along(dim)[0])


_LEAVING = (Tensor.numpy, Tensor.tolist)
_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]


def _is_method(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor)


def _integers(value: Any) -> list[int]:
    """All integers in nested arguments, in order; slices give their bounds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, slice):
        return _integers((value.start, value.stop, value.step))
    if isinstance(value, (list, tuple)):
        return [i for v in value for i in _integers(v)]
    if isinstance(value, Mapping):
        return _integers(tuple(value.values()))
    return []


@contextmanager
def _functions_open() -> Iterator[None]:
    """Lets functions that PyTorch writes in Python run to the ones that it does not, which are seen."""
    with ExitStack() as stack:
        for module in (torch.nn.functional, torch.functional, torch._tensor):
            for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda *_: False))
        yield


_LAYERS = (_ConvNd, nn.Linear, nn.Embedding, nn.PReLU, *operators.NORMS)


@contextmanager
def _sizes_followed(model: nn.Module, channels: Channels) -> Iterator[None]:
    """Within the block the integers of the model's modules are `Length`s, but those of PyTorch's layers."""

    def met(attribute: Length, length: Length) -> None:
        assert length.channels is not None
        if length.ratio == 1 and attribute.attribute is not None:
            channels.follow(length.channels[None], Length(attribute, attribute=attribute.attribute))

    for name, module in model.named_modules():
        own = isinstance(module, _LAYERS) and type(module).__module__.startswith("torch.nn.")
        for key, value in vars(module).items() if not own else ():
            if type(value) is int and value > 1:
                vars(module)[key] = Length(value, attribute=(name, key), met=met)
            elif _is_sizes(value):
                parts = (Length(n, attribute=(name, f"{key}[{i}]"), met=met) for i, n in enumerate(value))
                vars(module)[key] = type(value)(parts)
    try:
        yield
    finally:
        for module in model.modules():  # also what the forward pass set
            for key, value in vars(module).items():
                if type(value) is Length:
                    vars(module)[key] = int(value)
                elif isinstance(value, (tuple, list)) and any(type(n) is Length for n in value):
                    vars(module)[key] = type(value)(int(n) if type(n) is Length else n for n in value)


def _is_sizes(value: Any) -> bool:
    """Whether an attribute is a tuple or list of integers."""
    return type(value) in (tuple, list) and bool(value) and all(type(n) is int for n in value)


@contextmanager
def _modules_followed(model: nn.Module, channels: Channels) -> Iterator[None]:
    """Keeps the stack of running modules."""
    handles = []

    def follow(name: str, module: nn.Module) -> None:
        def enter(*_: Any) -> None:
            channels.stack.append((name, module))

        def leave(*_: Any) -> None:
            while channels.stack.pop()[1] is not module:
                pass  # modules that an exception left

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            follow(name, module)
    with hooked(handles):
        yield


@contextmanager
def _scripts_frozen(model: nn.Module, channels: Channels, operations: _Operators) -> Iterator[None]:
    """Runs scripted modules, whose sizes cannot be followed, unseen: what they read cannot be cut."""
    scripts = {m: name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)}

    def enter(module: nn.Module, inputs: Any) -> None:
        if module in scripts:
            channels.fix_all(tensors_in(inputs), f"is read by {scripts[module]!r}, which is scripted")
            operations.paused += 1

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in scripts:
            operations.paused -= 1
            from_input = any(channels.facts(t).from_input for t in tensors_in(inputs))
            for tensor in tensors_in(output):
                channels.learn(tensor, Facts([], from_input))

    handles = (
        [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)] if scripts else []
    )
    with hooked(handles):
        yield


@contextmanager
def _handled(model: nn.Module, channels: Channels, operations: _Operators) -> Iterator[None]:
    """Runs modules that have a handler unseen, and calls it."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            handler = next((_HANDLERS[kind] for kind in type(module).__mro__ if kind in _HANDLERS), None)
            if handler is not None:
                stack.enter_context(
                    mock.patch.object(module, "forward", _unseen(name, module, handler, channels, operations))
                )
        yield


def _unseen(
    name: str, module: nn.Module, handler: Handler, channels: Channels, operations: _Operators
) -> Callable[..., Any]:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        operations.paused += 1
        try:
            output = forward(*args, **kwargs)
            inputs = _positional(forward, args, kwargs)
            from_input = any(channels.facts(t).from_input for t in tensors_in(inputs))
            for tensor in tensors_in(output):
                channels.learn(tensor, Facts([], from_input))
            try:
                handler(module, inputs, output, channels)
            except Exception as error:
                kind = type(module).__name__
                raise UnsupportedModelError(
                    f"the handler of {name!r} ({kind}) fails: {type(error).__name__}: {error}"
                ) from error
        finally:
            operations.paused -= 1
        return output

    return run


def _positional(forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The inputs in the order of the signature, however they were given."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # has no signature
        return (*args, *kwargs.values())
    bound.apply_defaults()
    return (*bound.args, *bound.kwargs.values())
