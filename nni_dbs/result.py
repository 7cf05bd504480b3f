"""Pruned networks on disk.

A directory holds `widths.yaml` (what was decided, and how to make the full model), `groups.json` (the
channel groups and which of their channels come first), `weights.safetensors` and `result.json`. Every file
is written beside its final name and renamed, so a crash never leaves half of one.
"""

from __future__ import annotations

import json
import platform
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from nni_dbs.cost import Bounds, Cost
from nni_dbs.errors import ResultError
from nni_dbs.files import write
from nni_dbs.models import build_model
from nni_dbs.space import Widths
from torch_pruning_adapters import ChannelGroup, WidthError, prefix_order, shrink
from torch_pruning_adapters.importance import Order


@dataclass
class Result:
    """The record of how a network came about.

    Attributes:
        method: Name of the method.
        seed: Its seed.
        budget: The budget, as text.
        widths: The chosen widths.
        flops, full_flops: Multiply-adds of one sample, pruned and full.
        params, full_params: Number of parameters, pruned and full.
        metrics: Metric at each stage that measured it.
        latency_ms, full_latency_ms: Measured milliseconds of one sample, pruned and full, where the budget
            bounds them, and `latency_error`, the mean relative error of the model that predicted them.
        evaluations: Number of sub-networks that were evaluated.
        counts: Of each stage: starting points, training steps of the supernet, fits of the predictor, ...
        limits: The most that each kind of cost might be, by kind.
        fits: Of each fit of a predictor: evaluations, held-out Kendall tau, and that in the budget's band
            (None where it is not defined), and the radius of the trust region.
        held_out: Predicted and measured scores of the last fit, and which are in the band.
        architecture: Of the steps on an architecture, at most 200 of them: progress of the training, loss of
            the task, and expected share of the budget.
        prior: The chances that a search began with: group name -> width -> chance.
        seconds: Wall time of each stage.
        device: Where it ran.
        versions: Of the packages that matter.
    """

    method: str
    seed: int
    budget: str
    widths: Widths
    flops: int
    full_flops: int
    params: int
    full_params: int
    metrics: dict[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    full_latency_ms: float | None = None
    latency_error: float | None = None
    evaluations: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    fits: list[dict[str, float | None]] = field(default_factory=list)
    held_out: dict[str, list[float] | list[bool]] = field(default_factory=dict)
    architecture: list[dict[str, float]] = field(default_factory=list)
    prior: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=lambda: package_versions())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "widths": dict(self.widths)}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    packages = ("nni-dbs", "torch", "torchvision", "torch-pruning", "fvcore", "nni")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def save_pruned(
    directory: str | Path,
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    order: Order,
    result: Result | None = None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Saves a pruned model so that `load_pruned` finds all that it needs.

    Args:
        directory: Made if missing.
        model: The pruned model.
        groups, widths, order: What it was shrunk by.
        result: Written as `result.json`.
        source: `{"model": name, "arguments": {...}}` as `build_model` takes them, if the full model can be
            made by name.

    Raises:
        ResultError: No write access.
    """
    directory = Path(directory)
    described = {
        "groups": [g.to_dict() for g in groups],
        "order": {name: np.asarray(ranked).tolist() for name, ranked in order.items()},
    }
    chosen = {**(source or {}), "widths": {g.name: int(widths.get(g.name, g.size)) for g in groups}}
    write(directory / "weights.safetensors", lambda path: save_model(model, str(path)))
    write(directory / "groups.json", lambda path: path.write_text(json.dumps(described)))
    write(directory / "widths.yaml", lambda path: path.write_text(yaml.safe_dump(chosen, sort_keys=False)))
    if result is not None:
        save_result(directory, result)


def save_result(directory: str | Path, result: Result) -> None:
    """Writes `result.json`."""
    write(
        Path(directory) / "result.json", lambda path: path.write_text(json.dumps(result.to_dict(), indent=2))
    )


def load_widths(path: str | Path) -> Widths:
    """Reads the widths of a `widths.yaml`, or of a plain YAML mapping group name -> width."""
    data = _read_mapping(Path(path), yaml.safe_load)
    widths = data.get("widths", data)
    if not isinstance(widths, dict) or not all(type(w) is int for w in widths.values()):
        raise ResultError(f"{path}: expected a mapping from group names to numbers of channels")
    return Widths({str(name): width for name, width in widths.items()})


def load_groups(directory: str | Path) -> tuple[ChannelGroup, ...]:
    """The channel groups that a saved model was shrunk by."""
    path = Path(directory) / "groups.json"
    try:
        return tuple(ChannelGroup.from_dict(g) for g in _read_mapping(path, json.loads)["groups"])
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path} is damaged ({error!r})") from error


def load_source(directory: str | Path) -> dict[str, Any]:
    """How to make the full model: what `save_pruned` got as `source`; empty if the run did not say."""
    chosen = _read_mapping(Path(directory) / "widths.yaml", yaml.safe_load)
    return {key: value for key, value in chosen.items() if key != "widths"}


def load_result(directory: str | Path) -> Result:
    """Reads `result.json`."""
    path = Path(directory) / "result.json"
    try:
        result = Result(**_read_mapping(path, json.loads))
        result.widths = Widths(result.widths)
    except (TypeError, ValueError) as error:
        raise ResultError(f"{path} is damaged ({error})") from error
    return result


def append_search(
    path: str | Path,
    widths: Widths,
    score: float,
    stage: str,
    costs: Mapping[str, Cost],
    bounds: Bounds,
) -> None:
    """Adds an evaluated network to a `search.jsonl`, at once.

    Raises:
        ResultError: No write access.
    """
    path = Path(path)
    line = {
        "stage": stage,
        "score": score,
        **{kind: cost(widths) for kind, cost in costs.items()},
        "used": bounds.used(widths),
        "widths": dict(widths),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise ResultError(f"cannot write {path}: {error.strerror or error}") from error


def load_search(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `search.jsonl`, one for each evaluated network; none if there is no such file.

    A last line that a crash cut short is removed from the file.

    Raises:
        ResultError: Other lines are damaged.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, rest = path.read_text().split("\n")
    if rest:
        write(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in lines)))
    try:
        found = [json.loads(line) for line in lines]
        for line in found:
            Widths(line["widths"]), float(line["score"])
    except (ValueError, TypeError, KeyError) as error:
        raise ResultError(f"{path} is damaged ({error!r}); delete it to evaluate again") from error
    return found


def load_pruned(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuilds a saved pruned model.

    Args:
        directory: What `export` or `save_pruned` wrote.
        model: A full-size model of the same architecture (its weights do not matter and it is not
            touched); None if the run named the model itself.

    Returns:
        The pruned model with its weights, in the mode of `model`.

    Raises:
        ResultError: Files missing or damaged, or saved from another model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ResultError(f"no directory {directory}; give the output directory of a run")
    chosen = _read_mapping(directory / "widths.yaml", yaml.safe_load)
    groups = load_groups(directory)
    widths = load_widths(directory / "widths.yaml")
    if model is None:
        if "model" not in chosen:
            raise ResultError(
                f"{directory} does not say how to build its model; "
                "give a full-size one: load_pruned(directory, model)"
            )
        model = build_model(chosen["model"], chosen.get("arguments"))
    try:
        small = shrink(model, groups, widths, prefix_order(groups))
    except WidthError as error:
        raise ResultError(f"{directory} was saved from another model: {error}") from error
    load_weights(small, directory / "weights.safetensors")
    return small


def load_weights(model: nn.Module, path: Path) -> None:
    """Gives a model the weights of a safetensors file.

    Raises:
        ResultError: The file is missing, damaged, or of another model.
    """
    try:
        _load(model, load_file(str(path)))
    except FileNotFoundError as error:
        raise ResultError(f"{path} is missing; save the weights again") from error
    except (SafetensorError, OSError) as error:
        raise ResultError(f"{path} is damaged ({error}); save the weights again") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ResultError(f"{path} does not fit this model: {reason[:300]}") from error


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of what `save_model` wrote: one name for each tensor, and no versions of modules.

    MNASNet refuses a state without its version.
    """
    own = model.state_dict(keep_vars=True)
    names: dict[int, str] = {id(tensor): name for name, tensor in own.items() if name in tensors}
    shared = {name: names.get(id(tensor), name) for name, tensor in own.items()}
    state = OrderedDict(tensors)
    state.update({name: tensors[known] for name, known in shared.items() if known in tensors})
    state._metadata = own._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        data = parse(path.read_text())
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ResultError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(data, dict):
        raise ResultError(f"{path} is damaged: expected a mapping")
    return data


def describe_device(device: torch.device) -> str:
    """The device's name for a record: `cpu`, or the GPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
