"""The shell's training loop: one function that fits NNI's `TorchEvaluator`, and resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import Dataset
from tqdm import tqdm

from nni_dbs.bilevel import entries_below
from nni_dbs.config import Config, Recipe
from nni_dbs.data import DATASETS, Splits, loader
from nni_dbs.errors import ConfigError, ResultError, TrainingError
from nni_dbs.files import write
from nni_dbs.steps import PatchedStep, kl_divergence, logits_of

Batch = tuple[Tensor, Tensor]


def load_splits(config: Config) -> Splits:
    """The configuration's data, split by its seed."""
    options = {key: value for key, value in config.data.items() if key != "name"}
    return DATASETS[config.data["name"]](seed=config.seed, **options)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device on this machine; use auto or cpu")
    return torch.device(name)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with decay (weights) and without (biases and normalisations)."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def training_step(label_smoothing: float) -> Callable[[Batch, nn.Module], Tensor]:
    """The loss of a batch (images (B, C, H, W), labels (B,)); auxiliary heads count 0.3 each.

    The weight is that of GoogLeNet (Szegedy et al., 2015).
    """

    def step(batch: Batch, model: nn.Module) -> Tensor:
        images, labels = batch
        logits, *others = _heads(model(images))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return loss + _auxiliary_loss(others, labels, label_smoothing)

    return step


def _heads(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o is not None]


def _auxiliary_loss(heads: list[Tensor], labels: Tensor, label_smoothing: float) -> Tensor:
    losses = [nn.functional.cross_entropy(h, labels, label_smoothing=label_smoothing) for h in heads]
    return 0.3 * torch.stack(losses).sum() if losses else torch.zeros((), device=labels.device)


def distilling_step(label_smoothing: float) -> Callable[[Batch, nn.Module], Tensor]:
    """The loss of a batch for a `Slimmable`: the full network's, and what the small one's outputs differ."""

    def step(batch: Batch, model: nn.Module) -> Tensor:
        images, labels = batch
        full, small = map(logits_of, model(images))
        loss = nn.functional.cross_entropy(full, labels, label_smoothing=label_smoothing)
        return loss + kl_divergence(small, full)

    return step


def distillation_loss(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor,
    weight: float = 0.9,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 - weight) CE(student, labels) + weight T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Averaged over the batch (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015). The
    defaults are those by which TAS trains its found networks. No gradient reaches the teacher.

    Args:
        student, teacher: Logits (B, K).
        labels: (B,)
        weight: Of the teacher, in [0, 1].
        temperature: T; above 1 the teacher's small probabilities count more.
        label_smoothing: Of the cross-entropy.

    Raises:
        TrainingError: Outputs that are no such logits.
    """
    soft = temperature**2 * kl_divergence(student / temperature, teacher / temperature)
    hard = nn.functional.cross_entropy(student, labels, label_smoothing=label_smoothing)
    return (1 - weight) * hard + weight * soft


def taught_step(
    teacher: nn.Module, weight: float = 0.9, temperature: float = 4.0, label_smoothing: float = 0.0
) -> Callable[[Batch, nn.Module], Tensor]:
    """The loss of a batch for a network that a teacher (in eval mode, without gradients) helps to train.

    Auxiliary heads learn from the labels alone. See `distillation_loss`.
    """
    teacher.eval()

    def step(batch: Batch, model: nn.Module) -> Tensor:
        images, labels = batch
        logits, *others = _heads(model(images))
        with torch.no_grad():
            taught = logits_of(teacher(images))
        loss = distillation_loss(logits, labels, taught, weight, temperature, label_smoothing)
        return loss + _auxiliary_loss(others, labels, label_smoothing)

    return step


def reinitialise(model: nn.Module, seed: int) -> None:
    """Draws all weights anew, as their layers do when they are made.

    Raises:
        ConfigError: Some parameters belong to modules that cannot.
    """
    torch.manual_seed(seed)
    drawn: set[int] = set()
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            drawn |= {id(parameter) for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in drawn:
            raise ConfigError(
                f"final: nothing resets {name!r}, so this model cannot be trained from scratch; use finetune "
                "or distill"
            )


def training_loop(
    dataset: Dataset,
    recipe: Recipe,
    *,
    device: torch.device,
    seed: int = 0,
    workers: int = 0,
    checkpoint: Path | None = None,
    name: str = "train",
    quiet: bool = False,
) -> Callable[..., None]:
    """A `training_func` for `TorchEvaluator` that follows `recipe`.

    With `max_steps` it stops there. With a `checkpoint` it writes model, momentum and epoch (of a
    `PatchedStep`, its state too) after every epoch of a run without `max_steps`, and continues from
    what it finds: on a CPU to the same weights as an uninterrupted run, since each epoch seeds its own
    order, augmentation and dropout.
    """

    def train(
        model: nn.Module,
        optimizer: Optimizer,
        step: Callable[[Batch, nn.Module], Tensor],
        lr_schedulers: None = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        epochs = max_epochs or recipe.epochs
        steps_per_epoch = max(len(dataset) // recipe.batch_size, 1)  # type: ignore[arg-type]
        saved = checkpoint if max_steps is None else None
        first = 0
        if saved is not None and saved.exists():
            first = load_checkpoint(saved, model, optimizer, step)
        total = max_steps or epochs * steps_per_epoch
        done = first * steps_per_epoch
        model.train()
        with tqdm(
            total=total, initial=done, desc=name, unit="step", leave=False, disable=True if quiet else None
        ) as bar:
            epoch = first
            while done < total:
                for batch in _epoch(dataset, recipe, device, seed + epoch, workers):
                    _set_rate(optimizer, recipe.lr * _rate(done / total))
                    optimizer.zero_grad()
                    loss = step(batch, model)
                    loss.backward()
                    optimizer.step()
                    done += 1
                    bar.update()
                    if done % 20 == 0 or done % steps_per_epoch == 0:
                        _check_loss(loss.item(), name, done, recipe.lr)
                        bar.set_postfix(loss=f"{loss.item():.3f}")
                    if done == total:
                        break
                epoch += 1
                if saved is not None:
                    save_checkpoint(saved, model, optimizer, epoch, step)

    return train


def sgd(model: nn.Module, recipe: Recipe, optimizer_class: Callable[..., Optimizer] = SGD) -> Optimizer:
    """The recipe's optimizer; `optimizer_class` may be NNI's traced SGD."""
    return optimizer_class(
        parameter_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=recipe.momentum, nesterov=True
    )


@torch.no_grad()
def accuracy(
    model: nn.Module, dataset: Dataset, *, device: torch.device, batch_size: int = 256, workers: int = 0
) -> float:
    """Top-1 accuracy in per cent, in eval mode; the model's mode comes back."""
    mode = model.training
    model.eval()
    correct = total = 0
    for images, labels in loader(dataset, batch_size, workers=workers):
        logits = model(images.to(device))
        correct += int((logits.argmax(1).cpu() == labels).sum())
        total += len(labels)
    model.train(mode)
    return 100 * correct / total


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, epoch: int, step: Any = None) -> None:
    """Model, momentum, number of finished epochs and a `PatchedStep`'s state, in one safetensors file."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in _trained(model, step).items():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum.contiguous()
    progress: dict[str, Any] = {"epoch": epoch}
    if isinstance(step, PatchedStep):
        progress["step"] = {}
        for name, value in step.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"step.{name}"] = value.detach().contiguous()
            else:
                progress["step"][name] = value
    metadata = {"progress": json.dumps(progress)}
    write(path, lambda temporary: save_file(tensors, str(temporary), metadata))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer | None = None, step: Any = None
) -> int:
    """Restores what `save_checkpoint` wrote and returns the number of finished epochs.

    Raises:
        ResultError: The file is damaged, or belongs to another model.
    """
    try:
        with safe_open(str(path), "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            epoch = progress["epoch"]
            if step is not None and ("step" in progress) != isinstance(step, PatchedStep):
                raise ValueError("it was written by another kind of training step")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        model.load_state_dict(entries_below("model.", tensors))
        if isinstance(step, PatchedStep):
            step.load_state_dict({**progress["step"], **entries_below("step.", tensors)})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ResultError(
            f"cannot resume from {path}: {reason}; delete it to start this stage again"
        ) from error
    if optimizer is not None:
        for name, parameter in _trained(model, step).items():
            if f"momentum.{name}" in tensors:
                momentum = tensors[f"momentum.{name}"].to(parameter.device)
                optimizer.state[parameter]["momentum_buffer"] = momentum
    return epoch


def _trained(model: nn.Module, step: Any) -> dict[str, nn.Parameter]:
    """The parameters of a training, the model's own and those that a step adds, by distinct names."""
    added = step.parameters if isinstance(step, PatchedStep) else {}
    return {**dict(model.named_parameters()), **{f"+{name}": p for name, p in added.items()}}


def _epoch(
    dataset: Dataset, recipe: Recipe, device: torch.device, seed: int, workers: int
) -> Iterator[Batch]:
    torch.manual_seed(seed)  # augmentation and dropout draw from the global generator
    whole = len(dataset) >= recipe.batch_size  # type: ignore[arg-type]
    for images, labels in loader(
        dataset, recipe.batch_size, shuffle=True, seed=seed, workers=workers, drop_last=whole
    ):
        yield images.to(device), labels.to(device)


def _rate(progress: float, warmup: float = 0.1) -> float:
    """Share of the peak learning rate at `progress` in [0, 1)."""
    if progress < warmup:
        return (progress + 0.01) / (warmup + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _set_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _check_loss(loss: float, name: str, step: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"the loss of {name!r} became {loss} at step {step}; lower {name}.lr (now {lr})")
