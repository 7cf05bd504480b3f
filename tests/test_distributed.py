"""Two processes train one supernet: DistributedDataParallel on the CPU, one reduction for all passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import Net, conv, head
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from nni_dbs import Budget, FlopsCost
from nni_dbs.algorithms.dmcp import DMCPSearch
from nni_dbs.algorithms.dsa import DSASearch
from nni_dbs.algorithms.pse_net import PSENetStep, WidthRecords
from nni_dbs.algorithms.tas import TASSearch
from nni_dbs.algorithms.tas_supernet import TASSupernet
from nni_dbs.bilevel import ArchitectureSearch, BilevelStep
from nni_dbs.errors import TrainingError
from nni_dbs.sampling import Step, bcnet, draw_paths, in_parallel, sandwich, single, spfs
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.steps import SupernetStep
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import ChannelGroup, find_channel_groups, prefix_order

RANKS = 2
STEPS = 5
TIMEOUT = 120  # seconds that a hanging reduction may cost

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without distributed training")


def build() -> Net:
    """The same weights in every process."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.bn(net.stem(x)).relu()
        return head(net, x + net.gamma * net.b(net.bn_a(net.a(x)).relu()))

    torch.manual_seed(0)
    net = Net(
        forward,
        stem=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        a=conv(8, 6, bias=False),
        bn_a=nn.BatchNorm2d(6),
        b=conv(6, 8, 1),
        gamma=nn.Parameter(torch.ones(8, 1, 1)),
        fc=nn.Linear(8, 10),
    )
    return net.double()


@functools.cache
def groups() -> tuple[ChannelGroup, ...]:
    return tuple(find_channel_groups(build(), torch.zeros(2, 3, 6, 6, dtype=torch.float64)))


def half(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's half of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(RANKS, 8, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (RANKS, 8), generator=generator)
    return images[rank], labels[rank]


def ordinary() -> Iterator[Step]:
    return single(space().largest())


def space() -> WidthSpace:
    return WidthSpace(groups(), min_ratio=0.25, divisor=1)


def drawn() -> Iterator[Step]:
    generator = torch.Generator().manual_seed(4)
    pool = [space().sample(generator) for _ in range(8)]
    return spfs(space(), draw_paths(pool, generator))


RULES: dict[str, Callable[[], Iterator[Step]]] = {
    "ordinary": ordinary,
    "spfs": drawn,
    "bcnet": lambda: bcnet(space(), torch.Generator().manual_seed(4)),
    "sandwich": lambda: sandwich(space(), torch.Generator().manual_seed(5)),
    "parallel": lambda: in_parallel(sandwich(space(), torch.Generator().manual_seed(6))),
    "parallel_distilled": lambda: in_parallel(drawn(), distilled=True),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_broadcast": {"broadcast_buffers": False},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "small_buckets": {"bucket_cap_mb": 0.002},
}

RUNS = [(rule, "default") for rule in RULES] + [
    (rule, setting) for rule in ("spfs", "parallel") for setting in SETTINGS if setting != "default"
]


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_distributed(rule: str, setting: str) -> dict[str, Any]:
    """One rank's training: final weights, statistics, losses, networks, and reductions in each step."""
    model = build()
    supernet = Supernet(model, groups(), prefix_order(groups()))
    ddp = DistributedDataParallel(model, **SETTINGS[setting])
    reductions = [0]

    def count(group: None, bucket):  # type: ignore[no-untyped-def]  # PyTorch takes no annotation as text
        reductions[-1] += 1
        return allreduce_hook(group, bucket)

    ddp.register_comm_hook(None, count)
    networks: list[list[dict[str, int]]] = []
    steps = RULES[rule]()

    def noted() -> Iterator[Step]:
        for step in steps:
            networks.append([dict(widths) for widths in step.networks])
            yield step

    records = WidthRecords(space())
    step = SupernetStep(supernet, noted(), training_step)
    if rule == "parallel":
        step = PSENetStep(supernet, noted(), training_step, records=records)
    optimizer, losses = optimizer_of(model), []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss = step(half(number, dist.get_rank()), ddp)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        reductions.append(0)
    return {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "statistics": dict(model.named_buffers()),
        "losses": losses,
        "networks": networks,
        "reductions": reductions[:-1],
        "records": records.state_dict(),
    }


SEARCHES = ("dmcp", "tas", "dsa")


def train_architecture(method: str) -> dict[str, Tensor]:
    """One rank's training of weights and architecture: all that both have in the end."""
    model, x = build(), torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    bounds = Budget.parse(0.5).bound({"flops": FlopsCost(model, x, groups())})
    search: ArchitectureSearch
    if method == "tas":
        candidates = {name: space().options(name, 8) for name in space().names}
        search = TASSearch(TASSupernet(model, groups(), candidates, x), space(), bounds, steps=STEPS)
    else:
        kind = DMCPSearch if method == "dmcp" else DSASearch
        search = kind(Supernet(model, groups()), space(), bounds, steps=STEPS)
    step = BilevelStep(search, training_step, STEPS)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    added = dict(step.parameters)
    optimizer = torch.optim.SGD([*model.parameters(), *added.values()], lr=0.1, momentum=0.9)
    for number in range(STEPS):
        optimizer.zero_grad()
        step(half(number, dist.get_rank()), ddp).backward()
        optimizer.step()
    return {
        name: p.detach().clone()
        for name, p in (*model.named_parameters(), *added.items(), *search.architecture.named_parameters())
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found: dict[tuple[str, str], Any] = {}
    for rule, setting in RUNS:
        try:
            found[rule, setting] = train_distributed(rule, setting)
        except RuntimeError as error:
            found[rule, setting] = str(error)
    for method in SEARCHES:
        found["architecture", method] = train_architecture(method)
    ddp = DistributedDataParallel(build(), static_graph=True)
    try:
        SupernetStep(Supernet(ddp.module, groups()), drawn(), training_step)(half(0, rank), ddp)
    except TrainingError as error:
        found["spfs", "static"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """What each rank found in every run."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        mp.get_context("spawn").Process(target=work, args=(rank, str(folder))) for rank in range(RANKS)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        assert [process.exitcode for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return [load(folder / f"{rank}.pt") for rank in range(RANKS)]


def load(path: Path) -> dict[tuple[str, str], Any]:
    return torch.load(path, weights_only=False)


@functools.cache
def train_alone(rule: str) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """One process that takes both halves of each batch apart and averages their gradients."""
    model = build()
    supernet = Supernet(model, groups(), prefix_order(groups()))
    optimizer, losses = optimizer_of(model), []
    for number, step in enumerate(islice(RULES[rule](), STEPS)):
        optimizer.zero_grad()
        losses.append([])
        for rank in range(RANKS):
            loss = SupernetStep(supernet, iter([step]), training_step)(half(number, rank), model)
            (loss / RANKS).backward()
            losses[-1].append(loss.detach())
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize(("rule", "setting"), RUNS)
def test_both_ranks_find_the_weights_of_one_process(
    ranks: list[dict[tuple[str, str], Any]], rule: str, setting: str
) -> None:
    runs = [found[rule, setting] for found in ranks]
    assert not [run for run in runs if isinstance(run, str)]
    expected, losses = train_alone(rule)
    start = dict(build().named_parameters())
    for name, weights in expected.items():
        assert torch.equal(runs[0]["weights"][name], runs[1]["weights"][name])
        torch.testing.assert_close(runs[0]["weights"][name], weights, rtol=1e-10, atol=1e-12)
        if name != "stem.bias":  # BatchNorm takes it away
            assert not torch.allclose(weights, start[name], rtol=1e-3)
    for rank, run in enumerate(runs):
        torch.testing.assert_close(run["losses"], [both[rank] for both in losses], rtol=1e-10, atol=0)


@pytest.mark.parametrize(("rule", "setting"), RUNS)
def test_all_passes_of_a_step_cost_the_reductions_of_one(
    ranks: list[dict[tuple[str, str], Any]], rule: str, setting: str
) -> None:
    for found in ranks:
        reductions = found[rule, setting]["reductions"]
        assert len(reductions) == STEPS and min(reductions) > 0
        if setting != "small_buckets":
            assert reductions == found["ordinary", "default"]["reductions"]


@pytest.mark.parametrize("method", SEARCHES)
def test_ranks_learn_the_same_architecture_and_weights(
    ranks: list[dict[tuple[str, str], Any]], method: str
) -> None:
    """From different data; TAS's copies of BatchNorm too, which DistributedDataParallel does not know."""
    first, second = (found["architecture", method] for found in ranks)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert any(name.startswith(("alpha", "theta", "widths.alpha")) for name in first)
    assert any(" " in name for name in first) == (method == "tas")


def test_a_static_graph_is_refused(ranks: list[dict[tuple[str, str], Any]]) -> None:
    assert all("build it without static_graph" in found["spfs", "static"] for found in ranks)


def test_small_buckets_are_several_reductions(ranks: list[dict[tuple[str, str], Any]]) -> None:
    found = ranks[0]
    assert found["spfs", "small_buckets"]["reductions"] == found["parallel", "small_buckets"]["reductions"]
    assert max(found["spfs", "small_buckets"]["reductions"]) > 1


def test_ranks_have_the_same_records_of_losses(ranks: list[dict[tuple[str, str], Any]]) -> None:
    """Also of networks whose losses differ between the ranks, which have other images."""
    first, second = (found["parallel", "default"]["records"] for found in ranks)
    extremes = space().largest(), space().smallest()
    networks = [network for step in ranks[0]["parallel", "default"]["networks"] for network in step]
    drawn = [network for network in networks if Widths(network) not in extremes]
    assert len(drawn) > STEPS
    assert first["counts"].sum(1).tolist() == [len(drawn)] * len(groups())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", RULES)
def test_ranks_train_the_same_networks(ranks: list[dict[tuple[str, str], Any]], rule: str) -> None:
    networks = [found[rule, "default"]["networks"] for found in ranks]
    assert networks[0] == networks[1]
    assert {len(step) for step in networks[0]} == ({1} if rule in ("ordinary", "bcnet") else {4})


def test_statistics_stay_those_of_each_process_unless_they_are_broadcast(
    ranks: list[dict[tuple[str, str], Any]],
) -> None:
    alone = [found["spfs", "no_broadcast"]["statistics"]["bn.running_mean"] for found in ranks]
    assert not torch.equal(alone[0], alone[1])
    torch.testing.assert_close(ranks[0]["spfs", "default"]["statistics"]["bn.running_mean"], alone[0])
