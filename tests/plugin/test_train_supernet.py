"""Supernets trained and scored by NNI's evaluators; as a script, a `ddp` training with Lightning."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from nni.compression import LightningEvaluator, TorchEvaluator, TransformersEvaluator
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from nni_dbs.algorithms.pse_net import PSENetStep, WidthRecords
from nni_dbs.errors import EvaluatorError, TrainingError, UserError
from nni_dbs.plugin.evaluator import recalibrate_batchnorm, repair, score, train_supernet
from nni_dbs.sampling import Step, bcnet, draw_paths, in_parallel, path_fair, sandwich, spfs, uniform
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.steps import SupernetStep
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import find_channel_groups, shrink

SAMPLES, BATCH, STEPS_PER_EPOCH = 12, 4, 3
LR, DECAY = 0.1, 0.01

Batch = tuple[Tensor, Tensor]


def make_data(samples: int = SAMPLES, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(images, torch.randint(3, (samples,), generator=generator))


def batches(count: int, size: int = BATCH, dtype: torch.dtype = torch.float64) -> list[Batch]:
    epoch = list(DataLoader(make_data(dtype=dtype), batch_size=size))
    return [tuple(epoch[i % len(epoch)]) for i in range(count)]


def make_net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=not norm),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


@functools.cache
def lightning_module() -> type[Any]:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self, norm: bool = True) -> None:
            super().__init__()
            self.net = make_net(norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return functional.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("default", functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return nni.trace(torch.optim.SGD)(self.parameters(), lr=LR, weight_decay=DECAY)

    return Module


class Classifier(nn.Module):
    """What a Trainer trains: images and labels in, loss and logits out."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.net = make_net(norm)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        logits = self.net(pixel_values)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class CountingClassifier(Classifier):
    """One whose loss is a sum over the items of the accumulated batches."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(pixel_values)
        items = kwargs.get("num_items_in_batch")
        if labels is not None:
            output["loss"] = (
                functional.cross_entropy(output.logits, labels)
                if items is None
                else functional.cross_entropy(output.logits, labels, reduction="sum") / items
            )
        return output


def torch_loss(batch: Batch, model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def torch_training(
    model: nn.Module,
    optimizer: Any,
    training_step: Any,
    lr_scheduler: Any,
    max_steps: int | None,
    max_epochs: int | None,
) -> None:
    model.train()
    for batch in batches(max_steps or STEPS_PER_EPOCH * (max_epochs or 1)):
        optimizer.zero_grad()
        training_step(batch, model).backward()
        optimizer.step()


def torch_evaluator(
    model: nn.Module, path: Path, training: Callable[..., None] = torch_training, step: Any = torch_loss
) -> Any:
    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        mode = model.training
        model.eval()
        metric = torch_loss(make_data().tensors, model)
        model.train(mode)
        return float(metric)

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=LR, weight_decay=DECAY)
    return initialised(TorchEvaluator(training, optimizer, step, evaluating_func=evaluate), model)


def lightning_evaluator(model: Any, path: Path, **arguments: Any) -> Any:
    pl = pytest.importorskip("pytorch_lightning")

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(make_data(), batch_size=BATCH)

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(make_data(), batch_size=SAMPLES)

        def test_dataloader(self) -> DataLoader[Any]:
            return DataLoader(make_data(), batch_size=SAMPLES)

    trainer = nni.trace(pl.Trainer)(
        default_root_dir=str(path),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    return initialised(LightningEvaluator(trainer, nni.trace(Data)()), model)


def transformers_evaluator(
    model: nn.Module, path: Path, batch_size: int = BATCH, loss_func: Any = None, **arguments: Any
) -> Any:
    pytest.importorskip("accelerate")
    hf = pytest.importorskip("transformers")

    class InOrder(hf.Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    def metrics(prediction: Any) -> dict[str, float]:
        logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
        return {"default": float(functional.cross_entropy(logits, labels))}

    data = [{"pixel_values": image, "labels": label} for image, label in make_data()]
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=LR, weight_decay=DECAY)
    trainer = nni.trace(InOrder)(
        model=model,
        args=hf.TrainingArguments(
            output_dir=str(path),
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=SAMPLES,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            max_grad_norm=0.0,
            **arguments,
        ),
        train_dataset=data,
        eval_dataset=data,
        optimizers=(optimizer, nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 100)),
        compute_loss_func=loss_func,
        compute_metrics=metrics,
    )
    return initialised(TransformersEvaluator(trainer), model)


def initialised(evaluator: Any, model: nn.Module) -> Any:
    repair(evaluator)
    evaluator._init_optimizer_helpers(model)
    return evaluator


@dataclass(frozen=True)
class Kind:
    """One of the evaluators, with a model for it and the place of the training step while bound."""

    make_model: Callable[[], Any]
    make_evaluator: Callable[..., Any]
    place: Callable[[Any, Any], tuple[Any, str]]


KINDS = {
    "torch": Kind(make_net, torch_evaluator, lambda evaluator, model: (evaluator, "_training_step")),
    "lightning": Kind(
        lambda: lightning_module()(), lightning_evaluator, lambda evaluator, model: (model, "training_step")
    ),
    "transformers": Kind(
        Classifier,
        transformers_evaluator,
        lambda evaluator, model: (evaluator.trainer, "compute_loss"),
    ),
}


def installed(name: str) -> Kind:
    """One of `KINDS`, or a skip where its library is missing."""
    if name == "lightning":
        pytest.importorskip("pytorch_lightning")
    if name == "transformers":
        pytest.importorskip("accelerate")
        pytest.importorskip("transformers")
    return KINDS[name]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return installed(request.param)


def supernet_of(model: nn.Module) -> Supernet:
    images = make_data().tensors[0][:2].to(next(model.parameters()).dtype)
    inputs = {"pixel_values": images} if isinstance(model, Classifier) else images
    return Supernet(model, find_channel_groups(model, inputs))


def space_of(supernet: Supernet) -> WidthSpace:
    return WidthSpace(supernet.groups, min_ratio=0.25, divisor=2)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def pool(space: WidthSpace) -> list[Widths]:
    return [space.uniform(ratio) for ratio in (0.3, 0.6, 0.8, 1.0)]


RULES: dict[str, Callable[[WidthSpace], Iterator[Step]]] = {
    "sandwich": lambda space: sandwich(space, generator()),
    "spfs": lambda space: spfs(space, draw_paths(pool(space), generator())),
    "path_fair": lambda space: path_fair(draw_paths(pool(space), generator())),
    "uniform": lambda space: uniform(space, generator()),
    "bcnet": lambda space: bcnet(space, generator()),
    "parallel": lambda space: in_parallel(path_fair(draw_paths(pool(space), generator()))),
    "parallel distilled": lambda space: in_parallel(
        path_fair(draw_paths(pool(space), generator())), distilled=True
    ),
}
HARD = ("path_fair", "uniform", "bcnet", "parallel")
INSIDE = [rule for rule in RULES if rule != "parallel distilled"]  # where the model computes its loss
DISTILLED = ("sandwich", "spfs", "parallel distilled")


def steps_of(supernet: Supernet, rule: str) -> Iterator[Step]:
    return RULES[rule](space_of(supernet))


def loss_of(batch: Batch, model: nn.Module) -> Tensor:
    if isinstance(model, Classifier):
        return model(pixel_values=batch[0], labels=batch[1]).loss
    return functional.cross_entropy(model(batch[0]), batch[1])


def loss_outside(batch: Batch, model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(pixel_values=batch[0]).logits, batch[1])


def trained_by_hand(
    model: nn.Module,
    rule: str | None,
    count: int,
    training_step: Callable[[Batch, nn.Module], Tensor] = loss_of,
    context: Callable[[], Any] | None = None,
) -> dict[str, Tensor]:
    """The state of a copy of `model` after `count` steps of a loop without evaluators."""
    model = copy.deepcopy(model).train()
    step: Any = training_step
    if rule is not None:
        supernet = supernet_of(model)
        step = SupernetStep(supernet, steps_of(supernet, rule), training_step)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    for batch in batches(count, dtype=next(model.parameters()).dtype):
        optimizer.zero_grad()
        if context is None:
            loss = step(batch, model)
        else:
            with context():
                loss = step(batch, model)
        loss.backward()
        optimizer.step()
    return model.state_dict()


def trained(
    evaluator: Any, model: nn.Module, rule: str | None, **duration: int
) -> tuple[dict[str, Tensor], int]:
    """The state of `model` after training with the evaluator, and how many steps of the rule it took."""
    evaluator.bind_model(model)
    if rule is None:
        evaluator.train(**duration)
        taken = 0
    else:
        supernet = supernet_of(model)
        with train_supernet(evaluator, supernet, steps_of(supernet, rule)) as step:
            evaluator.train(**duration)
        taken = step.taken
    evaluator.unbind_model()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, taken


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=tolerance, atol=tolerance)


def narrow_widths(supernet: Supernet) -> dict[str, int]:
    return {g.name: g.size // 2 for g in supernet.groups if g.frozen is None}


def attributes_of(model: nn.Module) -> dict[str, set[str]]:
    """The instance attributes of every module, by its name."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(("duration", "count"), [({"max_steps": 5}, 5), ({"max_epochs": 2}, 6)])
@pytest.mark.parametrize("rule", RULES)
def test_training_equals_a_loop_by_hand(
    kind: Kind, rule: str, duration: dict[str, int], count: int, tmp_path: Path
) -> None:
    if rule not in INSIDE and kind is KINDS["transformers"]:
        pytest.skip("refused, see below")
    model = kind.make_model()
    expected = trained_by_hand(model, rule, count)
    plain = trained_by_hand(model, None, count)
    state, taken = trained(kind.make_evaluator(model, tmp_path), model, rule, **duration)
    assert taken == count
    assert same(state, expected)
    assert not same(state, plain)


def test_one_step_has_the_gradient_of_the_sum_over_shrunk_networks(kind: Kind, tmp_path: Path) -> None:
    model = kind.make_model()
    supernet = supernet_of(copy.deepcopy(model).train())
    images, labels = batches(1)[0]
    step = next(steps_of(supernet, "path_fair"))
    total = torch.zeros((), dtype=torch.float64)
    for widths in step.networks:
        with supernet.at(widths) as net:
            logits = net(images)
        logits = logits.logits if hasattr(logits, "logits") else logits
        total = total + functional.cross_entropy(logits, labels)
    total.backward()
    with torch.no_grad():
        for parameter in supernet.model.parameters():
            parameter -= LR * (parameter.grad + DECAY * parameter)

    state, _ = trained(kind.make_evaluator(model, tmp_path), model, "path_fair", max_steps=1)
    for name, parameter in supernet.model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patched", [False, True], ids=["own step", "patched step"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "after an exception"])
def test_the_training_step_is_back_after_the_block(
    kind: Kind, patched: bool, fails: bool, tmp_path: Path
) -> None:
    model = kind.make_model()
    evaluator = kind.make_evaluator(model, tmp_path)
    supernet = supernet_of(model)
    evaluator.bind_model(model)
    evaluator.train(max_steps=1)  # trainers leave attributes of their own
    calls: list[int] = []
    if patched:
        evaluator.patch_loss(lambda loss, batch: calls.append(1) or loss)
    owner, name = kind.place(evaluator, model)
    before, attributes = vars(owner).get(name), attributes_of(model)

    def steps() -> Iterator[Step]:
        yield Step((space_of(supernet).smallest(), space_of(supernet).largest()))
        if fails:
            raise RuntimeError("no more steps")
        yield Step((space_of(supernet).smallest(),))

    if fails:
        with pytest.raises(RuntimeError), train_supernet(evaluator, supernet, steps()):
            evaluator.train(max_steps=2)
    else:
        with train_supernet(evaluator, supernet, steps()):
            assert getattr(owner, name) is not before
            evaluator.train(max_steps=2)
    assert len(calls) == (0 if not patched else 2 if fails else 3)
    assert vars(owner).get(name) is before
    assert attributes_of(model) == attributes
    evaluator.unbind_model()
    assert evaluator.model is None


def test_an_exception_in_a_pass_leaves_model_and_evaluator_as_they_were(kind: Kind, tmp_path: Path) -> None:
    model = kind.make_model()
    evaluator = kind.make_evaluator(model, tmp_path)
    supernet = supernet_of(model)
    evaluator.bind_model(model)
    evaluator.train(max_steps=1)
    owner, name = kind.place(evaluator, model)
    before, attributes = vars(owner).get(name), attributes_of(model)
    passes: list[int] = []

    def fail(module: nn.Module, args: Any, output: Tensor) -> None:
        passes.append(output.shape[1])
        if len(passes) == 3:
            raise RuntimeError("in the third pass")

    hook = model.get_submodule("0" if isinstance(model, nn.Sequential) else "net.0").register_forward_hook(
        fail
    )
    with (
        pytest.raises(RuntimeError, match="third pass"),
        train_supernet(evaluator, supernet, steps_of(supernet, "sandwich")),
    ):
        evaluator.train(max_steps=2)
    hook.remove()
    assert passes[0] == 8
    assert vars(owner).get(name) is before
    assert attributes_of(model) == attributes
    evaluator.unbind_model()


@pytest.mark.parametrize("rebind", [False, True], ids=["still bound", "bound again"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "after an exception"])
def test_the_evaluator_trains_plainly_afterwards(
    kind: Kind, rebind: bool, fails: bool, tmp_path: Path
) -> None:
    model = kind.make_model()
    start = copy.deepcopy(model.state_dict())
    expected = trained_by_hand(model, None, 5)
    evaluator = kind.make_evaluator(model, tmp_path)
    supernet = supernet_of(model)
    evaluator.bind_model(model)

    def steps() -> Iterator[Step]:
        yield from itertools.islice(steps_of(supernet, "sandwich"), 1 if fails else 2)
        raise RuntimeError("no more steps")

    failure = pytest.raises(RuntimeError, match="no more steps") if fails else contextlib.nullcontext()
    with failure, train_supernet(evaluator, supernet, steps()):
        evaluator.train(max_steps=2)
    if rebind:
        evaluator.unbind_model()
        evaluator.bind_model(model)
    model.load_state_dict(start)
    evaluator.train(max_steps=5)
    evaluator.unbind_model()
    assert same(model.state_dict(), expected)


def test_a_rule_that_ends_too_early_does_not_end_the_training_silently(kind: Kind, tmp_path: Path) -> None:
    model = kind.make_model()
    evaluator = kind.make_evaluator(model, tmp_path)
    supernet = supernet_of(model)
    evaluator.bind_model(model)
    steps = iter([next(steps_of(supernet, "sandwich"))])
    with pytest.raises(UserError), train_supernet(evaluator, supernet, steps):
        evaluator.train(max_epochs=1)


def test_it_needs_the_supernets_model_bound(kind: Kind, tmp_path: Path) -> None:
    model = kind.make_model()
    evaluator = kind.make_evaluator(model, tmp_path)
    supernet = supernet_of(model)
    with pytest.raises(EvaluatorError, match="bind"), train_supernet(evaluator, supernet, iter(())):
        pass
    evaluator.bind_model(kind.make_model())
    with pytest.raises(EvaluatorError, match="bind"), train_supernet(evaluator, supernet, iter(())):
        pass
    evaluator.unbind_model()
    with pytest.raises(EvaluatorError, match="bind"), train_supernet(evaluator, supernet, iter(())):
        pass


def metric_of(result: Any) -> float:
    return float(result[0] if isinstance(result, tuple) else result)


def test_evaluating_at_widths_equals_the_shrunk_model(kind: Kind, tmp_path: Path) -> None:
    model = kind.make_model()
    evaluator = kind.make_evaluator(model, tmp_path)
    supernet = supernet_of(model)
    trained(evaluator, model, "sandwich", max_steps=3)
    attributes = attributes_of(model)
    widths = narrow_widths(supernet)
    small = shrink(model, supernet.groups, widths, supernet.order)
    other = kind.make_evaluator(small, tmp_path)
    other.bind_model(small)
    expected = metric_of(other.evaluate())
    other.unbind_model()

    evaluator.bind_model(model)
    full = metric_of(evaluator.evaluate())
    with supernet.at(widths):
        metric = metric_of(evaluator.evaluate())
    assert metric_of(evaluator.evaluate()) == full
    evaluator.unbind_model()
    assert metric == pytest.approx(expected, rel=1e-6)  # Lightning logs single precision
    assert abs(metric - full) > 1e-3
    assert set(attributes_of(model)[""]) - attributes[""] <= {"training_step", "configure_optimizers"}


def test_recalibrating_and_scoring_at_widths_equals_the_shrunk_model(kind: Kind, tmp_path: Path) -> None:
    model = kind.make_model()
    evaluator = kind.make_evaluator(model, tmp_path)
    supernet = supernet_of(model)
    trained(evaluator, model, "sandwich", max_steps=3)
    widths = narrow_widths(supernet)
    small = shrink(model, supernet.groups, widths, supernet.order)
    other = kind.make_evaluator(small, tmp_path)
    recalibrate_batchnorm(other, small, max_steps=STEPS_PER_EPOCH)
    expected = score(other, small)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    with supernet.at(widths):
        stale = score(evaluator, model)
        recalibrate_batchnorm(evaluator, model, max_steps=STEPS_PER_EPOCH)
        assert score(evaluator, model) == pytest.approx(expected, rel=1e-6)
    assert abs(stale - expected) > 1e-3
    assert same({name: p.detach() for name, p in model.named_parameters()}, weights)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    small_norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]
    for group, norm, small_norm in zip(supernet.groups, norms, small_norms, strict=False):
        kept = sorted(supernet.order[group.name][: widths[group.name]])
        torch.testing.assert_close(norm.running_mean[kept], small_norm.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var[kept], small_norm.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["torch", "lightning"])
def test_pse_nets_step_keeps_records_and_trains_alike(name: str, tmp_path: Path) -> None:
    found = []
    for recorded in (False, True):
        kind = installed(name)
        model = kind.make_model()
        evaluator = kind.make_evaluator(model, tmp_path)
        supernet = supernet_of(model)
        records = WidthRecords(space_of(supernet))
        evaluator.bind_model(model)
        make = functools.partial(PSENetStep, records=records) if recorded else SupernetStep
        with train_supernet(evaluator, supernet, steps_of(supernet, "parallel"), make=make) as step:
            evaluator.train(max_steps=4)
        assert step.taken == 4
        evaluator.unbind_model()
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        assert bool(records.counts.sum() > 0) == recorded
    assert same(*found)


class TestTorch:
    def test_the_training_function_gets_the_step_and_its_state(self, tmp_path: Path) -> None:
        model = make_net()
        received: list[Any] = []

        def training(model: nn.Module, optimizer: Any, training_step: Any, *rest: Any) -> None:
            received.append(training_step)
            torch_training(model, optimizer, training_step, *rest)

        evaluator = torch_evaluator(model, tmp_path, training)
        supernet = supernet_of(model)
        evaluator.bind_model(model)
        with train_supernet(evaluator, supernet, steps_of(supernet, "uniform")) as step:
            evaluator.train(max_steps=2)
        assert received == [step]
        assert step.taken == 2

    @pytest.mark.parametrize("form", [lambda loss: (loss, 3), lambda loss: {"loss": loss, "more": 3}])
    def test_steps_that_return_more_than_the_loss(
        self, form: Callable[[Tensor], Any], tmp_path: Path
    ) -> None:
        model = make_net()
        expected = trained_by_hand(model, "sandwich", 3)
        extra: list[int] = []

        def training(
            model: nn.Module, optimizer: Any, training_step: Any, lr: Any, steps: int, epochs: Any
        ) -> None:
            def loss_only(batch: Batch, model: nn.Module) -> Tensor:
                output = training_step(batch, model)
                values = list(output.values()) if isinstance(output, dict) else output
                extra.append(values[1])
                return values[0]

            torch_training(model, optimizer, loss_only, lr, steps, epochs)

        evaluator = torch_evaluator(
            model, tmp_path, training, lambda batch, net: form(torch_loss(batch, net))
        )
        assert same(trained(evaluator, model, "sandwich", max_steps=3)[0], expected)
        assert extra == [3, 3, 3]

    def test_a_step_that_takes_entries_out_of_its_batch(self, tmp_path: Path) -> None:
        model = make_net()
        expected = trained_by_hand(model, "sandwich", 3)

        def step(batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            labels = batch.pop("labels")
            return functional.cross_entropy(model(**{"input": batch["images"]}), labels)

        def training(
            model: nn.Module, optimizer: Any, training_step: Any, lr: Any, steps: int, epochs: Any
        ) -> None:
            def from_pair(batch: Batch, model: nn.Module) -> Tensor:
                return training_step({"images": batch[0], "labels": batch[1]}, model)

            torch_training(model, optimizer, from_pair, lr, steps, epochs)

        assert same(
            trained(torch_evaluator(model, tmp_path, training, step), model, "sandwich", max_steps=3)[0],
            expected,
        )

    @pytest.mark.parametrize("rule", RULES)
    def test_autocast(self, rule: str, tmp_path: Path) -> None:
        model = make_net().float()
        autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)

        def training(
            model: nn.Module, optimizer: Any, training_step: Any, lr: Any, steps: int, epochs: Any
        ) -> None:
            model.train()
            for batch in batches(steps, dtype=torch.float32):
                optimizer.zero_grad()
                with autocast():
                    loss = training_step(batch, model)
                loss.backward()
                optimizer.step()

        expected = trained_by_hand(model, rule, 3, context=autocast)
        exact = trained_by_hand(model, rule, 3)
        state, _ = trained(torch_evaluator(model, tmp_path, training), model, rule, max_steps=3)
        assert same(state, expected)
        assert not same(state, exact)
        for name, tensor in state.items():
            assert torch.isfinite(tensor).all()
            torch.testing.assert_close(tensor, exact[name], rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("rule", RULES)
    def test_a_gradient_scaler_changes_nothing(self, rule: str, tmp_path: Path) -> None:
        model = make_net()
        scales: list[float] = []

        def training(
            model: nn.Module, optimizer: Any, training_step: Any, lr: Any, steps: int, epochs: Any
        ) -> None:
            scaler = torch.amp.GradScaler("cpu", growth_interval=2)
            model.train()
            for batch in batches(steps):
                optimizer.zero_grad()
                scaler.scale(training_step(batch, model)).backward()
                scaler.step(optimizer)
                scaler.update()
                scales.append(scaler.get_scale())

        expected = trained_by_hand(model, rule, 4)
        state, _ = trained(torch_evaluator(model, tmp_path, training), model, rule, max_steps=4)
        assert same(state, expected)  # a scale is a power of two
        assert scales == [2.0**16, 2.0**17, 2.0**17, 2.0**18]

    @pytest.mark.parametrize("rule", RULES)
    def test_the_training_function_wraps_the_model_in_ddp(self, rule: str, tmp_path: Path) -> None:
        model = make_net()

        def training(model: nn.Module, *rest: Any) -> None:
            torch_training(DistributedDataParallel(model), *rest)

        expected = trained_by_hand(model, rule, 4)
        evaluator = torch_evaluator(model, tmp_path, training)
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            state, taken = trained(evaluator, model, rule, max_steps=4)
        finally:
            distributed.destroy_process_group()
        assert taken == 4
        assert same(state, expected)


class TestLightning:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("pytorch_lightning")

    @pytest.mark.parametrize("rule", RULES)
    def test_a_training_step_that_returns_a_dictionary_and_logs(self, rule: str, tmp_path: Path) -> None:
        logged: list[dict[str, float]] = []

        class Own(lightning_module()):
            def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
                loss = functional.cross_entropy(self(batch[0]), batch[1])
                self.log("loss", loss, on_step=True, on_epoch=True)
                return {"loss": loss, "index": batch_idx}

            def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
                assert outputs["index"] == batch_idx
                logged.append({name: float(value) for name, value in self.trainer.logged_metrics.items()})

        model = Own()
        expected = trained_by_hand(model, rule, 3)
        state, _ = trained(lightning_evaluator(model, tmp_path), model, rule, max_steps=3)
        assert same(state, expected)
        assert len(logged) == 3

    def test_validation_inside_of_fit_is_not_a_step(self, tmp_path: Path) -> None:
        seen: list[tuple[bool, bool]] = []

        class Own(lightning_module()):
            def validation_step(self, batch: Batch, batch_idx: int) -> None:
                loss = self.training_step(batch, batch_idx)  # as many modules do
                self.log("loss", loss)
                seen.append((loss.requires_grad, "forward" in vars(self)))

        model = Own()
        expected = trained_by_hand(model, "sandwich", 6)
        state, taken = trained(
            lightning_evaluator(model, tmp_path, val_check_interval=1), model, "sandwich", max_epochs=2
        )
        assert seen == 6 * [(False, False)]
        assert taken == 6
        assert same(state, expected)

    def test_a_module_in_eval_mode_is_trained_as_a_supernet_too(self, tmp_path: Path) -> None:
        model = lightning_module()().eval()  # Lightning >= 2.2 keeps the modes that it finds
        evaluator = lightning_evaluator(model, tmp_path)
        _, taken = trained(evaluator, model, "sandwich", max_steps=3)
        assert taken == 3

    @pytest.mark.parametrize("rule", RULES)
    def test_half_precision(self, rule: str, tmp_path: Path) -> None:
        class Own(lightning_module()):
            def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
                return functional.cross_entropy(self(batch[0].float()), batch[1])

        model = Own().float()
        expected = trained_by_hand(
            model, rule, 3, context=functools.partial(torch.autocast, "cpu", torch.bfloat16)
        )
        exact = trained_by_hand(model, rule, 3)
        state, _ = trained(
            lightning_evaluator(model, tmp_path, precision="bf16-mixed"), model, rule, max_steps=3
        )
        assert same(state, expected)
        assert not same(state, exact)

    @pytest.mark.parametrize("rule", ["sandwich", "path_fair"])
    def test_accumulated_and_clipped_gradients(self, rule: str, tmp_path: Path) -> None:
        model = lightning_module()()
        twin = copy.deepcopy(model).train()
        supernet = supernet_of(twin)
        step = SupernetStep(supernet, steps_of(supernet, rule), loss_of)
        optimizer = torch.optim.SGD(twin.parameters(), lr=LR, weight_decay=DECAY)
        for i, batch in enumerate(2 * batches(2)):
            (step(batch, twin) / 2).backward()
            if i % 2:
                nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "limit_train_batches": 2}
        state, taken = trained(lightning_evaluator(model, tmp_path, **options), model, rule, max_epochs=2)
        assert taken == 4
        assert same(state, twin.state_dict())

    @pytest.mark.parametrize("rule", RULES)
    def test_a_part_of_the_module_may_be_the_supernet(self, rule: str, tmp_path: Path) -> None:
        class Own(lightning_module()):
            def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
                return functional.cross_entropy(self.net(batch[0]), batch[1])

        model = Own()
        expected = trained_by_hand(model.net, rule, 3, torch_loss)
        evaluator = lightning_evaluator(model, tmp_path)
        evaluator.bind_model(model)
        supernet = supernet_of(model.net)
        with train_supernet(evaluator, supernet, steps_of(supernet, rule)):
            evaluator.train(max_steps=3)
        assert same(model.net.state_dict(), expected)

    @pytest.mark.parametrize("rule", RULES)
    def test_a_training_step_past_the_modules_forward(self, rule: str, tmp_path: Path) -> None:
        class Own(lightning_module()):
            def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
                return functional.cross_entropy(self.net(batch[0]), batch[1])

        model = Own()
        evaluator = lightning_evaluator(model, tmp_path)
        if rule in DISTILLED:
            with pytest.raises(TrainingError, match=r"self\(x\)"):
                trained(evaluator, model, rule, max_steps=3)
            assert "forward" not in vars(model)
        else:
            expected = trained_by_hand(model, rule, 3)
            assert same(trained(evaluator, model, rule, max_steps=3)[0], expected)

    @pytest.mark.parametrize("rule", ["sandwich", "path_fair"])
    def test_manual_optimisation_is_refused_clearly(self, rule: str, tmp_path: Path) -> None:
        class Own(lightning_module()):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: Batch, batch_idx: int) -> None:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        model = Own()
        with pytest.raises(UserError, match="automatic"):
            trained(lightning_evaluator(model, tmp_path), model, rule, max_steps=3)

    @pytest.mark.parametrize("rule", ["sandwich", "path_fair"])
    def test_a_training_step_may_skip_a_batch(self, rule: str, tmp_path: Path) -> None:
        class Own(lightning_module()):
            def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
                return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        model = Own()
        evaluator = lightning_evaluator(model, tmp_path)
        _, taken = trained(evaluator, model, rule, max_epochs=1)
        assert taken == 3


class TestTransformers:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("accelerate")
        pytest.importorskip("transformers")

    @pytest.mark.parametrize("rule", ["sandwich", "path_fair", "parallel"])
    def test_a_model_that_returns_a_dictionary(self, rule: str, tmp_path: Path) -> None:
        class Own(Classifier):
            def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
                output = super().forward(pixel_values, labels)
                return {name: value for name, value in output.items() if value is not None}

        model = Own()
        expected = trained_by_hand(Classifier(), rule, 3, loss_outside)
        state, _ = trained(transformers_evaluator(model, tmp_path), model, rule, max_steps=3)
        assert_close(state, expected)

    def test_parallel_networks_are_not_distilled_where_the_model_computes_the_loss(
        self, tmp_path: Path
    ) -> None:
        """Its loss over replicated labels would be that of all networks."""
        model = Classifier()
        with pytest.raises(TrainingError, match="compute it in the training step from the logits"):
            trained(transformers_evaluator(model, tmp_path), model, "parallel distilled", max_steps=3)

    def test_pse_net_cannot_tell_parts_of_a_loss_that_the_model_computes(self, tmp_path: Path) -> None:
        model = Classifier()
        evaluator, supernet = transformers_evaluator(model, tmp_path), supernet_of(model)
        evaluator.bind_model(model)
        make = functools.partial(PSENetStep, records=WidthRecords(space_of(supernet)))
        with (
            pytest.raises(TrainingError, match="label_smoothing_factor or compute_loss_func"),
            train_supernet(evaluator, supernet, steps_of(supernet, "parallel"), make=make),
        ):
            evaluator.train(max_steps=1)

    @pytest.mark.parametrize("rule", INSIDE)
    def test_the_loss_inside_of_the_model_equals_one_outside(self, rule: str, tmp_path: Path) -> None:
        model = Classifier()
        expected = trained_by_hand(model, rule, 3, loss_outside)
        state, _ = trained(transformers_evaluator(model, tmp_path), model, rule, max_steps=3)
        assert_close(state, expected)

    @pytest.mark.parametrize("rule", ["sandwich", "path_fair", "parallel"])
    def test_a_model_that_returns_loss_and_logits(self, rule: str, tmp_path: Path) -> None:
        class Own(Classifier):
            def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
                return super().forward(pixel_values, labels).to_tuple()

        model = Own()
        expected = trained_by_hand(Classifier(), rule, 3, loss_outside)
        state, _ = trained(transformers_evaluator(model, tmp_path), model, rule, max_steps=3)
        assert_close(state, expected)

    @pytest.mark.parametrize("rule", ["sandwich", "parallel"])
    def test_evaluation_inside_of_training_is_not_a_step(self, rule: str, tmp_path: Path) -> None:
        model = Classifier()
        expected = trained_by_hand(model, rule, 4)
        evaluator = transformers_evaluator(model, tmp_path, eval_strategy="steps", eval_steps=1)
        evaluator.bind_model(model)
        supernet = supernet_of(model)
        metrics: list[tuple[float, float]] = []
        evaluate = evaluator.trainer.evaluate

        def recording(*args: Any, **kwargs: Any) -> dict[str, float]:
            result = evaluate(*args, **kwargs)
            metrics.append((result["eval_loss"], result["eval_default"]))
            return result

        evaluator.trainer.evaluate = recording
        with train_supernet(evaluator, supernet, steps_of(supernet, rule)) as step:
            evaluator.train(max_steps=4)
        assert step.taken == 4
        assert same(model.state_dict(), expected)
        assert len(metrics) == 4
        for loss, cross_entropy in metrics:
            assert loss == pytest.approx(cross_entropy, rel=1e-12)

    @pytest.mark.parametrize("rule", INSIDE)
    def test_gradient_accumulation_equals_a_loop_by_hand(self, rule: str, tmp_path: Path) -> None:
        model = Classifier()
        twin = copy.deepcopy(model).train()
        supernet = supernet_of(twin)
        step = SupernetStep(supernet, steps_of(supernet, rule), loss_of)
        optimizer = torch.optim.SGD(twin.parameters(), lr=LR, weight_decay=DECAY)
        for i, batch in enumerate(batches(6, size=2)):
            (step(batch, twin) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()

        evaluator = transformers_evaluator(model, tmp_path, batch_size=2, gradient_accumulation_steps=2)
        state, taken = trained(evaluator, model, rule, max_steps=3)
        assert taken == 6
        assert same(state, twin.state_dict())

    @pytest.mark.parametrize("distilled", [False, True], ids=["hard labels", "distilled"])
    @pytest.mark.parametrize("model_class", [Classifier, CountingClassifier])
    def test_accumulated_half_batches_equal_the_whole_batch(
        self, model_class: type[Classifier], distilled: bool, tmp_path: Path
    ) -> None:
        states = []
        for size, accumulated in ((4, 1), (2, 2)):
            model = model_class(norm=False)
            evaluator = transformers_evaluator(
                model, tmp_path, batch_size=size, gradient_accumulation_steps=accumulated
            )
            evaluator.bind_model(model)
            supernet = supernet_of(model)
            space = space_of(supernet)
            step = Step((space.largest(), space.smallest()), distilled=distilled)
            with train_supernet(evaluator, supernet, iter(6 * [step])):
                evaluator.train(max_steps=3)
            states.append(copy.deepcopy(model.state_dict()))
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("rule", ["sandwich", "path_fair", "parallel distilled"])
    def test_label_smoothing(self, rule: str, tmp_path: Path) -> None:
        def smoothed(batch: Batch, model: nn.Module) -> Tensor:
            logits = model(pixel_values=batch[0]).logits
            return functional.cross_entropy(logits, batch[1], label_smoothing=0.1)

        model = Classifier()
        model.config = None
        expected = trained_by_hand(model, rule, 3, smoothed)
        evaluator = transformers_evaluator(model, tmp_path, label_smoothing_factor=0.1)
        state, _ = trained(evaluator, model, rule, max_steps=3)
        assert_close(state, expected, 1e-7)  # a Trainer sums the smooth part in single precision

    @pytest.mark.parametrize("rule", ["sandwich", "path_fair", "parallel distilled"])
    def test_a_loss_function_of_the_user(self, rule: str, tmp_path: Path) -> None:
        def loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            return 2 * functional.cross_entropy(outputs.logits, labels)

        model = Classifier()
        expected = trained_by_hand(model, rule, 3, lambda batch, net: 2 * loss_outside(batch, net))
        evaluator = transformers_evaluator(model, tmp_path, loss_func=loss_func)
        state, _ = trained(evaluator, model, rule, max_steps=3)
        assert same(state, expected)


DDP_STEPS = 4


class InHalves(nn.Module):
    """Each half of the batch runs by itself, as on two processes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(half) for half in x.chunk(2)])


@pytest.mark.parametrize("rule", ["sandwich", pytest.param("path_fair", marks=pytest.mark.slow)])
def test_lightning_on_two_processes_equals_one_that_sums_both_half_batches(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), rule],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    weights = [name for name, _ in lightning_module()().named_parameters()]
    assert all(torch.equal(first[name], second[name]) for name in weights)

    twin = lightning_module()().train()
    supernet = supernet_of(twin)
    optimizer = torch.optim.SGD(twin.parameters(), lr=LR, weight_decay=DECAY)
    data = make_data()
    for i, step in zip(range(DDP_STEPS), steps_of(supernet, rule), strict=False):
        optimizer.zero_grad()
        images, labels = data[(i % 3) * 4 : (i % 3) * 4 + 4]
        for rank in range(2):
            both = SupernetStep(supernet, iter([step]), loss_of)
            (both((images[rank::2], labels[rank::2]), twin) / 2).backward()
        optimizer.step()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-9, atol=1e-9)


def train_on_two_processes(path: Path, rule: str) -> None:
    """Lightning starts the second process itself, with this script."""
    pl = pytest.importorskip("pytorch_lightning")

    class Halves(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            data = make_data()
            return DataLoader(data, BATCH // 2, sampler=DistributedSampler(data, shuffle=False))

    model = lightning_module()()
    trainer = nni.trace(pl.Trainer)(
        default_root_dir=str(path),
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,  # Lightning's would shuffle
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    evaluator = initialised(LightningEvaluator(trainer, nni.trace(Halves)()), model)
    state, taken = trained(evaluator, model, rule, max_steps=DDP_STEPS)
    assert taken == DDP_STEPS
    torch.save(state, path / f"rank{os.environ.get('LOCAL_RANK', '0')}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_on_two_processes(Path(sys.argv[1]), sys.argv[2])
