"""One network for every width: trained once by the sandwich rule, narrowed afterwards without more training.

    python -m examples.slimmable

A loop as anyone writes it; only its training step is wrapped. The narrow networks share the weights of the
full one, so a single training gives the whole curve of accuracy over FLOPs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.cifar_resnet import resnet20
from nni_dbs import FlopsCost, Supernet, SupernetStep, WidthSpace
from nni_dbs.data import digits, loader
from nni_dbs.evaluate import recalibrate_batchnorm, score
from nni_dbs.sampling import sandwich
from nni_dbs.training import accuracy
from torch_pruning_adapters import prefix_order, shrink

EPOCHS = 8


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


torch.manual_seed(0)
splits = digits(seed=0)
model = resnet20(num_classes=splits.num_classes)
example = torch.zeros(1, *splits.input_shape)

space = WidthSpace.from_model(model, example, min_ratio=0.25, divisor=4)
supernet = Supernet(model, space.groups, prefix_order(space.groups))
step = SupernetStep(supernet, sandwich(space, torch.Generator().manual_seed(0)), training_step)

batches = [loader(splits.train, 64, shuffle=True, seed=epoch, drop_last=True) for epoch in range(EPOCHS)]
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=sum(map(len, batches)))
model.train()
for epoch, epoch_batches in enumerate(batches, start=1):
    for batch in epoch_batches:
        optimizer.zero_grad()
        loss = step(batch, model)  # was: training_step(batch, model)
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}, summed over the networks of the last step")


def evaluate(model: nn.Module) -> float:
    return accuracy(model, splits.test, device=torch.device("cpu"))


flops = FlopsCost(model, example, space.groups)
for ratio in (1.0, 0.75, 0.5, 0.25):
    widths = space.uniform(ratio)
    found = score(supernet, widths, evaluate, loader(splits.train, 64))
    print(f"width {ratio:.0%}: {flops(widths):>12,} FLOPs, {found:.1f} % of the test digits")

small = shrink(model, space.groups, space.uniform(0.25), supernet.order)
recalibrate_batchnorm(small, loader(splits.train, 64))
print(f"cut out at 25%: {sum(p.numel() for p in small.parameters()):,} parameters, {evaluate(small):.1f} %")
