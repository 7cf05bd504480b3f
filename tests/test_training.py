from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nni_dbs.config import Recipe
from nni_dbs.errors import ResultError, TrainingError
from nni_dbs.training import (
    accuracy,
    load_checkpoint,
    parameter_groups,
    save_checkpoint,
    sgd,
    training_loop,
    training_step,
)

CPU = torch.device("cpu")


def _data(samples: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    return TensorDataset(images, (images.mean((1, 2, 3)) > 0).long())


def _net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(216, 2)
    )


def _train(model: nn.Module, recipe: Recipe, checkpoint: Path | None = None, **duration: int) -> None:
    loop = training_loop(_data(), recipe, device=CPU, checkpoint=checkpoint, quiet=True)
    loop(model, sgd(model, recipe), training_step(recipe.label_smoothing), **duration)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    states = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in states)


def test_an_interrupted_training_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=4, batch_size=10)
    whole = _net()
    _train(whole, recipe)

    path = tmp_path / "train.safetensors"
    saved = save_checkpoint

    def interrupt(
        file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, *rest: Any
    ) -> None:
        saved(file, model, optimizer, epoch, *rest)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nni_dbs.training.save_checkpoint", interrupt)
        _train(_net(), recipe, path)
    resumed = _net()
    torch.manual_seed(123)  # nothing hangs on the global generator
    _train(resumed, recipe, path)
    assert _equal(resumed, whole)
    finished = _net()
    _train(finished, recipe, path)
    assert _equal(finished, whole)


def test_max_steps_are_exact_and_leave_no_checkpoint(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=10)
    steps = 0

    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        nonlocal steps
        steps += 1
        return model(batch[0]).sum()

    model, path = _net(), tmp_path / "train.safetensors"
    training_loop(_data(), recipe, device=CPU, checkpoint=path, quiet=True)(
        model, sgd(model, recipe), step, max_steps=7
    )
    assert steps == 7 and not path.exists()


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    recipe = Recipe(epochs=1, batch_size=10)
    model = _net()
    loop = training_loop(_data(), recipe, device=CPU, quiet=True)
    with pytest.raises(TrainingError, match=r"became nan at step 4; lower train\.lr"):
        loop(model, sgd(model, recipe), lambda batch, model: model(batch[0]).sum() * float("nan"))


def test_checkpoints_of_another_model_or_cut_short_are_refused(tmp_path: Path) -> None:
    model, recipe = _net(), Recipe()
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, model, sgd(model, recipe), 3)
    assert load_checkpoint(path, model) == 3
    with pytest.raises(ResultError, match="delete it to start this stage again"):
        load_checkpoint(path, nn.Linear(2, 2))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ResultError, match="cannot resume"):
        load_checkpoint(path, model)


def test_only_weights_are_decayed() -> None:
    decayed, plain = parameter_groups(_net(), 0.1)
    assert [p.dim() for p in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert {p.dim() for p in plain["params"]} == {1} and plain["weight_decay"] == 0.0


def test_auxiliary_heads_count_three_tenths() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    batch = (torch.zeros(1), torch.tensor([0]))
    alone = training_step(0.0)(batch, lambda images: logits)  # type: ignore[arg-type]
    both = training_step(0.0)(batch, lambda images: (logits, logits))  # type: ignore[arg-type]
    torch.testing.assert_close(both, 1.3 * alone)


def test_accuracy_by_hand_and_the_mode_comes_back() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not self.training
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    model = Fixed().train()
    dataset = TensorDataset(torch.zeros(8, 1), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0]))
    assert accuracy(model, dataset, device=CPU, batch_size=3) == 75.0
    assert model.training
