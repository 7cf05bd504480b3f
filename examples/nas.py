"""NNI's NAS over the widths of a network: by trials, or with weights and widths trained together.

    python -m examples.nas dbs      # or evolution: trials, each a network that is trained for an epoch
    python -m examples.nas dmcp     # or tas, dsa: one training

To run the trials on NNI's training service, leave out `config`, which is for this process alone, and set
`experiment.config.trial_concurrency` and `max_trial_number`.
"""

from __future__ import annotations

import sys
from typing import Any

import nni
import torch
import torch.nn.functional as F
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from torch import nn

from nni_dbs import DBSStrategy, DMCPStrategy, DSAStrategy, EvolutionStrategy, TASStrategy, WidthModelSpace
from nni_dbs.data import digits, loader
from nni_dbs.training import accuracy

TRIALS = 12
STRATEGIES = {
    "dbs": lambda: DBSStrategy(points=8),
    "evolution": EvolutionStrategy,
    "dmcp": DMCPStrategy,
    "tas": TASStrategy,
    "dsa": DSAStrategy,
}


def train(model: nn.Module, epochs: int) -> None:
    splits = digits(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        for images, labels in loader(splits.train, 64, shuffle=True, seed=epoch, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def evaluate(model: nn.Module) -> None:
    """A trial: NNI hands it a narrow network."""
    train(model, epochs=1)
    nni.report_final_result(accuracy(model, digits(seed=0).validation, device=torch.device("cpu")))


def main(name: str) -> None:
    torch.manual_seed(0)
    space = WidthModelSpace(
        "examples.cifar_resnet:resnet20",
        input=(3, 32, 32),
        budget=0.5,
        arguments={"widths": [8, 16, 32]},
        divisor=2,
    )
    evaluator: Any = FunctionalEvaluator(evaluate)
    config = NasExperimentConfig("sequential", "raw", "local")
    config.max_trial_number = TRIALS
    if name in ("dmcp", "tas", "dsa"):
        splits = digits(seed=0)
        evaluator = Classification(
            num_classes=10,
            learning_rate=0.01,
            max_epochs=6,
            train_dataloaders=DataLoader(splits.train, 32, shuffle=True, drop_last=True),
            val_dataloaders=DataLoader(splits.validation, 32),
            logger=False,
            enable_checkpointing=False,
        )
    experiment = NasExperiment(space, evaluator, STRATEGIES[name](), config)
    experiment.run()
    (sample,) = experiment.export_top_models(1, formatter="dict")
    (small,) = experiment.export_top_models(1, formatter="instance")
    experiment.stop()
    train(small, epochs=12)
    widths = space.widths.from_nni(sample)
    test = accuracy(small, digits(seed=0).test, device=torch.device("cpu"))
    print(dict(widths))
    print(f"{name}: {space.bounds.used(widths):.1%} of the budget, {test:.2f} % of the test images")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "dbs")
