"""What does it cost to find the channel groups, beside torch-pruning's own graph?

`find_channel_groups` without and with its trial cuts (`verify`), and the construction of torch-pruning's
pruner, which builds its dependency graph and walks its groups once. All run in turns on 224x224 images. Run
from the root of the repository:

    python -m examples.benchmarks.grouping_speed --out examples/benchmarks/grouping_speed.json
"""

from __future__ import annotations

import torch_pruning as tp
from torch import Tensor, nn

from examples.benchmarks.measure import Row, arguments, collect, medians, model_and_image, one_thread, report
from torch_pruning_adapters import find_channel_groups

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "vgg16",
    "efficientnet_b0",
    "regnet_y_400mf",
)


def torch_pruning_pruner(model: nn.Module, image: Tensor) -> tp.pruner.BasePruner:
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    return tp.pruner.BasePruner(
        model,
        image,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[classifier],
        in_channel_groups={},  # the defaults are shared by all pruners of a process
        out_channel_groups={},
    )


def measure(name: str, image_size: int, repeats: int) -> list[Row]:
    """One row."""
    model, image = model_and_image(name, image_size)
    found = medians(
        {
            "groups": lambda: find_channel_groups(model, image, verify=False),
            "verified": lambda: find_channel_groups(model, image, verify=True),
            "torch_pruning": lambda: torch_pruning_pruner(model, image),
        },
        repeats,
    )
    groups, verified, peer = (found[key].cpu for key in ("groups", "verified", "torch_pruning"))
    return [
        {
            "model": name,
            "groups": len(find_channel_groups(model, image, verify=False)),
            "unverified_ms": 1000 * groups,
            "verified_ms": 1000 * verified,
            "torch_pruning_ms": 1000 * peer,
            "unverified/torch_pruning": groups / peer,
            "verified/unverified": verified / groups,
        }
    ]


def main() -> None:
    args = arguments(__doc__, repeats=7)
    one_thread()
    models, image_size = (("resnet18",), 32) if args.quick else (MODELS, 224)
    rows = collect(lambda name: measure(name, image_size, args.repeats), models)
    report(args, "grouping_speed", {"image_size": image_size, "clock": "CPU seconds"}, rows)


if __name__ == "__main__":
    main()
