"""What does a training step of each search cost, against a plain one of the same network and batch?

    python -m examples.benchmarks.search_step --out examples/benchmarks/search_step.json

A plain step is forward, backward and SGD of the full network. All are run in turns in one run; each timing
is that of 4 consecutive steps, whose networks are drawn anew, and `ms` is per step. The searches begin at
half of a training of 1000 steps, but for the first half of DMCP's, which trains sub-networks alone. TAS and
DSA train their architecture on batches of their own, as large as those of the weights; DSA in every second
step. All have the same images a step: the sandwich of DBS and AutoSlim trains four networks on all of them,
BCNet's rule one network on both sides, PSE-Net four networks on a quarter each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.benchmarks.measure import Row, arguments, collect, medians, one_thread, report
from examples.cifar_resnet import resnet20
from nni_dbs import Budget, FlopsCost, WidthSpace
from nni_dbs.algorithms.dbs import DBSSearch
from nni_dbs.algorithms.dmcp import DMCPSearch
from nni_dbs.algorithms.dsa import DSASearch
from nni_dbs.algorithms.pse_net import PSENetStep, WidthRecords
from nni_dbs.algorithms.tas import TASSearch
from nni_dbs.algorithms.tas_supernet import TASSupernet
from nni_dbs.bilevel import ArchitectureSearch, BilevelStep
from nni_dbs.cost import Bounds
from nni_dbs.models import build_model
from nni_dbs.sampling import RULES, Step
from nni_dbs.steps import PatchedStep, SupernetStep
from nni_dbs.supernet import Supernet
from nni_dbs.training import Batch, training_step
from torch_pruning_adapters import channel_order, find_residual_blocks

BUDGET = 0.5
SEARCH_STEPS = 1000
POINTS, PATHS = 24, 2  # starting points of DBS, and networks that a step of a supernet draws
CANDIDATES = 8  # of TAS, its pruner's default
STEP = training_step(0.0)


class Case(NamedTuple):
    model: str
    build: Callable[[], nn.Module]
    classes: int
    size: int  # pixels
    batch_size: int
    divisor: int
    steps: int = 4  # of a timing


CASES = (
    Case("cifar resnet20", resnet20, 10, 32, 64, 4),
    Case("resnet18", lambda: build_model("resnet18"), 1000, 64, 32, 8),
)
QUICK = (Case("resnet18", lambda: build_model("resnet18"), 1000, 32, 8, 32, steps=2),)


def bounds_of(space: WidthSpace, model: nn.Module, image: Tensor) -> Bounds:
    return Budget.parse(BUDGET).bound({"flops": FlopsCost(model, image, space.groups)})


def steps_of(
    model: nn.Module, image: Tensor, batch: Batch, divisor: int
) -> Iterator[tuple[str, PatchedStep]]:
    """Each method's training step, of a copy of the model."""
    space = WidthSpace.from_model(model, image, divisor=divisor)
    bounds = bounds_of(space, model, image)
    order = channel_order(model, space.groups)

    def supernet() -> Supernet:
        return Supernet(copy.deepcopy(model), space.groups, order)

    def bilevel(search: ArchitectureSearch, first: int = SEARCH_STEPS // 2) -> BilevelStep:
        step = BilevelStep(search, STEP, SEARCH_STEPS, second=[batch] if search.bilevel else None)
        step.taken = first
        return step

    def ruled(rule: str) -> Iterator[Step]:
        points = DBSSearch(space, bounds, 0, points=POINTS).points
        return RULES[rule](space, points, torch.Generator().manual_seed(0), PATHS)

    yield "dbs", SupernetStep(supernet(), ruled("spfs"), STEP)
    yield "autoslim", SupernetStep(supernet(), ruled("sandwich"), STEP)
    yield "bcnet", SupernetStep(supernet(), ruled("bcnet"), STEP)
    records = WidthRecords(space)
    yield "pse_net", PSENetStep(supernet(), ruled("parallel"), STEP, records=records)
    yield "pse_net, without records", SupernetStep(supernet(), ruled("parallel"), STEP)
    yield "dmcp, first half", bilevel(DMCPSearch(supernet(), space, bounds, steps=SEARCH_STEPS), first=0)
    yield "dmcp, second half", bilevel(DMCPSearch(supernet(), space, bounds, steps=SEARCH_STEPS))
    blocks = WidthSpace(find_residual_blocks(model, space.groups, image), divisor=divisor)
    within = bounds_of(blocks, model, image)
    options = {name: blocks.options(name, CANDIDATES) for name in blocks.names}
    mixed = TASSupernet(copy.deepcopy(model), blocks.groups, options, image, order)
    yield "tas", bilevel(TASSearch(mixed, blocks, within, steps=SEARCH_STEPS, limit=CANDIDATES))
    yield "dsa", bilevel(DSASearch(supernet(), space, bounds, steps=SEARCH_STEPS))


def trained(
    model: nn.Module,
    batch: Batch,
    step: Callable[[Batch, nn.Module], Tensor],
    steps: int,
    more: Iterable[nn.Parameter] = (),
) -> Callable[[], None]:
    """So many steps of SGD on the model and the parameters that the step adds."""
    model.train()
    optimizer = torch.optim.SGD([*model.parameters(), *more], lr=0.01, momentum=0.9, nesterov=True)

    def take() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return take


def rows_of(case: Case, repeats: int) -> list[Row]:
    """One row for each method."""
    torch.manual_seed(0)
    model = case.build()
    images = torch.randn(case.batch_size, 3, case.size, case.size)
    batch = images, torch.randint(case.classes, (case.batch_size,))
    functions = {"plain": trained(copy.deepcopy(model), batch, STEP, case.steps)}
    for name, step in steps_of(model, images[:1], batch, case.divisor):
        functions[name] = trained(step.supernet.model, batch, step, case.steps, step.parameters.values())
    ms = {name: 1000 * seconds.cpu / case.steps for name, seconds in medians(functions, repeats).items()}
    plain = ms.pop("plain")
    return [
        {
            "model": case.model,
            "image_size": case.size,
            "batch_size": case.batch_size,
            "method": name,
            "ms": value,
            "plain_ms": plain,
            "ratio": value / plain,
        }
        for name, value in ms.items()
    ]


def main() -> None:
    args = arguments(__doc__, 9)
    one_thread()
    cases = QUICK if args.quick else CASES
    settings = {
        "budget": BUDGET,
        "divisors": {case.model: case.divisor for case in cases},
        "steps_of_a_timing": cases[0].steps,
        "search_steps": SEARCH_STEPS,
        "points": POINTS,
        "clock": "CPU seconds",
    }
    rows = collect(lambda case: rows_of(case, args.repeats), cases)
    report(args, "search_step", settings, rows)


if __name__ == "__main__":
    main()
