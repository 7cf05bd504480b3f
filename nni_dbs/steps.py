"""A training step over several sub-networks behind one loss.

A loop calls a training step, then `backward` on the loss it got, and knows nothing of sub-networks. The
gradients of each pass are computed at once and added up, so that only one pass' activations are alive at a
time, and handed over when the caller's `backward` reaches the returned loss. `zero_grad` before or after the
training step, a `GradScaler`, gradient accumulation, activation checkpointing (`use_reentrant=False`) and
`DistributedDataParallel` (one reduction for all passes) work as in ordinary training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
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
from torch_pruning_adapters.graph import tensors_in

Distill = Callable[[Tensor, Tensor], Tensor]


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) at temperature 1, averaged over all but the classes.

    In-place distillation (Yu & Huang, "Universally Slimmable Networks", 2019). No gradient reaches the
    teacher.

    Args:
        student: (B, K, ...) logits.
        teacher: Same shape.
    """
    log_p, log_q = F.log_softmax(teacher.detach(), dim=1), F.log_softmax(student, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


class SupernetStep:
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

    Raises:
        TrainingError: If the training step returns no loss, or runs a `DistributedDataParallel` with
            `static_graph=True`; in a distilled step, if it does not call the model, or gives it other inputs
            in each pass.
    """

    def __init__(
        self,
        supernet: Supernet,
        steps: Iterator[Step],
        training_step: Callable[..., Any],
        distill: Distill = kl_divergence,
    ) -> None:
        self.supernet = supernet
        self.steps = steps
        self.training_step = training_step
        self.distill = distill
        self.taken = 0
        self._scale = _LossScale()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # an evaluation by the same function
            return self.training_step(*args, **kwargs)
        if any(isinstance(a, DistributedDataParallel) and a.static_graph for a in (*args, *kwargs.values())):
            raise TrainingError(
                "DistributedDataParallel with static_graph=True cannot run the several passes of a step; "
                "build it without static_graph"
            )
        first: list[Any] = []

        def compute_loss() -> Tensor:
            output = self.training_step(*map(_fresh, args), **{k: _fresh(v) for k, v in kwargs.items()})
            if output is None and not first:
                raise _SkippedError
            if not first:
                first.append(output)
            return _loss_of(output)

        try:
            step = next(self.steps)
        except StopIteration:
            raise TrainingError(
                f"the rule ended after {self.taken} steps; give an endless one, as in nni_dbs.sampling"
            ) from None
        self.taken += 1
        try:
            loss = step_loss(self.supernet, step, compute_loss, self.distill, self._scale)
        except _SkippedError:
            return None
        return _with_loss(first[0], loss)

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken: all that a rule needs to go on, if its generator is seeded alike."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skips the steps that were taken before; call it on a step made anew with the same seed."""
        skipped = state["taken"] - self.taken
        if skipped < 0:
            raise ValueError(f"{self.taken} steps are taken already, more than the {state['taken']} to skip")
        next(islice(self.steps, skipped, skipped), None)
        self.taken = state["taken"]


class _SkippedError(Exception):
    """The training step returned None, which skips a batch in Lightning."""


def _fresh(value: Any) -> Any:
    """A shallow copy of a batch that the training step may take entries out of."""
    return copy.copy(value) if isinstance(value, (MutableMapping, list)) else value


class _LossScale:
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
    scale: _LossScale | None = None,
) -> Tensor:
    """The loss of one step: the sum over its networks, or the mean over the batch where they run in parallel.

    Args:
        supernet: Of the model that `compute_loss` runs.
        step: The networks.
        compute_loss: Runs the model on the batch and returns its loss (a scalar).
        distill: See `SupernetStep`.
        scale: Kept from step to step by `SupernetStep`.
    """
    gradients = _Gradients(scale or _LossScale())
    if step.parallel:
        return gradients.hand_over(_parallel_loss(supernet, step, compute_loss, distill, gradients))
    networks = tuple(dict.fromkeys(step.networks))
    teacher: _Record | None = None
    losses = []
    for widths in networks:
        # DistributedDataParallel may look for the parameters in the graph of the last forward pass
        cuts: list[Cut] | None = None if widths is networks[-1] else []
        recorded = _recorded(supernet.model) if step.distilled else nullcontext()
        with supernet.at(widths, cuts), recorded as record:
            loss = compute_loss()
            if record is not None and teacher is not None:
                loss = record.distilled(teacher, distill)
            gradients.add(loss, cuts or ())
        if record is not None and teacher is None:
            teacher = record.detached()
        losses.append(loss.detach())
    return gradients.hand_over(torch.stack(losses).sum())


def _parallel_loss(
    supernet: Supernet,
    step: Step,
    compute_loss: Callable[[], Tensor],
    distill: Distill,
    gradients: _Gradients,
) -> Tensor:
    parts = len(step.networks)
    with supernet.parallel(step.networks):
        if not step.distilled:
            loss = compute_loss()
        else:
            with _replicated(supernet.model, parts) as copies:
                loss = compute_loss()
            if not copies:
                raise TrainingError(_NOT_CALLED)
            for logits in copies:
                teacher, *students = logits.chunk(parts)
                losses = [distill(student, teacher.detach()) for student in students]
                loss = loss + sum(losses, loss.new_zeros(())) / len(copies)
        gradients.add(loss)
    return loss.detach()


_NOT_CALLED = (
    "distillation reads the model's outputs, but the training step did not call the model itself; "
    "let it call model(x) (in a LightningModule: self(x)), or train without distillation"
)


class _Record:
    """Inputs and logits of a model's calls during one pass."""

    def __init__(self) -> None:
        self.inputs: list[list[Tensor]] = []
        self.logits: list[Tensor] = []

    def detached(self) -> _Record:
        """Without the graphs of the logits."""
        record = _Record()
        record.inputs, record.logits = self.inputs, [t.detach() for t in self.logits]
        return record

    def distilled(self, teacher: _Record, distill: Distill) -> Tensor:
        """Mean distillation loss over the calls."""
        if not self.logits or len(self.logits) != len(teacher.logits):
            raise TrainingError(_NOT_CALLED)
        for mine, theirs in zip(self.inputs, teacher.inputs, strict=True):
            if len(mine) != len(theirs) or not all(
                a is b or torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)
            ):
                raise TrainingError(
                    "the training step gave the model other inputs in the second pass over the same batch; "
                    "networks of one step must see the same images: augment in the data loader"
                )
        losses = [distill(s, t) for s, t in zip(self.logits, teacher.logits, strict=True)]
        return torch.stack(losses).mean()


@contextmanager
def _recorded(model: nn.Module) -> Iterator[_Record]:
    record = _Record()

    def hook(model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        record.inputs.append(tensors_in((args, kwargs)))
        record.logits.append(_logits(outputs))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()


@contextmanager
def _replicated(model: nn.Module, parts: int) -> Iterator[list[Tensor]]:
    """The model runs on copies of its batch and returns the first copy's outputs; yields all logits."""
    logits: list[Tensor] = []

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
        logits.append(_logits(outputs))
        return tree_map_only(Tensor, lambda t: t[: len(t) // parts] if t.dim() else t, outputs)

    handles = model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def _logits(outputs: Any) -> Tensor:
    """The classification outputs: the tensor itself, `logits` or `out` of several, else the first batch."""
    if isinstance(outputs, Mapping):
        for name in ("logits", "out"):
            if name in outputs:
                return outputs[name]
    if hasattr(outputs, "logits"):
        return outputs.logits
    return next(t for t in tensors_in(outputs) if t.dim() > 1)


def _loss_of(output: Any) -> Tensor:
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, Sequence) and output:
        loss = output[0]
    if not isinstance(loss, Tensor):
        raise TrainingError(
            "the training step must return a loss: a tensor, a sequence that begins with it, or a mapping "
            f"with the key 'loss'; it returned {type(output).__name__}"
        )
    return loss


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Tensor):
        return loss
    return {**output, "loss": loss} if isinstance(output, Mapping) else (loss, *output[1:])


class _Gradients:
    """The gradients of several passes, added up until `backward` reaches the loss of the step."""

    def __init__(self, scale: _LossScale) -> None:
        self.scale = scale
        self.unit = scale.value  # everything here is multiplied by it
        self.of: dict[Tensor, Tensor] = {}

    def add(self, loss: Tensor, cuts: Sequence[Cut] = ()) -> None:
        """Adds those of all leaves behind `loss`, of cut parameters only to the active part."""
        leaves = _leaves(loss)
        cut = {id(c.part): c for c in cuts}
        if not leaves:
            return
        found = torch.autograd.grad(loss * self.unit, leaves)
        for leaf, gradient in zip(leaves, found, strict=True):
            c = cut.get(id(leaf))
            if c is not None:
                if c.parameter not in self.of:
                    self.of[c.parameter] = torch.zeros_like(c.parameter)
                self.of[c.parameter].data[c.index] += gradient
            elif leaf in self.of:
                self.of[leaf] += gradient
            else:
                self.of[leaf] = gradient.clone()  # may be shared with that of another leaf

    def hand_over(self, loss: Tensor) -> Tensor:
        """`loss`, whose `backward` delivers the gradients."""
        return _HandOver.apply(loss, self, *self.of) if self.of else loss


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that the gradient of `loss` would be accumulated in."""
    leaves = []
    nodes = [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
        for before, _ in node.next_functions:
            if before not in seen:
                seen.add(before)
                nodes.append(before)
    return leaves


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
        return None, None, *(g.mul_(factor) for g in gradients.of.values())
