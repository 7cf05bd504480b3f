"""The configuration of a run: a YAML file whose every key is checked, with `key=value` overrides."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nni_dbs.cost import Budget
from nni_dbs.data import DATASETS
from nni_dbs.errors import ConfigError
from torch_pruning_adapters.errors import nearest

FINAL = ("finetune", "scratch", "distill")
EXECUTORS = ("local", "nni")
TRIALS = ("score", "train")


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with Nesterov momentum; the rate rises for a tenth of the steps, then
    falls to zero along a cosine.

    Attributes:
        epochs: Passes over the training data; 0 leaves the stage out.
        lr: Peak learning rate.
        batch_size: Images a step.
        momentum, weight_decay: As in `torch.optim.SGD`; biases and normalisations are not decayed.
        label_smoothing: As in cross entropy.
    """

    epochs: int = 10
    lr: float = 0.05
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Teaching:
    """Knowledge distillation (Hinton et al., 2015): the trained full network teaches the pruned one.

    Attributes:
        weight: Of the teacher's outputs in the loss, the labels have the rest; 0: no teacher. TAS has 0.9.
        temperature: That softens both outputs.
    """

    weight: float = 0.0
    temperature: float = 4.0


@dataclass(frozen=True)
class Trials:
    """How an NNI experiment scores networks.

    Attributes:
        trials: `score`: sub-networks of the supernet, as the pruner would; `train`: each after its final
            training, alone (`final`: from inherited weights, or from scratch).
        concurrency: Trials at a time.
        port: Of NNI's manager and portal.
        service: NNI's `trainingService`, as NNI's documentation has it: `{platform: local}`, `remote`, ...
    """

    trials: str = "score"
    concurrency: int = 2
    port: int = 8080
    service: dict[str, Any] = field(default_factory=lambda: {"platform": "local"})


@dataclass(frozen=True)
class Config:
    """A run of `nni-dbs prune`.

    Attributes:
        model: torchvision's name, or `package.module:callable`.
        arguments: Of the model's builder (`num_classes`, `weights`, ...).
        data: `name` of a data set in `nni_dbs.data.DATASETS`, and that function's options.
        budget: As `Budget.parse` takes it.
        method: See `nni-dbs methods`.
        options: The method's own options.
        config_list: NNI's selection of layers.
        min_ratio, divisor: See `WidthSpace`.
        train: Of the full model, before pruning (0 epochs: `arguments` bring trained weights).
        supernet: Of the full model as a supernet, where the method trains one (dbs can do without: 0 epochs).
        finetune: Of the pruned model.
        final: How that is trained: `finetune` from the weights that it inherits, from `scratch`, or
            `distill`: inside of the full model, which teaches it (`Slimmable`).
        teacher: Of the final training, where that is `finetune` or `scratch`.
        executor: `local`: networks are scored one by one, in this process; `nni`: by the trials of an NNI
            experiment.
        experiment: That experiment.
        seed: Of everything random.
        device: `auto`, `cpu` or `cuda`.
        workers: Processes that load data.
    """

    model: str
    data: dict[str, Any]
    budget: float | str | dict[str, float | str]
    arguments: dict[str, Any] = field(default_factory=dict)
    method: str = "dbs"
    options: dict[str, Any] = field(default_factory=dict)
    config_list: list[dict[str, Any]] = field(default_factory=lambda: [{"op_types": ["Conv2d", "Linear"]}])
    min_ratio: float = 0.1
    divisor: int = 8
    train: Recipe = Recipe()
    supernet: Recipe = Recipe(epochs=5, lr=0.02)
    finetune: Recipe = Recipe(epochs=5, lr=0.01)
    final: str = "finetune"
    teacher: Teaching = Teaching()
    executor: str = "local"
    experiment: Trials = field(default_factory=Trials)
    seed: int = 0
    device: str = "auto"
    workers: int = 0

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration and checks all of it.

    Args:
        path: A YAML file with the keys of `Config`.
        overrides: `key=value` texts; dots lead into nested keys (`train.epochs=2`), values are YAML.

    Raises:
        ConfigError: Unreadable file, unknown key (with the nearest valid one), or a value of a wrong type.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys such as model, data and budget")
    for override in overrides:
        _override(data, override)
    config = _build(Config, data, "")
    _check(config)
    return config


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"cannot read the override {text!r}; write key=value")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {text!r}: {parent!r} has no keys of its own")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from error


def _build(cls: type, data: dict[str, Any], prefix: str) -> Any:
    """A dataclass from a mapping, every key known and every value of its field's type."""
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ConfigError(f"unknown key {f'{prefix}{key}'!r}{nearest(str(key), hints)}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in data:
            raise ConfigError(f"the key {f'{prefix}{f.name}'!r} is missing")
    return cls(**{key: _convert(value, hints[key], f"{prefix}{key}") for key, value in data.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected a mapping, not {value!r}")
        return _build(typing.cast(type, hint), value, f"{key}.")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if float in kinds and isinstance(value, str) and str not in kinds:
        try:
            return float(value)  # YAML reads 1e-4 as a text
        except ValueError:
            raise ConfigError(f"{key}: expected a number, not {value!r}") from None
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{key}: expected {names}, not {value!r}")
    return value


def _check(config: Config) -> None:
    Budget.parse(config.budget)
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, not {config.device!r}")
    name = config.data.get("name")
    if name not in DATASETS:
        raise ConfigError(f"data.name: no data set {name!r}{nearest(str(name), DATASETS)}")
    known = [p for p in inspect.signature(DATASETS[name]).parameters if p != "seed"]
    for option in config.data:
        if option not in ("name", *known):
            raise ConfigError(f"unknown key {f'data.{option}'!r}{nearest(str(option), known)}")
    parameters = inspect.signature(DATASETS[name]).parameters.values()
    for option in (p.name for p in parameters if p.default is inspect.Parameter.empty):
        if option not in config.data:
            raise ConfigError(f"the key 'data.{option}' is missing: data set {name!r} needs it")
    if config.final not in FINAL:
        raise ConfigError(
            f"final: expected {', '.join(FINAL)}, not {config.final!r}{nearest(config.final, FINAL)}"
        )
    if not (0 <= config.teacher.weight <= 1 and 0 < config.teacher.temperature < math.inf):
        raise ConfigError("teacher: weight must lie in [0, 1], and temperature be positive")
    if config.teacher.weight > 0 and config.final == "distill":
        raise ConfigError(
            "teacher: final: distill has the full network as its teacher already; set teacher.weight=0"
        )
    if config.executor not in EXECUTORS:
        raise ConfigError(f"executor: expected local or nni, not {config.executor!r}")
    if config.experiment.trials not in TRIALS:
        raise ConfigError(f"experiment.trials: expected score or train, not {config.experiment.trials!r}")
    if config.experiment.concurrency < 1 or not 0 < config.experiment.port < 65535:
        raise ConfigError("experiment: concurrency must be at least 1, and port lie between 1 and 65534")
    for stage in ("train", "supernet", "finetune"):
        recipe: Recipe = getattr(config, stage)
        if recipe.epochs < 0 or recipe.batch_size < 1 or not 0 < recipe.lr < math.inf:
            raise ConfigError(f"{stage}: epochs, batch_size and lr must be positive (epochs may be 0)")
        if not (0 < recipe.momentum < 1 and 0 <= recipe.label_smoothing < 1 and recipe.weight_decay >= 0):
            raise ConfigError(
                f"{stage}: momentum must lie in (0, 1), label_smoothing in [0, 1), weight_decay not below 0"
            )
    if config.workers < 0 or config.seed < 0:
        raise ConfigError("workers and seed must not be negative")
