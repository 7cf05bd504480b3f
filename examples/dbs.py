"""An NNI script as NNI's documentation has it, with one class changed: DBS searches the widths.

    python -m examples.dbs

NNI's own pruners mask each layer by itself at a ratio that the user guesses. Here the evaluator trains the
model as a supernet, networks near the budget are scored by its metric, and widths are searched by gradient.
"""

from __future__ import annotations

from typing import Any

import nni
import torch
import torch.nn.functional as F
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from examples.cifar_resnet import resnet20

# was: from nni.compression.pruning import TaylorPruner as Pruner
from nni_dbs import DBSPruner as Pruner
from nni_dbs.data import digits, loader
from nni_dbs.training import accuracy

splits = digits(seed=0)
model = resnet20(num_classes=splits.num_classes)


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train(
    model: nn.Module,
    optimizer: Any,
    step: Any = training_step,
    lr_schedulers: None = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    model.train()
    steps = 0
    for epoch in range(max_epochs or 1):
        for batch in loader(splits.train, 64, shuffle=True, seed=epoch, drop_last=True):
            if steps == max_steps:
                return
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()
            steps += 1


def evaluate(model: nn.Module) -> float:
    return accuracy(model, splits.validation, device=torch.device("cpu"))


torch.manual_seed(0)
optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
train(model, optimizer, max_epochs=6)
print(f"full: {evaluate(model):.1f} %")

evaluator = TorchEvaluator(
    train, optimizer, training_step, dummy_input=torch.zeros(1, 3, 32, 32), evaluating_func=evaluate
)
config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]

pruner = Pruner(model, config_list, evaluator, divisor=4, points=16, evaluations=24, calibration_steps=8)
_, masks = pruner.compress(max_steps=None, max_epochs=3)  # of the supernet
small = pruner.export()

print(f"{pruner.budget}: {pruner.result.flops:,} of {pruner.result.full_flops:,} FLOPs")
print(f"searched: {evaluate(small):.1f} % before BatchNorm is estimated anew and before fine-tuning")
optimizer = torch.optim.SGD(small.parameters(), lr=0.02, momentum=0.9, nesterov=True)
train(small, optimizer, max_epochs=3)
print(f"fine-tuned: {evaluate(small):.1f} %, widths {dict(pruner.widths)}")
