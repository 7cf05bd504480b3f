"""How fast is `shrink`, beside torch-pruning and NNI's `ModelSpeedup`?

Every group is cut to half its channels, ranked by L2 norm, by

* `shrink` with a given order of channels, and with the default one (computed inside);
* torch-pruning: a deep copy of the model (it prunes in place), the pruner's construction and one step;
* NNI: `ModelSpeedup(...).speedup_model()` on a ready copy, with the masks of `UniformPruner`.

All must end at the same number of parameters. The groups that `shrink` takes are found once for a model;
their price stands beside it. All get images of 224x224. Aims: 10 times faster than torch-pruning, 50 times
faster than NNI. Run from the root of the repository:

    python -m examples.benchmarks.surgery_speed --out examples/benchmarks/surgery_speed.json
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from examples.benchmarks.grouping_speed import torch_pruning_pruner
from examples.benchmarks.measure import (
    Row,
    arguments,
    collect,
    median,
    medians,
    model_and_image,
    one_thread,
    report,
    timed,
)
from nni_dbs import FlopsCost, UniformPruner
from torch_pruning_adapters import channel_order, find_channel_groups, shrink

MODELS = ("resnet50", "densenet121")
Masks = dict[str, dict[str, Tensor]]


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def prune_with_torch_pruning(model: nn.Module, image: Tensor) -> nn.Module:
    """Copies, builds the pruner and prunes half of the channels."""
    small = copy.deepcopy(model)
    torch_pruning_pruner(small, image).step()
    return small


def half_masks(model: nn.Module, image: Tensor) -> Masks:
    """`UniformPruner`'s masks at the FLOPs of the network with half the channels."""
    groups = find_channel_groups(model, image)
    flops = FlopsCost(model, image, groups)({g.name: g.size // 2 for g in groups if g.frozen is None})
    pruner = UniformPruner(
        copy.deepcopy(model),
        [{"op_types": ["Conv2d"]}],
        budget=float(flops),
        example_inputs=image,
        divisor=1,
        quiet=True,
    )
    _, masks = pruner.compress()
    return masks


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps NNI's logs, warnings and prints off the terminal."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def speed_up_with_nni(model: nn.Module, image: Tensor, masks: Masks) -> None:
    """NNI's surgery, in place."""
    from nni.compression.speedup import ModelSpeedup  # warns on import

    graph = torch.fx.symbolic_trace(model)
    ModelSpeedup(model, image, masks, graph_module=graph).speedup_model()


def measure(name: str, image_size: int, repeats: int, nni_repeats: int) -> list[Row]:
    """One row."""
    model, image = model_and_image(name, image_size)
    groups = find_channel_groups(model, image)
    order = channel_order(model, groups)
    widths = {g.name: g.size // 2 for g in groups if g.frozen is None}
    found = medians(
        {
            "given": lambda: shrink(model, groups, widths, order),
            "default": lambda: shrink(model, groups, widths),
            "groups": lambda: find_channel_groups(model, image, verify=False),
            "torch_pruning": lambda: prune_with_torch_pruning(model, image),
        },
        repeats,
    )
    with silenced():
        masks = half_masks(model, image)
        copies = [copy.deepcopy(model) for _ in range(nni_repeats)]
        nni = median([timed(partial(speed_up_with_nni, target, image, masks)) for target in copies])

    params = {
        "shrink": count_parameters(shrink(model, groups, widths)),
        "torch-pruning": count_parameters(prune_with_torch_pruning(model, image)),
        "NNI": count_parameters(copies[0]),
    }
    if len(set(params.values())) > 1:
        raise AssertionError(f"{name}: unequal numbers of parameters: {params}")
    given, default, grouping = found["given"].cpu, found["default"].cpu, found["groups"].cpu
    torch_pruning = found["torch_pruning"].cpu
    return [
        {
            "model": name,
            "params": params["shrink"],
            "given_order_ms": 1000 * given,
            "default_order_ms": 1000 * default,
            "groups_ms": 1000 * grouping,
            "torch_pruning_ms": 1000 * torch_pruning,
            "nni_ms": 1000 * nni.cpu,
            "torch_pruning/given": torch_pruning / given,
            "torch_pruning/default": torch_pruning / default,
            "torch_pruning/(groups+default)": torch_pruning / (grouping + default),
            "nni/given": nni.cpu / given,
            "nni/default": nni.cpu / default,
        }
    ]


def main() -> None:
    args = arguments(__doc__, repeats=7)
    one_thread()
    models = ("resnet18",) if args.quick else MODELS
    image_size = 32 if args.quick else 224
    nni_repeats = min(args.repeats, 2)
    rows = collect(lambda name: measure(name, image_size, args.repeats, nni_repeats), models)
    settings = {
        "image_size": image_size,
        "nni_repeats": nni_repeats,
        "kept_ratio": 0.5,
        "clock": "CPU seconds",
    }
    report(args, "surgery_speed", settings, rows)


if __name__ == "__main__":
    main()
