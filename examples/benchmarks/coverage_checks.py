"""What `coverage.py` finds out about one model."""

from __future__ import annotations

import copy
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from examples.benchmarks.coverage_table import UNPRUNED, Row
from examples.benchmarks.detection_heads import groups_of_wrapped
from examples.benchmarks.measure import timed
from examples.benchmarks.torchvision_models import (
    build,
    comparable,
    example_of,
    family_of,
    inputs_of,
    randomise,
    settle,
    training_batch,
)
from nni_dbs import Budget, FlopsCost, Widths, WidthSpace, project
from nni_dbs.cost import count_flops
from nni_dbs.result import load_weights
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import ChannelGroup, find_channel_groups, shrink
from torch_pruning_adapters.calls import Inputs, tensors_in

SLICED, EXPORTED = 1e-5, 1e-4  # largest differences, relative


def empty_row(name: str) -> Row:
    """The row of a model of which nothing is known yet."""
    return Row(name, family_of(name), " + ".join("x".join(map(str, x.shape)) for x in inputs_of(name)))


def examine(name: str, tell: Callable[[Row], object] = lambda row: None) -> Row:
    """All that there is to find out; `tell` gets the row whenever it has grown. Never raises."""
    row, start = empty_row(name), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(row, tell)
    except Exception as error:
        row.error = text_of(error)
    row.seconds["all"] = rounded(time.perf_counter() - start)
    tell(row)
    return row


def _examine(row: Row, tell: Callable[[Row], object]) -> None:
    model = build(row.name)
    net = comparable(row.name, model)
    row.params = sum(p.numel() for p in model.parameters())
    row.flops = count_flops(net, inputs_of(row.name))
    tell(row)
    groups = find_groups(row, model, net)
    tell(row)
    randomise(net)
    settle(net, training_batch(row.name))
    pruned = halved(row, net, groups)
    tell(row)
    for key, check in CHECKS.items():
        if key == "forward" and net is model:
            continue  # "outputs" checks the same
        row.checks[key], difference = outcome(partial(check, pruned))
        if difference is not None:
            row.differences[key] = rounded(difference)
        tell(row)
    for key, export in EXPORTS.items():
        for part in (pruned.net, pruned.small):
            row.checks[key], difference = outcome(partial(check_export, export, part, pruned.inputs))
            if row.checks[key] != "ok":
                if part is pruned.net:
                    row.checks[key] = UNPRUNED + row.checks[key]
                break
        if difference is not None:
            row.differences[key] = rounded(difference)
        tell(row)
    if net is not model:
        row.groups_before_suppression = groups_found(net, pruned.inputs)


def find_groups(row: Row, model: nn.Module, net: nn.Module) -> tuple[ChannelGroup, ...]:
    """The groups of the model's own forward pass, for `net`; writes what is known of them into the row."""
    example = example_of(row.name)
    row.seconds["trace"] = rounded(timed(lambda: find_channel_groups(model, example, verify=False)).wall)
    start = time.perf_counter()
    groups = find_channel_groups(model, example)
    row.seconds["verify"] = rounded(time.perf_counter() - start)
    row.groups = len(groups)
    for g in groups:
        if g.frozen is not None:
            reason = re.sub(r"'[^']*'", "'...'", g.frozen)  # layers' names
            row.frozen.setdefault(reason, {"groups": 0, "example": g.name})["groups"] += 1
    return groups if net is model else groups_of_wrapped(groups)


def groups_found(net: nn.Module, inputs: Inputs) -> int | str:
    """Their number, or the error."""
    try:
        return len(find_channel_groups(net, inputs, verify=False))
    except Exception as error:
        return text_of(error)


@dataclass(frozen=True)
class Pruned:
    """A network, and what is left of it without half of the FLOPs that it can lose.

    Attributes:
        name: Of the model.
        net, inputs: The full network with random weights, and one input of it.
        supernet, widths, small: `net` at narrow widths; the network cut to them.
        cost, bound: FLOPs by widths, and the most that `small` may have.
        flops: Those of `small`, counted.
    """

    name: str
    net: nn.Module
    inputs: tuple[Tensor, ...]
    supernet: Supernet
    widths: Widths
    small: nn.Module
    cost: FlopsCost
    bound: int
    flops: int


def halved(row: Row, net: nn.Module, groups: Sequence[ChannelGroup]) -> Pruned:
    """Prunes the network, and writes how far that could go into the row."""
    inputs = inputs_of(row.name)
    cost = FlopsCost(net, inputs, groups)
    space = WidthSpace(groups, min_ratio=0, divisor=1)
    full, lowest = cost(space.largest()), cost(space.smallest())
    row.lowest_flops, row.prunable_share = lowest, rounded(1 - lowest / full)
    bound = lowest + (full - lowest) // 2
    widths = project(space.largest(), space, Budget.parse(bound).bound({"flops": cost}))
    supernet = Supernet(net, groups)
    start = time.perf_counter()
    small = shrink(net, groups, widths, supernet.order)
    row.seconds["shrink"] = rounded(time.perf_counter() - start)
    row.pruned_flops = count_flops(small, inputs)
    return Pruned(row.name, net, inputs, supernet, widths, small, cost, bound, row.pruned_flops)


# Checks: they raise, or return the largest relative difference


class CheckError(Exception):
    """A check failed."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def outcome(fn: Callable[[], float | None]) -> tuple[str, float | None]:
    """What is wrong, or "ok"; and the difference that the check found."""
    try:
        return "ok", fn()
    except Exception as error:
        return text_of(error), None


@torch.no_grad()
def outputs_of(net: nn.Module, inputs: Inputs) -> Any:
    return net.eval()(*inputs)


def check_close(found: Any, expected: Any, tolerance: float) -> float:
    """Compares the tensors of two outputs, each relative to its largest entry."""
    pairs = list(zip(tensors_in(found), tensors_in(expected), strict=True))
    require(all(a.shape == b.shape for a, b in pairs), "other shapes")
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
    require(worst <= tolerance, f"differs by {worst:.2g}")  # not so with NaN
    return worst


def check_finite(net: nn.Module, inputs: Inputs) -> None:
    require(all(bool(t.isfinite().all()) for t in tensors_in(outputs_of(net, inputs))), "not finite")


def check_budget(pruned: Pruned) -> None:
    require(pruned.flops <= pruned.bound, f"{pruned.flops} FLOPs, allowed are {pruned.bound}")


def check_outputs(pruned: Pruned) -> None:
    check_finite(pruned.small, pruned.inputs)
    found, expected = (outputs_of(net, pruned.inputs) for net in (pruned.small, pruned.net))
    require(tree_structure(found) == tree_structure(expected), "another structure of outputs")
    shapes = [[t.shape for t in tensors_in(value)] for value in (found, expected)]
    require(shapes[0] == shapes[1], "other shapes of outputs")


def check_forward(pruned: Pruned) -> None:
    """The own forward pass of a detector that is wrapped."""
    check_finite(pruned.small.get_submodule("model"), example_of(pruned.name))


def check_sliced(pruned: Pruned) -> float:
    with pruned.supernet.at(pruned.widths) as net:
        found = outputs_of(net, pruned.inputs)
    return check_close(found, outputs_of(pruned.small, pruned.inputs), SLICED)


def check_flops(pruned: Pruned) -> None:
    said = pruned.cost(pruned.widths)
    require(said == pruned.flops, f"FlopsCost says {said}, fvcore {pruned.flops}")


def check_reload(pruned: Pruned) -> None:
    fresh = comparable(pruned.name, build(pruned.name))
    again = shrink(fresh, pruned.supernet.groups, pruned.widths, pruned.supernet.order)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights.safetensors"
        save_model(pruned.small, str(path))
        load_weights(again, path)
    found, expected = (tensors_in(outputs_of(net, pruned.inputs)) for net in (again, pruned.small))
    require(all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "other outputs")


def check_training(pruned: Pruned) -> None:
    inputs = training_batch(pruned.name)
    expected = learning(pruned.net, inputs)
    small = copy.deepcopy(pruned.small)
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-6)  # squares of random outputs are steep
    missing = expected - learning(small, inputs, optimizer)
    require(not missing, f"{len(missing)} parameters get no gradient, such as {min(missing, default='')}")
    require(all(bool(p.isfinite().all()) for p in small.parameters()), "parameters are not finite")


def learning(net: nn.Module, inputs: Inputs, optimizer: torch.optim.Optimizer | None = None) -> set[str]:
    """A training step; the parameters that got a gradient."""
    torch.manual_seed(0)
    net.train()
    outputs = tensors_in(net(*inputs))
    torch.stack([t.square().mean() for t in outputs if t.is_floating_point()]).sum().backward()
    if optimizer is not None:
        optimizer.step()
    names = {name for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    net.eval()
    return names


Export = Callable[[nn.Module, tuple[Tensor, ...]], Any]


def check_export(export: Export, net: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    return check_close(export(net, inputs), outputs_of(net, inputs), EXPORTED)


@torch.no_grad()
def exported_outputs(net: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.export.export(net.eval(), inputs).module()(*inputs)


@torch.no_grad()
def onnx_outputs(net: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        torch.onnx.export(net.eval(), inputs, path, dynamo=True, verbose=False, external_data=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        found = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return [torch.as_tensor(value) for value in found]


def text_of(error: BaseException) -> str:
    """Its class and the first line of its message."""
    lines = str(error).strip().splitlines()
    message = lines[0][:300] if lines else ""
    if isinstance(error, CheckError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


CHECKS: dict[str, Callable[[Pruned], float | None]] = {
    "budget": check_budget,
    "outputs": check_outputs,
    "forward": check_forward,
    "sliced": check_sliced,
    "flops": check_flops,
    "reload": check_reload,
    "training": check_training,
}
EXPORTS: dict[str, Export] = {"export": exported_outputs, "onnx": onnx_outputs}
