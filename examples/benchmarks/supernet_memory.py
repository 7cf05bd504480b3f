"""How much memory does a step of a supernet need at its peak?

Counted are all bytes that torch's allocator hands out between the start of a step, when no parameter has a
gradient, and the end of its backward pass: its records of every allocation and release, from torch's
profiler, are added up, and the largest sum is the peak. This misses nothing that tensors and kernels take
(oneDNN's buffers come from the same allocator), needs no sampling, and does not depend on the load of the
machine; the resident set of the process would add what the system's allocator keeps for later. The largest
of `repeats` counts is reported. Parameters and the batch are there before and do not count.

Steps (batch of 32, widths multiples of 8):

* plain: the model itself;
* pass at 0.5: inside of `supernet.at`;
* sandwich: `SupernetStep` with the largest, two random and the smallest network;
* masked sandwich: the same networks through `supernet.gated`, every pass at full width;
* parallel: the same four at once, each on a quarter of the images.

Aim: a sandwich needs a plain step's peak and one more set of gradients (`of_aim` at most 1). Run from the
root of the repository:

    python -m examples.benchmarks.supernet_memory --out examples/benchmarks/supernet_memory.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, product

import torch
from torch.autograd.profiler import profile

from examples.benchmarks.measure import Row, arguments, collect, one_thread, report
from examples.benchmarks.supernet_speed import (
    MODELS,
    NETWORKS,
    masked_step,
    plain_pass,
    random_batch,
    sliced_pass,
    supernet_step,
    supernets,
)
from nni_dbs.sampling import Step, in_parallel, sandwich

MEGABYTE = 1e6


def peak(step: Callable[[], None]) -> int:
    """Largest number of bytes that are allocated at once during a call, beyond those before it."""
    with profile(profile_memory=True) as recorded:
        step()
    records = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())))


def measure(name: str, image_size: int, batch_size: int, repeats: int) -> list[Row]:
    """One row for each step and, where it matters, order."""
    space, found = supernets(name)
    model = found["prefix"].model
    batch = random_batch(batch_size, image_size)

    def steps() -> Iterator[Step]:
        return sandwich(space, torch.Generator().manual_seed(0), NETWORKS)

    calls: dict[tuple[str, str], Callable[[], None]] = {
        ("plain", "any"): lambda: plain_pass(model, batch),
        ("masked sandwich", "any"): masked_step(found["prefix"], steps(), batch),
        ("parallel", "any"): supernet_step(found["prefix"], in_parallel(steps()), batch),
    }
    for order, supernet in found.items():
        calls["pass at 0.5", order] = partial(sliced_pass, supernet, space.uniform(0.5), batch)
        calls["sandwich", order] = supernet_step(supernet, steps(), batch)

    peaks: dict[tuple[str, str], float] = {}
    for key, call in calls.items():
        counts = []
        for _ in range(repeats):
            model.zero_grad(set_to_none=True)
            counts.append(peak(call))
        peaks[key] = max(counts) / MEGABYTE
    gradients = sum(p.numel() * p.element_size() for p in model.parameters()) / MEGABYTE
    plain = peaks["plain", "any"]
    return [
        {
            "model": name,
            "image_size": image_size,
            "step": step,
            "order": order,
            "peak_mb": mb,
            "gradients_mb": gradients,
            "of_plain": mb / plain,
            "of_aim": mb / (plain + gradients),
        }
        for (step, order), mb in peaks.items()
    ]


def main() -> None:
    args = arguments(__doc__, repeats=2)
    one_thread()
    models = ("resnet18",) if args.quick else MODELS
    image_sizes, batch_size = ((32,), 8) if args.quick else ((64, 128), 32)
    cases = list(product(models, image_sizes))
    rows = collect(lambda case: measure(case[0], case[1], batch_size, args.repeats), cases)
    settings = {
        "batch_size": batch_size,
        "divisor": 8,
        "min_ratio": 0.1,
        "networks_of_a_step": NETWORKS,
        "counted": "bytes of torch's allocator",
    }
    report(args, "supernet_memory", settings, rows)


if __name__ == "__main__":
    main()
