"""An NNI script as NNI's documentation has it, with one class changed.

    python examples/drop_in.py

NNI masks each layer by itself and leaves the model as slow as it was; the pruner that takes its place decides
the widths of whole channel groups for the same `config_list`, and exports a smaller plain model.
"""

from __future__ import annotations

import torch
from torchvision.models import resnet18

# was: from nni.compression.pruning import L1NormPruner as Pruner
from nni_dbs import UniformPruner as Pruner

model = resnet18()
config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]

pruner = Pruner(model, config_list, example_inputs=torch.zeros(1, 3, 224, 224))
_, masks = pruner.compress()

small = pruner.export()
result = pruner.result
print(f"masks for {len(masks)} layers")
print(f"FLOPs  {result.full_flops:,} -> {result.flops:,}")
print(f"params {result.full_params:,} -> {sum(p.numel() for p in small.parameters()):,}")
