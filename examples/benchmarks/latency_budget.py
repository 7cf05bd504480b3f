"""Is a latency budget kept by the network that comes out, timed beside the original?

    python -m examples.benchmarks.latency_budget --out FILE

Half the measured latency, by equal ratios and by DBS (whose scores are a made-up function of the widths, so
that nothing needs to be trained). What is exported is timed with the original in turns, in one run; `ratio`
is that of the medians, and `believed` what the pruner had measured. `fit_error` is that of the latency model
on widths which it was not fitted to. The process runs one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from examples.benchmarks.measure import Row, arguments, collect, model_and_image, one_thread, report
from nni_dbs import DBSPruner, UniformPruner
from nni_dbs.latency import medians_ms
from nni_dbs.plugin.pruner import WidthPruner

BUDGET = 0.5
MODEL = "resnet18"
SIZE = 128
CONFIG = [{"op_types": ["Conv2d"]}]


def score(model: nn.Module) -> float:
    """The mean logarithm of the widths."""
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    return float(torch.tensor(widths).double().log().mean())


def no_training(*_: Any, **__: Any) -> None:
    """The pruner's evaluator is asked for scores only."""


def uniform(model: nn.Module, image: Tensor, seed: int) -> WidthPruner:
    pruner = UniformPruner(
        model, CONFIG, example_inputs=image, budget={"latency_ms": BUDGET}, seed=seed, quiet=True
    )
    pruner.compress()
    return pruner


def dbs(model: nn.Module, image: Tensor, seed: int) -> WidthPruner:
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    evaluator = TorchEvaluator(
        no_training, optimizer, lambda batch, model: None, dummy_input=image, evaluating_func=score
    )
    pruner = DBSPruner(
        model, CONFIG, evaluator, budget={"latency_ms": BUDGET}, points=24, evaluations=40,
        calibration_steps=0, seed=seed, quiet=True,
    )  # fmt: skip
    pruner.compress(max_steps=0, max_epochs=None)
    return pruner


METHODS: tuple[Callable[[nn.Module, Tensor, int], WidthPruner], ...] = (uniform, dbs)


def row(method: Callable[[nn.Module, Tensor, int], WidthPruner], seed: int, size: int) -> Row:
    model, image = model_and_image(MODEL, size)
    pruner = method(model, image, seed)
    result, small = pruner.result, pruner.export().eval()
    pruner.unwrap_model()
    full_ms, small_ms = medians_ms([model.eval(), small], image, turns=9, seconds=0.2)
    assert result.latency_ms is not None and result.full_latency_ms is not None
    return {
        "model": MODEL,
        "method": method.__name__,
        "seed": seed,
        "full_ms": full_ms,
        "pruned_ms": small_ms,
        "ratio": small_ms / full_ms,
        "kept": small_ms <= BUDGET * full_ms,
        "believed": result.latency_ms / result.full_latency_ms,
        "fit_error": result.latency_error,
        "flops_ratio": result.flops / result.full_flops,
        "score": score(small),
    }


def main() -> None:
    args = arguments(__doc__, 3)
    one_thread()
    size = 32 if args.quick else SIZE
    cases = [(method, seed) for method in METHODS for seed in range(args.repeats)]
    rows = collect(lambda case: [row(case[0], case[1], size)], cases)
    report(args, "latency_budget", {"model": MODEL, "size": size, "budget": BUDGET}, rows)


if __name__ == "__main__":
    main()
