"""Detectors up to their non-maximum suppression, where outputs can still be compared and exported.

Behind it, rounding decides which boxes are left. Both modules take images (B, 3, H, W) in place of a list,
skip the detector's resizing and hold the detector as `model`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from torch_pruning_adapters import ChannelGroup, Member

BOXES = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.6, 0.9), (0.5, 0.5, 0.7, 0.6))  # shares of the image


class OneStage(nn.Module):
    """RetinaNet, FCOS and SSD: the backbone's features and the heads' maps of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.model.head(list(self.model.backbone(images).values()))


class TwoStage(nn.Module):
    """Faster, Mask and Keypoint R-CNN: maps of the proposals, and all heads on the fixed `BOXES`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> dict[str, Any]:
        height, width = images.shape[-2:]
        boxes = [images.new_tensor(BOXES) * images.new_tensor([width, height, width, height])] * len(images)
        sizes = [(height, width)] * len(images)
        features, heads = self.model.backbone(images), self.model.roi_heads
        objectness, deltas = self.model.rpn.head(list(features.values()))
        found: dict[str, Any] = {"objectness": objectness, "deltas": deltas}
        found["boxes"] = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, sizes)))
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                pooled = getattr(heads, f"{kind}_roi_pool")(features, boxes, sizes)
                found[kind] = getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled))
        return found


def before_suppression(model: nn.Module) -> nn.Module:
    """The part of a torchvision detector whose outputs can be compared."""
    return TwoStage(model) if hasattr(model, "roi_heads") else OneStage(model)


def groups_of_wrapped(groups: Iterable[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """A detector's groups, under the same names, for the module that holds it as `model`."""

    def inside(layer: str) -> str:
        return f"model.{layer}".rstrip(".")

    def member(m: Member) -> Member:
        return replace(m, layer=inside(m.layer), reader=None if m.reader is None else inside(m.reader))

    return tuple(
        replace(
            g,
            members=tuple(map(member, g.members)),
            products=tuple(replace(p, layer=inside(p.layer)) for p in g.products),
        )
        for g in groups
    )
