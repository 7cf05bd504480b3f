"""The CIFAR ResNets of He et al. (2016) with a chosen width per stage.

The arithmetic is that of TAS (Dong and Yang, 2019): where a block halves the resolution or changes the number
of channels, its shortcut is a 1x1 convolution with batch normalisation. With 10 classes and 32x32 images
ResNet-20, 32, 56 and 110 then take 40.813, 69.125, 125.748 and 253.150 million multiply-adds.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

StageWidths = tuple[int, int, int]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first convolution strides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A stem and three stages of basic blocks at full, half and quarter resolution, then a linear classifier.

    Args:
        depth: layers counted as in the paper, 6 n + 2: each stage has n blocks.
        num_classes: size of the output.
        widths: channels of the three stages; the stem has those of the first.

    Raises:
        ValueError: the depth is not 6 n + 2 with n at least 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, widths: StageWidths = (16, 32, 64)) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6 n + 2; choose 8, 14, 20, 32, 56, 110, ...")
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stage1 = _stage(blocks, widths[0], widths[0], stride=1)
        self.stage2 = _stage(blocks, widths[0], widths[1], stride=2)
        self.stage3 = _stage(blocks, widths[1], widths[2], stride=2)
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))  # (B, widths[0], H, W)
        x = self.stage3(self.stage2(self.stage1(x)))  # (B, widths[2], H / 4, W / 4)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (B, widths[2])
        return self.fc(x)


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, widths: StageWidths = (16, 32, 64)) -> CifarResNet:
    """ResNet-20: 40.813 M multiply-adds at the default widths and 10 classes."""
    return CifarResNet(20, num_classes, widths)


def resnet32(num_classes: int = 10, widths: StageWidths = (16, 32, 64)) -> CifarResNet:
    """ResNet-32: 69.125 M multiply-adds at the default widths and 10 classes."""
    return CifarResNet(32, num_classes, widths)


def resnet56(num_classes: int = 10, widths: StageWidths = (16, 32, 64)) -> CifarResNet:
    """ResNet-56: 125.748 M multiply-adds at the default widths and 10 classes."""
    return CifarResNet(56, num_classes, widths)


def resnet110(num_classes: int = 10, widths: StageWidths = (16, 32, 64)) -> CifarResNet:
    """ResNet-110: 253.150 M multiply-adds at the default widths and 10 classes."""
    return CifarResNet(110, num_classes, widths)
