"""How many width vectors a second does `FlopsCost.batch` cost on one core?

Random widths in float64, in batches of 1,024 and of 65,536, without and with the gradient of the batch's
sum. The alternative, shrinking a copy and counting it with fvcore, is timed in the same run, and its count
must be the batch's value. Aim: 10^6 vectors a second for ResNet-50. Run from the root of the repository:

    python -m examples.benchmarks.cost_speed --out examples/benchmarks/cost_speed.json
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.benchmarks.measure import Row, arguments, collect, medians, model_and_image, one_thread, report
from nni_dbs.cost import FlopsCost, count_flops
from torch_pruning_adapters import ChannelGroup, find_channel_groups, shrink

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121")
BATCH_SIZES = (1024, 65536)
VECTORS_PER_TIMING = 65536  # small batches are called several times


def random_widths(groups: tuple[ChannelGroup, ...], batch_size: int) -> Tensor:
    """Uniformly drawn widths (B, G), float64."""
    steps = torch.tensor([g.step for g in groups], dtype=torch.float64)
    units = torch.tensor([g.size // g.step for g in groups], dtype=torch.float64)
    return (torch.rand(batch_size, len(groups), dtype=torch.float64) * units).floor().add(1) * steps


def measure(name: str, image_size: int, batch_sizes: tuple[int, ...], repeats: int) -> list[Row]:
    """One row for each batch size."""
    model, image = model_and_image(name, image_size)
    groups = find_channel_groups(model, image)
    cost = FlopsCost(model, image, groups)
    one = random_widths(groups, 1)
    widths = {g.name: int(w) for g, w in zip(groups, one[0], strict=True)}

    def prune_and_count() -> int:
        return count_flops(shrink(model, groups, widths), image)

    if prune_and_count() != int(cost.batch(one)):
        raise AssertionError(f"{name}: the cost of {widths} is not fvcore's count")
    rows = []
    for batch_size in batch_sizes:
        batch = random_widths(groups, batch_size)
        leaf = batch.clone().requires_grad_()
        calls = max(VECTORS_PER_TIMING // batch_size, 1)

        def forward(batch: Tensor = batch, calls: int = calls) -> None:
            for _ in range(calls):
                cost.batch(batch)

        def with_gradient(leaf: Tensor = leaf, calls: int = calls) -> None:
            for _ in range(calls):
                torch.autograd.grad(cost.batch(leaf).sum(), leaf)

        found = medians(
            {"forward": forward, "gradient": with_gradient, "prune_and_count": prune_and_count}, repeats
        )
        per_second = batch_size * calls / found["forward"].cpu
        rows.append(
            {
                "model": name,
                "groups": len(groups),
                "batch_size": batch_size,
                "per_second": per_second,
                "per_second_with_gradient": batch_size * calls / found["gradient"].cpu,
                "prune_and_count_seconds": found["prune_and_count"].cpu,
                "ratio": per_second * found["prune_and_count"].cpu,
            }
        )
    return rows


def main() -> None:
    args = arguments(__doc__, repeats=9)
    one_thread()
    models, image_size, batch_sizes = (("resnet18",), 32, (64,)) if args.quick else (MODELS, 224, BATCH_SIZES)
    rows = collect(lambda name: measure(name, image_size, batch_sizes, args.repeats), models)
    settings = {"image_size": image_size, "dtype": "float64", "clock": "CPU seconds"}
    report(args, "cost_speed", settings, rows)


if __name__ == "__main__":
    main()
