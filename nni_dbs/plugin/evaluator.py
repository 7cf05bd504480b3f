"""NNI's evaluators made to work with today's libraries, and the two things our pruners ask of them.

Users build `TorchEvaluator`, `LightningEvaluator` or `TransformersEvaluator` as in any NNI script. `repair`
replaces the broken methods on that one instance; no class of NNI, Lightning or Transformers is touched.
Call it before `Compressor.__init__`, which already uses the evaluator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import nni
from nni.common import is_traceable
from nni.compression import LightningEvaluator, TransformersEvaluator
from nni.compression.utils.evaluator import Evaluator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from nni_dbs.bilevel import ArchitectureSearch, BilevelStep
from nni_dbs.errors import EvaluatorError
from nni_dbs.evaluate import cumulative_batchnorm, saw_batches
from nni_dbs.sampling import Step
from nni_dbs.steps import Distill, PatchedStep, SupernetStep, kl_divergence
from nni_dbs.supernet import Supernet

Task = Callable[[], Any]


def repair(evaluator: Evaluator) -> None:
    """Replace the methods of this evaluator that fail with current library versions.

    Methods that the user overrode in a subclass are left alone. Repeating the call changes nothing.
    `TorchEvaluator` needs no repair. What was broken is told by each replacement, further down.

    Raises:
        EvaluatorError: the Trainer of a `TransformersEvaluator` uses DeepSpeed, which owns the steps.
    """
    for nni_class, methods in _REPAIRS.items():
        if not isinstance(evaluator, nni_class):
            continue
        if nni_class is TransformersEvaluator and evaluator.traced_trainer.args.deepspeed:
            raise EvaluatorError(
                "a Trainer with DeepSpeed is not supported; remove `deepspeed` from its arguments"
            )
        for name, method in methods.items():
            if getattr(type(evaluator), name) is getattr(nni_class, name):
                setattr(evaluator, name, MethodType(method, evaluator))


def score(evaluator: Evaluator, model: nn.Module) -> float:
    """Evaluate `model` with the user's own metric (higher is better) and return it as a float.

    `model` may be a smaller copy of the network that the evaluator was made for. The evaluator is unbound
    afterwards, also after an exception; whatever was bound to it before is unbound by NNI, with a warning.

    Raises:
        EvaluatorError: there is no metric, or it is not a number.
    """
    with _bound(evaluator, model):
        result = evaluator.evaluate()
    metric = result[0] if isinstance(result, tuple) else result
    if metric is None:
        raise EvaluatorError(f"{type(evaluator).__name__} gave no metric; {_how_to_add_a_metric(evaluator)}")
    try:
        value = float(metric)
    except (TypeError, ValueError) as error:
        raise EvaluatorError(
            f"the metric must be a number, got {metric!r}; {_how_to_add_a_metric(evaluator)}"
        ) from error
    if math.isnan(value):
        raise EvaluatorError("the metric is NaN; check the model's outputs and the evaluation data")
    return value


def recalibrate_batchnorm(evaluator: Evaluator, model: nn.Module, max_steps: int) -> None:
    """Re-estimate the BatchNorm statistics of `model` from `max_steps` batches of the user's training data.

    The user's training loop runs as it is, on a model whose parameters are frozen: the loss it gets has a
    gradient of its own but leads nowhere, so every `param.grad` stays None and optimizers skip it, weight
    decay included. Gradients left from earlier are dropped, for they would be applied. Use it on a smaller
    copy before `score`. A model without BatchNorm is left alone and no data is read. Loops with a GradScaler
    (float16) fail, because it insists on gradients; bfloat16 and float32 need none.

    Raises:
        EvaluatorError: the training loop failed (its error is the cause), or ran no batch in train mode.
    """
    with cumulative_batchnorm(model) as layers:
        if not layers:
            return
        model.train()  # Lightning >= 2.2 trains in the mode it finds
        with _bound(evaluator, model), _frozen_parameters(model):
            evaluator.patch_loss(_without_gradient)
            try:
                evaluator.train(max_steps=max_steps)
            except Exception as error:
                raise EvaluatorError(
                    f"recalibrating BatchNorm by training with {type(evaluator).__name__} failed: {error}; "
                    "its loop must accept parameters that receive no gradient, which a GradScaler does not"
                ) from error
        if not any(saw_batches(layer) for layer in layers):
            raise EvaluatorError(
                f"the training of {type(evaluator).__name__} ran no batch through BatchNorm in train mode; "
                "its loop must honour `max_steps` and must not put BatchNorm layers in eval mode"
            )


@contextmanager
def train_supernet(
    evaluator: Evaluator,
    supernet: Supernet,
    steps: Iterator[Step],
    distill: Distill = kl_divergence,
    make: Callable[..., SupernetStep] = SupernetStep,
) -> Iterator[SupernetStep]:
    """Within the block the evaluator's training steps train the networks that `steps` names.

    The model must be bound, without NNI's wrappers; then call `evaluator.train(max_steps, max_epochs)`. Works
    with `TorchEvaluator` (whose training function gets the `SupernetStep` and may save its state to resume),
    and, after `repair`, with `LightningEvaluator` (automatic optimisation; strategy `ddp` too) and
    `TransformersEvaluator`.

    Args:
        evaluator: Bound to the supernet's model, or to a module that contains it.
        supernet: What to train.
        steps: From `nni_dbs.sampling`.
        distill: See `SupernetStep`.
        make: Builds the step from supernet, steps, training step and `distill`.

    Yields:
        The step that takes the place of the user's.

    Raises:
        EvaluatorError: Another model is bound, or none; or Lightning's optimisation is manual.
    """
    owner, name, distill = _training_step_of(evaluator, supernet, distill)
    with patched_step(owner, name, make(supernet, steps, getattr(owner, name), distill)) as step:
        yield step


@contextmanager
def train_architecture(
    evaluator: Evaluator, search: ArchitectureSearch, steps: int, second: Iterable[Any] | None = None
) -> Iterator[BilevelStep]:
    """Within the block the evaluator's training steps train the weights and the architecture of `search`.

    As `train_supernet`. What the method trains beside the model joins the first parameter group of the
    evaluator's optimizer that has a BatchNorm's parameters.

    Args:
        evaluator: Bound to the search's model, or to a module that contains it.
        search: The method.
        steps: Of the optimizer, altogether. Where Lightning or a Trainer accumulates gradients, the schedules
            follow; a training function that does so counts its calls of the training step.
        second: As for `BilevelStep`.

    Raises:
        EvaluatorError: As for `train_supernet`.
    """
    owner, name, distill = _training_step_of(evaluator, search.supernet, kl_divergence)
    batch_at = ("inputs", 1) if isinstance(evaluator, TransformersEvaluator) else ("batch", 0)
    if search.parameters:
        norms = (n for n, m in evaluator.model.named_modules() if isinstance(m, _BatchNorm))
        evaluator.patch_optim_param_group({next(norms, ""): list(search.parameters.values())})
    calls = steps * _accumulated(evaluator)
    step = BilevelStep(search, getattr(owner, name), calls, batch_at, second, distill)
    with patched_step(owner, name, step), _cleared_with(search.supernet.model, search.parameters.values()):
        yield step


@contextmanager
def _cleared_with(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block `model.zero_grad()`, by which a Trainer ends its steps, clears these gradients too."""
    added, zero_grad = list(parameters), model.zero_grad

    def zero_all(set_to_none: bool = True) -> None:
        zero_grad(set_to_none)
        for parameter in added:
            parameter.grad = None

    model.zero_grad = zero_all  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.zero_grad


def _accumulated(evaluator: Evaluator) -> int:
    """Training steps for each step of the optimizer."""
    if isinstance(evaluator, LightningEvaluator):
        return int(evaluator.trainer.trace_kwargs.get("accumulate_grad_batches", 1))
    if isinstance(evaluator, TransformersEvaluator):
        return int(evaluator.trainer.args.gradient_accumulation_steps)
    return 1


def _training_step_of(evaluator: Evaluator, supernet: Supernet, distill: Distill) -> tuple[Any, str, Distill]:
    """Who has the training step of an evaluator, under which name; and what distillation has to be there."""
    bound = getattr(evaluator, "model", None)
    if bound is None or all(module is not supernet.model for module in bound.modules()):
        raise EvaluatorError("bind the supernet's model to the evaluator before training the supernet")
    if isinstance(evaluator, LightningEvaluator):
        if not bound.automatic_optimization:
            raise EvaluatorError(
                "a supernet needs automatic optimization, for several networks share one backward pass; "
                "remove `self.automatic_optimization = False`"
            )
        return bound, "training_step", distill
    if isinstance(evaluator, TransformersEvaluator):
        return evaluator.trainer, "compute_loss", _per_accumulated_batch(distill, evaluator.trainer)
    return evaluator, "_training_step", distill


Patched = TypeVar("Patched", bound=PatchedStep)


@contextmanager
def patched_step(owner: Any, name: str, step: Patched) -> Iterator[Patched]:
    """Within the block `step` takes the place of `owner`'s training step `name`, with its signature."""
    own = vars(owner).get(name)

    @functools.wraps(step.training_step)  # Lightning and Transformers inspect signatures
    def training_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    setattr(owner, name, step if isinstance(owner, Evaluator) else training_step)
    try:
        yield step
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _per_accumulated_batch(distill: Distill, trainer: Any) -> Distill:
    """Divides by the number of accumulated batches where a Trainer leaves that to the loss."""

    def divided(student: Tensor, teacher: Tensor) -> Tensor:
        loss = distill(student, teacher)
        if trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None:
            loss = loss / trainer.current_gradient_accumulation_steps
        return loss

    return divided


@contextmanager
def _bound(evaluator: Evaluator, model: nn.Module) -> Iterator[None]:
    evaluator.bind_model(model)
    try:
        yield
    finally:
        evaluator.unbind_model()


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.grad = None
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _without_gradient(loss: Tensor, batch: Any) -> Tensor:
    return loss.detach().requires_grad_()


def _how_to_add_a_metric(evaluator: Evaluator) -> str:
    if isinstance(evaluator, LightningEvaluator):
        return "log it under the name 'default' in the LightningModule's test_step"
    if isinstance(evaluator, TransformersEvaluator):
        return "return it under the key 'default' from the Trainer's compute_metrics"
    return "pass an evaluating_func that returns a float, or a dict with a float under the key 'default'"


def _add_step_tasks(optimizer: Optimizer, before: list[Task], after: list[Task]) -> None:
    """Run `before` when the gradients are ready and `after` when the step is done.

    Lightning computes the gradients inside `optimizer.step`, in its closure. NNI runs the first tasks ahead
    of it, where they see no gradients or those of the previous step.
    """
    step = optimizer.step

    @functools.wraps(step)
    def patched_step(_: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        def run_before() -> Any:
            loss = None if closure is None else closure()
            for task in before:
                task()
            return loss

        if closure is None:
            run_before()
            result = step(**kwargs)
        else:
            result = step(closure=run_before, **kwargs)
        for task in after:
            task()
        return result

    optimizer.step = MethodType(patched_step, optimizer)  # type: ignore[method-assign]


def _lightning_train(self: Any, max_steps: int | None = None, max_epochs: int | None = None) -> None:
    """Broken: NNI assigns `fit_loop.max_steps`, since Lightning 2 a property without a setter.

    Fixed by giving the duration to the constructor of the Trainer. A limit that is not given is lifted, so
    that the Trainer's own limits do not end the training early; with none given they are in force.
    """
    traced = self.trainer.trace_copy()
    # Sanity validation would feed batches to hooks before the first step.
    traced.trace_kwargs["num_sanity_val_steps"] = 0
    if max_steps is not None or max_epochs is not None:
        traced.trace_kwargs["max_steps"] = -1 if max_steps is None else max_steps
        traced.trace_kwargs["max_epochs"] = -1 if max_epochs is None else max_epochs
    try:
        traced.get().fit(self.model, self.data_module)
    finally:
        self.model.trainer = None


def _lightning_patch_optimizer_step(
    self: Any, before_step_tasks: list[Task], after_step_tasks: list[Task]
) -> None:
    """Broken: the first tasks run before the gradients exist, see `_add_step_tasks`."""
    before, after = list(before_step_tasks), list(after_step_tasks)
    configure_optimizers = self.model.configure_optimizers

    def patched_configure_optimizers(_: nn.Module) -> Any:
        configured = configure_optimizers()
        _add_step_tasks(_first_optimizer(configured), before, after)
        return configured

    self.model.configure_optimizers = MethodType(patched_configure_optimizers, self.model)
    vars(self).setdefault("_nni_dbs_step_tasks", []).extend([before, after])


def _first_optimizer(configured: Any) -> Optimizer:
    """The optimizer that NNI patches, in each of the three forms that its `configure_optimizers` returns."""
    first = configured[0]
    if isinstance(first, dict):
        return first["optimizer"]
    return first[0] if isinstance(first, list) else first


def _lightning_revert_optimizer_step(self: Any) -> None:
    """Broken: NNI restores `configure_callbacks`, which nobody patched, and the tasks go on running.

    Fixed by emptying the task lists, which leaves the parameter groups added to the same optimizers.
    """
    for tasks in vars(self).pop("_nni_dbs_step_tasks", []):
        tasks.clear()


def _transformers_init_optimizer_helpers(self: Any, pure_model: nn.Module) -> None:
    """Broken: for a Trainer without a traced optimizer NNI replaces a static method of the Trainer class by a
    function with too few arguments, and leaves the class damaged.

    Fixed by creating the default optimizer here, traced, which NNI then takes as if the user had passed it.
    """
    trainer = self.traced_trainer
    if is_traceable(trainer.optimizer):
        TransformersEvaluator._init_optimizer_helpers(self, pure_model)
        return
    chosen = trainer.optimizer_cls_and_kwargs
    optimizer_class, kwargs = chosen or trainer.get_optimizer_cls_and_kwargs(trainer.args, pure_model)
    trainer.optimizer_cls_and_kwargs = nni.trace(optimizer_class), kwargs
    trainer.optimizer = None
    try:
        trainer.create_optimizer()
        TransformersEvaluator._init_optimizer_helpers(self, pure_model)
    finally:
        trainer.optimizer_cls_and_kwargs = chosen
        trainer.optimizer = None


def _transformers_patch_loss(self: Any, patch: Callable[[Tensor, Any], Tensor]) -> None:
    """Broken: NNI's `compute_loss` lacks the argument `num_items_in_batch` (transformers >= 4.46).

    Only training losses are patched, as in the other evaluators: evaluation has no gradients to work with.
    """
    compute_loss = self.trainer.compute_loss

    def patched_compute_loss(
        _: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        result = compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not model.training:
            return result
        return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

    self.trainer.compute_loss = MethodType(patched_compute_loss, self.trainer)


def _transformers_patch_optimizer_step(
    self: Any, before_step_tasks: list[Task], after_step_tasks: list[Task]
) -> None:
    """Broken: once training begins NNI takes `trainer.deepspeed`, if there is such an attribute, for the
    optimizer; now there always is, as None. It also keeps the tasks in a callback class that is shared by
    all evaluators.

    Fixed by patching the optimizer that NNI made for the bound model, as `TorchEvaluator` does.
    """
    _add_step_tasks(self.trainer.optimizer, list(before_step_tasks), list(after_step_tasks))


def _transformers_train(self: Any, max_steps: int | None = None, max_epochs: int | None = None) -> None:
    """Broken: a Trainer ignores its epochs when it has a number of steps, its own included; and it leaves
    its optimizer wrapped, so that NNI reverts the step of the wrapper.
    """
    trainer, arguments, optimizer = self.trainer, self.trainer.args, self.trainer.optimizer
    own_limits = arguments.max_steps, arguments.num_train_epochs
    if max_steps is not None or max_epochs is not None:
        arguments.max_steps = -1 if max_steps is None else max_steps
    if max_epochs is not None:
        arguments.num_train_epochs = max_epochs
    stop = _stop_after_epochs(max_epochs) if max_steps is not None and max_epochs is not None else None
    if stop is not None:
        trainer.add_callback(stop)
    if self._lr_scheduler_helper is not None:
        trainer.lr_scheduler = self._lr_scheduler_helper.call(optimizer)
    try:
        trainer.train()
    finally:
        arguments.max_steps, arguments.num_train_epochs = own_limits
        trainer.optimizer, trainer.lr_scheduler = optimizer, None
        if stop is not None:
            trainer.remove_callback(stop)


def _stop_after_epochs(max_epochs: int) -> Any:
    from transformers import TrainerCallback

    class StopAfterEpochs(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.epoch >= max_epochs:
                control.should_training_stop = True

    return StopAfterEpochs()


def _transformers_evaluate(self: Any) -> tuple[float | None, dict[str, Any]]:
    """Broken: NNI looks for the key 'default', but a Trainer prefixes all metrics with `eval_`."""
    metrics = self.trainer.evaluate()
    return metrics.get("default", metrics.get("eval_default")), metrics


_REPAIRS: dict[Any, dict[str, Callable[..., Any]]] = {
    LightningEvaluator: {
        "train": _lightning_train,
        "patch_optimizer_step": _lightning_patch_optimizer_step,
        "revert_optimizer_step": _lightning_revert_optimizer_step,
    },
    TransformersEvaluator: {
        "_init_optimizer_helpers": _transformers_init_optimizer_helpers,
        "patch_loss": _transformers_patch_loss,
        "patch_optimizer_step": _transformers_patch_optimizer_step,
        "train": _transformers_train,
        "evaluate": _transformers_evaluate,
    },
}
