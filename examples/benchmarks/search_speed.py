"""How long DBS searches when all evaluations are at hand: points, predictor, gradient search, projection.

    python -m examples.benchmarks.search_speed --out FILE

Spaces are those of whole torchvision models, scores a made-up function of the widths, so that only the search
itself is timed. Random search draws and projects as many networks beside it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from examples.benchmarks.measure import Row, arguments, collect, model_and_image, one_thread, report
from nni_dbs import Budget, FlopsCost, Widths, WidthSpace
from nni_dbs.algorithms.dbs import DBSSearch
from nni_dbs.search import RandomSearch

T = TypeVar("T")


class Case(NamedTuple):
    model: str
    points: int
    latent: bool = False


CASES = (Case("resnet50", 1000), Case("resnet50", 1000, latent=True), Case("mobilenet_v2", 1000))
QUICK = (Case("resnet18", 12),)
SIZE = 64  # pixels; the widths' space does not depend on it
ROUND = 16  # networks of a round


def score(space: WidthSpace, widths: Widths) -> float:
    """A smooth function of the ratios with an optimum of its own."""
    ratios = space.encode(widths) / space.encode({})
    weight = torch.linspace(0.5, 1.5, len(ratios), dtype=torch.float64)
    return float((weight * ratios.log()).mean() - (ratios[1:] - ratios[:-1]).square().mean())


def timed(fn: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    found = fn()
    return found, time.perf_counter() - started


def rows_of(case: Case, repeats: int) -> list[Row]:
    model, image = model_and_image(case.model, SIZE)
    space = WidthSpace.from_model(model, image)
    bounds = Budget.parse(0.5).bound({"flops": FlopsCost(model, image, space.groups)})
    rows = []
    for seed in range(repeats):
        make = functools.partial(DBSSearch, space, bounds, seed, points=case.points, latent=case.latent)
        search, points = timed(make)
        asked, first = timed(functools.partial(search.ask, case.points))
        for widths in asked:
            search.tell(widths, score(space, widths))
        _, fit = timed(search.fit)
        asked, gradient = timed(functools.partial(search.ask, ROUND))
        for widths in asked:
            search.tell(widths, score(space, widths))
        _, choice = timed(search.best)
        random = RandomSearch(space, bounds, seed)
        _, drawn = timed(functools.partial(random.ask, case.points))
        best = max(score(space, widths) for widths in asked)
        rows.append(
            {
                "model": case.model,
                "variant": "latent" if case.latent else "relaxed",
                "groups": search.predictor.options.shape[0],
                "points": case.points,
                "points_s": points + first,
                "fit_s": fit,
                "round_s": gradient,
                "choice_s": choice,
                "all_s": points + first + fit + gradient + choice,
                "random_s": drawn,
                "round_beats_points": best > max(score(space, widths) for widths in search.points),
            }
        )
    return rows


def main() -> None:
    args = arguments(__doc__, 1)
    one_thread()
    cases = QUICK if args.quick else CASES
    rows = collect(lambda case: rows_of(case, args.repeats), cases)
    report(args, "search_speed", {"size": SIZE, "round": ROUND}, rows)


if __name__ == "__main__":
    main()
