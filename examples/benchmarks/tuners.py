"""Our tuner against NNI's own, on a table of networks that others have trained, through the tuner interface.

    CHANNEL_BENCH=channel_bench_macro_mobilenet.csv python -m examples.benchmarks.tuners --out FILE

Table, gap and intervals are those of `channel_bench`. A trial's result is one seed's accuracy of the network
that the tuner asks for; two trials run at a time. NNI's tuners know no budget: they are told 0 of a network
that is over it, which counts as a trial (`NNI TPE`), or such networks are refused at once, for free, until
one is inside (`NNI TPE, free refusals`). The network kept is `WidthTuner`'s own choice, and of NNI's tuners
the best one measured inside of the budget.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nni
import numpy as np
from nni.algorithms.hpo.evolution_tuner import EvolutionTuner
from nni.algorithms.hpo.random_tuner import RandomTuner
from nni.algorithms.hpo.tpe_tuner import TpeTuner
from nni.tuner import Tuner
from tqdm import tqdm

from examples.benchmarks.channel_bench import SHARES, Table, interval, shared_table, table_path
from examples.benchmarks.measure import Row, arguments, one_thread, report
from nni_dbs import Widths, WidthTuner
from nni_dbs.cost import Bounds
from nni_dbs.problem import Problem

TRIALS = (64, 128)
SEEDS = 20
CONCURRENCY = 2
REFUSALS = 10_000  # networks over the budget in a row, after which one counts as a trial all the same
OURS = {"DBS": "dbs", "DBSEvolution": "evolution", "DBSRandom": "random"}
NNIS = ("TPE", "Evolution", "Random")
METHODS = (*OURS, *(f"NNI {name}" for name in NNIS), *(f"NNI {name}, free refusals" for name in NNIS))


def nnis_tuner(name: str, seed: int) -> Tuner:
    """One of NNI's tuners, with its default settings."""
    if name == "TPE":
        return TpeTuner(optimize_mode="maximize", seed=seed)
    if name == "Random":
        return RandomTuner(seed=seed)
    np.random.seed(seed)  # NNI's evolution draws from the global generators
    random.seed(seed)
    return EvolutionTuner(optimize_mode="maximize", population_size=32)


def run(table: Table, method: str, share: float, seed: int, trials: Sequence[int]) -> dict[str, Any]:
    """One search; the gaps of what would be kept after each number of trials, and how many were inside."""
    bounds = table.bounds(share)
    inside = table.band(bounds, 0.0)
    best = float(table.truth[inside].max())
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        kept, valid = _searched(table, method, bounds, seed, trials, Path(folder))
    smallest = table.space.smallest()  # where nothing was inside
    gaps = [best - float(table.truth[table.index(widths or smallest)]) for widths in kept]
    return {
        "method": method, "share": share, "seed": seed, "gap": gaps, "inside": valid,
        "seconds": time.process_time() - started,
    }  # fmt: skip


def _searched(
    table: Table, method: str, bounds: Bounds, seed: int, trials: Sequence[int], folder: Path
) -> tuple[list[Widths | None], list[float]]:
    """Of each number of trials: the network to keep, and the share of trials inside of the budget."""
    ours = method in OURS
    free = method.endswith("free refusals")
    tuner: Any
    if ours:
        problem = Problem(table.space, {"flops": table.cost}, {}, bounds.limits[0][2])
        problem.save(folder / "problem.json")
        options = {"points": 12} if method == "DBS" else {}
        log = str(folder / "search.jsonl")
        tuner = WidthTuner(str(folder / "problem.json"), log, searcher=OURS[method], seed=seed, **options)
    else:
        tuner = nnis_tuner(method.removeprefix("NNI ").removesuffix(", free refusals"), seed)
    tuner.update_search_space(table.space.to_nni())
    running: deque[tuple[int, dict[str, int]]] = deque()
    scores: dict[Widths, float] = {}
    kept: list[Widths | None] = []
    valid: list[float] = []
    ids = itertools.count()
    finished = inside = 0
    while len(kept) < len(trials):
        while len(running) < CONCURRENCY and (asked := _asked(tuner, table, bounds, ids, free)) is not None:
            running.append(asked)
        if running:
            number, parameters = running.popleft()
            widths = table.space.from_nni(parameters)
            if bounds.fits(widths):
                scores[widths] = float(table.accuracy[table.index(widths), 0])
            elif ours:
                raise AssertionError("WidthTuner proposed a network over the budget")
            tuner.receive_trial_result(number, parameters, scores.get(widths, 0.0))
            tuner.trial_end(number, True)
            finished += 1
            inside += bounds.fits(widths)
        while len(kept) < len(trials) and (not running or finished >= trials[len(kept)]):
            kept.append(tuner.study.best() if ours else max(scores, key=scores.__getitem__, default=None))
            valid.append(inside / finished)
    return kept, valid


def _asked(
    tuner: Tuner, table: Table, bounds: Bounds, ids: Iterator[int], free: bool
) -> tuple[int, dict[str, int]] | None:
    """A new trial's number and parameters; None when the tuner has no more."""
    for refused in itertools.count():
        number = next(ids)
        try:
            parameters: Any = tuner.generate_parameters(number)
        except nni.NoMoreTrialError:
            return None
        if not free or refused == REFUSALS or bounds.fits(table.space.from_nni(parameters)):
            return number, parameters
        tuner.receive_trial_result(number, parameters, 0.0)
        tuner.trial_end(number, True)
    return None


def summary(runs: Sequence[dict[str, Any]], trials: Sequence[int], methods: Sequence[str]) -> list[Row]:
    """One row for each method and number of trials."""
    runs = sorted(runs, key=lambda r: (r["share"], r["seed"]))
    gaps = {m: np.array([r["gap"] for r in runs if r["method"] == m]) for m in methods}  # (runs, trials)
    rows = []
    for method, gap in gaps.items():
        own = [r for r in runs if r["method"] == method]
        for i, count in enumerate(trials):
            low, high = interval(gap[:, i])
            less, more = interval(gap[:, i] - gaps["DBS"][:, i])
            rows.append(
                {
                    "method": method,
                    "trials": count,
                    "gap": float(gap[:, i].mean()),
                    "low": low,
                    "high": high,
                    "gap beyond DBS, low": less,
                    "gap beyond DBS, high": more,
                    "trials inside": float(np.mean([r["inside"][i] for r in own])),
                    "cpu seconds": float(np.mean([r["seconds"] for r in own])),
                }
            )
    return rows


def _run(task: tuple[Any, ...]) -> dict[str, Any]:
    return run(shared_table(), *task)


def measure(args: argparse.Namespace) -> list[Row]:
    """Rows of all methods."""
    shares, trials = (SHARES[2:3], (16,)) if args.quick else (SHARES, TRIALS)
    seeds = 1 if args.quick else args.repeats
    tasks = [(m, share, seed, trials) for m in METHODS for share in shares for seed in range(seeds)]
    table_path()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        runs = list(tqdm(pool.map(_run, tasks), total=len(tasks), desc="searches", disable=None))
    return summary(runs, trials, METHODS)


def main() -> None:
    args = arguments(__doc__, SEEDS)
    one_thread()
    settings = {"shares": SHARES, "trials": TRIALS, "concurrency": CONCURRENCY, "noise": "acc1"}
    report(args, "tuners", settings, measure(args))


if __name__ == "__main__":
    main()
