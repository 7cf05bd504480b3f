"""`nni-dbs prune`: train, prune through an NNI pruner, fine-tune, export, reload, report."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset

from nni_dbs.config import Config, Recipe, load_config
from nni_dbs.cost import FlopsCost
from nni_dbs.data import Splits, loader, split_in_two
from nni_dbs.errors import ConfigError, ResultError
from nni_dbs.evaluate import recalibrate_batchnorm
from nni_dbs.files import write
from nni_dbs.latency import medians_ms
from nni_dbs.models import build_model
from nni_dbs.plugin.architecture import ArchitecturePruner, DMCPPruner, DSAPruner, TASPruner
from nni_dbs.plugin.experiment import NNIExecutor
from nni_dbs.plugin.pruner import UniformPruner, WidthPruner
from nni_dbs.plugin.searching import Executor, RandomPruner, SearchPruner
from nni_dbs.plugin.slimming import AutoSlimPruner
from nni_dbs.plugin.supernets import DBSPruner, EvolutionPruner, PSENetPruner
from nni_dbs.report import Row, write_pictures, write_report
from nni_dbs.result import (
    load_groups,
    load_pruned,
    load_result,
    load_source,
    save_pruned,
    save_result,
)
from nni_dbs.slimmable import Slimmable
from nni_dbs.training import (
    accuracy,
    distilling_step,
    load_splits,
    reinitialise,
    resolve_device,
    sgd,
    taught_step,
    training_loop,
    training_step,
)
from torch_pruning_adapters.errors import nearest

METHODS: dict[str, type[WidthPruner]] = {
    p.method: p
    for p in (
        DBSPruner,
        PSENetPruner,
        EvolutionPruner,
        AutoSlimPruner,
        DMCPPruner,
        TASPruner,
        DSAPruner,
        UniformPruner,
        RandomPruner,
    )
}

_TRAINED = {"finetune": "fine-tuned", "scratch": "from scratch", "distill": "distilled"}


@dataclass
class _Run:
    """What the stages of one run share."""

    config: Config
    out: Path
    splits: Splits
    device: torch.device
    quiet: bool
    seconds: dict[str, float]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def evaluator(
        self,
        model: nn.Module,
        recipe: Recipe,
        name: str,
        checkpoint: bool,
        step: Any = None,
        dataset: Dataset | None = None,
    ) -> TorchEvaluator:
        """NNI's evaluator around the shell's own loop; it scores on the search-validation data."""
        path = self.out / "checkpoint" / f"{name}.safetensors"
        loop = training_loop(
            dataset or self.splits.train,
            recipe,
            device=self.device,
            seed=self.config.seed,
            workers=self.config.workers,
            checkpoint=path if checkpoint else None,
            name=name,
            quiet=self.quiet,
        )
        return TorchEvaluator(
            loop,
            sgd(model, recipe, nni.trace(SGD)),
            step or training_step(recipe.label_smoothing),
            dummy_input=self.example(),
            evaluating_func=lambda m: accuracy(
                m, self.splits.validation, device=self.device, workers=self.config.workers
            ),
        )

    def train(self, model: nn.Module, recipe: Recipe, name: str, step: Any = None) -> None:
        """One stage of training, which resumes from its checkpoint."""
        if recipe.epochs == 0:
            return
        evaluator = self.evaluator(model, recipe, name, checkpoint=True, step=step)
        evaluator._init_optimizer_helpers(model)
        evaluator.bind_model(model)
        evaluator.train(max_epochs=recipe.epochs)
        evaluator.unbind_model()

    def recalibrate(self, model: nn.Module) -> None:
        """Estimates BatchNorm statistics anew on the training data, as a cut network needs."""
        batches = loader(self.splits.train, 64, shuffle=True, seed=self.config.seed)
        images = (images.to(self.device) for images, _ in batches)
        torch.manual_seed(self.config.seed)
        recalibrate_batchnorm(model, images)

    def example(self) -> Tensor:
        return torch.zeros(1, *self.splits.input_shape, device=self.device)

    def test(self, model: nn.Module) -> float:
        return accuracy(model, self.splits.test, device=self.device, workers=self.config.workers)


def experiment(
    config: Config | str | Path, out: str | Path | None = None, resume: bool = False, quiet: bool = False
) -> list[Row]:
    """Runs a configuration whose networks are scored by the trials of an NNI experiment.

    `prune` with `executor: nni`, to be called from Python. NNI's portal shows the trials meanwhile, at the
    configuration's `experiment.port`.

    Args:
        config: A configuration, or the path of one.
        out: The run's directory; default: `runs/NAME-METHOD-nni`.
        resume: Continue a run that was interrupted; networks that its log has are not scored again.
        quiet: No progress bars.
    """
    name = "run"
    if not isinstance(config, Config):
        name = Path(config).resolve().parent.name
        config = load_config(config)
    config = dataclasses.replace(config, executor="nni")
    out = Path(out) if out is not None else Path("runs") / f"{name}-{config.method}-nni"
    return prune(config, out, resume, quiet)


class _Prepared(Exception):
    """Ends a run where its search would begin."""


def prepare(config: Config, out: Path, resume: bool = False, quiet: bool = False) -> Path:
    """Runs a configuration up to its search, and writes the directory of an experiment to begin by `nnictl`.

    Its results go to the run's log, so that `prune` with `resume` goes on from them.

    Returns:
        The NNI configuration for `nnictl create`.
    """
    config = dataclasses.replace(config, executor="nni")
    executor = NNIExecutor(config, out, quiet)

    def write_only(pruner: SearchPruner, model: nn.Module) -> None:
        executor.prepare(pruner, model)
        raise _Prepared

    try:
        prune(config, out, resume, quiet, write_only)
    except _Prepared:
        return executor.directory / "nni.yml"
    raise AssertionError("a run without a search was not refused")


def prune(
    config: Config, out: Path, resume: bool = False, quiet: bool = False, executor: Executor | None = None
) -> list[Row]:
    """Runs a configuration and fills the directory `out`; returns the rows of the final table.

    Args:
        config, out: What to run, and where.
        resume, quiet: As the command's.
        executor: In place of the one that `config.executor` names.

    Raises:
        ConfigError: Unknown method or option.
        ResultError: `out` holds another run and `resume` is not set, or the reloaded model differs.
    """
    pruner_class = method(config.method)
    if config.executor == "nni" and not issubclass(pruner_class, SearchPruner):
        able = ", ".join(name for name, p in METHODS.items() if issubclass(p, SearchPruner))
        raise ConfigError(
            f"executor: an NNI experiment scores the networks of {able}; method {config.method!r} asks for "
            "none of it: set executor=local"
        )
    if config.executor == "nni" and executor is None:
        executor = NNIExecutor(config, out, quiet)
    if not resume and any((out / name).exists() for name in ("checkpoint", "search.jsonl", "result.json")):
        raise ResultError(f"{out} holds a run already; continue it with --resume or choose another --out")
    if resume:
        _check_same_run(config, out)
    device = resolve_device(config.device)
    run = _Run(config, out, load_splits(config), device, quiet, {})
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.arguments).to(device)
    with run.stage("check"):  # before the training, what could not be pruned after it
        _check_outputs(model, run)
        if config.final == "scratch":
            reinitialise(copy.deepcopy(model), config.seed)
        checked = _pruner(pruner_class, copy.deepcopy(model), run, resume, executor)
    write(out / "config.yaml", lambda path: path.write_text(config.to_yaml()))
    with run.stage("train"):
        run.train(model, config.train, "train")
    rows = [Row("full", test_accuracy=run.test(model))]
    teacher = copy.deepcopy(model) if config.teacher.weight > 0 else None

    with run.stage("prune"):
        pruner = _pruner(pruner_class, model, run, resume, executor)
        pruner.compress(max_epochs=config.supernet.epochs if pruner.trains_supernet else None)
        small = pruner.export()
        pruner.unwrap_model()
        run.recalibrate(small)
    rows.append(Row("pruned", test_accuracy=run.test(small)))
    with run.stage("finetune"):
        small = _finally_trained(model, small, pruner, run, teacher)
    rows.append(Row(_TRAINED[config.final], test_accuracy=run.test(small)))

    result = pruner.result
    source = {
        "model": config.model,
        "arguments": config.arguments,
        "input": list(run.splits.input_shape),
    }
    with run.stage("export"):
        save_pruned(out, small, pruner.space.groups, result.widths, pruner.order, source=source)
        reloaded = load_pruned(out).to(device)
        _check_reloaded(small, reloaded, run.example())
    rows.append(Row("reloaded", test_accuracy=run.test(reloaded)))
    with run.stage("latency"):
        full_ms, small_ms = medians_ms([model.eval(), reloaded.eval()], run.example())

    for row in rows:
        pruned = row.stage != "full"
        row.flops = result.flops if pruned else result.full_flops
        row.params = result.params if pruned else result.full_params
        row.latency_ms = small_ms if pruned else full_ms
    result.metrics = {row.stage: row.test_accuracy for row in rows}
    result.seconds = {**run.seconds, **result.seconds, **checked.seconds}  # latencies are measured once
    save_result(out, result)
    write_report(out, config, result, rows, pruner.space.groups, pruner.flops)
    return rows


def replot(out: Path) -> list[Path]:
    """Draws the pictures of a finished run again, from its files."""
    result, groups = load_result(out), load_groups(out)
    source = load_source(out)
    if "model" not in source or "input" not in source:
        raise ResultError(f"{out} does not say which model it holds; plot takes the directory of a run")
    model = build_model(source["model"], source["arguments"])
    example = torch.zeros(1, *source["input"])
    return write_pictures(out, result, groups, FlopsCost(model, example, groups))


def method(name: str) -> type[WidthPruner]:
    """The pruner of a method's name."""
    if name not in METHODS:
        raise ConfigError(f"method: no method {name!r}{nearest(name, METHODS)}")
    return METHODS[name]


def _finally_trained(
    model: nn.Module, small: nn.Module, pruner: WidthPruner, run: _Run, teacher: nn.Module | None
) -> nn.Module:
    """The pruned model after its final training, as the configuration has it."""
    recipe = run.config.finetune
    if run.config.final == "distill" and recipe.epochs > 0:
        pair = Slimmable(model, pruner.space.groups, pruner.widths, pruner.order)
        run.train(pair, recipe, "finetune", distilling_step(recipe.label_smoothing))
        return pair.small()
    if run.config.final == "scratch":
        reinitialise(small, run.config.seed)
    step = None
    if teacher is not None:
        taught = run.config.teacher
        step = taught_step(teacher, taught.weight, taught.temperature, recipe.label_smoothing)
    run.train(small, recipe, "finetune", step)
    return small


def _pruner(
    pruner_class: type[WidthPruner],
    model: nn.Module,
    run: _Run,
    resume: bool,
    executor: Executor | None = None,
) -> WidthPruner:
    config = run.config
    check_options(config.options, pruner_class)
    trains = pruner_class.trains_supernet
    recipe, name = (config.supernet, "supernet") if trains else (config.finetune, "calibrate")
    data: Dataset = run.splits.train
    more: dict[str, Any] = {}
    if pruner_class.second_share:
        data, second = split_in_two(data, pruner_class.second_share, config.seed)
        size = min(recipe.batch_size, len(second))  # type: ignore[arg-type]
        more["second"] = loader(
            second, size, shuffle=True, seed=config.seed, workers=config.workers, drop_last=True
        )
    if issubclass(pruner_class, ArchitecturePruner):
        if config.supernet.epochs == 0:
            raise ConfigError(f"supernet.epochs: {config.method} learns its widths then; give it at least 1")
        more["steps_per_epoch"] = max(len(data) // recipe.batch_size, 1)  # type: ignore[arg-type]
    if executor is not None:
        more["executor"] = executor
    evaluator = run.evaluator(model, recipe, name, checkpoint=trains, dataset=data)
    try:
        return pruner_class(
            model,
            config.config_list,
            evaluator,
            budget=config.budget,
            min_ratio=config.min_ratio,
            divisor=config.divisor,
            seed=config.seed,
            quiet=run.quiet,
            log=run.out / "search.jsonl",
            resume=resume,
            latency_table=run.out / "latency.json",
            **{**more, **config.options},
        )
    except TypeError as error:
        raise ConfigError(f"options of method {config.method!r}: {error}") from error


def check_options(options: Mapping[str, Any], pruner_class: type[WidthPruner]) -> None:
    """Raises `ConfigError` for an option that the method does not have."""
    known = {
        name
        for ancestor in pruner_class.__mro__
        for name, parameter in inspect.signature(ancestor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for name in options.keys() - known:
        raise ConfigError(
            f"options of method {pruner_class.method!r}: no option {name!r}{nearest(name, known)}"
        )


def _check_outputs(model: nn.Module, run: _Run) -> None:
    """Runs the model once and compares its outputs with the number of classes."""
    mode = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(run.example())
    except Exception as error:
        raise ConfigError(
            f"the model does not run on images of {'x'.join(map(str, run.splits.input_shape))}: {error}"
        ) from error
    model.train(mode)
    if not isinstance(logits, Tensor) or logits.shape != (1, run.splits.num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"the data has {run.splits.num_classes} classes, the model's output is {found}; "
            f"set arguments.num_classes={run.splits.num_classes}"
        )


def _check_same_run(config: Config, out: Path) -> None:
    path = out / "config.yaml"
    started = [out / "checkpoint" / "supernet.safetensors", out / "search.jsonl"]
    if not path.exists():
        if any(file.exists() for file in started):
            raise ResultError(f"{path} is missing, so this run cannot be resumed; choose another --out")
        return
    before = load_config(path)
    decisive = ["model", "arguments", "data", "seed", "train"]
    if any(path.exists() for path in started):
        decisive += ["method", "options", "budget", "config_list", "min_ratio", "divisor", "supernet"]
    if (out / "checkpoint" / "finetune.safetensors").exists() or (out / "result.json").exists():
        decisive = [field.name for field in dataclasses.fields(Config)]
    searched = (out / "search.jsonl").exists()
    other_trials = searched and before.experiment.trials != config.experiment.trials
    if other_trials or any(getattr(before, name) != getattr(config, name) for name in decisive):
        raise ResultError(
            f"{out} holds a run with another configuration; resume that one or choose another --out"
        )


def _check_reloaded(saved: nn.Module, reloaded: nn.Module, example: Tensor) -> None:
    with torch.no_grad():
        if not torch.equal(saved.eval()(example), reloaded.eval()(example)):
            raise ResultError("the reloaded model gives other outputs than the saved one; this is a bug")
