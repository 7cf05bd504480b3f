"""A training step that trains weights and architecture: whose batch is whose, what stays, what is refused."""

from __future__ import annotations

import json
import math
from collections import UserDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nni_dbs import Widths
from nni_dbs.bilevel import ArchitectureSearch, BilevelStep, ComputeLoss, cosine, scaled_rate
from nni_dbs.errors import ConfigError, DataError, ResultError, TrainingError
from nni_dbs.sampling import Step
from nni_dbs.steps import SupernetStep
from nni_dbs.supernet import Supernet
from nni_dbs.training import load_checkpoint, save_checkpoint
from torch_pruning_adapters import find_channel_groups
from torch_pruning_adapters.calls import tensors_in

Batch = Any
STEPS = 10


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()


def batch_of(*numbers: int) -> tuple[Tensor, Tensor]:
    """Images and labels whose first pixel tells which samples they are."""
    generator = torch.Generator().manual_seed(sum(numbers))
    images = torch.randn(len(numbers), 3, 8, 8, generator=generator, dtype=torch.float64)
    images[:, 0, 0, 0] = torch.tensor(numbers, dtype=torch.float64)
    return images, torch.tensor(numbers) % 3


class Factor(nn.Module):
    """One number by which all channels of the first group are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.unused = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))


class Gate(ArchitectureSearch):
    """A method with one gate; it trains it in the steps of `when`."""

    bilevel = True  # type: ignore[misc]

    def __init__(self, model: nn.Module, *, bilevel: bool = True, when: range = range(STEPS)) -> None:
        groups = find_channel_groups(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        architecture = Factor()
        optimizer = torch.optim.Adam(architecture.parameters(), 0.1)
        super().__init__(Supernet(model, groups), architecture, optimizer, torch.Generator().manual_seed(0))
        self.bilevel = bilevel  # type: ignore[misc]
        self.when = when
        self.progress: list[float] = []
        self.scales: list[float] = []  # in the steps on the architecture

    def due(self, taken: int, progress: float) -> bool:
        return taken in self.when

    def weights_pass(self, progress: float) -> Step | AbstractContextManager[Any]:
        self.progress.append(progress)
        return nullcontext()

    def architecture_step(self, compute_loss: ComputeLoss, progress: float) -> None:
        factor = self.architecture.get_parameter("factor")
        self.scales.append(float(self.scale))
        with self.supernet.gated({"0": factor * torch.ones(8, dtype=torch.float64)}):
            task = compute_loss()
            self._descend(task + factor, task)
        self._record(progress, task, 2 * factor)

    def networks(self, n: int) -> list[Widths]:
        return [Widths({"0": 8})][:n]


class Seen(NamedTuple):
    """A pass: which samples it saw, and whether the gate was there."""

    numbers: list[int]
    gated: bool


class Spy:
    """A training step that notes what it is called with."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[Seen] = []
        self.calls: list[Any] = []

    def __call__(self, batch: Any, model: nn.Module, *rest: Any, **more: Any) -> Tensor:
        images, labels = batch
        self.seen.append(Seen([int(n) for n in images[:, 0, 0, 0]], "forward" in vars(self.model[3])))
        self.calls.append((rest, more))
        assert (images[:, 0, 0, 0] % 3 == labels).all()
        return F.cross_entropy(model(images), labels)


def step_of(
    second: Any = None, bilevel: bool = True, when: range = range(STEPS)
) -> tuple[nn.Sequential, BilevelStep, Spy]:
    model = make_net().train()
    spy = Spy(model)
    return model, BilevelStep(Gate(model, bilevel=bilevel, when=when), spy, STEPS, second=second), spy


def factor_of(step: BilevelStep) -> float:
    return step.search.architecture.get_parameter("factor").item()


# --- whose batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "left"), [(4, 2), (5, 3), (8, 4)])
def test_a_bilevel_method_takes_the_second_half_of_each_batch(size: int, left: int) -> None:
    model, step, spy = step_of()
    step(batch_of(*range(size)), model)
    assert spy.seen == [Seen([*range(left, size)], True), Seen([*range(left)], False)]


def test_the_weights_get_whole_batches_while_the_architecture_rests() -> None:
    model, step, spy = step_of(when=range(1, 2))
    for _ in range(3):
        step(batch_of(*range(6)), model)
    whole, half = Seen([*range(6)], False), [Seen([3, 4, 5], True), Seen([0, 1, 2], False)]
    assert spy.seen == [whole, *half, whole]
    assert step.search.progress == [0, 0.1, 0.2]  # type: ignore[attr-defined]


def test_other_methods_take_the_same_batch() -> None:
    model, step, spy = step_of(bilevel=False)
    step(batch_of(*range(5)), model)
    assert spy.seen == [Seen([*range(5)], True), Seen([*range(5)], False)]


@pytest.mark.parametrize("bilevel", [False, True])
def test_a_second_loader_is_iterated_again_and_again(bilevel: bool) -> None:
    second = [batch_of(10, 11), batch_of(12)]
    model, step, spy = step_of(second, bilevel)
    for _ in range(5):
        step(batch_of(0, 1, 2), model)
    assert [s.numbers for s in spy.seen if s.gated] == [[10, 11], [12], [10, 11], [12], [10, 11]]
    assert all(s.numbers == [0, 1, 2] for s in spy.seen if not s.gated)
    assert step.drawn == 5


def test_a_second_batch_goes_where_the_first_one_is() -> None:
    devices = []

    def training_step(batch: dict[str, Any], scale: Tensor) -> Tensor:
        devices.append((batch["x"].device.type, batch["more"][0].device.type, batch["name"]))
        return (batch["x"].cpu() if batch["x"].is_cpu else torch.ones(2)).sum() * scale

    class Plain(Gate):
        def architecture_step(self, compute_loss: ComputeLoss, progress: float) -> None:
            compute_loss()

    second = [{"x": torch.ones(2), "more": [torch.ones(3)], "name": "b"}]
    step = BilevelStep(Plain(make_net()), training_step, STEPS, second=second)
    first = {"x": torch.ones(2, device="meta"), "more": [torch.ones(3, device="meta")], "name": "a"}
    step(first, torch.ones((), requires_grad=True))
    assert devices == [("meta", "meta", "b"), ("meta", "meta", "a")]


def test_only_tensors_as_long_as_the_batch_are_halved() -> None:
    batch = {
        "x": torch.arange(6),
        "pair": (torch.arange(12).reshape(6, 2), torch.tensor(7)),
        "prior": torch.arange(3),
        "name": "day",
    }
    calls = []

    def training_step(model: nn.Module, inputs: dict[str, Any], flag: bool = False) -> Tensor:
        calls.append((inputs, flag))
        return model(batch_of(0, 1, 2)[0]).sum()

    model = make_net()
    step = BilevelStep(Gate(model), training_step, STEPS, batch_at=("inputs", 1))
    step(model, batch, flag=True)
    step(model, flag=True, inputs=batch)
    for k, (inputs, flag) in enumerate(calls):
        part = slice(3) if k % 2 else slice(3, 6)
        assert flag
        assert torch.equal(inputs["x"], batch["x"][part])
        assert torch.equal(inputs["pair"][0], batch["pair"][0][part])
        assert int(inputs["pair"][1]) == 7
        assert torch.equal(inputs["prior"], batch["prior"])
        assert inputs["name"] == "day"
    assert len(calls) == 4


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: list[Tensor]
    name: str = "day"


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
    "batch",
    [
        Pair(torch.arange(6), torch.arange(6)),
        Record(torch.arange(6), [torch.arange(6)]),
        UserDict(x=torch.arange(6), y=torch.arange(6)),
        [torch.arange(6), torch.arange(6)],
        (torch.arange(6), torch.arange(6)),
    ],
)
def test_batches_of_any_kind_keep_it(batch: Any, second: bool) -> None:
    seen = []

    def training_step(batch: Any, model: nn.Module) -> Tensor:
        seen.append(batch)
        return model(batch_of(0, 1, 2)[0]).sum()

    model = make_net()
    BilevelStep(Gate(model), training_step, STEPS, second=[batch] if second else None)(batch, model)
    numbers = [[t.tolist() for t in tensors_in(part)] for part in seen]
    parts = [[0, 1, 2, 3, 4, 5]] * 2 if second else [[3, 4, 5], [0, 1, 2]]
    assert numbers == [[part, part] for part in parts]
    assert all(type(part) is type(batch) for part in seen)
    assert [t.tolist() for t in tensors_in(batch)] == [[0, 1, 2, 3, 4, 5]] * 2


def test_other_arguments_reach_both_passes() -> None:
    model, step, spy = step_of()
    step(batch_of(*range(4)), model, 5, name="x")
    assert spy.calls == [((5,), {"name": "x"})] * 2


def test_what_a_training_step_takes_out_of_its_batch_is_there_in_the_next_pass() -> None:
    def training_step(batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch.pop("x")), batch.pop("y"))

    model = make_net()
    for bilevel in (False, True):
        images, labels = batch_of(*range(6))
        batch = {"x": images, "y": labels}
        BilevelStep(Gate(model, bilevel=bilevel), training_step, STEPS)(batch, model)
        assert batch.keys() == {"x", "y"}


# --- what stays --------------------------------------------------------------------------------------


def test_the_weights_get_the_gradients_and_statistics_of_their_half_alone() -> None:
    model, step, _ = step_of()
    plain = make_net().train()
    images, labels = batch_of(*range(8))
    images[4:] *= 1e6  # statistics that would show
    loss = step((images, labels), model)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    expected = F.cross_entropy(plain(images[:4]), labels[:4])
    expected.backward()
    assert torch.equal(loss, expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for mine, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert model[1].num_batches_tracked == 1


def test_gradients_that_wait_are_added_to_and_not_touched_by_the_architecture() -> None:
    model, step, _ = step_of()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    loss = step(batch_of(*range(8)), model)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    loss.backward()
    plain = make_net().train()
    images, labels = batch_of(*range(8))
    F.cross_entropy(plain(images[:4]), labels[:4]).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, 1 + q.grad)


def test_the_architecture_gets_the_gradient_of_its_half() -> None:
    model, step, _ = step_of()
    twin = make_net().train()
    images, labels = batch_of(*range(8))
    step((images, labels), model)
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with Supernet(twin, step.supernet.groups).gated({"0": factor * torch.ones(8, dtype=torch.float64)}):
        task = F.cross_entropy(twin(images[4:]), labels[4:])
    (gradient,) = torch.autograd.grad(task + factor, factor)
    found = step.search.architecture
    torch.testing.assert_close(found.get_parameter("factor").grad, gradient, rtol=1e-12, atol=0)
    assert found.get_parameter("unused").grad is None
    values = {name: p.item() for name, p in found.named_parameters()}
    assert values == {"factor": pytest.approx(0.9), "unused": 2}  # Adam's first step
    (entry,) = step.search.log
    assert entry == {"progress": 0, "loss": pytest.approx(task.item(), rel=1e-12), "used": pytest.approx(1.8)}


def test_the_scale_of_a_grad_scaler_is_seen_and_does_not_move_the_architecture() -> None:
    found = []
    for scale in (1.0, 65536.0):
        model, step, _ = step_of()
        for _ in range(2):
            model.zero_grad()
            step(batch_of(*range(8)), model).backward(torch.tensor(scale, dtype=torch.float64))
        assert step.search.scales == [1.0, scale]  # type: ignore[attr-defined]
        found.append(factor_of(step))
    assert found[0] == found[1]


def test_the_model_comes_back_as_it_was_also_after_an_error() -> None:
    def fail(batch: Any, model: nn.Module) -> Tensor:
        model(batch[0])
        raise RuntimeError("no power")

    model = make_net().train()
    model[4].eval()
    step = BilevelStep(Gate(model), fail, STEPS)
    with pytest.raises(RuntimeError, match="no power"):
        step(batch_of(*range(4)), model)
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    assert [m.training for m in model] == [True] * 4 + [False] + [True] * 4
    assert model[1].track_running_stats and model[4].track_running_stats
    assert model[1].num_batches_tracked == 0


def test_a_norm_without_statistics_gets_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    model.extend([nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    model = model.double().train()
    BilevelStep(Gate(model), lambda b, m: F.cross_entropy(m(b[0]), b[1]), STEPS)(batch_of(*range(4)), model)
    assert not model[1].track_running_stats and model[1].running_mean is None


def test_an_evaluation_passes_through() -> None:
    model, step, spy = step_of()
    with torch.no_grad():
        loss = step(batch_of(*range(6)), model)
    assert spy.seen == [Seen([*range(6)], False)]
    assert not loss.requires_grad
    assert step.taken == step.drawn == len(step.search.log) == 0
    assert factor_of(step) == 1


# --- what a training step returns --------------------------------------------------------------------


class Named(NamedTuple):
    loss: Tensor
    size: int


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss, size: loss,
        lambda loss, size: (loss, size),
        lambda loss, size: {"loss": loss, "size": size},
        Named,
    ],
)
def test_the_output_is_that_of_the_weights_pass(wrap: Any) -> None:
    def training_step(batch: Any, model: nn.Module) -> Any:
        return wrap(F.cross_entropy(model(batch[0]), batch[1]), len(batch[0]))

    model = make_net()
    output = BilevelStep(Gate(model), training_step, STEPS)(batch_of(*range(7)), model)
    images, labels = batch_of(*range(7))
    expected = wrap(F.cross_entropy(make_net()(images[:4]), labels[:4]), 4)
    assert type(output) is type(expected)
    if isinstance(output, Tensor):
        assert torch.equal(output, expected) and output.requires_grad
    elif isinstance(output, dict):
        assert torch.equal(output["loss"], expected["loss"]) and output["size"] == 4
    else:
        assert torch.equal(output[0], expected[0]) and output[1] == 4


def test_a_skipped_batch_trains_nothing() -> None:
    model = make_net()
    step = BilevelStep(Gate(model), lambda batch, model: None, STEPS)
    assert step(batch_of(*range(4)), model) is None
    assert not step.search.log
    assert factor_of(step) == 1
    assert step.taken == 1  # schedules go on


def test_a_training_step_without_a_loss_is_refused() -> None:
    model = make_net()
    step = BilevelStep(Gate(model), lambda batch, model: "loss", STEPS)
    with pytest.raises(TrainingError, match="must return a loss"):
        step(batch_of(*range(4)), model)


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(0,), (0, 1), (0, 1, 2)])
def test_batches_too_small_to_be_halved_are_refused(numbers: tuple[int, ...]) -> None:
    model, step, spy = step_of()
    with pytest.raises(DataError, match=f"a batch of {len(numbers)} samples cannot be halved.*loader of its"):
        step(batch_of(*numbers), model)
    assert not spy.seen


@pytest.mark.parametrize("batch", [[], {"a": "text"}, torch.ones(())])
def test_a_batch_without_samples_is_refused(batch: Any) -> None:
    model = make_net()
    step = BilevelStep(Gate(model), lambda batch, model: model(batch_of(0, 1)[0]).sum(), STEPS)
    with pytest.raises(DataError, match="a batch of 0 samples"):
        step(batch, model)


def test_a_batch_without_tensors_has_no_device_to_follow() -> None:
    model = make_net()
    step = BilevelStep(
        Gate(model), lambda batch, model: model(batch_of(0, 1)[0]).sum(), STEPS, second=["b", "c"]
    )
    step("a", model)
    assert step.drawn == 1


def test_a_second_loader_without_a_batch_is_refused() -> None:
    model, step, _ = step_of(second=[])
    with pytest.raises(DataError, match="the second loader gave no batch"):
        step(batch_of(0, 1), model)


def test_a_second_loader_that_runs_dry_is_refused() -> None:
    model, step, _ = step_of(second=iter([batch_of(5, 6)]))
    step(batch_of(0, 1), model)
    with pytest.raises(DataError, match="can be iterated again and again"):
        step(batch_of(0, 1), model)


def test_a_loss_that_is_not_finite_stops_the_architecture() -> None:
    model = make_net()
    step = BilevelStep(Gate(model), lambda b, m: m(b[0]).sum() * float("nan"), STEPS)
    with pytest.raises(TrainingError, match="the architecture became nan; lower the learning rate of"):
        step(batch_of(*range(4)), model)
    assert factor_of(step) == 1


# --- state -------------------------------------------------------------------------------------------


def epoch(start: int) -> Iterator[tuple[Tensor, Tensor]]:
    for number in range(start, 7):
        yield batch_of(*range(number, number + 4))


@pytest.mark.parametrize("second", [False, True])
def test_a_state_goes_through_a_checkpoint_to_the_same_search(second: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def made() -> tuple[nn.Module, BilevelStep, Spy, torch.optim.Optimizer]:
        own = [batch_of(10, 11), batch_of(12, 13), batch_of(14, 15)] if second else None
        model, step, spy = step_of(own)
        return model, step, spy, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def train(model: nn.Module, step: BilevelStep, optimizer: torch.optim.Optimizer, first: int) -> None:
        for number, batch in enumerate(epoch(first), first + 1):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()
            if number == 4 and first == 0:
                save_checkpoint(path, model, optimizer, number, step)

    model, step, spy, optimizer = made()
    train(model, step, optimizer, 0)
    resumed, again, seen, other = made()
    assert load_checkpoint(path, resumed, other, again) == 4
    assert again.taken == 4 and len(again.search.log) == 4
    train(resumed, again, other, 4)
    assert seen.seen == spy.seen[8:]
    for mine, theirs in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    mine, theirs = step.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
    json.dumps({key: value for key, value in mine.items() if not isinstance(value, Tensor)})
    assert mine["taken"] == 7 and mine["drawn"] == (7 if second else 0)


def test_a_state_before_the_first_step_is_one() -> None:
    _, step, _ = step_of()
    fresh = step.state_dict()
    model, other, _ = step_of()
    other(batch_of(*range(4)), model)
    other.load_state_dict({**fresh, "taken": 0})
    assert other.taken == 0 and not other.search.log
    assert not other.search.optimizer.state_dict()["state"]
    assert factor_of(other) == 1


def test_a_checkpoint_of_a_supernet_is_no_state_of_a_search(tmp_path: Path) -> None:
    model, step, spy = step_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plain = SupernetStep(step.supernet, iter([]), spy)
    save_checkpoint(tmp_path / "x.safetensors", model, optimizer, 1, plain)
    with pytest.raises(ResultError, match="cannot resume"):
        load_checkpoint(tmp_path / "x.safetensors", model, optimizer, step)


# --- schedules ---------------------------------------------------------------------------------------


def test_progress_ends_at_one_where_the_training_goes_on() -> None:
    model, step, _ = step_of(when=range(100))
    step.taken = STEPS + 3
    step(batch_of(*range(4)), model)
    assert step.search.log[0]["progress"] == 1


@pytest.mark.parametrize(
    ("steps", "rate"),
    [(1000, 0.01), (2000, 0.01), (500, 0.02), (100, 0.1), (10, 0.3), (1, 0.3), (0, 0.3)],
)
def test_rates_of_shorter_searches_are_higher(steps: int, rate: float) -> None:
    assert scaled_rate(0.01, steps, 1000, most=0.3) == pytest.approx(rate)


def test_half_a_cosine() -> None:
    assert cosine(0, 5, 0.1) == 5
    assert cosine(1, 5, 0.1) == pytest.approx(0.1)
    assert cosine(0.5, 5, 0.1) == pytest.approx(2.55)
    assert cosine(0.25, 1, 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)


# --- batches of lists, scales, gradients -------------------------------------------------------------


def test_lists_with_an_entry_for_each_sample_are_halved() -> None:
    """As captions and detection batches have them; a list inside of a sample stays whole."""
    images, names = torch.arange(8), [f"image {i}" for i in range(8)]
    targets = [{"boxes": torch.arange(8 * (i + 1)).reshape(-1, 8)} for i in range(8)]
    seen = []

    def training_step(batch: Any, model: nn.Module) -> Tensor:
        seen.append(batch)
        return model(batch_of(0, 1, 2)[0]).sum()

    model = make_net()
    step = BilevelStep(Gate(model), training_step, STEPS)
    step((images, names, targets), model)
    step(([torch.zeros(3, 4, 5) for _ in range(8)], targets), model)
    for own, (half, labels, boxes) in zip((slice(4, 8), slice(4)), seen[:2], strict=True):
        assert torch.equal(half, images[own])
        assert labels == names[own]
        assert boxes == targets[own]
    assert [len(part) for batch in seen[2:] for part in batch] == [4, 4, 4, 4]


@pytest.mark.parametrize("power", [0, 16])
def test_gradients_are_taken_at_the_scale_of_a_grad_scaler(power: int) -> None:
    """Then small float16 gradients survive; the step itself is the same."""
    model = make_net()
    search = Gate(model)
    step = BilevelStep(search, lambda b, m: F.cross_entropy(m(b[0]), b[1]), STEPS)
    step._scale.value = torch.tensor(2.0**power)
    step(batch_of(*range(8)), model)
    moved = factor_of(step)
    other = make_net()
    plain = BilevelStep(Gate(other), lambda b, m: F.cross_entropy(m(b[0]), b[1]), STEPS)
    plain(batch_of(*range(8)), other)
    assert moved == pytest.approx(factor_of(plain), rel=1e-12)
    assert search.scales == [2.0**power]


def test_gradients_that_are_not_finite_stop_the_architecture() -> None:
    """Though the loss is: 0 has no slope under a root."""
    model = make_net()
    step = BilevelStep(
        Gate(model), lambda b, m: F.cross_entropy(m(b[0]), b[1]) + (m(b[0]) * 0).sum().sqrt(), STEPS
    )
    with pytest.raises(TrainingError, match="gradients that are not finite; lower"):
        step(batch_of(*range(8)), model)
    assert factor_of(step) == 1


def test_a_second_loader_must_give_the_same_kind_of_batches() -> None:
    second = [{"x": torch.arange(4)}]
    model = make_net()
    step = BilevelStep(Gate(model), lambda b, m: m(b[0]).sum(), STEPS, second=second)
    with pytest.raises(DataError, match=r"mappings with x, the training batches of 2 parts"):
        step(batch_of(*range(4)), model)


def test_a_training_has_steps() -> None:
    with pytest.raises(ConfigError, match="0 steps"):
        BilevelStep(Gate(make_net()), lambda b, m: m(b[0]).sum(), 0)
