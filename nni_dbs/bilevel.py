"""A training step that trains a network's weights and, in between, its architecture.

Architecture here is what DMCP, TAS and DSA learn beside the weights: probabilities or ratios of widths,
outside of the model and with an optimiser of their own. Each step trains the weights on a batch, as the
method says, and may be preceded by a step on the architecture, whose loss is that of the task and of the
budget. Methods that are bilevel (DARTS, first order) take the two losses on different data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import Dataset

from nni_dbs.batches import batch_size, mapped, part_of
from nni_dbs.errors import ConfigError, DataError, TrainingError
from nni_dbs.sampling import Step
from nni_dbs.space import Widths
from nni_dbs.steps import Distill, PatchedStep, kl_divergence, pass_loss, step_loss
from nni_dbs.supernet import Supernet
from torch_pruning_adapters.calls import tensors_in
from torch_pruning_adapters.importance import Order

ComputeLoss = Callable[[], Tensor]
_LOGGED = ("progress", "loss", "used")


class ArchitectureSearch(ABC):
    """One method's architecture: how weights are trained for it, how it is trained, and what it decides.

    Attributes:
        supernet: Of the user's model.
        architecture: What is learnt, outside of the model; on the CPU.
        optimizer: Of the architecture.
        generator: Of everything random.
        bilevel: Whether the architecture's steps should have data of their own.
        log: One entry for each step on the architecture: progress, loss and expected use of the budget.
        scale: What a GradScaler multiplies losses by at present; gradients are taken at it, so that small
            float16 ones survive.
    """

    bilevel: ClassVar[bool]

    def __init__(
        self, supernet: Supernet, architecture: nn.Module, optimizer: Optimizer, generator: torch.Generator
    ) -> None:
        self.supernet = supernet
        self.architecture = architecture
        self.optimizer = optimizer
        self.generator = generator
        self.log: list[dict[str, float]] = []
        self.scale: Tensor | float = 1.0

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the weights' optimiser has to train beside the model."""
        return {}

    @abstractmethod
    def due(self, taken: int, progress: float) -> bool:
        """Whether a step on the architecture goes before the step on the weights number `taken`."""

    @abstractmethod
    def weights_pass(self, progress: float) -> Step | AbstractContextManager[Any]:
        """What a step on the weights trains: sub-networks, or the model inside of a block."""

    @abstractmethod
    def architecture_step(self, compute_loss: ComputeLoss, progress: float) -> None:
        """One step on the architecture.

        Args:
            compute_loss: Runs the model on a batch and returns the task's loss.
            progress: Of the training, in [0, 1).
        """

    @abstractmethod
    def networks(self, n: int) -> list[Widths]:
        """At most n different networks inside of the budget, the method's own choice first."""

    def settle(self, widths: Widths) -> Order:
        """Prepares the model to be cut to one of `networks`; returns which channels come first."""
        return self.supernet.order

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: tensors, and what JSON can hold."""
        tensors: dict[str, Any] = dict(self.architecture.state_dict(prefix="architecture."))
        for number, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{n}": v for n, v in entries.items() if isinstance(v, Tensor)}
        log = torch.tensor([[line[key] for key in _LOGGED] for line in self.log], dtype=torch.float64)
        return {**tensors, "generator": self.generator.get_state(), "log": log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on a search made anew with the same arguments."""
        self.architecture.load_state_dict(entries_below("architecture.", state))
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        for key, value in entries_below("optimizer.", state).items():
            number, name = key.split(".")
            optimizer["state"].setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        self.generator.set_state(state["generator"])
        self.log = [dict(zip(_LOGGED, line, strict=True)) for line in state["log"].tolist()]

    def _gradients(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Of the loss; None where it does not depend on an input. The weights' stay as they are."""
        found = torch.autograd.grad(loss * self.scale, inputs, allow_unused=True)
        return [None if g is None else g / torch.as_tensor(self.scale).to(g) for g in found]

    def _descend(self, loss: Tensor, task: Tensor) -> None:
        """One step of the optimiser, by gradients averaged over the ranks of a distributed training.

        Args:
            loss: What has the gradients.
            task: The task's part of it, or what that is made from.

        Raises:
            TrainingError: The task's loss or a gradient is not finite.
        """
        parameters = list(self.architecture.parameters())
        for parameter, gradient in zip(parameters, self._gradients(loss, parameters), strict=True):
            parameter.grad = None if gradient is None else mean_over_ranks(gradient, task.device)
        wrong = "" if task.isfinite() else f"the loss of a step on the architecture became {task.item()}"
        if not all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None):
            wrong = wrong or "a step on the architecture has gradients that are not finite"
        if wrong:
            raise TrainingError(f"{wrong}; lower the learning rate of the weights")
        self.optimizer.step()

    def _record(self, progress: float, loss: Tensor, used: Tensor) -> None:
        self.log.append({"progress": progress, "loss": float(loss.detach()), "used": float(used.detach())})

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


class BilevelStep(PatchedStep):
    """A training step that trains the weights as an `ArchitectureSearch` says, and the architecture.

    The steps on the architecture run in train mode, but BatchNorm's running statistics do not see them. In a
    distributed training the gradients of the architecture, and of what the search trains beside the model,
    are averaged over the ranks; searches must be seeded alike on all of them. As TAS uses a part of the
    model's BatchNorms at most, its `DistributedDataParallel` needs `find_unused_parameters=True`.

    Args:
        search: The method.
        training_step: The user's; see `PatchedStep`.
        steps: How many steps the training has: schedules run over them.
        batch_at: Name and position of the batch among the training step's arguments.
        second: Batches for the architecture, iterated again and again. Without, a bilevel method takes the
            second half of each batch whenever it trains the architecture (so samples change sides from pass
            to pass), and others take the same batch.
        distill: See `SupernetStep`.

    Raises:
        ConfigError: No steps.
        DataError: No second batch, one unlike those of the weights, or batches that cannot be halved.
        TrainingError: As `SupernetStep`; a loss that is not finite.
    """

    def __init__(
        self,
        search: ArchitectureSearch,
        training_step: Callable[..., Any],
        steps: int,
        batch_at: tuple[str, int] = ("batch", 0),
        second: Iterable[Any] | None = None,
        distill: Distill = kl_divergence,
    ) -> None:
        super().__init__(search.supernet, training_step, distill)
        if steps < 1:
            raise ConfigError(f"a training of {steps} steps cannot train an architecture; give it at least 1")
        self.search = search
        self.steps = steps
        self.batch_at = batch_at
        self.second = None if second is None else _again_and_again(second)
        self.drawn = 0
        for parameter in search.parameters.values():
            parameter.register_post_accumulate_grad_hook(_average)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.search.parameters

    def _take(self, args: Any, kwargs: Any) -> Any:
        progress = min(self.taken / self.steps, 1.0)
        self.search.scale = self._scale.value
        if self.search.due(self.taken, progress):
            args, kwargs = self._train_architecture(args, kwargs, progress)
        self.taken += 1
        weights_pass = self.search.weights_pass(progress)

        def make_loss(compute_loss: ComputeLoss) -> Tensor:
            if isinstance(weights_pass, Step):
                return step_loss(self.supernet, weights_pass, compute_loss, self.distill, self._scale)
            loss = pass_loss(self.supernet, weights_pass, compute_loss, self._scale)
            if loss.requires_grad:
                loss.register_hook(self._scale.observe)
            return loss

        return self._with_loss_of(make_loss, args, kwargs)

    def _train_architecture(self, args: Any, kwargs: Any, progress: float) -> tuple[Any, Any]:
        """A step on the architecture; the arguments that are left for the weights."""
        name, position = self.batch_at
        batch = kwargs[name] if name in kwargs else args[position]
        own = batch
        if self.second is not None:
            own = self._next(batch)
        elif self.search.bilevel:
            batch, own = _halves(batch)
        left, other = (_with_batch(args, kwargs, self.batch_at, part) for part in (batch, own))

        def make_loss(compute_loss: ComputeLoss) -> Tensor:
            with _without_statistics(self.supernet):
                self.search.architecture_step(compute_loss, progress)
            return torch.zeros(())

        self._with_loss_of(make_loss, *other)
        return left

    def _next(self, like: Any) -> Any:
        assert self.second is not None
        batch = next(self.second)
        self.drawn += 1
        if _form(batch) != _form(like):
            raise DataError(
                f"the second loader gives {_form(batch)}, the training {_form(like)}; let both give the same"
            )
        tensors = tensors_in(like)
        return mapped(batch, lambda t: t.to(tensors[0].device)) if tensors else batch

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "drawn": self.drawn, **self.search.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after that state; batches for the architecture that were used before are skipped."""
        self.search.load_state_dict(state)
        self.taken = state["taken"]
        while self.second is not None and self.drawn < state["drawn"]:
            next(self.second)
            self.drawn += 1


def scaled_rate(rate: float, steps: int, published: int, most: float) -> float:
    """A published learning rate for `published` steps, for a search of another length.

    Rate times steps, how far the architecture can move, stays the same, up to a rate of `most`. Searches
    that are longer than the published ones keep its rate. (A reconstruction: no paper searches so briefly.)
    """
    return min(max(rate, rate * published / max(steps, 1)), most)


def check_architecture(*, limit: int = 2, lr: float | None = None) -> None:
    """Raises `ConfigError` for fewer than 2 widths of a group, or a learning rate that is not positive."""
    if limit < 2:
        raise ConfigError(f"limit must be at least 2 widths, not {limit}")
    if lr is not None and not 0 < lr < math.inf:
        raise ConfigError(f"lr must be positive, not {lr}")


def check_second(second: Iterable[Any] | None) -> None:
    """Raises `ConfigError` for what is not batches that can be iterated again and again."""
    if second is not None and (isinstance(second, Dataset) or not hasattr(second, "__iter__")):
        raise ConfigError(
            f"second must give batches, as a DataLoader does, not {type(second).__name__}: wrap a data set "
            "in a DataLoader"
        )


def cosine(progress: float, first: float, last: float) -> float:
    """From `first` to `last` along half a cosine, for progress in [0, 1]."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


@contextmanager
def _without_statistics(supernet: Supernet) -> Iterator[None]:
    """Within the block BatchNorms in train mode use a batch's statistics without keeping them."""
    layers = [m for m in supernet.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise DataError(
                "the second loader gave no batch; give one that can be iterated again and again, with at "
                "least one batch"
            )


def _form(batch: Any) -> str:
    """What a batch is made of, for comparison."""
    if isinstance(batch, Mapping):
        return f"mappings with {', '.join(sorted(map(str, batch)))}"
    if isinstance(batch, (list, tuple)):
        return f"batches of {len(batch)} parts"
    return "tensors" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"


def _halves(batch: Any) -> tuple[Any, Any]:
    """The first and the second half of a batch."""
    size = batch_size(batch)
    if size < 4:
        raise DataError(
            f"a batch of {size} samples cannot be halved for weights and architecture; use larger batches, "
            "or give the architecture a loader of its own"
        )
    middle = size - size // 2
    return part_of(batch, size, slice(middle)), part_of(batch, size, slice(middle, size))


def _with_batch(
    args: Sequence[Any], kwargs: Mapping[str, Any], batch_at: tuple[str, int], batch: Any
) -> tuple[Any, Any]:
    name, position = batch_at
    if name in kwargs:
        return args, {**kwargs, name: batch}
    return (*args[:position], batch, *args[position + 1 :]), kwargs


def mean_over_ranks(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """The mean over the processes of a distributed training; the same tensor if there is none.

    Args:
        tensor: Of any device.
        device: That the processes communicate by; default: the tensor's.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    shared = tensor.to(device or tensor.device, copy=True)
    dist.all_reduce(shared)
    return (shared / dist.get_world_size()).to(tensor.device)


def _average(parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad = mean_over_ranks(parameter.grad)


def entries_below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose names begin with a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
