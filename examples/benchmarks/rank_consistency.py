"""Which training rule makes a supernet rank its sub-networks as training each of them alone does?

The protocol of DBS's second figure, on `digits-clutter`. Networks of the budget's band (80 to 105 % of it)
are drawn before anything is trained. Each is trained alone, from scratch, with several seeds, and tested: the
truth is the mean over the seeds. A supernet is trained from scratch by each rule, with several seeds, all on
the same number of images; every network is scored in it on the search-validation images, with BatchNorm
recalibrated. The learning rate of each rule is the one of four after which, in a training of a quarter of
the length, its starting points score best; the drawn networks have no part in that choice.

`tau` is Kendall's, of scores and truth, the mean over the supernets; `low` and `high` its 95 % interval when
the networks are drawn again (bootstrap; it knows nothing of other supernets' seeds), `over_sandwich` its
difference to the sandwich's, with the interval of that over the same draws. Beside the rules: the rank by
FLOPs, and that by the accuracies alone of another seed, the mean over pairs of seeds: what a single training
tells of another one (the truth is less noisy than that, so a rule may well be above it). `inherited` is the
mean score of the networks, `top` the truth of the one that the supernet likes best, `seconds` CPU seconds of
a training (on a GPU: seconds), and `cost` that over the sandwich's. path_fair and spfs train other networks
of the same band, the other rules networks of the whole space. `parallel_twice` is parallel on twice the
images, for about the sandwich's time, at parallel's learning rate. Under `bcnet` a network's score is the
mean of its first and its last channels'.

    python -m examples.benchmarks.rank_consistency --processes 2 \\
        --out examples/benchmarks/rank_consistency.json

Interrupted, the same command goes on. `--large` is a setting for a GPU (`--device cuda`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import kendalltau
from torch import nn
from tqdm import tqdm

from examples.benchmarks.measure import Row, one_thread, print_table, timed
from examples.cifar_resnet import CifarResNet
from nni_dbs import Budget, FlopsCost, Supernet, SupernetStep, Widths, WidthSpace
from nni_dbs.config import Recipe
from nni_dbs.cost import Bounds
from nni_dbs.data import Splits, digits_clutter, loader
from nni_dbs.evaluate import score
from nni_dbs.files import write
from nni_dbs.plot import FAINT, SOLID, save
from nni_dbs.pool import draw, starting_points, tilted
from nni_dbs.result import describe_device, package_versions
from nni_dbs.sampling import RULES
from nni_dbs.training import accuracy, reinitialise, sgd, training_loop, training_step
from torch_pruning_adapters import find_channel_groups, prefix_order, shrink

BAND = (0.8, 1.05)  # of the budget
TWICE, ANOTHER = "parallel_twice", "another seed"
METHODS = ("uniform", "sandwich", "path_fair", "spfs", "parallel", TWICE, "bcnet")
IMAGE = torch.zeros(1, 3, 32, 32)


class Sizes(NamedTuple):
    """Of network, data and trainings; `rates` are learning rates of supernets, each rule gets the best."""

    rates: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)
    depth: int = 8
    divisor: int = 2
    budget: float = 0.3
    train: int = 8000
    validation: int = 2000
    test: int = 4000
    networks: int = 24
    alone_seeds: int = 3
    alone_epochs: int = 2
    alone_batch: int = 32
    alone_rate: float = 0.1
    supernet_seeds: int = 2
    supernet_epochs: int = 8
    supernet_batch: int = 64
    points: int = 64
    tuning_points: int = 6
    per_step: int = 2
    calibration: int = 1024


QUICK = Sizes(
    rates=(0.1,),
    divisor=4,
    train=64,
    validation=32,
    test=32,
    networks=4,
    alone_seeds=2,
    alone_epochs=1,
    alone_batch=8,
    supernet_seeds=1,
    supernet_epochs=1,
    supernet_batch=16,
    points=4,
    tuning_points=2,
    calibration=16,
)
LARGE = Sizes(
    depth=56,
    divisor=4,
    train=40000,
    test=10000,
    networks=50,
    alone_epochs=20,
    alone_batch=128,
    supernet_seeds=3,
    supernet_epochs=40,
    supernet_batch=256,
    points=256,
    calibration=2048,
)


class Task(NamedTuple):
    """One training: of a drawn network alone, of a supernet, or a short one at a learning rate.

    Attributes:
        kind: `alone`, `tune` or `supernet`.
        method: The rule; of networks alone, which one.
        seed: Of weights, order of samples and draws.
        rate: Learning rate.
    """

    kind: str
    method: str | int
    seed: int
    rate: float


class Setup(NamedTuple):
    """What all trainings share."""

    splits: Splits
    model: nn.Module
    space: WidthSpace
    bounds: Bounds
    points: list[Widths]
    networks: list[Widths]
    flops: FlopsCost


@functools.cache
def setup(sizes: Sizes) -> Setup:
    """Data, space, starting points and the networks to rank, the same in every process."""
    splits = digits_clutter(0, sizes.train, sizes.validation, sizes.test)
    model = CifarResNet(sizes.depth)
    space = WidthSpace(find_channel_groups(model, IMAGE), divisor=sizes.divisor)
    flops = FlopsCost(model, IMAGE, space.groups)
    bounds = Budget.parse(sizes.budget).bound({"flops": flops})
    points = starting_points(space, bounds, sizes.points, torch.Generator().manual_seed(0))
    networks = drawn_networks(space, bounds, sizes.networks, torch.Generator().manual_seed(1))
    return Setup(splits, model, space, bounds, points, networks, flops)


def drawn_networks(
    space: WidthSpace, bounds: Bounds, n: int, generator: torch.Generator, batch: int = 256
) -> list[Widths]:
    """Different networks in the budget's band, none of them projected: all the chances of `tilted` allow."""
    chances, found = tilted(space, bounds), dict[Widths, None]()
    while len(found) < n:
        candidates = draw(space, chances, batch, generator)
        used = bounds.used_batch(candidates)
        in_band = candidates[(used >= BAND[0]) & (used <= BAND[1])]
        found |= dict.fromkeys(map(space.decode, in_band))
    return list(found)[:n]


def run(task: Task, sizes: Sizes, device: str) -> Row:
    """Trains, and tests or scores; one row of the record."""
    one_thread()
    return (_alone if task.kind == "alone" else _supernet)(task, sizes, torch.device(device))


def _alone(task: Task, sizes: Sizes, device: torch.device) -> Row:
    setting = setup(sizes)
    widths = setting.networks[int(task.method)]
    model = shrink(setting.model, setting.space.groups, widths)
    reinitialise(model, task.seed)
    model.to(device)
    recipe = Recipe(epochs=sizes.alone_epochs, lr=task.rate, batch_size=sizes.alone_batch)
    seconds = _train(model, setting, recipe, task.seed, device, training_step(0.0))
    return {**task._asdict(), "seconds": seconds, "test": accuracy(model, setting.splits.test, device=device)}


def _supernet(task: Task, sizes: Sizes, device: torch.device) -> Row:
    setting = setup(sizes)
    epochs = sizes.supernet_epochs * (2 if task.method == TWICE else 1)
    tuning = task.kind == "tune"
    supernet, seconds = trained_supernet(
        setting, sizes, task, max(epochs // 4, 1) if tuning else epochs, device
    )
    networks = setting.points[: sizes.tuning_points] if tuning else setting.networks
    sides = (False, True) if task.method == "bcnet" else (False,)
    scores = [
        statistics.mean(_score(supernet, widths, setting, sizes, device, last) for last in sides)
        for widths in networks
    ]
    return {**task._asdict(), "seconds": seconds, "scores": scores}


def trained_supernet(
    setting: Setup, sizes: Sizes, task: Task, epochs: int, device: torch.device
) -> tuple[Supernet, float]:
    """A supernet of the first channels, trained from scratch by a rule; CPU seconds of its training."""
    model = CifarResNet(sizes.depth)
    reinitialise(model, task.seed)
    supernet = Supernet(model.to(device), setting.space.groups, prefix_order(setting.space.groups))
    rule = RULES["parallel" if task.method == TWICE else str(task.method)]
    generator = torch.Generator().manual_seed(task.seed)
    steps = rule(setting.space, setting.points, generator, sizes.per_step)
    step = SupernetStep(supernet, steps, training_step(0.0))
    recipe = Recipe(epochs=epochs, lr=task.rate, batch_size=sizes.supernet_batch)
    return supernet, _train(model, setting, recipe, task.seed, device, step)


def _train(
    model: nn.Module, setting: Setup, recipe: Recipe, seed: int, device: torch.device, step: Any
) -> float:
    loop = training_loop(setting.splits.train, recipe, device=device, seed=seed, quiet=True)
    taken = timed(lambda: loop(model, sgd(model, recipe), step))  # which ends with the loss on this machine
    return taken.cpu if device.type == "cpu" else taken.wall


def _score(
    supernet: Supernet, widths: Widths, setting: Setup, sizes: Sizes, device: torch.device, last: bool
) -> float:
    """Accuracy (%) on the search-validation images."""
    batches = loader(setting.splits.train, sizes.supernet_batch, shuffle=True, seed=0)
    images = (images.to(device) for images, _ in batches)
    return score(
        supernet,
        widths,
        lambda model: accuracy(model, setting.splits.validation, device=device),
        images,
        sizes.calibration,
        last=last,
    )


def first_tasks(sizes: Sizes) -> list[Task]:
    """Those that need no result of others: short supernets at each rate, and the networks alone."""
    tuned = [Task("tune", rule, 0, rate) for rule in METHODS if rule != TWICE for rate in sizes.rates]
    numbers = itertools.product(range(sizes.alone_seeds), range(sizes.networks))
    return [*tuned, *(Task("alone", i, seed, sizes.alone_rate) for seed, i in numbers)]


def last_tasks(sizes: Sizes, runs: Sequence[Row]) -> list[Task]:
    """The supernets, at the learning rate that was best for their rule."""
    return [
        Task("supernet", method, seed, best_rate(runs, method))
        for seed in range(sizes.supernet_seeds)
        for method in METHODS
    ]


def best_rate(runs: Sequence[Row], method: str) -> float:
    rule = "parallel" if method == TWICE else method
    tuned = [run for run in runs if run["kind"] == "tune" and run["method"] == rule]
    return max(tuned, key=lambda run: statistics.mean(run["scores"]))["rate"]


def truth_of(runs: Sequence[Row], networks: int) -> np.ndarray:
    """(seeds, networks) test accuracies of the networks trained alone, of the seeds that are complete."""
    alone = {(run["seed"], run["method"]): run["test"] for run in runs if run["kind"] == "alone"}
    seeds = sorted({seed for seed, _ in alone})
    complete = [seed for seed in seeds if all((seed, i) in alone for i in range(networks))]
    return np.array([[alone[seed, i] for i in range(networks)] for seed in complete])


def mean_tau(rankings: np.ndarray, truths: np.ndarray) -> float:
    """Mean Kendall's tau-b of the rows (R, N) with their truths (R, N)."""
    pairs = zip(rankings, truths, strict=True)
    return float(np.mean([kendalltau(row, truth).statistic for row, truth in pairs]))


def resampled(rankings: np.ndarray, truths: np.ndarray, resamples: int = 1000) -> np.ndarray:
    """`mean_tau` (resamples,) of networks drawn with replacement; of as many networks, the same draws."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(rankings.shape[1], size=(resamples, rankings.shape[1]))
    return np.array([mean_tau(rankings[:, rows], truths[:, rows]) for rows in drawn])


def interval(values: np.ndarray) -> list[float]:
    """That 95 % of the values lie in."""
    return [float(x) for x in np.nanquantile(values, [0.025, 0.975])]


def pairs_of_seeds(accuracies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of seeds' accuracies (S, N), those of the first and of the second of each pair (P, N)."""
    first, second = zip(*itertools.combinations(accuracies, 2), strict=True)
    return np.stack(first), np.stack(second)


def summary(runs: Sequence[Row], networks: Sequence[Mapping[str, int]], flops: Sequence[int]) -> list[Row]:
    """One row for each rule, FLOPs and another seed; none before a seed of trainings alone is complete."""
    accuracies = truth_of(runs, len(networks))
    if not len(accuracies):
        return []
    truth = accuracies.mean(0)
    trained = {
        method: [run for run in runs if run["kind"] == "supernet" and run["method"] == method]
        for method in METHODS
    }
    sandwich = [run["seconds"] for run in trained["sandwich"]]
    rows, taus = [], {}
    for method, found in trained.items():
        if not found:
            continue
        scores = np.array([run["scores"] for run in found])
        seconds = statistics.mean(run["seconds"] for run in found)
        row, taus[method] = _row(method, scores, np.stack([truth] * len(scores)))
        rows.append(
            row
            | {
                "inherited": float(scores.mean()),
                "top": statistics.mean(float(truth[s.argmax()]) for s in scores),
                "rate": found[0]["rate"],
                "seconds": seconds,
                "cost": seconds / statistics.mean(sandwich) if sandwich else math.nan,
            }
        )
    nothing = dict.fromkeys(("inherited", "top", "rate", "seconds", "cost"))
    rows.append(_row("FLOPs", np.array([flops]), truth[None])[0] | nothing)
    if len(accuracies) > 1:
        rows.append(_row(ANOTHER, *pairs_of_seeds(accuracies))[0] | nothing | {"top": float(truth.max())})
    for row in rows:
        compared = row["ranked by"] in taus and "sandwich" in taus
        difference = taus[row["ranked by"]] - taus["sandwich"] if compared else None
        row["over_sandwich"] = None if difference is None else [round(x, 4) for x in interval(difference)]
    return rows


def _row(name: str, rankings: np.ndarray, truths: np.ndarray) -> tuple[Row, np.ndarray]:
    """A row, and the taus of its resamples."""
    taus = resampled(rankings, truths)
    low, high = interval(taus)
    tau = mean_tau(rankings, truths)
    return {"ranked by": name, "seeds": len(rankings), "tau": tau, "low": low, "high": high}, taus


def plot(record: Row) -> Figure:
    """A panel for each rule: what networks score in the supernet over what they reach alone."""
    accuracies = truth_of(record["runs"], len(record["networks"]))
    truth, spread = accuracies.mean(0), accuracies.std(0, ddof=1) if len(accuracies) > 1 else 0
    rows = [row for row in record["rows"] if row["ranked by"] in METHODS]
    columns = min(len(rows), 4)
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.7 * lines + 0.7), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
    for panel, row in zip(axes, rows, strict=False):
        name = row["ranked by"]
        found = [r["scores"] for r in record["runs"] if r["kind"] == "supernet" and r["method"] == name]
        scores = np.array(found)
        panel.errorbar(
            truth, scores.mean(0), xerr=spread, fmt="o", ms=4, color=SOLID, ecolor="#dddddd", elinewidth=1
        )
        panel.set_title(
            f"{name.replace('_', ' ')}: τ {row['tau']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            fontsize=9,
            loc="left",
        )
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.tick_params(labelsize=8, colors=FAINT, labelbottom=True)
    for panel in axes[len(rows) :]:
        panel.set_axis_off()
    figure.supxlabel("accuracy trained alone (%), mean and standard deviation over seeds", fontsize=9)
    figure.supylabel("accuracy in the supernet (%)", fontsize=9)
    settings = record["settings"]
    others = {row["ranked by"]: row["tau"] for row in record["rows"]}
    between = f", between two seeds {others[ANOTHER]:.2f}" if ANOTHER in others else ""
    figure.suptitle(
        f"{len(truth)} networks of {settings['budget']:.0%} of ResNet-{settings['depth']}'s FLOPs on "
        f"digits-clutter: τ by FLOPs {others['FLOPs']:.2f}{between}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def missing(tasks: Sequence[Task], runs: Sequence[Row]) -> list[Task]:
    done = {(run["kind"], run["method"], run["seed"], run["rate"]) for run in runs}
    return [task for task in tasks if tuple(task) not in done]


def results(tasks: Sequence[Task], sizes: Sizes, device: str, processes: int) -> Iterator[Row]:
    """Rows as they are done."""
    if processes == 1:
        for task in tasks:
            yield run(task, sizes, device)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(run, task, sizes, device) for task in tasks]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file; the runs that it has are not repeated")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, one core each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="a setting for a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny setting that only shows that it runs")
    args = parser.parse_args()
    sizes = QUICK if args.quick else LARGE if args.large else Sizes()
    record = begun(args, sizes)
    stages: list[Callable[[], list[Task]]] = [
        lambda: first_tasks(sizes),
        lambda: last_tasks(sizes, record["runs"]),
    ]
    for stage in stages:
        tasks = missing(stage(), record["runs"])
        done = results(tasks, sizes, args.device, args.processes)
        for row in tqdm(done, total=len(tasks), desc="trainings", disable=None):
            record["runs"].append(_rounded(row))
            save_record(record, args.out)
    record["rows"] = [_rounded(row) for row in summary(record["runs"], record["networks"], record["flops"])]
    save_record(record, args.out)
    print_table(record["rows"])
    if args.out is not None:
        save(plot(record), args.out.with_suffix(".png"))


def begun(args: argparse.Namespace, sizes: Sizes) -> Row:
    """The record to go on with."""
    setting = setup(sizes)
    record: Row = {
        "command": shlex.join(["python", "-m", "examples.benchmarks.rank_consistency", *sys.argv[1:]]),
        "device": describe_device(torch.device(args.device)),
        "versions": package_versions(),
        "settings": {"band": BAND, **sizes._asdict()},
        "networks": [dict(widths) for widths in setting.networks],
        "flops": [setting.flops(widths) for widths in setting.networks],
        "rows": [],
        "runs": [],
    }
    record = json.loads(json.dumps(record))
    if args.out is not None and args.out.exists():
        before = json.loads(args.out.read_text())
        if any(before[key] != record[key] for key in ("settings", "networks", "device", "versions")):
            raise SystemExit(f"{args.out} has other settings, versions or device; choose another --out")
        record["runs"] = before["runs"]
    return record


def save_record(record: Row, out: Path | None) -> None:
    if out is not None:
        text = json.dumps(record, indent=2) + "\n"
        write(out, lambda path: path.write_text(text))


def _rounded(row: Row) -> Row:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
