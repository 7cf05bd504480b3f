"""What do a supernet's passes, steps and changes of width cost?

Four questions, answered with widths that are multiples of 8, with the channels in the order of `prefix_order`
and of `channel_order`:

* passes: forward and backward inside of `supernet.at`, the block's entry included, against the same of the
  network that `shrink` cuts. Aim: at most 1.15 times as long.
* sandwich steps of 4 networks (the largest, two random ones, the smallest): by masking, where every pass runs
  at full width through `supernet.gated`, against `SupernetStep`. The losses are the same. The networks are
  drawn anew for each step, so that kernels are prepared for new shapes as in training, or the same in every
  step. Aim: at least 1.8 times as long.
* parallel steps of 4 networks, each on a quarter of the images, against the serial sandwich, where each
  network sees all of them, and against serial passes over the quarters.
* changing all widths: entering and leaving `supernet.at`, and all that slicing costs in a step (that, the
  cutting of weights and the filling of their gradients: the difference to the shrunk network on tiny images),
  against a training step at the same random widths.

Passes have batches of 32 images, parallel steps and what they are held against of 64. `ratio` is `ms` over
`against_ms`. Run from the root of the repository:

    python -m examples.benchmarks.supernet_speed --out examples/benchmarks/supernet_speed.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import cycle, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.measure import Row, arguments, collect, medians, model_and_image, one_thread, report
from nni_dbs.sampling import Step, in_parallel, sandwich
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.steps import SupernetStep, kl_divergence
from nni_dbs.supernet import Supernet
from torch_pruning_adapters import channel_order, prefix_order, shrink

MODELS = ("resnet18", "mobilenet_v2")
SWITCHED_MODELS = ("resnet50", "densenet121")
RATIOS = (0.25, 0.5, 0.75)
NETWORKS = 4
Batch = tuple[Tensor, Tensor]


@lru_cache(maxsize=1)
def supernets(name: str) -> tuple[WidthSpace, dict[str, Supernet]]:
    """The space of a model in train mode, and its supernet for each order of channels."""
    model, image = model_and_image(name, 64)
    space = WidthSpace.from_model(model, image)
    orders = {
        "prefix": prefix_order(space.groups),
        "importance": channel_order(model, space.groups),
    }
    model.train()
    return space, {order: Supernet(model, space.groups, ranked) for order, ranked in orders.items()}


def random_batch(batch_size: int, image_size: int) -> Batch:
    """Images of noise with labels, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    return images, torch.randint(1000, (batch_size,), generator=generator)


def cross_entropy(batch: Batch, model: nn.Module) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def plain_pass(model: nn.Module, batch: Batch) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    cross_entropy(batch, model).backward()


def sliced_pass(supernet: Supernet, widths: Widths, batch: Batch) -> None:
    """Forward and backward of the supernet at `widths`."""
    supernet.model.zero_grad(set_to_none=True)
    with supernet.at(widths) as model:
        cross_entropy(batch, model).backward()


def supernet_step(supernet: Supernet, steps: Iterator[Step], batch: Batch) -> Callable[[], None]:
    """Every call takes the next step as a training loop would."""
    step = SupernetStep(supernet, steps, cross_entropy)

    def take() -> None:
        supernet.model.zero_grad(set_to_none=True)
        step(batch, supernet.model).backward()

    return take


def masked_step(supernet: Supernet, steps: Iterator[Step], batch: Batch) -> Callable[[], None]:
    """A distilled step in which every network runs at full width, with gates of 0 and 1."""
    images, labels = batch

    def take() -> None:
        supernet.model.zero_grad(set_to_none=True)
        teacher = None
        for widths in next(steps).networks:
            gates = {name: gate for name, gate in supernet.gates_of(widths).items() if not gate.all()}
            with supernet.gated(gates) as model:
                logits = model(images)
                if teacher is None:
                    F.cross_entropy(logits, labels).backward()
                    teacher = logits.detach()
                else:
                    kl_divergence(logits, teacher).backward()

    return take


def quarters_step(supernet: Supernet, steps: Iterator[Step], batch: Batch) -> Callable[[], None]:
    """One sliced pass after another, each over the network's part of the images."""
    images, labels = batch

    def take() -> None:
        supernet.model.zero_grad(set_to_none=True)
        networks = next(steps).networks
        parts = zip(images.chunk(len(networks)), labels.chunk(len(networks)), strict=True)
        for widths, part in zip(networks, parts, strict=True):
            with supernet.at(widths) as model:
                (cross_entropy(part, model) / len(networks)).backward()

    return take


def row(name: str, image_size: int, order: str, measured: str, ms: float, against: str, other: float) -> Row:
    return {
        "model": name,
        "image_size": image_size,
        "order": order,
        "measured": measured,
        "ms": ms,
        "against": against,
        "against_ms": other,
        "ratio": ms / other,
    }


def milliseconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median CPU time of each function, run in turns."""
    return {name: 1000 * seconds.cpu for name, seconds in medians(functions, repeats).items()}


def passes(name: str, ratio: float, image_size: int, batch_size: int, repeats: int) -> list[Row]:
    """One row for each order."""
    space, found = supernets(name)
    widths, batch = space.uniform(ratio), random_batch(batch_size, image_size)
    small = shrink(found["prefix"].model, space.groups, widths, found["prefix"].order)
    ms = milliseconds(
        {
            "shrunk": lambda: plain_pass(small, batch),
            **{order: partial(sliced_pass, supernet, widths, batch) for order, supernet in found.items()},
        },
        repeats,
    )
    return [
        row(name, image_size, order, f"pass at {ratio:g}", ms[order], "shrunk network", ms["shrunk"])
        for order in found
    ]


def sandwich_steps(name: str, image_size: int, batch_size: int, repeats: int) -> list[Row]:
    """Two rows for each order."""
    space, found = supernets(name)
    batch = random_batch(batch_size, image_size)

    def steps() -> Iterator[Step]:
        return sandwich(space, torch.Generator().manual_seed(0), NETWORKS)

    functions = {"masked": masked_step(found["prefix"], steps(), batch)}
    for order, supernet in found.items():
        functions[f"new {order}"] = supernet_step(supernet, steps(), batch)
        functions[f"same {order}"] = supernet_step(supernet, repeat(next(steps())), batch)
    ms = milliseconds(functions, repeats)
    return [
        row(name, image_size, order, "masked sandwich", ms["masked"], against, ms[f"{draw} {order}"])
        for order in found
        for draw, against in (("new", "sandwich"), ("same", "sandwich, same networks"))
    ]


def parallel_steps(name: str, image_size: int, batch_size: int, repeats: int) -> list[Row]:
    """Two rows for each order."""
    space, found = supernets(name)
    batch = random_batch(batch_size, image_size)

    def steps() -> Iterator[Step]:
        return sandwich(space, torch.Generator().manual_seed(0), NETWORKS)

    functions: dict[str, Callable[[], None]] = {}
    for order, supernet in found.items():
        functions[f"parallel {order}"] = supernet_step(supernet, in_parallel(steps()), batch)
        functions[f"sandwich {order}"] = supernet_step(supernet, steps(), batch)
        functions[f"serial quarters {order}"] = quarters_step(supernet, steps(), batch)
    ms = milliseconds(functions, repeats)
    return [
        row(name, image_size, order, "parallel", ms[f"parallel {order}"], against, ms[f"{against} {order}"])
        for order in found
        for against in ("sandwich", "serial quarters")
    ]


def switches(name: str, image_size: int, batch_size: int, repeats: int) -> list[Row]:
    """Two rows for each order."""
    space, found = supernets(name)
    generator = torch.Generator().manual_seed(0)
    fresh = cycle([space.sample(generator) for _ in range(64)])
    drawn = [space.sample(generator) for _ in range(NETWORKS)]
    small = [shrink(found["prefix"].model, space.groups, w, found["prefix"].order) for w in drawn]
    batch, tiny = random_batch(batch_size, image_size), random_batch(2, 32)

    def switch(supernet: Supernet) -> None:
        for _ in range(NETWORKS):
            with supernet.at(next(fresh)):
                pass

    def train(supernet: Supernet, images: Batch) -> None:
        for widths in drawn:
            sliced_pass(supernet, widths, images)

    def train_small() -> None:
        for model in small:
            plain_pass(model, tiny)

    functions: dict[str, Callable[[], None]] = {"tiny shrunk": train_small}
    for order, supernet in found.items():
        functions[f"switch {order}"] = partial(switch, supernet)
        functions[f"tiny {order}"] = partial(train, supernet, tiny)
    light = milliseconds(functions, 3 * repeats)
    heavy = milliseconds(
        {order: partial(train, supernet, batch) for order, supernet in found.items()}, repeats
    )
    rows = []
    for order in found:
        step = heavy[order] / NETWORKS
        switching = light[f"switch {order}"] / NETWORKS
        slicing = max(light[f"tiny {order}"] - light["tiny shrunk"], 0.0) / NETWORKS
        rows.append(row(name, image_size, order, "change of widths", switching, "training step", step))
        rows.append(row(name, image_size, order, "all of slicing", slicing, "training step", step))
    return rows


def cases(args: argparse.Namespace) -> list[Callable[[], list[Row]]]:
    if args.quick:
        quick = ("resnet18", 32, 8, args.repeats)
        return [
            partial(passes, "resnet18", 0.25, 32, 8, args.repeats),
            *(partial(measure, *quick) for measure in (sandwich_steps, parallel_steps, switches)),
        ]
    few = max(args.repeats // 3, 1)
    return [
        *(
            partial(passes, name, ratio, image_size, 32, repeats)
            for name in MODELS
            for image_size, repeats in ((64, args.repeats), (224, few))
            for ratio in RATIOS
        ),
        *(
            partial(sandwich_steps, name, image_size, 32, repeats)
            for name in MODELS
            for image_size, repeats in ((64, args.repeats), (128, few))
        ),
        *(partial(parallel_steps, name, 64, 64, max(args.repeats // 2, 1)) for name in MODELS),
        *(partial(switches, name, 64, 32, few) for name in SWITCHED_MODELS),
    ]


def main() -> None:
    args = arguments(__doc__, repeats=15)
    one_thread()
    rows = collect(lambda case: case(), cases(args))
    settings = {
        "divisor": 8,
        "min_ratio": 0.1,
        "networks_of_a_step": NETWORKS,
        "batch_size": 8 if args.quick else "32, parallel 64",
        "clock": "CPU seconds",
    }
    report(args, "supernet_speed", settings, rows)


if __name__ == "__main__":
    main()
