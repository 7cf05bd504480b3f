"""What the comparisons of methods on `digits-clutter` share: training, searches, and runs kept by seed.

All networks are cut from ResNet-20 at 50 % of its FLOPs, with widths that are multiples of 4. The test set
serves for the final numbers alone. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nni
import torch
from nni.compression import TorchEvaluator
from torch import nn
from torch.utils.data import Dataset

from examples.benchmarks.measure import Row, one_thread, print_table, timed
from examples.cifar_resnet import CifarResNet
from nni_dbs.config import Recipe
from nni_dbs.data import Splits, digits_clutter, loader, split_in_two
from nni_dbs.files import write
from nni_dbs.latency import processor
from nni_dbs.plugin.pruner import WidthPruner
from nni_dbs.result import package_versions
from nni_dbs.training import accuracy, reinitialise, sgd, training_loop, training_step

BUDGET, DIVISOR = 0.5, 4
LEARNING_RATE, SEARCH_LEARNING_RATE = 0.1, 0.05
CPU = torch.device("cpu")


class Sizes(NamedTuple):
    """Of network, data, trainings and searches."""

    depth: int = 20
    train: int = 8000
    validation: int = 2000
    test: int = 4000
    batch_size: int = 32
    start_epochs: int = 1  # of the network that searches start from
    epochs: int = 2  # of each final training
    search_steps: int = 250  # of dbs' supernet, dmcp, tas and dsa
    candidates: int = 10  # of random
    points: int = 16  # of dbs, like the next two
    evaluations: int = 24
    per_round: int = 4

    def data(self, seed: int) -> Splits:
        return digits_clutter(seed, self.train, self.validation, self.test)

    def options(self, method: str) -> dict[str, Any]:
        """Options of a method's pruner that are not its defaults."""
        if method == "dbs":
            return {"points": self.points, "evaluations": self.evaluations, "per_round": self.per_round}
        return {"candidates": self.candidates} if method == "random" else {}


QUICK = Sizes(
    depth=8,
    train=64,
    validation=32,
    test=32,
    batch_size=8,
    start_epochs=1,
    epochs=1,
    search_steps=8,
    candidates=2,
    points=3,
    evaluations=4,
    per_round=1,
)
RunsOf = Callable[[int, Sequence[str], Sizes], Iterator[Row]]


def full_network(seed: int, sizes: Sizes) -> nn.Module:
    """The full ResNet with the weights that this seed draws."""
    model = CifarResNet(sizes.depth)
    reinitialise(model, seed)
    return model


def train(model: nn.Module, data: Dataset, epochs: int, sizes: Sizes, seed: int, step: Any = None) -> float:
    """Trains by the shell's loop and recipe; returns CPU seconds. Without `step`: plain cross entropy."""
    recipe = Recipe(epochs=epochs, lr=LEARNING_RATE, batch_size=sizes.batch_size)
    loop = training_loop(data, recipe, device=CPU, seed=seed, quiet=True)
    return timed(lambda: loop(model, sgd(model, recipe), step or training_step(0.0))).cpu


def pruner_of(
    pruner_class: type[WidthPruner], start: nn.Module, splits: Splits, sizes: Sizes, seed: int
) -> WidthPruner:
    """A method's pruner for a copy of `start`, with a split of the training data where it wants two parts."""
    model = copy.deepcopy(start)
    data, options = splits.train, sizes.options(pruner_class.method)
    if pruner_class.second_share:
        data, second = split_in_two(data, pruner_class.second_share, seed)
        size = min(sizes.batch_size, len(second))  # type: ignore[arg-type]
        options["second"] = loader(second, size, shuffle=True, seed=seed, drop_last=True)
    recipe = Recipe(lr=SEARCH_LEARNING_RATE, batch_size=sizes.batch_size)
    evaluator = TorchEvaluator(
        training_loop(data, recipe, device=CPU, seed=seed, quiet=True),
        sgd(model, recipe, nni.trace(torch.optim.SGD)),
        training_step(0.0),
        dummy_input=torch.zeros(1, *splits.input_shape),
        evaluating_func=lambda m: accuracy(m, splits.validation, device=CPU),
    )
    return pruner_class(
        model,
        [{"op_types": ["Conv2d"]}],
        evaluator,
        budget=BUDGET,
        divisor=DIVISOR,
        seed=seed,
        quiet=True,
        **options,
    )


def search(pruner: WidthPruner, steps: int) -> float:
    """Chooses the widths, with so many training steps where the method trains; returns CPU seconds."""
    duration = steps if pruner.trains_supernet else None
    return timed(lambda: pruner.compress(max_steps=duration)).cpu


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def runs_of_method(runs: Iterable[Row], method: str) -> list[Row]:
    """In the order of seeds."""
    return sorted((run for run in runs if run["method"] == method), key=lambda run: run["seed"])


def compare(
    description: str | None,
    module: str,
    methods: Sequence[str],
    seeds: int,
    runs_of: RunsOf,
    summary: Callable[[Sequence[Row]], list[Row]],
) -> list[Row]:
    """The command line: makes the runs (seed, method) that `--out` lacks, or merges files; all runs.

    Args:
        description, module, methods: Of the benchmark.
        seeds: 0, ..., seeds - 1 are the default.
        runs_of: Yields one run (with `seed` and `method`) for each of the methods, for one seed.
        summary: The rows of the table.
    """
    args = _arguments(description, methods, seeds)
    one_thread()
    sizes = QUICK if args.quick else Sizes()
    head = {
        "command": shlex.join(["python", "-m", f"examples.benchmarks.{module}", *sys.argv[1:]]),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "settings": {
            "budget": BUDGET,
            "divisor": DIVISOR,
            "learning_rate": LEARNING_RATE,
            "search_learning_rate": SEARCH_LEARNING_RATE,
            **sizes._asdict(),
        },
    }
    runs: list[Row] = []
    if args.merge:
        records = [json.loads(path.read_text()) for path in args.merge]
        if any(r[key] != records[0][key] for r in records for key in ("settings", "versions", "cpu")):
            raise SystemExit("these files have other settings, versions or processors: nothing is merged")
        head |= {key: records[0][key] for key in ("cpu", "threads", "versions", "settings")}
        head["command"] = [r["command"] for r in records]
        runs = list({(run["seed"], run["method"]): run for r in records for run in r["runs"]}.values())
    elif args.out is not None and args.out.exists():
        record = json.loads(args.out.read_text())
        if record["settings"] != head["settings"]:
            raise SystemExit(f"{args.out} has other settings; choose another --out")
        runs = record["runs"]
    for seed in () if args.merge else args.seeds:
        done = {run["method"] for run in runs if run["seed"] == seed}
        if missing := [method for method in args.methods if method not in done]:
            for run in runs_of(seed, missing, sizes):
                runs.append(run)
                print(run, file=sys.stderr, flush=True)
                _save(args.out, head, runs, summary)
    _save(args.out, head, runs, summary)
    print_table(summary(runs))
    return runs


def _arguments(description: str | None, methods: Sequence[str], seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--out", type=Path, help="JSON file; the runs that it has are not repeated")
    parser.add_argument("--merge", type=Path, nargs="+", help="files whose runs --out gets; nothing is run")
    parser.add_argument("--quick", action="store_true", help="a tiny setting that only shows that it runs")
    return parser.parse_args()


def _save(
    out: Path | None, head: Row, runs: Sequence[Row], summary: Callable[[Sequence[Row]], list[Row]]
) -> None:
    if out is not None:
        text = json.dumps({**head, "rows": _rounded(summary(runs)), "runs": _rounded(runs)}, indent=2) + "\n"
        write(out, lambda path: path.write_text(text))


def _rounded(rows: Sequence[Row]) -> list[Row]:
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
