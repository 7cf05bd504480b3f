"""What DMCP, TAS and DSA share: budget, seeds, resuming, gradients, and finding a useless group."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.data import TensorDataset

from nni_dbs import FlopsCost, WidthSpace
from nni_dbs.algorithms.dmcp import DMCPSearch
from nni_dbs.algorithms.dsa import DSASearch
from nni_dbs.algorithms.tas import TASSearch
from nni_dbs.algorithms.tas_supernet import TASSupernet, single
from nni_dbs.bilevel import ArchitectureSearch, BilevelStep
from nni_dbs.config import Recipe
from nni_dbs.cost import Bounds, count_flops
from nni_dbs.data import loader
from nni_dbs.projection import leaves_room
from nni_dbs.sampling import Step
from nni_dbs.space import Widths
from nni_dbs.steps import kl_divergence
from nni_dbs.supernet import Supernet
from nni_dbs.training import sgd, training_loop
from tests.helpers import Net, bound, conv
from torch_pruning_adapters import (
    ChannelGroup,
    find_channel_groups,
    find_residual_blocks,
    shrink,
)

METHODS = ("dmcp", "tas", "dsa")
Batch = tuple[Tensor, Tensor]

pytestmark = pytest.mark.parametrize("method", METHODS)


class Problem(NamedTuple):
    """A method's search on a model, and what it searches."""

    model: nn.Module
    space: WidthSpace
    bounds: Bounds
    search: Any


def groups_of(method: str, model: nn.Module, x: Tensor) -> tuple[ChannelGroup, ...]:
    groups = find_channel_groups(model, x)
    return find_residual_blocks(model, groups, x) if method == "tas" else groups


def search_on(
    method: str, model: nn.Module, x: Tensor, space: WidthSpace, bounds: Bounds, steps: int, **options: Any
) -> ArchitectureSearch:
    if method == "tas":
        candidates = {name: space.options(name, 8) for name in space.names}
        mixed = TASSupernet(model, space.groups, candidates, x)
        return TASSearch(mixed, space, bounds, steps=steps, **options)
    search = {"dmcp": DMCPSearch, "dsa": DSASearch}[method]
    return search(Supernet(model, space.groups), space, bounds, steps=steps, **options)


def cross_entropy(batch: Batch, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# --- budget ------------------------------------------------------------------------------------------

IMAGE = torch.zeros(1, 3, 32, 32)
NETS = ("resnet18", "mobilenet_v2", "squeezenet1_1")  # the last one has concatenations


@functools.cache
def pretrained_like(method: str, name: str) -> tuple[nn.Module, WidthSpace, FlopsCost]:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    groups = groups_of(method, model, IMAGE)
    return model, WidthSpace(groups), FlopsCost(model, IMAGE, groups)


def randomise(architecture: nn.Module, seed: int, spread: float = 3.0) -> None:
    """What a long search on anything may lead to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in architecture.parameters():
            p.copy_(spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def assert_fills(widths: Widths, space: WidthSpace, bounds: Bounds) -> None:
    """A network of the space, inside of the budget, that uses 98 % of it or cannot grow."""
    removed = {g.block for g in space.groups if widths[g.name] == 0}
    there = space.without([block for block in removed if block is not None])
    assert widths in there
    assert bounds.fits(widths)
    assert not leaves_room(widths, there, bounds)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("net", NETS)
def test_any_architecture_gives_networks_that_fill_the_budget_and_keep_it(
    method: str, net: str, share: float
) -> None:
    model, space, cost = pretrained_like(method, net)
    bounds = bound(share, cost)
    search = search_on(method, model, IMAGE, space, bounds, steps=100)
    found = {}
    for seed, spread in enumerate((0.0, 3.0, 30.0)):
        randomise(search.architecture, seed, spread)
        networks = search.networks(4)
        assert len(set(networks)) == len(networks) <= (1 if method == "dsa" else 4)
        assert search.networks(1) == networks[:1]
        for widths in networks:
            assert_fills(widths, space, bounds)
        found[networks[0]] = None
    assert len(found) > 1  # the architecture decides


@pytest.mark.parametrize("net", NETS)
def test_the_cut_network_costs_what_the_budget_says(method: str, net: str) -> None:
    model, space, cost = pretrained_like(method, net)
    bounds = bound(0.5, cost)
    search = search_on(method, model, IMAGE, space, bounds, steps=100)
    randomise(search.architecture, 0)
    (widths,) = search.networks(1)
    small = shrink(model, space.groups, widths, search.supernet.order)
    assert count_flops(small, IMAGE) == cost(widths) <= 0.5 * count_flops(model, IMAGE)


# --- a small training --------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv(12, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.BatchNorm2d(12)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.branch(x)).relu()


def small_net(recompute: bool = False) -> nn.Module:
    """Residual blocks, a concatenation and dropout; `recompute` checkpoints its activations."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = recomputed(net.blocks, x, use_reentrant=False) if recompute else net.blocks(x)
        x = net.norm(torch.cat([net.left(x), net.right(x)], 1)).relu()
        return net.fc(net.dropout(x.mean((2, 3))))

    torch.manual_seed(1)
    return Net(
        forward,
        stem=nn.Sequential(conv(3, 12), nn.BatchNorm2d(12), nn.ReLU()),
        blocks=nn.Sequential(Block(), Block()),
        left=conv(12, 6),
        right=conv(12, 10),
        norm=nn.BatchNorm2d(16),
        dropout=nn.Dropout(0.2),
        fc=nn.Linear(16, 3),
    )


def small_problem(method: str, steps: int = 16, recompute: bool = False, **options: Any) -> Problem:
    model, x = small_net(recompute), torch.zeros(1, 3, 8, 8)
    groups = groups_of(method, small_net(), x)
    space = WidthSpace(groups, divisor=2)
    bounds = bound(0.5, FlopsCost(model, x, groups))
    return Problem(model, space, bounds, search_on(method, model, x, space, bounds, steps, **options))


def small_data(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    return TensorDataset(images, images.mean((2, 3)).argmax(1))


RECIPE = Recipe(epochs=4, batch_size=10)  # of four steps each
ARCHITECTURE_STEPS = {"dmcp": 8, "tas": 16, "dsa": 7}  # from the half; always; every second after a tenth


def trained(
    method: str,
    second: bool = True,
    seed: int = 3,
    checkpoint: Path | None = None,
    killed_at: int | None = None,
) -> dict[str, Any]:
    """What comes out of a training of 16 steps; its process is killed in step number `killed_at`."""
    torch.manual_seed(os.getpid())  # nothing hangs on the global generator
    quick = {"lr": 2.0} if method == "dsa" else {}  # the others begin in the midst of their widths
    model, space, bounds, search = small_problem(method, seed=seed, **quick)
    batches = loader(small_data(22, 1), 10, shuffle=True, seed=5, drop_last=True) if second else None

    def training_step(batch: Batch, model: nn.Module) -> Tensor:
        if step.taken == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(batch, model)

    step = BilevelStep(search, training_step, 16, second=batches)
    optimizer = sgd(model, RECIPE)
    if step.parameters:
        optimizer.add_param_group({"params": list(step.parameters.values())})
    loop = training_loop(
        small_data(40, 0), RECIPE, device=torch.device("cpu"), checkpoint=checkpoint, quiet=True
    )
    loop(model, optimizer, step)
    state = search.state_dict()
    assert len(search.log) == ARCHITECTURE_STEPS[method]
    networks = search.networks(3)
    order = search.settle(networks[0])
    for widths in networks:
        assert_fills(widths, space, bounds)
    return {
        "model": {name: t.clone() for name, t in model.state_dict().items()},
        "search": {name: t.clone() if isinstance(t, Tensor) else t for name, t in state.items()},
        "networks": [dict(widths) for widths in networks],
        "order": {name: torch.as_tensor(channels) for name, channels in order.items()},
    }


def assert_equal(found: Any, expected: Any) -> None:
    """Bit by bit, in nested dictionaries and lists."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert_equal(value, expected[key])
    elif isinstance(found, list):
        for mine, theirs in zip(found, expected, strict=True):
            assert_equal(mine, theirs)
    else:
        assert found == expected


def kill_a_copy(run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Runs a function in a copy of this process, which it kills."""
    child = multiprocessing.get_context("fork").Process(target=run, args=args, kwargs=kwargs)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Trainings in a new process with other hashes: whole ones, and what a killed process left over."""
    folder = tmp_path_factory.mktemp("fresh")
    for method in METHODS:
        kill_a_copy(trained, method, checkpoint=folder / method, killed_at=14)
    code = f"""
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.algorithms.test_contracts import METHODS, trained
folder = Path({str(folder)!r})
assert all((folder / method).exists() for method in METHODS)
torch.save({{
    "whole": {{m: trained(m) for m in METHODS}},
    "resumed": {{m: trained(m, checkpoint=folder / m) for m in METHODS}},
}}, folder / "found.pt")
"""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, timeout=300, check=True)
    return torch.load(folder / "found.pt")


@functools.cache
def whole(method: str) -> dict[str, Any]:
    return trained(method)


def test_the_same_seed_gives_the_same_search_in_a_fresh_process(
    method: str, fresh: Mapping[str, Any]
) -> None:
    assert_equal(fresh["whole"][method], whole(method))
    other = trained(method, seed=4)
    for part, name in (("model", "fc.weight"), ("search", "generator")):
        assert not torch.equal(other[part][name], whole(method)[part][name])


def test_a_killed_search_resumes_to_the_same_result_in_a_fresh_process(
    method: str, fresh: Mapping[str, Any]
) -> None:
    assert_equal(fresh["resumed"][method], whole(method))


@pytest.mark.parametrize(
    ("killed_at", "second"), [(6, False), pytest.param(10, True, marks=pytest.mark.slow)]
)
def test_a_search_resumes_before_and_after_its_first_steps_on_the_architecture(
    method: str, killed_at: int, second: bool, tmp_path: Path
) -> None:
    path = tmp_path / "supernet.safetensors"
    kill_a_copy(trained, method, second, checkpoint=path, killed_at=killed_at)
    written = path.stat().st_mtime_ns
    resumed = trained(method, second, checkpoint=path)
    assert path.stat().st_mtime_ns > written
    assert_equal(resumed, trained(method, second))
    assert_equal(trained(method, second, checkpoint=path), resumed)  # of a finished training


def test_the_training_computes_as_the_network_that_is_cut(method: str) -> None:
    model, space, bounds, search = small_problem(method)
    step = BilevelStep(search, cross_entropy, 16)
    optimizer = torch.optim.SGD([*model.parameters(), *step.parameters.values()], 0.1)
    for _ in range(16):
        optimizer.zero_grad()
        step(small_data(10, 0).tensors, model).backward()
        optimizer.step()
    (widths,) = search.networks(1)
    order = search.settle(widths)
    small = shrink(model.eval(), space.groups, widths, order)
    images = small_data(10, 7).tensors[0]
    here = search.supernet.sampled(single(widths)) if method == "tas" else None
    with torch.no_grad(), here or Supernet(model, space.groups, order).at(widths):
        torch.testing.assert_close(small(images), model(images), rtol=1e-5, atol=1e-5)
    assert count_flops(small, images[:1]) == bounds.limits[0][1](widths) <= bounds.limits[0][2]


# --- gradients ---------------------------------------------------------------------------------------


def valid_entries(search: Any) -> dict[str, Tensor]:
    """Which entries of the architecture's parameters have a meaning."""
    if isinstance(search, DMCPSearch):
        return {"alpha": search.chains.growth > 0}
    if isinstance(search, DSASearch):
        return {"theta": torch.ones_like(search.ratios.theta, dtype=torch.bool)}
    return {"widths.alpha": search.widths.widths > 0, "depths.beta": search.depths.depths > 0}


def gradients_of(search: ArchitectureSearch) -> dict[str, Tensor]:
    found = {}
    for name, p in search.architecture.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all()
        found[name] = p.grad
    return found


def one_step(method: str, **options: Any) -> tuple[Problem, dict[str, Tensor]]:
    """The gradients of one step on an architecture that is not saturated."""
    problem = small_problem(method, steps=100, seed=2, **options)
    if method == "dsa":
        nn.init.zeros_(problem.search.ratios.theta)
    batch = small_data(40, 0).tensors
    problem.search.architecture_step(lambda: cross_entropy(batch, problem.model.train()), 0.6)
    return problem, gradients_of(problem.search)


def test_gradients_reach_every_variable_of_the_architecture(method: str) -> None:
    problem, gradients = one_step(method)
    for name, valid in valid_entries(problem.search).items():
        assert valid.any()
        assert bool((gradients[name][valid] != 0).all()), name
        assert bool((gradients[name][~valid] == 0).all()), name


def test_the_task_alone_reaches_the_architecture(method: str) -> None:
    problem, gradients = one_step(method, **({} if method == "dsa" else {"weight": 0.0}))
    for name, valid in valid_entries(problem.search).items():
        if name == "widths.alpha":
            assert (gradients[name] != 0).sum(1).tolist() == [2] * len(valid)  # the drawn candidates
        else:
            assert bool((gradients[name][valid] != 0).all()), name


@pytest.mark.parametrize(("share", "narrows"), [(0.15, True), (0.95, False)])
def test_the_budget_alone_moves_the_expected_cost_towards_it(
    method: str, share: float, narrows: bool
) -> None:
    """With a task that no width changes. Nothing but the task widens the ratios of DSA."""
    model, x = small_net(), torch.zeros(1, 3, 8, 8)
    groups = groups_of(method, model, x)
    space = WidthSpace(groups, divisor=2)
    bounds = bound(share, FlopsCost(model, x, groups))
    search: Any = search_on(method, model, x, space, bounds, steps=300)
    if method == "dsa":
        search.interval = 1
        nn.init.zeros_(search.ratios.theta)
    for _ in range(8):
        search.architecture_step(lambda: 0 * model(torch.ones(4, 3, 8, 8)).sum(), 0.6)
    first, last = search.log[0]["used"], search.log[-1]["used"]
    if narrows:
        assert last < 0.99 * first and first > 1
    elif method == "dsa":
        assert first == pytest.approx(last) and last < 1
    else:
        assert 1.01 * first < last < 1


def snapshot(problem: Problem) -> dict[str, Any]:
    """All that a step on the architecture must leave alone."""
    added = problem.search.parameters
    return {
        "model": {name: t.clone() for name, t in problem.model.state_dict().items()},
        "gradients": [p.grad.clone() for p in problem.model.parameters() if p.grad is not None],
        "modes": [m.training for m in problem.model.modules()],
        "added": {name: p.detach().clone() for name, p in added.items()},
        "more": {
            name: t.clone() for name, t in problem.search.state_dict().items() if name.startswith("norms.")
        },
    }


def test_a_step_on_the_architecture_leaves_the_model_alone(method: str) -> None:
    problem = small_problem(method, steps=3)
    model, search = problem.model.train(), problem.search
    model.blocks[1].branch[1].eval()  # a BatchNorm that is frozen
    if method == "dsa":
        nn.init.zeros_(search.ratios.theta)  # at first all are full, and the task moves none
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    seen = []

    def training_step(batch: Batch, model: nn.Module) -> Tensor:
        seen.append(snapshot(problem))
        return cross_entropy(batch, model)

    step = BilevelStep(search, training_step, 3)
    step.taken = 2  # where all three train the architecture
    before = copy.deepcopy(search.architecture.state_dict())
    loss = step(small_data(20, 0).tensors, model)
    assert len(search.log) == 1 and len(seen) > 1
    assert_equal(seen[1], seen[0])
    after = snapshot(problem)
    for part in ("gradients", "modes", "added"):
        assert_equal(after[part], seen[0][part])
    statistics = {**after["model"], **after["more"]}
    moved = {
        k for k, t in {**seen[0]["model"], **seen[0]["more"]}.items() if not torch.equal(t, statistics[k])
    }
    assert moved and all("running" in name or "tracked" in name for name in moved)  # by the weights' pass
    for name, p in search.architecture.state_dict().items():
        assert not torch.equal(p, before[name]), name
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    loss.backward()
    assert any(
        not torch.equal(p.grad, g) for p, g in zip(model.parameters(), after["gradients"], strict=True)
    )


def without_dropout(problem: Problem) -> Problem:
    problem.model.double().train().dropout.p = 0.0
    if isinstance(problem.search, TASSearch):
        problem.search.supernet.norms.double()
    return problem


def doubled(batch: Any) -> Batch:
    return batch[0].double(), batch[1]


@pytest.mark.parametrize("taken", [2, 9])
def test_weights_get_the_gradients_of_the_methods_plain_loss(method: str, taken: int) -> None:
    mine, twin = (without_dropout(small_problem(method, seed=6)) for _ in range(2))
    batch, own = doubled(small_data(12, 0).tensors), doubled(small_data(8, 1).tensors)
    step = BilevelStep(mine.search, cross_entropy, 16, second=[own])
    step.taken = taken
    loss = step(batch, mine.model)
    loss.backward()

    search, model, progress = twin.search, twin.model, taken / 16
    if search.due(taken, progress):
        search.architecture_step(lambda: cross_entropy(own, model), progress)
    block = search.weights_pass(progress)
    if isinstance(block, Step):
        largest, smallest, *random = block.networks
        assert (largest, smallest, len(random)) == (twin.space.largest(), twin.space.smallest(), 2)
        logits = []
        for widths in dict.fromkeys(block.networks):
            with search.supernet.at(widths):
                logits.append(model(batch[0]))
        expected = F.cross_entropy(logits[0], batch[1])
        expected = expected + sum(kl_divergence(small, logits[0]) for small in logits[1:])
    else:
        with block:
            expected = cross_entropy(batch, model)
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    pairs = [*zip(mine.model.parameters(), model.parameters(), strict=True)]
    pairs += zip(mine.search.parameters.values(), search.parameters.values(), strict=True)
    trained = 0
    for p, q in pairs:
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
            trained += bool(q.grad.any())
    assert trained > 10


def test_recomputed_activations_give_the_same_gradients(method: str) -> None:
    plain, recomputing = (without_dropout(small_problem(method, recompute=r, seed=6)) for r in (False, True))
    for taken in (2, 9):
        losses = []
        for problem in (plain, recomputing):
            step = BilevelStep(problem.search, cross_entropy, 16)
            step.taken = taken
            losses.append(step(doubled(small_data(12, taken).tensors), problem.model))
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for p, q in zip(plain.model.parameters(), recomputing.model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for p, q in zip(
        plain.search.architecture.parameters(), recomputing.search.architecture.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# --- what is learnt ----------------------------------------------------------------------------------


def arms() -> Net:
    """Three arms of equal cost on one channel of the image each; nobody hears the third."""

    def arm() -> nn.Sequential:
        return nn.Sequential(
            conv(1, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 8), nn.BatchNorm2d(8), nn.ReLU()
        )

    def forward(net: Net, x: Tensor) -> Tensor:
        a, b, c = (arm(part) for arm, part in zip((net.a, net.b, net.c), x.split(1, 1), strict=True))
        return net.fc((a + b + 0 * c).mean((2, 3)))

    return Net(forward, a=arm(), b=arm(), c=arm(), fc=nn.Linear(8, 10))


def arms_batch(size: int, generator: torch.Generator) -> Batch:
    images, labels = arms_data()
    chosen = torch.randint(len(images), (size,), generator=generator)
    return images[chosen], labels[chosen]


@functools.cache
def arms_data() -> Batch:
    """Noise, labelled by a random network of this kind."""
    torch.manual_seed(99)
    images = torch.randn(4096, 3, 8, 8)
    with torch.no_grad():
        logits = arms()(images)
    return images, ((logits - logits.mean(0)) / logits.std(0)).argmax(1)


@functools.cache
def pretrained_arms() -> nn.Module:
    torch.manual_seed(0)
    model = arms()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(arms_batch(64, generator), model).backward()
        optimizer.step()
    return model


LENGTHS: dict[str, tuple[int, dict[str, Any]]] = {
    "dmcp": (90, {}),
    "tas": (150, {}),
    "dsa": (250, {"warmup": 0.0, "every": 1}),
}


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_tiny_search_meets_its_budget_and_narrows_the_useless_group(method: str, seed: int) -> None:
    model, x = copy.deepcopy(pretrained_arms()), torch.zeros(1, 3, 8, 8)
    groups = groups_of(method, model, x)
    space = WidthSpace(groups, divisor=1).among({"a.3": (8,)})
    cost = FlopsCost(model, x, groups)
    assert len({cost({name: 4}) for name in ("a.0", "b.0", "c.0")}) == 1
    steps, options = LENGTHS[method]
    bounds = bound(0.5, cost)
    search = search_on(method, model, x, space, bounds, steps, seed=seed, **options)
    step = BilevelStep(search, cross_entropy, steps)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *step.parameters.values()], 0.02, momentum=0.9, nesterov=True
    )
    before = copy.deepcopy(search.architecture.state_dict())
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(arms_batch(32, generator), model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    used = torch.tensor([entry["used"] for entry in search.log])
    tasks = torch.tensor([entry["loss"] for entry in search.log])
    (widths,) = search.networks(1)
    assert torch.stack(losses).isfinite().all() and tasks.isfinite().all()
    for name, p in search.architecture.state_dict().items():
        assert p.numel() == 0 or not torch.equal(p, before[name]), name
    assert abs(used[0] - 1) > 0.1
    assert abs(used[-len(used) // 3 :] - 1).min() < 0.05
    assert_fills(widths, space, bounds)
    assert widths["c.0"] < min(widths["a.0"], widths["b.0"])
