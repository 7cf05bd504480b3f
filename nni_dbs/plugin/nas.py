"""The widths of a model as a model space of NNI's NAS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nni
import torch
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.space import ExecutableModelSpace
from torch import nn

from nni_dbs.cost import FlopsCost, ParamsCost
from nni_dbs.models import build_model
from nni_dbs.problem import Problem
from nni_dbs.result import load_weights
from nni_dbs.space import Widths, WidthSpace
from torch_pruning_adapters import channel_order, shrink
from torch_pruning_adapters.importance import Order


class WidthModelSpace(ModelSpace):
    """All narrower versions of a model, as a model space for NNI's NAS strategies.

    Use it where a NAS experiment exists already, or where each network is to be trained by trials of a NAS
    evaluator. Each group of coupled channels is one choice of NNI's, called like the group. Frozen (by a
    sample, or in a trial), the space is the user's own model with fewer channels, cut from the full model's
    weights: the most important channels stay.

    Trials build the model anew from these arguments, so it is named or importable, and weights come from a
    file that the trials can read.

    NNI's own strategies know no budget; filter what they propose: `Chain(Random(), Filter(space.fits))`.

    Args:
        model: `resnet18`, `package.module:callable` (see `build_model`), or a callable that builds it.
        input: Shape of one sample: (3, 224, 224).
        budget: As `Budget.parse` takes it; of FLOPs and parameters.
        arguments: Keyword arguments of the builder.
        weights: safetensors file with the full model's state, a supernet's for example; default: as built.
        min_ratio, divisor: See `WidthSpace`.
        ignore: Layers whose channels stay, as for `find_channel_groups`.

    Attributes:
        model: The full model.
        widths: What it may be made smaller to; a `WidthSpace`.
        order: Which channels of each group stay, as `shrink` takes it.

    Raises:
        BudgetError: No network keeps the budget.
        ModelError: The model cannot be built.
        ResultError: The file of weights is missing or of another model.
    """

    def __init__(
        self,
        model: str | Callable[..., nn.Module],
        input: Sequence[int],
        budget: float | str | dict[str, float | str],
        arguments: dict[str, Any] | None = None,
        weights: str | None = None,
        min_ratio: float = 0.1,
        divisor: int = 8,
        ignore: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model, self.widths = _built(model, input, arguments, weights, min_ratio, divisor, ignore)
        self.order: Order = channel_order(self.model, self.widths.groups)
        self.example_inputs = torch.zeros(1, *input)
        costs = {
            "flops": FlopsCost(self.model, self.example_inputs, self.widths.groups),
            "params": ParamsCost(self.model, self.widths.groups),
        }
        self.problem = Problem(self.widths, costs, self.order, budget)
        self.bounds = self.problem.bounds()
        for name, entry in self.widths.to_nni().items():
            self.add_mutable(nni.choice(name, entry["_value"]))

    @classmethod
    def create_fixed_module(
        cls,
        sample: Mapping[str, Any],
        model: str | Callable[..., nn.Module],
        input: Sequence[int],
        budget: Any,
        *args: Any,
        **kwargs: Any,
    ) -> nn.Module:
        """What NNI makes of the constructor's arguments in a trial: one network of the space."""
        full, widths = _built(model, input, *args, **kwargs)
        return shrink(full, widths.groups, _network(widths, sample))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def freeze(self, sample: Mapping[str, Any]) -> nn.Module:
        """The network of a sample, with the present weights of the full model."""
        self.validate(sample)
        return shrink(self.model, self.widths.groups, _network(self.widths, sample), self.order)

    def fits(self, model: ExecutableModelSpace) -> bool:
        """Whether a network that a strategy proposes keeps the budget; for NNI's `Filter`."""
        return self.bounds.fits(_network(self.widths, model.sample))


def sample_of(space: WidthSpace, widths: Mapping[str, int]) -> dict[str, int]:
    """NNI's name for a network: a width for each group that has a choice."""
    return {name: widths[name] for name in space.to_nni()}


def _network(space: WidthSpace, sample: Mapping[str, Any]) -> Widths:
    """The widths of a sample, which may hold choices of an evaluator too."""
    return space.from_nni({name: sample[name] for name in space.to_nni() if name in sample})


def _built(
    model: str | Callable[..., nn.Module],
    input: Sequence[int],
    arguments: dict[str, Any] | None = None,
    weights: str | None = None,
    min_ratio: float = 0.1,
    divisor: int = 8,
    ignore: Iterable[str] = (),
) -> tuple[nn.Module, WidthSpace]:
    built = model(**(arguments or {})) if callable(model) else build_model(model, arguments)
    if weights is not None:
        load_weights(built, Path(weights))
    return built, WidthSpace.from_model(built, torch.zeros(1, *input), min_ratio, divisor, ignore)
