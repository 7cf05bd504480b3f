"""How closely do uniform widths fill a FLOPs budget, and how long does that take?

`project` of the full widths onto the budget, with any number of channels and with multiples of 8. For each:
fvcore's count of the network that `shrink` makes, the share of the budget in use, the groups that could
still take their next width, and seconds. `cost_seconds` is the analysis that a model needs once;
`project_seconds` and `shrink_seconds` come after it, for each budget. Aims: 98 to 100 % with any number of
channels, no group that can grow with multiples of 8, under a second each. Run from the root of the
repository:

    python -m examples.benchmarks.budget_hit --out examples/benchmarks/budget_hit.json
"""

from __future__ import annotations

from functools import partial

from examples.benchmarks.measure import Row, arguments, collect, medians, model_and_image, one_thread, report
from nni_dbs import Budget, FlopsCost, Widths, WidthSpace, project
from nni_dbs.cost import Bounds, count_flops
from torch_pruning_adapters import find_channel_groups, shrink

CASES = (("resnet18", "1.04G"), ("mobilenet_v2", "150M"), ("resnet50", "2.0G"))
DIVISORS = (1, 8)


def can_grow(widths: Widths, space: WidthSpace, bounds: Bounds) -> list[str]:
    """The groups that could take their next width without leaving the budget."""
    growing = []
    for name in space.names:
        wider = [w for w in space.choices(name) if w > widths[name]]
        if wider and bounds.fits({**widths, name: wider[0]}):
            growing.append(name)
    return growing


def measure(name: str, budget: str, image_size: int, repeats: int) -> list[Row]:
    """One row for each divisor."""
    model, image = model_and_image(name, image_size)
    groups = find_channel_groups(model, image)
    cost = FlopsCost(model, image, groups)
    bounds = Budget.parse(budget).bound({"flops": cost})
    rows = []
    for divisor in DIVISORS:
        space = WidthSpace(groups, divisor=divisor)
        widths = project(space.largest(), space, bounds)
        found = medians(
            {
                "cost": partial(FlopsCost, model, image, groups),
                "project": partial(project, space.largest(), space, bounds),
                "shrink": partial(shrink, model, groups, widths),
            },
            repeats,
        )
        counted = count_flops(shrink(model, groups, widths), image)
        if counted != cost(widths):
            raise AssertionError(f"{name}: costs {cost(widths)}, but fvcore counts {counted}")
        rows.append(
            {
                "model": name,
                "budget": budget,
                "divisor": divisor,
                "fvcore_flops": counted,
                "percent_of_budget": 100 * bounds.used(widths),
                "groups_that_can_grow": len(can_grow(widths, space, bounds)),
                "cost_seconds": found["cost"].wall,
                "project_seconds": found["project"].wall,
                "shrink_seconds": found["shrink"].wall,
            }
        )
    return rows


def main() -> None:
    args = arguments(__doc__, repeats=5)
    one_thread()
    cases, image_size = ((("resnet18", "50%"),), 32) if args.quick else (CASES, 224)
    rows = collect(lambda case: measure(case[0], case[1], image_size, args.repeats), cases)
    settings = {"image_size": image_size, "min_ratio": 0.1, "clock": "wall seconds"}
    report(args, "budget_hit", settings, rows)


if __name__ == "__main__":
    main()
