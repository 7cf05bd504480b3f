"""Does width matter on `digits-clutter`? ResNet-20 at full width against uniform widths of half the FLOPs.

Both networks get the same samples, steps and recipe. Run from the root of the repository:

    python -m examples.benchmarks.clutter_difficulty --out examples/benchmarks/clutter_difficulty.json
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import sklearn
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

from examples.cifar_resnet import StageWidths, resnet20
from nni_dbs.data import Splits, digits_clutter, loader

WIDTHS: dict[str, StageWidths] = {"full": (16, 32, 64), "half": (11, 23, 45)}
MEGA_FLOPS = {"full": 40.813, "half": 20.232}  # multiply-adds of convolutions and classifier
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 32, 0.1, 5e-4, 0.2


def train(model: nn.Module, splits: Splits, epochs: int, seed: int) -> None:
    """SGD with Nesterov momentum on a one-cycle schedule; `seed` orders the samples."""
    batches = loader(splits.train, BATCH_SIZE, shuffle=True, seed=seed, drop_last=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs * len(batches), pct_start=WARM_UP
    )
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, splits: Splits) -> float:
    """Percentage of the test set that the model gets right."""
    model.eval()
    right = 0
    for images, labels in loader(splits.test, 250):
        predicted = model(images.contiguous(memory_format=torch.channels_last)).argmax(dim=1)  # (B,)
        right += int((predicted == labels).sum())
    return 100 * right / len(splits.test)  # type: ignore[arg-type]


def measure(name: str, seed: int, epochs: int) -> dict[str, float | str]:
    """Trains one network on one core and tests it; `seed` sets its weights and its order of samples."""
    torch.set_num_threads(1)
    splits = digits_clutter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet20(widths=WIDTHS[name]).to(memory_format=torch.channels_last)
    wall, cpu = time.perf_counter(), time.process_time()
    train(model, splits, epochs, seed)
    return {
        "network": name,
        "seed": seed,
        "train_wall_seconds": round(time.perf_counter() - wall, 1),
        "train_cpu_seconds": round(time.process_time() - cpu, 1),
        "test_accuracy": accuracy(model, splits),
    }


def summary(runs: list[dict]) -> dict[str, float]:
    """Mean and standard deviation of both networks, and the mean and smallest of the paired differences."""
    score = {name: [run["test_accuracy"] for run in runs if run["network"] == name] for name in WIDTHS}
    differences = [full - half for full, half in zip(score["full"], score["half"], strict=True)]
    result = {"mean_loss": statistics.mean(differences), "smallest_loss": min(differences)}
    for name, values in score.items():
        result[f"{name}_mean"] = statistics.mean(values)
        result[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return {key: round(value, 3) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, one core each")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    runs = []
    with ProcessPoolExecutor(args.processes) as pool:
        futures = [
            pool.submit(measure, name, seed, args.epochs) for seed in range(args.seeds) for name in WIDTHS
        ]
        for future in tqdm(as_completed(futures), total=len(futures), desc="trainings"):
            runs.append(future.result())
            tqdm.write(str(runs[-1]))
    runs.sort(key=lambda run: (run["network"], run["seed"]))

    result = summary(runs)
    for name in WIDTHS:
        print(f"{name} {MEGA_FLOPS[name]} M: {result[f'{name}_mean']:.2f} +- {result[f'{name}_std']:.2f} %")
    print(f"half the FLOPs lose {result['mean_loss']:.2f} points, {result['smallest_loss']:.2f} at the least")
    if args.out:
        report = {
            "command": shlex.join(["python", "-m", "examples.benchmarks.clutter_difficulty", *sys.argv[1:]]),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "scikit-learn": sklearn.__version__,
            },
            "settings": {
                "data": "digits_clutter(), its defaults",
                "widths": WIDTHS,
                "mega_flops": MEGA_FLOPS,
                "epochs": args.epochs,
                "batch_size": BATCH_SIZE,
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "warm_up": WARM_UP,
            },
            "summary": result,
            "runs": runs,
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
