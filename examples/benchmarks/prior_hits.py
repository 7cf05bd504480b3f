"""How often do drawn networks lie near a small budget, with and without PSE-Net's prior distribution?

    python -m examples.benchmarks.prior_hits --out examples/benchmarks/prior_hits.json

The share of networks within 5 % of 15 % of the full FLOPs: `uniform`, where each choice of a group has the
same chance; `prior`, drawn from the prior of a supernet of which nothing is known yet; `searched`, the same
as a search proposes them, projected into the budget. No network is drawn in vain: there is no rejection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.benchmarks.measure import Row, arguments, collect, model_and_image, one_thread, report
from nni_dbs import Budget, FlopsCost, WidthSpace
from nni_dbs.pool import draw, draw_evenly, tilted
from nni_dbs.search import PriorSearch

SHARE, TOLERANCE = 0.15, 0.05
AIM = 0.97  # of its budget, at which `tilted` aims
MODELS = ("resnet18", "mobilenet_v2", "resnet50", "chain of 10")


def model_of(name: str) -> tuple[nn.Module, Tensor, int]:
    """A model, an image, and the divisor of its widths."""
    if name == "chain of 10":
        torch.manual_seed(0)
        layers = [nn.Conv2d(3 if i == 0 else 40, 40, 3, padding=1) for i in range(11)]
        return nn.Sequential(*layers), torch.zeros(1, 3, 8, 8), 4
    return *model_and_image(name, 64), 8


def rows_of(name: str, draws: int, proposals: int) -> list[Row]:
    model, image, divisor = model_of(name)
    space = WidthSpace.from_model(model, image, divisor=divisor)
    flops = FlopsCost(model, image, space.groups)
    generator = torch.Generator().manual_seed(0)

    def near(networks: Tensor) -> float:
        used = flops.batch(networks) / (SHARE * flops.full)
        return float(((used - 1).abs() <= TOLERANCE).double().mean())

    chances = tilted(space, Budget.parse(SHARE / AIM).bound({"flops": flops}))
    bounds = Budget.parse(SHARE * (1 + 0.8 * TOLERANCE)).bound({"flops": flops})
    proposed = PriorSearch(space, bounds).ask(proposals)
    uniform = near(draw_evenly(space, 10 * draws, generator))
    prior = near(draw(space, chances, draws, generator))
    searched = near(torch.stack([space.encode(widths) for widths in proposed]))
    return [
        {
            "model": name,
            "groups": sum(len(space.choices(group)) > 1 for group in space.names),
            "uniform": uniform,
            "prior": prior,
            "searched": searched,
            "prior/uniform": prior / uniform if uniform else float("inf"),
            "searched/uniform": searched / uniform if uniform else float("inf"),
        }
    ]


def main() -> None:
    args = arguments(__doc__, 1)
    one_thread()
    draws, proposals = (2000, 10) if args.quick else (40000, 200)
    models = MODELS[:1] if args.quick else MODELS
    settings = {"share": SHARE, "tolerance": TOLERANCE, "draws": draws, "proposals": proposals}
    rows = collect(lambda name: rows_of(name, draws, proposals), models)
    report(args, "prior_hits", settings, rows)


if __name__ == "__main__":
    main()
