"""PSE-Net: losses of the parts of a batch, records by width, and the prior that they give."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections import namedtuple
from collections.abc import Callable
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import space_of
from torch import Tensor, nn

from nni_dbs import FlopsCost, WidthSpace
from nni_dbs.algorithms.pse_net import SHRINKAGE, PSENetStep, WidthRecords
from nni_dbs.config import Recipe
from nni_dbs.cost import Bounds, Budget
from nni_dbs.errors import TrainingError
from nni_dbs.pool import chances_by_width, chances_of, draw, tilted
from nni_dbs.predict import kendall_tau
from nni_dbs.sampling import Step, in_parallel, sandwich
from nni_dbs.search import EvolutionSearch, PriorSearch, draw_evenly
from nni_dbs.space import Widths
from nni_dbs.steps import SupernetStep
from nni_dbs.supernet import Supernet
from nni_dbs.training import sgd, training_loop
from tests.algorithms.test_contracts import (
    arms_batch,
    assert_equal,
    assert_fills,
    cross_entropy,
    kill_a_copy,
    pretrained_arms,
    small_data,
    small_net,
)
from tests.helpers import bound
from torch_pruning_adapters import find_channel_groups, prefix_order

Batch = tuple[Tensor, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- losses of the parts -----------------------------------------------------------------------------


@functools.cache
def space() -> WidthSpace:
    return WidthSpace(find_channel_groups(small_net(), torch.zeros(1, 3, 8, 8)), divisor=2)


def model() -> nn.Module:
    """Without dropout, which each part would draw anew."""
    net = small_net().double().train()
    net.dropout.p = 0.0
    return net


def data(images: int = 12) -> Batch:
    x = torch.randn(images, 3, 8, 8, generator=seeded(), dtype=torch.float64)
    return x, x.mean((2, 3)).argmax(1)


class Seen:
    """Records that keep what they are told."""

    def __init__(self) -> None:
        self.networks: list[tuple[Widths, ...]] = []
        self.losses: list[list[float]] = []

    def add(self, networks: tuple[Widths, ...], losses: list[float]) -> None:
        self.networks.append(networks)
        self.losses.append(losses)


def step_of(
    net: nn.Module, training_step: Callable[..., Any] = cross_entropy, records: Any = None, **kwargs: Any
) -> PSENetStep:
    supernet = Supernet(net, space().groups, prefix_order(space().groups))
    steps = in_parallel(sandwich(space(), seeded(), 4), **kwargs)
    return PSENetStep(supernet, steps, training_step, records=records or Seen())


def expected_losses(networks: tuple[Widths, ...], batch: Batch) -> list[float]:
    """Each network alone on its part of the batch, in train mode."""
    net, losses = model(), []
    supernet = Supernet(net, space().groups, prefix_order(space().groups))
    for widths, x, y in zip(networks, *(t.chunk(len(networks)) for t in batch), strict=True):
        with supernet.at(widths):
            losses.append(F.cross_entropy(net(x), y).item())
    return losses


Pair = namedtuple("Pair", "images labels")
FORMS: dict[str, tuple[Callable[[Batch], Any], Callable[[Any, nn.Module], Any]]] = {
    "tuple": (lambda b: b, cross_entropy),
    "named tuple": (lambda b: Pair(*b), lambda b, m: F.cross_entropy(m(b.images), b.labels)),
    "mapping": (
        lambda b: {"x": b[0], "y": b[1]},
        lambda b, m: {"loss": F.cross_entropy(m(b.pop("x")), b.pop("y")), "logs": 1},
    ),
    "list of labels": (
        lambda b: (b[0], b[1].tolist()),
        lambda b, m: (F.cross_entropy(m(b[0]), torch.tensor(b[1])), "more"),
    ),
    "another size beside": (
        lambda b: (*b, torch.ones(3, dtype=torch.float64)),
        lambda b, m: F.cross_entropy(m(b[0]), b[1], weight=b[2]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_are_those_of_the_networks_alone(form: str) -> None:
    make, training_step = FORMS[form]
    records, net = Seen(), model()
    output = step_of(net, training_step, records)(make(data()), net)
    found = output["loss"] if isinstance(output, dict) else output
    found = found[0] if isinstance(found, tuple) else found
    expected = expected_losses(records.networks[0], data())
    assert len(expected) == 4
    assert records.losses[0] == pytest.approx(expected, rel=1e-12)
    assert found.item() == pytest.approx(sum(expected) / 4, rel=1e-12)


def test_several_calls_of_the_model_are_given_back_in_turn() -> None:
    def twice(batch: Batch, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + 2 * F.cross_entropy(model(-batch[0]), batch[1])

    records, net = Seen(), model()
    step_of(net, twice, records)(data(), net)
    x, y = data()
    first = expected_losses(records.networks[0], (x, y))
    second = expected_losses(records.networks[0], (-x, y))
    both = [a + 2 * b for a, b in zip(first, second, strict=True)]
    assert records.losses[0] == pytest.approx(both, rel=1e-12)


def test_gradients_statistics_and_the_model_are_those_of_a_step_without_records() -> None:
    found = []
    for recorded in (False, True):
        net = model()
        step: SupernetStep = step_of(net)
        if not recorded:
            step = SupernetStep(step.supernet, step.steps, cross_entropy)
        forward = net.forward
        for _ in range(2):
            step(data(), net).backward()
        assert net.forward == forward and "forward" not in vars(net)
        state = {**{f"{n}.grad": p.grad for n, p in net.named_parameters()}, **net.state_dict()}
        found.append(state)
    assert_equal(*found)


def test_an_evaluation_leaves_no_record() -> None:
    records, net = Seen(), model()
    step = step_of(net, cross_entropy, records)
    with torch.no_grad():
        step(data(), net)
    assert records.losses == [] and step.taken == 0


def test_a_skipped_batch_leaves_no_record() -> None:
    records, net = Seen(), model()
    assert step_of(net, lambda batch, model: None, records)(data(), net) is None
    assert records.losses == []


def test_a_step_past_the_model_is_refused() -> None:
    net = model()

    def past(batch: Batch, model: nn.Module) -> Tensor:
        return net.fc(net.stem(batch[0]).mean((2, 3)).repeat(1, 2)[:, :16]).sum()

    with pytest.raises(TrainingError, match="did not call the model itself"):
        step_of(net, past)(data(), net)


def test_a_model_that_computes_its_own_loss_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": F.cross_entropy(logits, y), "logits": logits}

    own = Own()
    supernet = Supernet(own, (), {})
    step = PSENetStep(
        supernet,
        repeat(Step((Widths({}), Widths({})), parallel=True)),
        lambda batch, m: m(*batch)["loss"],
        records=WidthRecords(WidthSpace(())),
    )
    with pytest.raises(TrainingError, match="the model computes its own; compute it in the training step"):
        step(data(), own)


def mixed(batch: Batch, model: nn.Module) -> Tensor:
    share = torch.rand(())
    x = share * batch[0] + (1 - share) * batch[0].flip(0)
    return F.cross_entropy(model(x), batch[1])


class Opaque:
    def __init__(self, batch: Batch) -> None:
        self.x, self.y = batch


@pytest.mark.parametrize(
    ("make", "training_step", "message"),
    [
        (lambda b: b, mixed, "other inputs"),
        (Opaque, lambda b, m: F.cross_entropy(m(b.x), b.y), "other inputs"),
        (
            lambda b: b,
            lambda b, m: F.cross_entropy(m(b[0].repeat(2, 1, 1, 1)), b[1].repeat(2)),
            "other inputs",
        ),
        (lambda b: b, lambda b, m: F.cross_entropy(m(b[0]), data()[1]), "takes batches of tensors"),
        (lambda b: b, lambda b, m: sum(m(b[0]).mean() for _ in range(1 + (len(b[0]) < 12))), "other inputs"),
    ],
    ids=["random", "opaque", "put together", "labels from elsewhere", "more calls"],
)
def test_parts_whose_loss_cannot_be_told_are_refused(make: Any, training_step: Any, message: str) -> None:
    net = model()
    with pytest.raises(TrainingError, match=f"PSE-Net computes the loss of each part.*{message}"):
        step_of(net, training_step)(make(data()), net)
    assert "forward" not in vars(net)


def test_the_parts_draw_no_random_numbers_of_the_training() -> None:
    def noisy(batch: Batch, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + 0 * torch.rand(())

    net = model()
    torch.manual_seed(5)
    step_of(net, noisy)(data(), net)
    found = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(())
    assert torch.equal(found, torch.rand(3))


# --- records -----------------------------------------------------------------------------------------


def test_records_by_hand() -> None:
    choices = space_of(2, 3)
    records = WidthRecords(choices)
    largest, smallest = choices.largest(), choices.smallest()
    a, b = Widths({"g0": 1, "g1": 3}), Widths({"g0": 2, "g1": 2})
    records.add((largest, a, b, smallest), (1.0, 3.0, 2.0, 9.0))
    assert records.usual == 2.5
    records.add((largest, smallest), (7.0, 9.0))
    records.add((largest, a, b, smallest), (1.0, math.nan, 2.0, 9.0))
    assert records.usual == 2.5
    records.add((largest, a, a, smallest), (2.0, 4.0, 5.0, 9.0))
    assert records.usual == pytest.approx(0.9 * 2.5 + 0.1 * 4.5)
    lost = [0.5 + 1.5 + 2.5, -0.5]  # a three times, b once
    torch.testing.assert_close(records.sums, torch.tensor([[*lost, 0], [0, lost[1], lost[0]]]).double())
    assert records.counts.tolist() == [[3, 1, 0], [0, 1, 3]]
    mean = sum(lost) / 4
    expected = [
        [(lost[0] + SHRINKAGE * mean) / (3 + SHRINKAGE), (lost[1] + SHRINKAGE * mean) / (1 + SHRINKAGE), 0],
        [
            mean,
            (lost[1] + SHRINKAGE * mean) / (1 + SHRINKAGE),
            (lost[0] + SHRINKAGE * mean) / (3 + SHRINKAGE),
        ],
    ]
    torch.testing.assert_close(records.errors, torch.tensor(expected, dtype=torch.float64))


def test_without_records_nothing_is_known() -> None:
    assert WidthRecords(space_of(2, 3)).errors.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("gap", ["constant", "growing"])
@pytest.mark.parametrize("seed", range(3))
def test_effects_of_widths_are_found_under_the_progress_of_a_training(seed: int, gap: str) -> None:
    """The loss falls by far more than widths differ, and the largest network's falls at another pace."""
    choices = space_of(6, 8, 5)
    generator = seeded(seed)
    effects = {g.name: -torch.arange(g.size).double() / g.size for g in choices.groups}
    records, raw = WidthRecords(choices), WidthRecords(choices)
    for number, step in enumerate(islice(sandwich(choices, generator, 4), 600)):
        noise = 0.3 * torch.randn(4, generator=generator)
        drawn = 1.0 + (0.005 * number if gap == "growing" else 0)
        losses = [
            20 * 0.99**number
            + float(noise[i])
            + float(sum(effects[name][width - 1] for name, width in network.items()))
            + (drawn if i in (1, 2) else 0)
            for i, network in enumerate(step.networks)
        ]
        records.add(step.networks, losses)
        raw.usual = torch.zeros((), dtype=torch.float64)  # as if nothing was known of the training
        raw.add(step.networks, losses)
    for g, found in zip(choices.groups, records.errors, strict=True):
        assert kendall_tau(found[: g.size], effects[g.name]) > 0.8
    assert kendall_tau(raw.errors[1], effects["g1"]) < 0.8


def test_records_of_another_space_are_refused() -> None:
    with pytest.raises(TrainingError, match="records are of another space"):
        WidthRecords(space_of(2, 3)).load_state_dict(WidthRecords(space_of(2, 4)).state_dict())


# --- the prior ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_chances_survive_as_a_mapping(sizes: list[int], seed: int) -> None:
    choices = space_of(*sizes)
    padded, counts = choices.padded_choices()
    chances = torch.rand(padded.shape, generator=seeded(seed), dtype=torch.float64)
    chances[torch.arange(padded.shape[1]) >= counts.unsqueeze(1)] = 0
    chances /= chances.sum(1, keepdim=True)
    found = chances_of(choices, chances_by_width(choices, chances))
    torch.testing.assert_close(found, chances, rtol=1e-15, atol=0)


def test_chances_of_a_part_of_the_space_sum_to_one() -> None:
    choices = space_of(3, 2)
    known = {"g0": {1: 0.5, 2: 0.25, 3: 0.25}, "g1": {1: 1.0, 2: 0.0}}
    part = choices.among({"g0": (2, 3), "g1": (2,)})
    assert chances_of(part, known).tolist() == [[0.5, 0.5], [1.0, 0.0]]


@functools.cache
def priced(name: str) -> tuple[WidthSpace, FlopsCost]:
    net, x = getattr(torchvision.models, name)().eval(), torch.zeros(1, 3, 64, 64)
    groups = find_channel_groups(net, x)
    return WidthSpace(groups), FlopsCost(net, x, groups)


def hits(networks: Tensor, cost: FlopsCost, share: float) -> float:
    used = cost.batch(networks) / (share * cost.full)
    return float(((used >= 0.95) & (used <= 1.05)).double().mean())


@pytest.mark.parametrize(("name", "least"), [("resnet50", 100), ("mobilenet_v2", 100), ("resnet18", 7)])
def test_the_prior_hits_a_small_budget_far_more_often_than_uniform_widths(name: str, least: float) -> None:
    """The issue's 10 times are met by deep networks; ResNet-18 has 12 groups, whose draws scatter more."""
    choices, cost = priced(name)
    share = 0.15
    bounds = Budget.parse(share / 0.97).bound({"flops": cost})
    prior = draw(choices, tilted(choices, bounds), 4000, seeded())
    uniform = hits(draw_evenly(choices, 40000, seeded()), cost, share)
    assert hits(prior, cost, share) >= least * uniform
    assert float(cost.batch(prior).mean()) == pytest.approx(share * cost.full, rel=0.03)
    searched = PriorSearch(choices, Budget.parse(1.04 * share).bound({"flops": cost})).ask(40)
    assert hits(torch.stack([choices.encode(w) for w in searched]), cost, share) == 1.0


# --- contracts ---------------------------------------------------------------------------------------


def trained(seed: int = 3, checkpoint: Path | None = None, killed_at: int | None = None) -> dict[str, Any]:
    """A training of 16 steps, and what evolution makes of its prior; killed in step number `killed_at`."""
    torch.manual_seed(os.getpid())  # nothing hangs on the global generator
    net = small_net()
    records = WidthRecords(space())

    def training_step(batch: Batch, model: nn.Module) -> Tensor:
        if step.taken == killed_at:
            os.kill(os.getpid(), 9)
        return cross_entropy(batch, model)

    supernet = Supernet(net, space().groups)
    steps = in_parallel(sandwich(space(), seeded(seed), 4))
    step = PSENetStep(supernet, steps, training_step, records=records)
    recipe = Recipe(epochs=4, batch_size=8)
    loop = training_loop(small_data(32, 0), recipe, device=torch.device("cpu"), checkpoint=checkpoint)
    loop(net, sgd(net, recipe), step)
    bounds = bound(0.5, FlopsCost(net, torch.zeros(1, 3, 8, 8), space().groups))
    prior = tilted(space(), bounds, errors=records.errors)
    networks = EvolutionSearch(space(), bounds, seed, prior=prior).ask(3)
    for widths in networks:
        assert_fills(widths, space(), bounds)
    state = {**net.state_dict(), **records.state_dict(), "prior": prior}
    return {**{name: t.clone() for name, t in state.items()}, "networks": [dict(w) for w in networks]}


def test_the_same_seed_gives_the_same_records_and_networks() -> None:
    first, other = trained(), trained(seed=4)
    assert_equal(trained(), first)
    assert first["counts"].sum() == 2 * 16 * len(space().groups)
    assert not torch.equal(first["prior"], other["prior"])
    assert first["networks"] != other["networks"]


def test_a_killed_training_resumes_to_the_same_records(tmp_path: Path) -> None:
    path = tmp_path / "supernet.safetensors"
    kill_a_copy(trained, checkpoint=path, killed_at=10)
    assert path.exists()
    assert_equal(trained(checkpoint=path), trained())
    assert_equal(trained(checkpoint=path), trained())  # of a finished training


def test_a_useless_group_gets_narrow() -> None:
    """Of three arms one has no effect on the outputs: its widths cost nothing, and the prior learns that."""
    net, x = copy.deepcopy(pretrained_arms()), torch.zeros(1, 3, 8, 8)
    groups = find_channel_groups(net, x)
    choices = WidthSpace(groups, divisor=1).among({"a.3": (8,)})
    bounds: Bounds = bound(0.5, FlopsCost(net, x, groups))
    records = WidthRecords(choices)
    steps = in_parallel(sandwich(choices, seeded(), 4))
    step = PSENetStep(Supernet(net, groups), steps, cross_entropy, records=records)
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, nesterov=True)
    generator = seeded()
    for _ in range(150):
        optimizer.zero_grad()
        step(arms_batch(64, generator), net).backward()
        optimizer.step()
    prior = tilted(choices, bounds, errors=records.errors)
    padded, _ = choices.padded_choices()
    mean = dict(zip(choices.names, (prior * padded.where(padded.isfinite(), 0)).sum(1), strict=True))
    assert mean["c.0"] < min(mean["a.0"], mean["b.0"])
