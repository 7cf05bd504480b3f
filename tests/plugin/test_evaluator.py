from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from nni_dbs.plugin.evaluator import EvaluatorError, recalibrate_batchnorm, repair, score

STEPS_PER_EPOCH = 4


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(8, 3, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
    )


def make_net(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def initialised(evaluator: Any, model: nn.Module) -> Any:
    repair(evaluator)
    evaluator._init_optimizer_helpers(model)
    return evaluator


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def record_inputs(layer: nn.Module) -> list[Tensor]:
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].clone()) if module.training else None
    )
    return inputs


def assert_exact_average(layer: nn.Module, inputs: list[Tensor], steps: int) -> None:
    assert len(inputs) == steps
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(layer.get_buffer("running_mean"), mean)
    torch.testing.assert_close(layer.get_buffer("running_var"), variance)


class TestTorch:
    @staticmethod
    def evaluator(
        model: nn.Module,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
        optimizer_class: type = torch.optim.SGD,
        penalty: float = 0.0,
    ) -> Any:
        def training_step(batch: Any, model: nn.Module) -> Tensor:
            return functional.cross_entropy(model(batch[0]), batch[1])

        def training_func(
            model: nn.Module,
            optimizer: Any,
            training_step: Any,
            lr_scheduler: Any,
            max_steps: int | None,
            max_epochs: int | None,
        ) -> None:
            model.train()
            for _, batch in zip(
                range(max_steps or 1), 10 * list(DataLoader(make_data(), batch_size=2)), strict=False
            ):
                loss = training_step(batch, model)
                (loss + penalty * sum(p.square().sum() for p in model.parameters())).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

        optimizer = nni.trace(optimizer_class)(model.parameters(), lr=0.1, weight_decay=0.1)
        return initialised(
            TorchEvaluator(training_func, optimizer, training_step, evaluating_func=evaluating_func), model
        )

    @pytest.mark.parametrize("metric", [0.25, torch.tensor(0.25), {"default": 0.25, "loss": 3.0}])
    def test_score(self, metric: Any) -> None:
        model, small = make_net(), make_net(2)
        scored: list[nn.Module] = []
        evaluator = self.evaluator(model, lambda m: scored.append(m) or metric)
        assert score(evaluator, small) == 0.25
        assert scored == [small]
        assert evaluator.model is None

    @pytest.mark.parametrize(
        ("evaluating_func", "message"),
        [
            (None, "evaluating_func"),
            (lambda _: {"accuracy": 0.5}, "'default'"),
            (lambda _: None, "evaluating_func"),
            (lambda _: "good", "number"),
            (lambda _: math.nan, "NaN"),
        ],
    )
    def test_no_usable_metric(self, evaluating_func: Any, message: str) -> None:
        model = make_net()
        evaluator = self.evaluator(model, evaluating_func)
        with pytest.raises(EvaluatorError, match=message):
            score(evaluator, model)
        assert evaluator.model is None

    def test_unbinds_after_an_exception(self) -> None:
        def fails(_: nn.Module) -> float:
            raise RuntimeError("out of data")

        model = make_net()
        evaluator = self.evaluator(model, fails)
        with pytest.raises(RuntimeError, match="out of data"):
            score(evaluator, model)
        assert evaluator.model is None

    @pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("width", [6, 2], ids=["same", "smaller"])
    def test_recalibration_changes_statistics_only(self, optimizer_class: type, width: int) -> None:
        evaluator = self.evaluator(make_net(), optimizer_class=optimizer_class, penalty=0.1)
        model = make_net(width).eval()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before, inputs = parameters_of(model), record_inputs(model[1])

        recalibrate_batchnorm(evaluator, model, max_steps=7)

        assert same(parameters_of(model), before)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert_exact_average(model[1], inputs, steps=7)
        assert not any(module.training for module in model.modules())
        assert model[1].momentum == 0.1
        assert evaluator.model is None

    def test_training_still_works_after_recalibration(self) -> None:
        model = make_net()
        evaluator = self.evaluator(model)
        recalibrate_batchnorm(evaluator, model, max_steps=2)
        before = parameters_of(model)
        evaluator.bind_model(model)
        evaluator.train(max_steps=2)
        evaluator.unbind_model()
        assert not same(parameters_of(model), before)

    def test_recalibration_without_batchnorm_reads_nothing(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        evaluator = self.evaluator(model)
        evaluator.training_func = None
        recalibrate_batchnorm(evaluator, model, max_steps=3)

    def test_failed_recalibration_says_why_and_keeps_the_statistics(self) -> None:
        model = make_net()
        evaluator = self.evaluator(model)
        evaluator.training_func = None
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with pytest.raises(EvaluatorError, match="TorchEvaluator failed: 'NoneType'") as caught:
            recalibrate_batchnorm(evaluator, model, max_steps=3)
        assert isinstance(caught.value.__cause__, TypeError)
        assert same({name: buffer.clone() for name, buffer in model.named_buffers()}, before)
        assert all(p.requires_grad for p in model.parameters())
        assert evaluator.model is None

    def test_recalibration_needs_batchnorm_in_train_mode(self) -> None:
        model = make_net()
        evaluator = self.evaluator(model)
        evaluator.training_func = lambda model, *_: model.eval()(make_data().tensors[0])
        with pytest.raises(EvaluatorError, match="no batch through BatchNorm"):
            recalibrate_batchnorm(evaluator, model, max_steps=3)


class TestLightning:
    pl: Any

    @classmethod
    def setup_class(cls) -> None:
        cls.pl = pytest.importorskip("pytorch_lightning")  # NNI does not take the classes of `lightning`

    @pytest.fixture(params=["optimizer", "pair of lists", "dictionary"])
    def form(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @classmethod
    def module(cls, width: int = 6, form: str = "optimizer", metric: str = "default") -> Any:
        class Module(cls.pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = make_net(width)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return functional.cross_entropy(self.net(batch[0]), batch[1])

            def test_step(self, batch: Any, batch_idx: int) -> None:
                self.log(metric, functional.cross_entropy(self.net(batch[0]), batch[1]))

            def configure_optimizers(self) -> Any:
                optimizer = nni.trace(torch.optim.SGD)(self.parameters(), lr=0.1, weight_decay=0.1)
                if form == "optimizer":
                    return optimizer
                scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 1)
                if form == "dictionary":
                    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}
                return [optimizer], [scheduler]

        return Module()

    @classmethod
    def evaluator(cls, model: Any, path: Path, **trainer_arguments: Any) -> Any:
        class Data(cls.pl.LightningDataModule):
            def train_dataloader(self) -> DataLoader[Any]:
                return DataLoader(make_data(), batch_size=2)

            def test_dataloader(self) -> DataLoader[Any]:
                return DataLoader(make_data(), batch_size=4)

        trainer = nni.trace(cls.pl.Trainer)(
            default_root_dir=str(path),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer_arguments,
        )
        from nni.compression import LightningEvaluator

        return initialised(LightningEvaluator(trainer, nni.trace(Data)()), model)

    @pytest.mark.parametrize(
        ("own", "duration", "steps"),
        [
            ({"max_epochs": 1}, {"max_steps": 7}, 7),
            ({"max_steps": 3}, {"max_epochs": 2}, 2 * STEPS_PER_EPOCH),
            ({"max_epochs": 1}, {"max_steps": 3, "max_epochs": 2}, 3),
            ({"max_epochs": 1}, {"max_steps": 100, "max_epochs": 2}, 2 * STEPS_PER_EPOCH),
            ({"max_epochs": 1}, {}, STEPS_PER_EPOCH),
            ({"max_steps": 3}, {}, 3),
        ],
    )
    def test_duration(
        self, tmp_path: Path, own: dict[str, int], duration: dict[str, int], steps: int
    ) -> None:
        model = self.module()
        evaluator = self.evaluator(model, tmp_path, **own)
        done: list[int] = []
        evaluator.bind_model(model)
        evaluator.patch_optimizer_step([], [lambda: done.append(1)])
        evaluator.train(**duration)
        evaluator.unbind_model()
        assert len(done) == steps

    def test_loss_and_step_tasks_run_in_order(self, tmp_path: Path, form: str) -> None:
        model = self.module(form=form)
        evaluator = self.evaluator(model, tmp_path, max_epochs=1)
        weight, events = model.net[0].weight, []
        start = weight.detach().clone()
        evaluator.bind_model(model)
        evaluator.patch_loss(lambda loss, batch: events.append(("loss", len(batch))) or 0 * loss)
        evaluator.patch_optimizer_step(
            [lambda: events.append(("before", weight.grad is not None and torch.equal(weight, start)))],
            [lambda: events.append(("after", not torch.equal(weight, start)))],
        )
        evaluator.train(max_steps=1)
        evaluator.unbind_model()
        assert events == [("loss", 2), ("before", True), ("after", True)]

    def test_nothing_stays_patched(self, tmp_path: Path) -> None:
        model, events = self.module(), []
        evaluator = self.evaluator(model, tmp_path, max_epochs=1)
        evaluator.bind_model(model)
        evaluator.patch_loss(lambda loss, batch: events.append("loss") or loss)
        evaluator.patch_optimizer_step([lambda: events.append("before")], [lambda: events.append("after")])
        evaluator.unbind_model()
        for name in ("training_step", "configure_optimizers"):
            assert getattr(model, name).__func__ is getattr(type(model), name)
        evaluator.bind_model(model)
        evaluator.train(max_steps=2)
        evaluator.unbind_model()
        assert events == []

    def test_reverting_the_step_keeps_added_parameters(self, tmp_path: Path) -> None:
        model, events = self.module(), []
        extra = nn.Parameter(torch.ones(1))
        evaluator = self.evaluator(model, tmp_path, max_epochs=1)
        evaluator.bind_model(model)
        evaluator.patch_optimizer_step([lambda: events.append("before")], [lambda: events.append("after")])
        evaluator.patch_optim_param_group({"net.0": [extra]})
        evaluator.patch_loss(lambda loss, batch: loss + extra.sum())
        evaluator.revert_optimizer_step()
        evaluator.train(max_steps=2)
        evaluator.unbind_model()
        assert events == []
        assert extra.item() < 1

    def test_score_and_recalibrate_a_smaller_copy(self, tmp_path: Path) -> None:
        evaluator = self.evaluator(self.module(), tmp_path, max_epochs=1)
        small = self.module(width=2).eval()
        before, inputs = parameters_of(small), record_inputs(small.net[1])
        recalibrate_batchnorm(evaluator, small, max_steps=7)
        assert same(parameters_of(small), before)
        assert_exact_average(small.net[1], inputs, steps=7)
        assert score(evaluator, small) > 0
        assert evaluator.model is None

    def test_metric_without_the_key(self, tmp_path: Path) -> None:
        model = self.module(metric="accuracy")
        with pytest.raises(EvaluatorError, match="test_step"):
            score(self.evaluator(model, tmp_path), model)

    def test_repair_is_idempotent_and_touches_no_class(self, tmp_path: Path) -> None:
        from nni.compression import LightningEvaluator

        before = dict(vars(LightningEvaluator))
        evaluator = self.evaluator(self.module(), tmp_path)
        attributes = dict(vars(evaluator))
        repair(evaluator)
        assert vars(evaluator) == attributes
        assert dict(vars(LightningEvaluator)) == before

    def test_repair_leaves_the_users_own_methods(self, tmp_path: Path) -> None:
        from nni.compression import LightningEvaluator

        class Own(LightningEvaluator):
            def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
                raise NotImplementedError("mine")

        evaluator = self.evaluator(self.module(), tmp_path)
        own = Own(evaluator.trainer, evaluator.data_module)
        repair(own)
        with pytest.raises(NotImplementedError, match="mine"):
            own.train()


class TestTransformers:
    hf: Any

    @classmethod
    def setup_class(cls) -> None:
        pytest.importorskip("accelerate")
        cls.hf = pytest.importorskip("transformers")

    @classmethod
    def model(cls, width: int = 4) -> Any:
        torch.manual_seed(0)
        return cls.hf.ResNetForImageClassification(
            cls.hf.ResNetConfig(
                embedding_size=width, hidden_sizes=[width], depths=[1], layer_type="basic", num_labels=3
            )
        )

    @classmethod
    def evaluator(
        cls,
        model: Any,
        path: Path,
        optimizers: tuple[Any, Any] = (None, None),
        metric: str = "default",
        **arguments: Any,
    ) -> Any:
        from nni.compression import TransformersEvaluator

        data = [{"pixel_values": image, "labels": label} for image, label in make_data()]
        trainer = nni.trace(cls.hf.Trainer)(
            model=model,
            args=cls.hf.TrainingArguments(
                output_dir=str(path),
                per_device_train_batch_size=2,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                use_cpu=True,
                weight_decay=0.1,
                **arguments,
            ),
            train_dataset=data,
            eval_dataset=data,
            optimizers=optimizers,
            compute_metrics=lambda prediction: {
                metric: float((prediction.predictions.argmax(1) >= 0).mean())
            },
        )
        return initialised(TransformersEvaluator(trainer), model)

    @staticmethod
    def traced_optimizers(model: nn.Module) -> tuple[Any, Any]:
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
        return optimizer, nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 100)

    @pytest.mark.parametrize("traced", [True, False], ids=["traced", "default"])
    def test_loss_and_step_tasks_run_in_order(self, tmp_path: Path, traced: bool) -> None:
        model = self.model()
        evaluator = self.evaluator(model, tmp_path, self.traced_optimizers(model) if traced else (None, None))
        weight, events = model.classifier[1].weight, []
        start = weight.detach().clone()
        evaluator.bind_model(model)
        evaluator.patch_loss(lambda loss, batch: events.append(("loss", len(batch["labels"]))) or loss)
        evaluator.patch_optimizer_step(
            [lambda: events.append(("before", weight.grad is not None and torch.equal(weight, start)))],
            [lambda: events.append(("after", not torch.equal(weight, start)))],
        )
        evaluator.train(max_steps=1)
        expected = [("loss", 2), ("before", True), ("after", True)]
        assert events == expected
        assert evaluator.evaluate()[0] == 1.0
        assert events == expected

        evaluator.revert_loss()
        evaluator.revert_optimizer_step()
        evaluator.train(max_steps=2)
        evaluator.unbind_model()
        assert events == expected
        assert evaluator.model is None

    @pytest.mark.parametrize(
        ("own", "duration", "steps"),
        [
            ({"num_train_epochs": 1}, {"max_steps": 7}, 7),
            ({"max_steps": 3}, {"max_epochs": 2}, 2 * STEPS_PER_EPOCH),
            ({}, {"max_steps": 3, "max_epochs": 2}, 3),
            ({}, {"max_steps": 100, "max_epochs": 2}, 2 * STEPS_PER_EPOCH),
            ({"num_train_epochs": 1}, {}, STEPS_PER_EPOCH),
        ],
    )
    def test_duration(
        self, tmp_path: Path, own: dict[str, int], duration: dict[str, int], steps: int
    ) -> None:
        model = self.model()
        evaluator = self.evaluator(model, tmp_path, **own)
        arguments = copy.copy(evaluator.traced_trainer.args)
        done: list[int] = []
        evaluator.bind_model(model)
        evaluator.patch_optimizer_step([], [lambda: done.append(1)])
        for _ in range(2):
            done.clear()
            evaluator.train(**duration)
            assert len(done) == steps
        assert evaluator.trainer.args.max_steps == arguments.max_steps
        assert evaluator.trainer.args.num_train_epochs == arguments.num_train_epochs
        evaluator.unbind_model()

    def test_default_optimizer_keeps_its_groups(self, tmp_path: Path) -> None:
        model = self.model()
        evaluator = self.evaluator(model, tmp_path)
        assert evaluator.traced_trainer.optimizer is None
        evaluator.bind_model(model)
        groups = evaluator.trainer.optimizer.param_groups
        evaluator.unbind_model()
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))

    def test_score_and_recalibrate_a_smaller_copy(self, tmp_path: Path) -> None:
        evaluator = self.evaluator(self.model(), tmp_path)
        small = self.model(width=2).eval()
        layer = next(module for module in small.modules() if isinstance(module, nn.BatchNorm2d))
        before, inputs = parameters_of(small), record_inputs(layer)
        recalibrate_batchnorm(evaluator, small, max_steps=7)
        assert same(parameters_of(small), before)
        assert_exact_average(layer, inputs, steps=7)
        assert score(evaluator, small) == 1.0

    def test_metric_without_the_key(self, tmp_path: Path) -> None:
        model = self.model()
        with pytest.raises(EvaluatorError, match="compute_metrics"):
            score(self.evaluator(model, tmp_path, metric="accuracy"), model)

    def test_no_class_is_touched(self, tmp_path: Path) -> None:
        from nni.compression.utils import evaluator as nni_evaluator

        classes = (self.hf.Trainer, nni_evaluator.TransformersEvaluator, nni_evaluator.PatchCallback)
        before = [dict(vars(cls)) for cls in classes]
        model = self.model()
        evaluator = self.evaluator(model, tmp_path)
        evaluator.bind_model(model)
        evaluator.patch_optimizer_step([lambda: None], [])
        evaluator.train(max_steps=1)
        evaluator.unbind_model()
        assert [dict(vars(cls)) for cls in classes] == before

    def test_deepspeed_is_refused(self, tmp_path: Path) -> None:
        evaluator = self.evaluator(self.model(), tmp_path)
        evaluator.traced_trainer.args.deepspeed = "config.json"
        with pytest.raises(EvaluatorError, match="DeepSpeed"):
            repair(evaluator)
