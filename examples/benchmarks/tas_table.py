"""TAS's table in small: uniform widths, random search and TAS, each trained plainly, with Init, with KD.

After the table of Dong and Yang (TAS, 2019) that separates the search from knowledge distillation; here on
`digits-clutter` (see `clutter_methods`). One full network, trained for 2 epochs, starts TAS's search and is
what Init and KD take from. Networks are

* uniform: the pre-defined widths;
* random: the best on the validation data of 10 networks inside the budget, after 1 epoch from scratch each;
* tas: widths and depths, by 250 steps on the training data in two halves;

and each is trained for 2 epochs

* plain: from scratch;
* init: from the full network's weights, the channels of the largest l2 norm;
* kd: from scratch with the full network as a teacher (weight 0.9, temperature 4).

Numbers are test accuracies. Two processes side by side:

    python -m examples.benchmarks.tas_table --seeds 0 1 --out A.json
    python -m examples.benchmarks.tas_table --seeds 2 --out B.json
    python -m examples.benchmarks.tas_table --merge A.json B.json --out examples/benchmarks/tas_table.json
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from torch import nn

from examples.benchmarks.clutter import (
    CPU,
    Sizes,
    compare,
    full_network,
    mean_and_sd,
    pruner_of,
    runs_of_method,
    search,
    train,
)
from examples.benchmarks.measure import Row, timed
from nni_dbs import TASPruner, UniformPruner, Widths
from nni_dbs.data import Splits
from nni_dbs.plugin.pruner import WidthPruner
from nni_dbs.search import RandomSearch
from nni_dbs.training import accuracy, reinitialise, taught_step
from torch_pruning_adapters import channel_order, shrink

METHODS = ("uniform", "random", "tas")
TRAININGS = ("plain", "init", "kd")
WEIGHT, TEMPERATURE = 0.9, 4.0
SHORT_EPOCHS = 1


def cut(full: nn.Module, pruner: WidthPruner, widths: Widths) -> nn.Module:
    """The network with the most important channels of the full one."""
    groups = pruner.space.groups
    return shrink(full, groups, widths, channel_order(full, groups))


def best_random(full: nn.Module, pruner: WidthPruner, splits: Splits, sizes: Sizes, seed: int) -> Widths:
    """The best of some networks inside the budget, after a short training of each."""

    def score(widths: Widths) -> float:
        network = cut(full, pruner, widths)
        reinitialise(network, seed)
        train(network, splits.train, SHORT_EPOCHS, sizes, seed)
        return accuracy(network, splits.validation, device=CPU)

    return max(RandomSearch(pruner.space, pruner.bounds, seed).ask(sizes.candidates), key=score)


def chosen(
    method: str, full: nn.Module, splits: Splits, sizes: Sizes, seed: int
) -> tuple[WidthPruner, Widths, float]:
    """The pruner whose groups the widths are of, the widths, and CPU seconds of the search."""
    pruner = pruner_of(TASPruner if method == "tas" else UniformPruner, full, splits, sizes, seed)
    if method != "random":
        seconds = search(pruner, sizes.search_steps)
        return pruner, pruner.widths, seconds
    found: list[Widths] = []
    seconds = timed(lambda: found.append(best_random(full, pruner, splits, sizes, seed))).cpu
    return pruner, found[0], seconds


def runs_of(seed: int, methods: Sequence[str], sizes: Sizes) -> Iterator[Row]:
    """One run for each method."""
    splits = sizes.data(seed)
    full = full_network(seed, sizes)
    train(full, splits.train, sizes.epochs, sizes, seed)
    full_accuracy = accuracy(full, splits.test, device=CPU)
    teach = taught_step(full, WEIGHT, TEMPERATURE)
    for method in methods:
        pruner, widths, seconds = chosen(method, full, splits, sizes, seed)
        reached = {}
        for training in TRAININGS:
            network = cut(full, pruner, widths)
            if training != "init":
                reinitialise(network, seed)
            train(network, splits.train, sizes.epochs, sizes, seed, teach if training == "kd" else None)
            reached[training] = accuracy(network, splits.test, device=CPU)
        yield {
            "seed": seed,
            "method": method,
            **reached,
            "full": full_accuracy,
            "flops_share": pruner.flops(widths) / pruner.flops.full,
            "params_share": pruner.params(widths) / pruner.params.full,
            "search_seconds": seconds,
            "widths": dict(widths),
        }


def summary(runs: Sequence[Row]) -> list[Row]:
    """One row for each method: mean and standard deviation over seeds of each training's accuracy."""
    rows = []
    for method in METHODS:
        if found := runs_of_method(runs, method):
            row: Row = {"method": method, "seeds": len(found)}
            for name in (*TRAININGS, "full"):
                row[name], row[f"{name}_sd"] = mean_and_sd([run[name] for run in found])
            row["flops"] = statistics.mean(run["flops_share"] for run in found)
            row["search_s"] = statistics.mean(run["search_seconds"] for run in found)
            rows.append(row)
    return rows


def main() -> None:
    compare(__doc__, "tas_table", METHODS, 3, runs_of, summary)


if __name__ == "__main__":
    main()
