"""Search quality without training: predictors and searchers on a table of networks that others have trained.

    CHANNEL_BENCH=channel_bench_macro_mobilenet.csv python -m examples.benchmarks.channel_bench --out FILE

The table has the format of Channel-Bench-Macro's MobileNet half (Su et al., 2022): all 16,384 settings of
seven widths, each trained alone on CIFAR-10 by three seeds. A searcher sees one seed's accuracy of the
networks that it asks for. What it would keep after 16 to 256 evaluations is judged by a smoothed truth:
out-of-fold predictions of gradient boosting for the mean of the three seeds. The figure of merit is the gap
to the best network inside of the budget, in points of accuracy; the raw gap, by the mean itself, is beside it
(the best of thousands of raw means is a lucky draw). Intervals are 95 % bootstrap intervals over the runs;
differences to DBS are paired by budget and seed.

A second table says how well each predictor ranks networks of the budget's band that it has not seen; one
that says the same of all ranks with a tau of 0.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import KFold, cross_val_predict
from torch import Tensor, nn
from tqdm import tqdm

from examples.benchmarks.measure import Row, arguments, one_thread, print_table, report
from nni_dbs import Budget, FlopsCost, Widths, WidthSpace
from nni_dbs.algorithms.dbs import DBSSearch
from nni_dbs.cost import Bounds
from nni_dbs.errors import DataError
from nni_dbs.predict import (
    Predictor,
    TransformerPredictor,
    boosting,
    gaussian_process,
    kendall_tau,
    mlp,
    ridge,
)
from nni_dbs.search import EvolutionSearch, GreedySearch, RandomSearch, Searcher

FULL = (128, 768, 768, 768, 256, 1536, 1024)
OPTIONS = 4
SHARES = (0.20, 0.35, 0.50, 0.65, 0.80)  # budgets, of the range of FLOPs
EVALUATIONS = (16, 32, 64, 128, 256)
SEEDS = 20
BAND = 0.8
DIM = 16  # of the predictor's tokens: enough for seven groups
SIZES = (16, 32, 64, 128, 256, 1000)
TAU_SEEDS = 5


class MacroMobileNet(nn.Module):
    """The network of the table; its groups and FLOPs are found, not told."""

    def __init__(self) -> None:
        super().__init__()
        w0, w1, w2, w3, w4, w5, w6 = FULL
        self.stem = _layer(3, w0, 3, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _layer(c_in, hidden, 1, 1), nn.ReLU(), _layer(hidden, hidden, 3, stride, hidden), nn.ReLU(),
                _layer(hidden, c_out, 1, 1),
            )
            for c_in, hidden, c_out, stride in ((w0, w1, w0, 1), (w0, w2, w0, 1), (w0, w3, w4, 2), (w4, w5,
            w4, 1))
        )  # fmt: skip
        self.head = _layer(w4, w6, 1, 1)
        self.fc = nn.Linear(w6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            y = block(x)
            x = x + y if x.shape == y.shape else y
        return self.fc(self.head(x).relu().mean((2, 3)))


def _layer(c_in: int, c_out: int, kernel: int, stride: int, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Table:
    """The networks of the table, as networks of our space.

    Attributes:
        space: Seven groups of four widths.
        cost: FLOPs, found on the model; equal to the table's in every row.
        widths: (N, G) as `WidthSpace.encode`.
        flops: (N,).
        accuracy: (N, 3) of the three seeds.
        mean, truth: (N,) the mean of the seeds, and its smoothed version.
    """

    def __init__(self, path: Path) -> None:
        model = MacroMobileNet().eval()
        example = torch.zeros(1, 3, 32, 32)
        found = WidthSpace.from_model(model, example, min_ratio=0, divisor=1)
        self.space = WidthSpace(found.groups, 0, 1).among(
            {
                g.name: [g.size * k // OPTIONS for k in range(1, OPTIONS + 1)]
                for g in found.groups
                if not g.frozen
            }
        )
        self.cost = FlopsCost(model, example, self.space.groups)
        self.free = [i for i, g in enumerate(self.space.groups) if g.frozen is None]
        if [self.space.groups[i].size for i in self.free] != list(FULL):
            raise DataError(f"the groups of the model are not those of the table: {self.space.groups}")
        rows = list(csv.DictReader(path.open()))
        digits = torch.tensor([[int(digit) for digit in row["widths"]] for row in rows])
        self.widths = self.space.encode({}).repeat(len(rows), 1)
        self.widths[:, self.free] = digits * torch.tensor(FULL, dtype=torch.float64) / OPTIONS
        self.flops = torch.tensor([float(row["flops"]) for row in rows], dtype=torch.float64)
        if not torch.equal(self.cost.batch(self.widths), self.flops):
            raise DataError("the FLOPs of the table are not those of the model")
        self.accuracy = torch.tensor([[float(row[f"acc{i}"]) for i in (1, 2, 3)] for row in rows])
        self.mean = self.accuracy.double().mean(1)
        boosted = HistGradientBoostingRegressor(max_iter=400, max_leaf_nodes=8, random_state=0)
        folds = KFold(5, shuffle=True, random_state=0)
        smooth = cross_val_predict(boosted, digits.numpy(), self.mean.numpy(), cv=folds)
        self.truth = torch.from_numpy(smooth)
        self.row = {tuple(digit): i for i, digit in enumerate(digits.tolist())}

    def index(self, widths: Widths) -> int:
        encoded = self.space.encode(widths)[self.free]
        return self.row[tuple((encoded * OPTIONS / torch.tensor(FULL)).round().long().tolist())]

    def bounds(self, share: float) -> Bounds:
        low, high = float(self.flops.min()), float(self.flops.max())
        return Budget.parse(low + share * (high - low)).bound({"flops": self.cost})

    def band(self, bounds: Bounds, low: float = BAND) -> Tensor:
        """Rows (M,) from `low` of the budget up to it."""
        most = bounds.limits[0][2]
        return ((self.flops <= most) & (self.flops >= low * most)).nonzero().squeeze(1)


class BandSearch(Searcher):
    """Networks of the table with at least `low` of the budget, all with equal chances."""

    def __init__(self, table: Table, bounds: Bounds, seed: int, low: float) -> None:
        super().__init__(table.space, bounds, seed)
        band = table.band(bounds, low)
        self.order = table.widths[band[torch.randperm(len(band), generator=self.generator)]]

    def _propose(self, n: int) -> Sequence[Widths]:
        asked = len(self._asked)
        return [self.space.decode(row) for row in self.order[asked : asked + n]]


class RidgeSearch(BandSearch):
    """Bayesian ridge on quadratic logarithms of widths: 16 networks of the band, then the best of all
    predictions.

    The final choice is its best prediction among the evaluated networks. It looks at every network of the
    table, which no search of a real space can.
    """

    def __init__(self, table: Table, bounds: Bounds, seed: int) -> None:
        super().__init__(table, bounds, seed, BAND)
        self.predictor = ridge(table.space)
        self.candidates = table.widths[table.band(bounds, 0.0)]

    def _propose(self, n: int) -> Sequence[Widths]:
        if len(self.told) < 16:
            return super()._propose(n)
        self._fit()
        order = self.predictor.predict(self.candidates).mean.argsort(descending=True)
        ranked = (self.space.decode(self.candidates[i]) for i in order)
        unknown = (w for w in ranked if w not in self.told and w not in self._asked)
        return [w for _, w in zip(range(n), unknown, strict=False)]

    def _by_quality(self) -> list[Widths]:
        known = super()._by_quality()
        self._fit()
        mean = self.predictor.predict(torch.stack([self.space.encode(w) for w in known])).mean
        return [known[i] for i in mean.argsort(descending=True)]

    def _fit(self) -> None:
        widths = torch.stack([self.space.encode(w) for w in self.told])
        self.predictor.fit(widths, torch.tensor(list(self.told.values())))


def _dbs(table: Table, bounds: Bounds, seed: int, points: int = 12, **kwargs: Any) -> DBSSearch:
    latent = kwargs.pop("latent", False)
    predictor = TransformerPredictor(table.space, bounds if latent else None, dim=DIM, seed=seed, **kwargs)
    return DBSSearch(table.space, bounds, seed, points=points, predictor=predictor, latent=latent)


METHODS: dict[str, Callable[[Table, Bounds, int], Searcher]] = {
    "dbs": _dbs,
    "ridge": RidgeSearch,
    "evolution": lambda table, bounds, seed: EvolutionSearch(table.space, bounds, seed),
    "greedy": lambda table, bounds, seed: GreedySearch(table.space, bounds, seed),
    "random": lambda table, bounds, seed: BandSearch(table, bounds, seed, 0.0),
    "random in band": lambda table, bounds, seed: BandSearch(table, bounds, seed, BAND),
    "random, projected": lambda table, bounds, seed: RandomSearch(table.space, bounds, seed),
}
PREDICTORS: dict[str, Callable[[WidthSpace], Predictor]] = {
    "transformer and trend": lambda space: TransformerPredictor(space, dim=DIM),
    "transformer": lambda space: TransformerPredictor(space, dim=DIM, trend=False),
    "ridge": ridge,
    "gaussian process": gaussian_process,
    "boosting": boosting,
    "mlp": mlp,
}


def run(table: Table, method: str, share: float, seed: int, evaluations: Sequence[int]) -> dict[str, Any]:
    """One search; the gaps of what it would keep at each number of evaluations."""
    bounds = table.bounds(share)
    inside = table.band(bounds, 0.0)
    best, best_raw = float(table.truth[inside].max()), float(table.mean[inside].max())
    searcher = METHODS[method](table, bounds, seed)
    step = 8 if method == "ridge" else 4
    smooth, raw = [], []
    started = time.process_time()
    for stop in evaluations:
        while len(searcher.told) < stop:
            known = len(searcher.told)
            asked = searcher.ask(min(max(step, known // 8 if method != "ridge" else 0), stop - known))
            for widths in asked:
                searcher.tell(widths, float(table.accuracy[table.index(widths), 0]))
            if not asked:
                break
        kept = table.index(searcher.best())
        if table.flops[kept] > bounds.limits[0][2]:
            raise AssertionError("a searcher kept a network over the budget")
        smooth.append(best - float(table.truth[kept]))
        raw.append(best_raw - float(table.mean[kept]))
    return {
        "method": method, "share": share, "seed": seed, "gap": smooth, "raw": raw,
        "seconds": time.process_time() - started,
    }  # fmt: skip


def tau(table: Table, predictor: str, share: float, seed: int, size: int) -> dict[str, Any]:
    """Kendall's tau of a predictor, with the smoothed truth, on the band's networks that it does not know."""
    band = table.band(table.bounds(share))
    order = band[torch.randperm(len(band), generator=torch.Generator().manual_seed(seed))]
    known, unseen = order[:size], order[size:]
    fitted = PREDICTORS[predictor](table.space)
    fitted.fit(table.widths[known], table.accuracy[known, 0])
    ranking = fitted.predict(table.widths[unseen]).mean
    return {
        "predictor": predictor, "size": size, "tau": kendall_tau(ranking, table.truth[unseen]),
        "tau_raw": kendall_tau(ranking, table.mean[unseen]),
    }  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (N,)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(4000, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def summary(runs: Sequence[dict[str, Any]], evaluations: Sequence[int]) -> list[Row]:
    """One row for each method and number of evaluations."""
    runs = sorted(runs, key=lambda r: (r["share"], r["seed"]))
    gaps = {m: np.array([r["gap"] for r in runs if r["method"] == m]) for m in METHODS}  # (runs, evaluations)
    raws = {m: np.array([r["raw"] for r in runs if r["method"] == m]) for m in METHODS}
    rows = []
    for method, gap in gaps.items():
        for i, count in enumerate(evaluations):
            low, high = interval(gap[:, i])
            less, more = interval(gap[:, i] - gaps["dbs"][:, i])
            rows.append(
                {
                    "method": method,
                    "evaluations": count,
                    "gap": float(gap[:, i].mean()),
                    "low": low,
                    "high": high,
                    "gap beyond dbs, low": less,
                    "gap beyond dbs, high": more,
                    "raw gap": float(raws[method][:, i].mean()),
                }
            )
    return rows


@functools.cache
def shared_table() -> Table:
    """The table, read once in each process."""
    one_thread()
    return Table(table_path())


def _run(task: tuple[Any, ...]) -> dict[str, Any]:
    return run(shared_table(), *task)


def _tau(task: tuple[Any, ...]) -> dict[str, Any]:
    return tau(shared_table(), *task)


def table_path() -> Path:
    """The table's path, from the environment variable CHANNEL_BENCH."""
    given = os.environ.get("CHANNEL_BENCH")
    if not given or not Path(given).is_file():
        raise DataError("set CHANNEL_BENCH to the path of channel_bench_macro_mobilenet.csv")
    return Path(given)


def measure(args: argparse.Namespace) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Rows of both tables, and the mean CPU seconds of a search of each method."""
    few = 1 if args.quick else None
    shares, evaluations, sizes = SHARES[:few], EVALUATIONS[:few], SIZES[:few]
    seeds, tau_seeds = (1, 1) if args.quick else (args.repeats, TAU_SEEDS)
    searches = [(m, share, seed, evaluations) for m in METHODS for share in shares for seed in range(seeds)]
    rankings = [
        (p, share, seed, size) for p in PREDICTORS for share in shares for seed in range(tau_seeds) for size
        in sizes if size < 700 or share < 0.8
    ]  # fmt: skip
    table_path()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        runs = list(tqdm(pool.map(_run, searches), total=len(searches), desc="searches", disable=None))
        taus = list(tqdm(pool.map(_tau, rankings), total=len(rankings), desc="predictors", disable=None))
    rows = summary(runs, evaluations)
    tau_rows = []
    for predictor in PREDICTORS:
        for size in sizes:
            found = [t for t in taus if t["predictor"] == predictor and t["size"] == size]
            smooth, raw = (np.nan_to_num([t[key] for t in found]) for key in ("tau", "tau_raw"))
            low, high = interval(smooth)
            tau_rows.append(
                {
                    "predictor": predictor,
                    "networks": size,
                    "tau": float(smooth.mean()),
                    "low": low,
                    "high": high,
                    "tau, raw": float(raw.mean()),
                }
            )
    seconds = {m: round(float(np.mean([r["seconds"] for r in runs if r["method"] == m])), 2) for m in METHODS}
    return rows, tau_rows, {"cpu seconds of a search": seconds}


def main() -> None:
    args = arguments(__doc__, SEEDS)
    one_thread()
    rows, tau_rows, seconds = measure(args)
    print_table(tau_rows)
    print()
    settings = {"shares": SHARES, "evaluations": EVALUATIONS, "band": BAND, "dim": DIM, "noise": "acc1"}
    report(args, "channel_bench", {**settings, **seconds, "tau": tau_rows}, rows)


if __name__ == "__main__":
    main()
