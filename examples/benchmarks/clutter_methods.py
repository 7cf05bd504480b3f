"""What does each method's network reach on `digits-clutter`, against uniform widths of the same FLOPs?

All searches start from copies of one full network, trained for an epoch. Of what they find only the shape
counts: every network, the full one too, is trained from scratch for 2 epochs from weights of the same seed,
and tested. `gain` is the difference to uniform's test accuracy, paired by seed; `from_uniform` the mean
difference to uniform's widths, relative to the full ones; `search/train` the time of the search over that of
the final training. Ends with an error if a search gives the uniform network. Two processes side by side:

    python -m examples.benchmarks.clutter_methods --seeds 0 1 2 --out A.json
    python -m examples.benchmarks.clutter_methods --seeds 3 4 --out B.json
    python -m examples.benchmarks.clutter_methods --merge A.json B.json \\
        --out examples/benchmarks/clutter_methods.json
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

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
from examples.benchmarks.measure import Row
from nni_dbs import DBSPruner, DMCPPruner, DSAPruner, RandomPruner, TASPruner, UniformPruner, WidthSpace
from nni_dbs.plugin.pruner import WidthPruner
from nni_dbs.training import accuracy, reinitialise

PRUNERS: dict[str, type[WidthPruner]] = {
    p.method: p for p in (UniformPruner, RandomPruner, DBSPruner, DMCPPruner, TASPruner, DSAPruner)
}
SEARCHES = ("dbs", "dmcp", "tas", "dsa")  # that must not give the uniform network


def distance(space: WidthSpace, widths: Mapping[str, int], others: Mapping[str, int]) -> float:
    """Mean difference of the widths over the groups with a choice, relative to the full widths."""
    free = [g for g in space.groups if len(space.choices(g.name)) > 1]
    return statistics.mean(abs(widths[g.name] - others[g.name]) / g.size for g in free)


def runs_of(seed: int, methods: Sequence[str], sizes: Sizes) -> Iterator[Row]:
    """One run for each method."""
    splits = sizes.data(seed)
    start = full_network(seed, sizes)
    train(start, splits.train, sizes.start_epochs, sizes, seed)
    uniform = pruner_of(UniformPruner, start, splits, sizes, seed)
    search(uniform, 0)
    for method in methods:
        if method == "full":
            network, result, seconds, widths = (
                full_network(seed, sizes),
                uniform.result,
                0.0,
                uniform.space.largest(),
            )
            flops, params = result.full_flops, result.full_params
        else:
            pruner = pruner_of(PRUNERS[method], start, splits, sizes, seed)
            seconds = search(pruner, sizes.search_steps)
            network, result, widths = pruner.export(), pruner.result, pruner.widths
            flops, params = result.flops, result.params
            reinitialise(network, seed)
        training = train(network, splits.train, sizes.epochs, sizes, seed)
        yield {
            "seed": seed,
            "method": method,
            "test_accuracy": accuracy(network, splits.test, device=CPU),
            "flops_share": flops / result.full_flops,
            "params_share": params / result.full_params,
            "from_uniform": distance(uniform.space, widths, uniform.widths),
            "is_uniform": dict(widths) == dict(uniform.widths),
            "search_seconds": seconds,
            "train_seconds": training,
            "stage_wall_seconds": {} if method == "full" else result.seconds,
            "widths": dict(widths),
        }


def summary(runs: Sequence[Row]) -> list[Row]:
    """One row for each method; gains only over seeds for which uniform was run."""
    baseline = {run["seed"]: run["test_accuracy"] for run in runs_of_method(runs, "uniform")}
    rows = []
    for method in ("full", *PRUNERS):
        found = runs_of_method(runs, method)
        if not found:
            continue
        mean, sd = mean_and_sd([run["test_accuracy"] for run in found])
        gains = [run["test_accuracy"] - baseline[run["seed"]] for run in found if run["seed"] in baseline]
        gain, gain_sd = mean_and_sd(gains) if gains else (None, None)

        def mean_of(key: str, runs: Sequence[Row] = found) -> float:
            return statistics.mean(run[key] for run in runs)

        rows.append(
            {
                "method": method,
                "seeds": len(found),
                "accuracy": mean,
                "sd": sd,
                "gain": gain,
                "gain_sd": gain_sd,
                "flops": mean_of("flops_share"),
                "params": mean_of("params_share"),
                "from_uniform": mean_of("from_uniform"),
                "is_uniform": any(run["is_uniform"] for run in found),
                "search_s": mean_of("search_seconds"),
                "search/train": mean_of("search_seconds") / mean_of("train_seconds"),
            }
        )
    return rows


def check(runs: Sequence[Row]) -> None:
    """Ends the program with an error if a search gave the uniform network."""
    same = [(run["method"], run["seed"]) for run in runs if run["method"] in SEARCHES and run["is_uniform"]]
    if same:
        raise SystemExit(f"these searches (method, seed) gave the uniform network: {same}")


def main() -> None:
    check(compare(__doc__, "clutter_methods", ("full", *PRUNERS), 5, runs_of, summary))


if __name__ == "__main__":
    main()
