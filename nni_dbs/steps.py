"""A training step over several sub-networks behind one loss.

A loop calls a training step, then `backward` on the loss it got, and knows nothing of sub-networks. The
gradients of all passes but the last are computed at once and added up, so that only one pass' activations are
alive at a time, and handed over when the caller's `backward` reaches the returned loss. `zero_grad` before or
after the training step, a `GradScaler`, gradient accumulation, hooks of parameters, activation checkpointing
(`use_reentrant=False`) and `DistributedDataParallel` (one reduction for all passes) work as in ordinary
training. Not so, losses that differentiate by the parameters themselves.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from nni_dbs.errors import TrainingError
from nni_dbs.sampling import Step
from nni_dbs.supernet import Cut, Supernet
from torch_pruning_adapters.calls import tensors_in

Distill = Callable[[Tensor, Tensor], Tensor]


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) at temperature 1, averaged over all but the classes.

    In-place distillation (Yu & Huang, "Universally Slimmable Networks", 2019), for classification and
    segmentation. No gradient reaches the teacher.

    Args:
        student: Logits (B, K) or (B, K, H, W) of K classes.
        teacher: Same shape.

    Raises:
        TrainingError: Other shapes, or a single class.
    """
    if student.dim() not in (2, 4) or student.shape[1] < 2:
        raise TrainingError(
            f"cannot distil outputs of shape {tuple(student.shape)} as (batch, classes, ...) logits; "
            "give distill= a loss of your own, such as binary_cross_entropy or mse_loss"
        )
    log_p, log_q = F.log_softmax(teacher.detach(), dim=1), F.log_softmax(student, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


class PatchedStep(ABC):
    """Takes the place of a training step in any loop, and returns one loss like it.

    `nni_dbs.plugin.evaluator` puts it into NNI's evaluators; `nni_dbs.training` saves its state and goes on.

    Attributes:
        supernet: Of the model that the training step trains.
        training_step: Computes the loss of a batch: a tensor, a sequence whose first part it is, or a
            mapping with the key `loss`.
        distill: Loss of a network's logits given those of the first network, for distilled steps.
        taken: Steps so far.
    """

    def __init__(self, supernet: Supernet, training_step: Callable[..., Any], distill: Distill) -> None:
        self.supernet = supernet
        self.training_step = training_step
        self.distill = distill
        self.taken = 0
        self._scale = LossScale()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # an evaluation by the same function
            return self.training_step(*args, **kwargs)
        if any(isinstance(a, DistributedDataParallel) and a.static_graph for a in (*args, *kwargs.values())):
            raise TrainingError(
                "DistributedDataParallel with static_graph=True cannot run the several passes of a step; "
                "build it without static_graph"
            )
        return self._take(args, kwargs)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What the model's optimizer has to train beside the model."""
        return {}

    @abstractmethod
    def _take(self, args: Any, kwargs: Any) -> Any:
        """One step on the arguments of the training step: what that returns, with the loss of the step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: tensors, and what JSON can hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after that state; call it on a step made anew with the same seed."""

    def _with_loss_of(
        self, make_loss: Callable[[Callable[[], Tensor]], Tensor], args: Any, kwargs: Any
    ) -> Any:
        """The training step's output, whose loss is `make_loss` of a function that runs the step."""
        first: list[Any] = []

        def compute_loss() -> Tensor:
            output = self.training_step(*map(_fresh, args), **{k: _fresh(v) for k, v in kwargs.items()})
            if output is None and not first:
                raise SkippedError
            if not first:
                first.append(output)
            return loss_of(output)

        try:
            loss = make_loss(compute_loss)
        except SkippedError:
            return None
        return _with_loss(first[0], loss)


class SupernetStep(PatchedStep):
    """A training step that trains, call by call, the networks of the next `Step`.

    Takes the place of a training step in any loop; `nni_dbs.plugin.evaluator.train_supernet` puts it into
    NNI's evaluators. In-place distillation needs no change of the loop: the model's outputs are read as they
    pass. Inputs must be the same in each pass of a step: augment in the data loader, not in the step.

    On all ranks of a distributed training the rules must draw from equal generators, so that all train the
    same networks. BatchNorm's running statistics stay those of each process (SyncBatchNorm is for GPUs);
    recalibrate before you score.

    Args:
        supernet: Of the model that the training step trains.
        steps: From `nni_dbs.sampling`.
        training_step: Computes the loss of a batch: a tensor, a sequence whose first part it is, or a
            mapping with the key `loss`.
        distill: Loss of a network's logits given those of the first network, for distilled steps.

    Attributes:
        last: The step that was taken last.

    Raises:
        TrainingError: If the training step returns no loss, or runs a `DistributedDataParallel` with
            `static_graph=True`; in a distilled step, if it does not call the model, or gives it other inputs
            in each pass.
    """

    def __init__(
        self,
        supernet: Supernet,
        steps: Iterable[Step],
        training_step: Callable[..., Any],
        distill: Distill = kl_divergence,
    ) -> None:
        super().__init__(supernet, training_step, distill)
        self.steps = iter(steps)
        self.last: Step | None = None

    def _take(self, args: Any, kwargs: Any) -> Any:
        try:
            self.last = step = next(self.steps)
        except StopIteration:
            raise TrainingError(
                f"the rule ended after {self.taken} steps; give an endless one, as in nni_dbs.sampling"
            ) from None
        self.taken += 1
        return self._with_loss_of(
            lambda compute_loss: step_loss(self.supernet, step, compute_loss, self.distill, self._scale),
            args,
            kwargs,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a rule needs to go on, if its generator is seeded alike; JSON."""
        last = () if self.last is None else self.last.networks
        return {"taken": self.taken, "last": [dict(widths) for widths in last]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skips the steps that were taken before; call it on a step made anew with the same seed.

        Raises:
            TrainingError: The rule draws other steps than before, or more steps are taken already.
        """
        if state["taken"] < self.taken:
            raise TrainingError(
                f"{self.taken} steps are taken already, more than the {state['taken']} to go on after"
            )
        for step in islice(self.steps, state["taken"] - self.taken):
            self.last, self.taken = step, self.taken + 1
        if any(value != state[name] for name, value in SupernetStep.state_dict(self).items()):
            raise TrainingError(
                f"cannot go on after step {state['taken']}: the rule draws other networks than before; make "
                "it anew with the same seed and the same space"
            )


class SkippedError(Exception):
    """The training step returned None, which skips a batch in Lightning."""


def _fresh(value: Any) -> Any:
    """A copy of a batch's containers, which the training step may take entries out of."""
    if isinstance(value, MutableMapping):
        fresh = copy.copy(value)
        fresh.update({name: _fresh(part) for name, part in value.items()})
        return fresh
    return [_fresh(part) for part in value] if type(value) is list else value


class LossScale:
    """What the caller last multiplied the loss by before `backward`, as a GradScaler does.

    Losses are differentiated at this scale, so that small float16 gradients survive as in ordinary training.
    """

    def __init__(self) -> None:
        self.value: Tensor | float = 1.0

    def observe(self, grad_output: Tensor) -> None:
        """Keeps the power of two below `grad_output`: scaling by it is exact."""
        power = torch.ldexp(torch.ones_like(grad_output), torch.frexp(grad_output.abs()).exponent - 1)
        self.value = torch.where(grad_output.isfinite() & (grad_output != 0), power, 1.0)


def step_loss(
    supernet: Supernet,
    step: Step,
    compute_loss: Callable[[], Tensor],
    distill: Distill = kl_divergence,
    scale: LossScale | None = None,
) -> Tensor:
    """The loss of one step: the sum over its networks, of the mean of their sides where they are mirrored; or
    the mean over the batch where they run in parallel.

    Args:
        supernet: Of the model that `compute_loss` runs.
        step: The networks.
        compute_loss: Runs the model on the batch and returns its loss (a scalar).
        distill: See `SupernetStep`.
        scale: Kept from step to step by `SupernetStep`.
    """
    gradients = _Gradients(supernet, scale or LossScale())
    if step.parallel:
        return gradients.hand_over(_parallel_loss(supernet, step, compute_loss, distill, gradients))
    sides = (False, True) if step.mirrored else (False,)
    passes = [(widths, side) for widths in dict.fromkeys(step.networks) for side in sides]
    teacher: Record | None = None
    total: Tensor | None = None
    for number, (widths, side) in enumerate(passes, start=1):
        last = number == len(passes)
        cuts: list[Cut] | None = None if last else []
        with supernet.at(widths, cuts, last=side), recorded(supernet.model) as record:
            loss = compute_loss() / len(sides)
            if step.distilled and teacher is not None:
                loss = record.distilled(teacher, distill)
            if not last or supernet.recomputes:
                loss = gradients.take(loss, cuts or (), record)
        if step.distilled and teacher is None:
            teacher = record.detached()
        total = loss if total is None else total + loss
    assert total is not None
    return gradients.hand_over(total)


def pass_loss(
    supernet: Supernet,
    block: AbstractContextManager[Any],
    compute_loss: Callable[[], Tensor],
    scale: LossScale | None = None,
) -> Tensor:
    """The loss of one pass inside of a block, whose `backward` may come after the block.

    Args:
        supernet: Of the model that `compute_loss` runs.
        block: Of the supernet, such as `supernet.gated(gates)`.
        compute_loss, scale: As for `step_loss`.
    """
    gradients = _Gradients(supernet, scale or LossScale())
    with block, recorded(supernet.model) as record:
        loss = compute_loss()
        if supernet.recomputes:
            loss = gradients.take(loss, (), record)
    return gradients.hand_over(loss)


def _parallel_loss(
    supernet: Supernet,
    step: Step,
    compute_loss: Callable[[], Tensor],
    distill: Distill,
    gradients: _Gradients,
) -> Tensor:
    parts = len(step.networks)
    with supernet.parallel(step.networks), recorded(supernet.model) as record:
        if not step.distilled:
            loss = compute_loss()
        else:
            with _replicated(supernet.model, parts) as copies:
                loss = compute_loss()
            if not copies:
                raise TrainingError(_NOT_CALLED)
            for outputs in copies:
                teacher, *students = logits_of(outputs).chunk(parts)
                losses = [distill(student, teacher.detach()) for student in students]
                loss = loss + sum(losses, loss.new_zeros(())) / len(copies)
        return gradients.take(loss, (), record) if supernet.recomputes else loss


_NOT_CALLED = (
    "distillation reads the model's outputs, but the training step did not call the model itself; "
    "let it call model(x) (in a LightningModule: self(x)), or train without distillation"
)


class Record:
    """Inputs and outputs of a model's calls during one pass."""

    def __init__(self) -> None:
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[Any] = []

    def detached(self) -> Record:
        """Without the graphs of the outputs."""
        record = Record()
        record.inputs, record.outputs = self.inputs, tree_map_only(Tensor, Tensor.detach, self.outputs)
        return record

    def distilled(self, teacher: Record, distill: Distill) -> Tensor:
        """Mean distillation loss over the calls."""
        if not self.outputs or len(self.outputs) != len(teacher.outputs):
            raise TrainingError(_NOT_CALLED)
        for mine, theirs in zip(self.inputs, teacher.inputs, strict=True):
            if len(mine) != len(theirs) or not all(
                a is b or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)
            ):
                raise TrainingError(
                    "the training step gave the model other inputs in the second pass over the same batch; "
                    "networks of one step must see the same images: augment in the data loader"
                )
        pairs = zip(self.outputs, teacher.outputs, strict=True)
        return torch.stack([distill(logits_of(s), logits_of(t)) for s, t in pairs]).mean()


@contextmanager
def recorded(model: nn.Module) -> Iterator[Record]:
    record = Record()

    def hook(model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        record.inputs.append(tensors_in((args, kwargs)))
        record.outputs.append(outputs)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()


@contextmanager
def _replicated(model: nn.Module, parts: int) -> Iterator[list[Any]]:
    """The model runs on copies of its batch and returns the first copy's outputs; yields all outputs."""
    copies: list[Any] = []

    def before(model: nn.Module, args: Any, kwargs: Any) -> Any:
        batch = len(tensors_in((args, kwargs))[0])

        def repeated(t: Tensor) -> Tensor:
            return torch.cat([t] * parts) if t.dim() and len(t) == batch else t

        return tree_map_only(Tensor, repeated, (args, kwargs))

    def after(model: nn.Module, args: Any, outputs: Any) -> Any:
        if any(t.dim() == 0 and t.requires_grad for t in tensors_in(outputs)):
            raise TrainingError(
                "the model computes its own loss, which would mix the labels' loss of all parallel networks; "
                "compute it in the training step from the logits, or distil one after another"
            )
        copies.append(outputs)
        return tree_map_only(Tensor, lambda t: t[: len(t) // parts] if t.dim() else t, outputs)

    handles = model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)
    try:
        yield copies
    finally:
        for handle in handles:
            handle.remove()


def logits_of(outputs: Any) -> Tensor:
    """A model's logits: the tensor itself, `logits` or `out` of several, or the first batch of a sequence.

    Raises:
        TrainingError: It cannot be told.
    """
    if isinstance(outputs, Mapping):
        found = next((outputs[name] for name in ("logits", "out") if name in outputs), None)
    elif hasattr(outputs, "logits"):
        found = outputs.logits
    else:
        found = next((t for t in tensors_in(outputs) if t.dim() > 1), None)
    if not isinstance(found, Tensor):
        raise TrainingError(
            f"cannot tell which output of the model holds its logits ({type(outputs).__name__}); let it "
            "return them as a tensor (batch, classes), first of a tuple, or under the name 'logits'"
        )
    return found


def loss_of(output: Any) -> Tensor:
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, Sequence) and output:
        loss = output[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TrainingError(
            "the training step must return a loss: a scalar tensor, a sequence that begins with it, or a "
            f"mapping with the key 'loss'; it returned {type(output).__name__}"
        )
    return loss


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, Mapping):
        return {**output, "loss": loss}
    named = getattr(output, "_fields", None)
    return output._replace(**{named[0]: loss}) if named else (loss, *output[1:])


class _Gradients:
    """The gradients of passes, added up until `backward` reaches the loss of the step."""

    def __init__(self, supernet: Supernet, scale: LossScale) -> None:
        self.parameters = [p for p in supernet.parameters() if p.requires_grad]
        self.scale = scale
        self.unit = scale.value  # everything here is multiplied by it
        self.of: dict[Tensor, Tensor] = {}

    def take(self, loss: Tensor, cuts: Sequence[Cut], record: Record) -> Tensor:
        """Adds those of a pass' loss, of cut parameters only to the active part; returns its value."""
        if not loss.requires_grad:
            return loss
        known = {id(t) for t in (*(c.part for c in cuts), *self.parameters)}
        others = [t for t in _leaves(loss, record.outputs) if id(t) not in known]
        uses = [*cuts, *(Cut(t, (), t) for t in (*self.parameters, *others))]
        found = torch.autograd.grad(loss * self.unit, [use.part for use in uses], allow_unused=True)
        for use, gradient in zip(uses, found, strict=True):
            if gradient is None:
                continue
            if use.parameter in self.of:
                self.of[use.parameter].data[use.index] += gradient
            elif use.index:
                self.of[use.parameter] = torch.zeros_like(use.parameter)
                self.of[use.parameter].data[use.index] = gradient
            else:
                self.of[use.parameter] = gradient.clone()  # may be shared with that of another leaf
        return loss.detach()

    def hand_over(self, loss: Tensor) -> Tensor:
        """`loss`, whose `backward` delivers the gradients too."""
        return _HandOver.apply(loss, self, *self.of) if self.of else loss


def _leaves(loss: Tensor, outputs: Any) -> list[Tensor]:
    """Tensors with gradients behind `loss` but not behind the model's outputs, as those of a learned loss."""
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None, *(t.grad_fn for t in tensors_in(outputs) if t is not loss)}
    leaves = []
    while nodes and len(seen) < MAX_NODES:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of AccumulateGrad
        if isinstance(variable, Tensor):
            leaves.append(variable)
        nodes.extend(before for before, _ in node.next_functions)
    return leaves


MAX_NODES = 2000  # a walk through very deep graphs overflows the stack when they are freed


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: _Gradients, *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward was called twice on the loss of one step; run the step again")
        gradients, ctx.gradients = ctx.gradients, None
        gradients.scale.observe(grad_output)
        factor = grad_output / gradients.unit
        return grad_output, None, *(g.mul_(factor) for g in gradients.of.values())
