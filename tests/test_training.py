from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nni_dbs.config import Recipe
from nni_dbs.errors import ConfigError, ResultError, TrainingError
from nni_dbs.sampling import Step, draw_paths, spfs
from nni_dbs.space import WidthSpace
from nni_dbs.steps import SupernetStep, kl_divergence
from nni_dbs.supernet import Supernet
from nni_dbs.training import (
    accuracy,
    distilling_step,
    load_checkpoint,
    parameter_groups,
    reinitialise,
    save_checkpoint,
    sgd,
    taught_step,
    training_loop,
    training_step,
)
from torch_pruning_adapters import prefix_order

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


def test_the_distilling_loss_by_hand() -> None:
    full = torch.tensor([[0.3, -1.0, 2.0], [0.5, 0.1, -0.4]], dtype=torch.float64, requires_grad=True)
    small = torch.tensor([[1.0, 0.2, -0.7], [0.0, 0.9, 0.3]], dtype=torch.float64, requires_grad=True)
    batch = (torch.zeros(2), torch.tensor([2, 0]))
    found = distilling_step(0.0)(batch, lambda images: (full, small))  # type: ignore[arg-type]
    p, q = full.softmax(1).tolist(), small.softmax(1).tolist()
    hard = -(math.log(p[0][2]) + math.log(p[1][0])) / 2
    soft = sum(a * math.log(a / b) for ps, qs in zip(p, q, strict=True) for a, b in zip(ps, qs, strict=True))
    assert found.item() == pytest.approx(hard + soft / 2, rel=1e-14)

    of_full, of_small = torch.autograd.grad(found, [full, small])
    labels = torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    teacher, student = full.detach().softmax(1), small.detach().softmax(1)
    torch.testing.assert_close(of_full, (teacher - labels) / 2, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(of_small, (student - teacher) / 2, rtol=1e-14, atol=1e-15)


def test_the_distilling_loss_smooths_labels_only_for_the_full_network() -> None:
    full, small = torch.randn(4, 3), torch.randn(4, 3)
    batch = (torch.zeros(4), torch.tensor([0, 1, 2, 1]))
    smooth, plain = (
        distilling_step(share)(batch, lambda images: (full, small))  # type: ignore[arg-type]
        for share in (0.1, 0.0)
    )
    cross_entropy = nn.functional.cross_entropy
    change = cross_entropy(full, batch[1], label_smoothing=0.1) - cross_entropy(full, batch[1])
    torch.testing.assert_close(smooth - plain, change)


# --- a teacher ---------------------------------------------------------------------------------------


def _headed(heads: int) -> nn.Module:
    """A classifier of 3 features with auxiliary heads, in double precision."""

    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(3, 4) for _ in range(heads))

        def forward(self, x: Tensor) -> Any:
            logits = [head(x) for head in self.heads]
            return logits[0] if heads == 1 else tuple(logits)

    return Headed().double()


def _features() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_student_that_equals_its_teacher_has_no_gradient_where_the_teacher_is_all() -> None:
    model, batch = _headed(1), _features()
    loss = taught_step(copy.deepcopy(model), weight=1.0)(batch, model)
    assert abs(loss.item()) < 1e-15
    assert all(gradient.abs().max() < 1e-15 for gradient in _gradients(loss, model))
    loss = taught_step(_headed(1), weight=1.0)(batch, model)
    assert all(gradient.abs().max() > 1e-3 for gradient in _gradients(loss, model))


@pytest.mark.parametrize("heads", [1, 2])
def test_without_weight_the_teacher_says_nothing(heads: int) -> None:
    model, batch = _headed(heads), _features()
    taught = taught_step(_headed(heads), weight=0.0, label_smoothing=0.1)(batch, model)
    plain = training_step(0.1)(batch, model)
    torch.testing.assert_close(taught, plain, rtol=1e-14, atol=1e-15)
    for mine, theirs in zip(_gradients(taught, model), _gradients(plain, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_taught_loss_by_its_parts(heads: int) -> None:
    """(1 - w) CE + w T^2 KL for the main head, 0.3 CE for the auxiliary one."""
    model, teacher, (x, labels) = _headed(heads), _headed(1), _features()
    loss = taught_step(teacher, weight=0.7, temperature=3.0, label_smoothing=0.2)((x, labels), model)
    cross_entropy = nn.functional.cross_entropy
    own, taught = model.heads[0](x), teacher(x)
    soft = 9 * kl_divergence(own / 3, taught / 3)
    expected = 0.3 * cross_entropy(own, labels, label_smoothing=0.2) + 0.7 * soft
    if heads == 2:
        expected = expected + 0.3 * cross_entropy(model.heads[1](x), labels, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for mine, theirs in zip(_gradients(loss, model), _gradients(expected, model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_a_teacher_stays_as_it_is() -> None:
    student, teacher = _net().train(), _net().train()
    before = copy.deepcopy(teacher.state_dict())
    step = taught_step(teacher)
    images, labels = _data(10).tensors
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    step((images, labels), student).backward()
    optimizer.step()
    assert not teacher.training and student.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert not student._forward_hooks
    assert not torch.equal(student[0].weight, teacher[0].weight)


def test_a_teacher_without_logits_is_refused() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    with pytest.raises(TrainingError, match="logits"):
        taught_step(Other())(_features(), _headed(1))


def test_all_weights_are_drawn_anew_by_the_seed() -> None:
    model = _net()
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
            tensor.fill_(7.0)
    reinitialise(model, seed=3)
    assert not any((tensor == 7).any() for tensor in model.state_dict().values())
    again, other = _net(), _net()
    torch.rand(5)
    reinitialise(again, seed=3)
    reinitialise(other, seed=4)
    assert _equal(model, again)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_parameters_that_nothing_draws_anew_are_told() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    with pytest.raises(ConfigError, match=r"nothing resets '1\.factor'.*use finetune or distill"):
        reinitialise(nn.Sequential(nn.Conv2d(3, 6, 3), Scale()), seed=0)


def test_accuracy_by_hand_and_the_mode_comes_back() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not self.training
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    model = Fixed().train()
    dataset = TensorDataset(torch.zeros(8, 1), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0]))
    assert accuracy(model, dataset, device=CPU, batch_size=3) == 75.0
    assert model.training


# --- supernets ---------------------------------------------------------------------------------------

LONG = Recipe(epochs=4, batch_size=10)  # 4 steps an epoch


def _supernet_step(model: nn.Module, seed: int = 7, killed_at: int | None = None) -> SupernetStep:
    """SPFS on the model; its process is killed while it takes step number `killed_at`."""
    space = WidthSpace.from_model(model, torch.zeros(2, 3, 8, 8), min_ratio=0.3, divisor=1)
    generator = torch.Generator().manual_seed(seed)
    draws = draw_paths([space.sample(generator) for _ in range(12)], generator, 2)

    def steps() -> Iterator[Step]:
        for number, step in enumerate(spfs(space, draws), 1):
            if number == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield step

    supernet = Supernet(model, space.groups, prefix_order(space.groups))
    return SupernetStep(supernet, steps(), training_step(0.1))


def _train_supernet(
    checkpoint: Path | None = None, seed: int = 7, killed_at: int | None = None
) -> tuple[nn.Module, SupernetStep]:
    model = _net()
    step = _supernet_step(model, seed, killed_at)
    loop = training_loop(_data(), LONG, device=CPU, checkpoint=checkpoint, quiet=True)
    loop(model, sgd(model, LONG), step)
    return model, step


def _in_a_new_process(call: str) -> int:
    """Return code of a process that evaluates `call` with the names of this file."""
    here = Path(__file__)
    code = f"import torch; torch.set_num_threads(1); from pathlib import Path; from {here.stem} import *; "
    code += f"from {here.stem} import _train_supernet; {call}"
    paths = os.pathsep.join([str(here.parent), str(here.parents[1])])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, timeout=120)
    return done.returncode


def test_an_interrupted_supernet_training_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, whole_step = _train_supernet()
    assert whole_step.taken == 16
    other, _ = _train_supernet(seed=8)
    assert not _equal(other, whole)  # the networks of the steps matter

    path = tmp_path / "supernet.safetensors"
    saved = save_checkpoint

    def interrupt(file: Path, model: nn.Module, optimizer: Any, epoch: int, *rest: Any) -> None:
        saved(file, model, optimizer, epoch, *rest)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nni_dbs.training.save_checkpoint", interrupt)
        _train_supernet(path)
    torch.manual_seed(123)  # nothing hangs on the global generator
    resumed, step = _train_supernet(path)
    assert _equal(resumed, whole)
    assert step.taken == 16
    finished, step = _train_supernet(path)
    assert _equal(finished, whole)
    assert step.taken == 16


def test_a_killed_supernet_training_resumes_to_the_same_weights_in_a_new_process(tmp_path: Path) -> None:
    whole, _ = _train_supernet()
    path, final = tmp_path / "supernet.safetensors", tmp_path / "final.pt"
    killed = _in_a_new_process(f"_train_supernet(Path({str(path)!r}), killed_at=10)")
    assert killed == -signal.SIGKILL
    assert load_checkpoint(path, _net()) == 2  # it died in the third epoch
    assert not final.exists()
    train = f"_train_supernet(Path({str(path)!r}))[0].state_dict()"
    assert _in_a_new_process(f"torch.save({train}, {str(final)!r})") == 0
    resumed = _net()
    resumed.load_state_dict(torch.load(final))
    assert _equal(resumed, whole)


def test_a_supernet_does_not_resume_from_a_checkpoint_of_ordinary_training(tmp_path: Path) -> None:
    model, path = _net(), tmp_path / "x.safetensors"
    save_checkpoint(path, model, sgd(model, LONG), 1, training_step(0.1))
    assert load_checkpoint(path, model, step=training_step(0.1)) == 1
    with pytest.raises(ResultError, match=r"cannot resume from .*; delete it to start this stage again"):
        load_checkpoint(path, model, step=_supernet_step(model))


def test_a_supernet_that_is_ahead_of_its_checkpoint_does_not_resume(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model, step = _train_supernet()
    save_checkpoint(path, model, sgd(model, LONG), 1, _supernet_step(model))
    with pytest.raises(ResultError, match="16 steps are taken already, more than the 0 to go on after"):
        load_checkpoint(path, model, step=step)


def test_momentum_in_channels_last_is_saved_and_restored(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=10)
    model = _net().to(memory_format=torch.channels_last)
    optimizer = sgd(model, recipe)
    loop = training_loop(_data(), recipe, device=CPU, checkpoint=tmp_path / "x.safetensors", quiet=True)
    loop(model, optimizer, training_step(0.1))
    other = _net()
    restored = sgd(other, recipe)
    assert load_checkpoint(tmp_path / "x.safetensors", other, restored) == 2
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        buffers = [o.state[p]["momentum_buffer"] for o, p in ((optimizer, mine), (restored, theirs))]
        assert torch.equal(*buffers)
