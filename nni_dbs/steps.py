"""A training step over several sub-networks behind one loss.

A loop calls a training step, then `backward` on the loss it got, and knows nothing of sub-networks. The
passes of a step are run one after another; the gradients of all but the last are computed at once and added
up, so that only one pass' activations are alive at a time, and handed over when the caller's `backward`
reaches the returned loss. `zero_grad` before or after the training step, a `GradScaler`, gradient
accumulation and `DistributedDataParallel` (one reduction for all passes) work as in ordinary training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from nni_dbs.errors import TrainingError
from nni_dbs.sampling import Step
from nni_dbs.supernet import Cut, Supernet
from torch_pruning_adapters.graph import tensors_in

Distill = Callable[[Tensor, Tensor], Tensor]

LOSS_SCALE = 1024.0  # keeps small float16 gradients of the early passes; a power of two, so exact elsewhere


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
        TrainingError: In a distilled step, if the training step does not call the model, or gives it other
            inputs in each pass.
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first: list[Any] = []

        def compute_loss() -> Tensor:
            output = self.training_step(*args, **kwargs)
            if not first:
                first.append(output)
            return _loss_of(output)

        step = next(self.steps)
        self.taken += 1
        loss = step_loss(self.supernet, step, compute_loss, self.distill)
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


def step_loss(
    supernet: Supernet, step: Step, compute_loss: Callable[[], Tensor], distill: Distill = kl_divergence
) -> Tensor:
    """The loss of one step: the sum over its networks, or the mean over the batch where they run in parallel.

    Args:
        supernet: Of the model that `compute_loss` runs.
        step: The networks.
        compute_loss: Runs the model on the batch and returns its loss (a scalar).
        distill: See `SupernetStep`.
    """
    if step.parallel:
        return _parallel_loss(supernet, step, compute_loss, distill)
    gradients: dict[nn.Parameter, Tensor] = {}
    teacher: _Record | None = None
    total: Tensor | None = None
    for widths in step.networks:
        cuts: list[Cut] = []
        recorded = _recorded(supernet.model) if step.distilled else nullcontext()
        with supernet.at(widths, cuts), recorded as record:
            loss = compute_loss()
            if record is not None and teacher is not None:
                loss = record.distilled(teacher, distill)
            if widths is not step.networks[-1]:
                _add_gradients(gradients, supernet.model, cuts, loss)
                loss = loss.detach()
        if record is not None and teacher is None:
            teacher = record.detached()
        total = loss if total is None else total + loss
    assert total is not None
    return _hand_over(total, gradients)


def _parallel_loss(
    supernet: Supernet, step: Step, compute_loss: Callable[[], Tensor], distill: Distill
) -> Tensor:
    parts = len(step.networks)
    if not step.distilled:
        with supernet.parallel(step.networks):
            return compute_loss()
    with supernet.parallel(step.networks), _replicated(supernet.model, parts) as outputs:
        loss = compute_loss()
    if not outputs:
        raise TrainingError(_NOT_CALLED)
    for logits in outputs:
        teacher, *students = logits.chunk(parts)
        loss = loss + torch.stack([distill(student, teacher.detach()) for student in students]).sum() / len(
            outputs
        )
    return loss


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
    forward = model.forward

    def recording(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        record.inputs.append(tensors_in((args, kwargs)))
        record.logits.append(_logits(outputs))
        return outputs

    with _replaced_forward(model, recording):
        yield record


@contextmanager
def _replicated(model: nn.Module, parts: int) -> Iterator[list[Tensor]]:
    """The model runs on copies of its batch and returns the first copy's outputs; yields all logits."""
    everything: list[Tensor] = []
    forward = model.forward

    def replicating(*args: Any, **kwargs: Any) -> Any:
        batch = len(tensors_in((args, kwargs))[0])

        def repeated(t: Tensor) -> Tensor:
            return torch.cat([t] * parts) if t.dim() and len(t) == batch else t

        args, kwargs = tree_map_only(Tensor, repeated, (args, kwargs))
        outputs = forward(*args, **kwargs)
        everything.append(_logits(outputs))
        return tree_map_only(Tensor, lambda t: t[: len(t) // parts] if t.dim() else t, outputs)

    with _replaced_forward(model, replicating):
        yield everything


@contextmanager
def _replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _logits(outputs: Any) -> Tensor:
    """The classification outputs: the tensor itself, `.logits`, the entry `out`, or the first of several."""
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, dict) and "out" in outputs:
        return outputs["out"]
    return tensors_in(outputs)[0]


def _loss_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["loss"] if isinstance(output, dict) else output[0]


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Tensor):
        return loss
    return {**output, "loss": loss} if isinstance(output, dict) else (loss, *output[1:])


def _add_gradients(
    gradients: dict[nn.Parameter, Tensor], model: nn.Module, cuts: list[Cut], loss: Tensor
) -> None:
    """Adds the gradients of `LOSS_SCALE * loss` to `gradients`, only to the active parts of each."""
    if not loss.requires_grad:
        return
    cut = {id(c.parameter) for c in cuts}
    whole = [Cut(p, (), p) for p in model.parameters() if p.requires_grad and id(p) not in cut]
    uses = [*cuts, *whole]
    found = torch.autograd.grad(loss * LOSS_SCALE, [use.part for use in uses], allow_unused=True)
    with torch.no_grad():
        for use, gradient in zip(uses, found, strict=True):
            if gradient is not None:
                if use.parameter not in gradients:
                    gradients[use.parameter] = torch.zeros_like(use.parameter)
                gradients[use.parameter][use.index] += gradient


def _hand_over(loss: Tensor, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """`loss`, whose `backward` also delivers the gradients of the earlier passes, which it consumes."""
    if not gradients:
        return loss
    return _HandOver.apply(loss, list(gradients.values()), *gradients)


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward was called twice on the loss of one step; run the step again")
        gradients, ctx.gradients = ctx.gradients, None
        return grad_output, None, *(g.mul_(grad_output / LOSS_SCALE) for g in gradients)
