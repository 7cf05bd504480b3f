"""The networks that can be chosen: a width for every channel group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_pruning_adapters import ChannelGroup, WidthError, check_width, find_channel_groups
from torch_pruning_adapters.calls import Inputs
from torch_pruning_adapters.errors import nearest

ROUNDING = 1e-9  # slack for ratios: 0.57 * 100 is below 57


class Widths(Mapping[str, int]):
    """An immutable, hashable mapping: group name -> number of channels."""

    __slots__ = ("_widths",)

    def __init__(self, widths: Mapping[str, int] | Iterable[tuple[str, int]] = ()) -> None:
        self._widths = {name: int(width) for name, width in dict(widths).items()}

    def __getitem__(self, name: str) -> int:
        return self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __hash__(self) -> int:
        return hash(frozenset(self._widths.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Widths, (self._widths,)

    def __repr__(self) -> str:
        return f"Widths({self._widths})"


def width_choices(size: int, step: int = 1, min_ratio: float = 0.0, divisor: int = 1) -> tuple[int, ...]:
    """Allowed widths of a group, ascending; the full width `size` is always one of them.

    The others are the multiples of `step` nearest to the multiples of `divisor`, not below
    `min_ratio * size`.
    """
    grid = np.arange(divisor, size, divisor)
    widths = np.floor(grid / step + 0.5).astype(int) * step
    allowed = {int(w) for w in widths if 0 < w < size and w / size >= min_ratio - ROUNDING}
    return (*sorted(allowed), size)


class WidthSpace:
    """Every network that the groups' allowed widths span.

    Use `from_model` on a model, or give groups that were found before. Frozen groups have one choice,
    their full width.

    Args:
        groups: From `find_channel_groups`.
        min_ratio: No width below this share of the full one.
        divisor: Widths are multiples of it as far as the group's step allows; 8 or 16 keeps kernels fast.

    Attributes:
        groups: The channel groups, frozen ones included; G of them.
    """

    def __init__(self, groups: Iterable[ChannelGroup], min_ratio: float = 0.1, divisor: int = 8) -> None:
        if not 0 <= min_ratio <= 1:
            raise WidthError(f"min_ratio must lie in [0, 1], not {min_ratio}")
        if divisor < 1:
            raise WidthError(f"divisor must be a positive number of channels, not {divisor}")
        self.groups = tuple(groups)
        self._choices = {
            g.name: (g.size,) if g.frozen else width_choices(g.size, g.step, min_ratio, divisor)
            for g in self.groups
        }

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        example_inputs: Inputs,
        min_ratio: float = 0.1,
        divisor: int = 8,
        ignore: Iterable[str] = (),
    ) -> WidthSpace:
        """The space of a model's channel groups; arguments as for `find_channel_groups`."""
        return cls(find_channel_groups(model, example_inputs, ignore), min_ratio, divisor)

    def within(self, bounds: Mapping[str, tuple[float, float]]) -> WidthSpace:
        """The part of the space where the named groups' ratios lie in [low, high].

        Raises:
            WidthError: A group has no width between its bounds.
        """
        space = WidthSpace(self.groups)
        space._choices = dict(self._choices)
        for g in self.groups:
            low, high = bounds.get(g.name, (0.0, 1.0))
            kept = [w for w in self._choices[g.name] if low - ROUNDING <= w / g.size <= high + ROUNDING]
            if not kept:
                widest = math.floor((high + ROUNDING) * g.size / g.step) * g.step
                fixed = g.frozen is not None or self._choices[g.name] == (0,)
                if fixed or widest < max((low - ROUNDING) * g.size, g.step):
                    raise WidthError(
                        f"group {g.name!r} ({g.size} channels, step {g.step}) has no width between "
                        f"{low:.0%} and {high:.0%}"
                    )
                kept = [widest]
            space._choices[g.name] = tuple(kept)
        return space

    def among(self, choices: Mapping[str, Iterable[int]]) -> WidthSpace:
        """The same groups with given choices; groups that are not named keep theirs.

        Raises:
            WidthError: Not a group, no choice, or a width that the group cannot take. Width 0 removes the
                group's residual block; where other groups belong to it, 0 must be the only choice of all.
        """
        by_name = {g.name: g for g in self.groups}
        space = WidthSpace(self.groups)
        space._choices = dict(self._choices)
        for name, widths in choices.items():
            if name not in by_name:
                raise WidthError(f"no channel group {name!r} in this model{nearest(name, by_name)}")
            for width in (listed := tuple(sorted(set(widths)))):
                check_width(by_name[name], width)
            if not listed:
                raise WidthError(f"group {name!r} needs at least one choice")
            space._choices[name] = listed
        space._check_blocks()
        return space

    def without(self, blocks: Iterable[str]) -> WidthSpace:
        """The part of the space in which these residual blocks are removed: width 0 for all their groups.

        Raises:
            WidthError: Not a residual block of the groups.
        """
        removed = tuple(blocks)
        known = dict.fromkeys(g.block for g in self.groups if g.block is not None)
        for block in removed:
            if block not in known:
                raise WidthError(
                    f"no residual block {block!r} in these groups{nearest(block, known)}; "
                    "find_residual_blocks() finds those that can be removed"
                )
        return self.among({g.name: (0,) for g in self.groups if g.block in removed})

    def _check_blocks(self) -> None:
        """Refuses choices from which one group of a block could get width 0 and another one not."""
        for block in {g.block: None for g in self.groups if 0 in self._choices[g.name]}:
            choices = {g.name: self._choices[g.name] for g in self.groups if g.block == block}
            if len(choices) > 1 and any(c != (0,) for c in choices.values()):
                raise WidthError(
                    f"block {block!r} goes as a whole: offer 0, and nothing else, for all of its groups "
                    f"({', '.join(choices)}), as without([{block!r}]) does"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(g.name for g in self.groups)

    def choices(self, name: str) -> tuple[int, ...]:
        """Allowed widths of a group, ascending."""
        return self._choices[name]

    def options(self, name: str, limit: int = 10) -> tuple[int, ...]:
        """A group's choices, or `limit` (from 2) of them: both ends and others evenly between."""
        choices = self._choices[name]
        if len(choices) <= limit:
            return choices
        return tuple(choices[i] for i in np.linspace(0, len(choices) - 1, limit).round().astype(int))

    def padded_choices(self) -> tuple[Tensor, Tensor]:
        """All choices (G, K) float64, ascending and padded by infinity; how many each group has, (G,)."""
        counts = torch.tensor([len(c) for c in self._choices.values()], dtype=torch.long)
        padded = torch.full((len(counts), max(map(len, self._choices.values()), default=1)), torch.inf)
        padded = padded.to(torch.float64)
        for row, choices in zip(padded, self._choices.values(), strict=True):
            row[: len(choices)] = torch.tensor(choices)
        return padded, counts

    def smallest(self) -> Widths:
        return Widths({name: c[0] for name, c in self._choices.items()})

    def largest(self) -> Widths:
        return Widths({name: c[-1] for name, c in self._choices.items()})

    def uniform(self, ratio: float) -> Widths:
        """Every group at the choice nearest to `ratio` of its full width (the narrower of two)."""
        return Widths(
            {g.name: min(self._choices[g.name], key=lambda w: abs(w - ratio * g.size)) for g in self.groups}
        )

    def sample(self, generator: torch.Generator) -> Widths:
        """Independent, uniformly drawn choices."""
        return Widths(
            {
                name: c[int(torch.randint(len(c), (), generator=generator))]
                for name, c in self._choices.items()
            }
        )

    def encode(self, widths: Mapping[str, int]) -> Tensor:
        """Widths as (G,) float64, in the order of `groups`; missing groups at full width."""
        return torch.tensor([widths.get(g.name, g.size) for g in self.groups], dtype=torch.float64)

    def decode(self, encoded: Tensor) -> Widths:
        """The inverse of `encode`: (G,) -> widths."""
        return Widths({g.name: round(float(w)) for g, w in zip(self.groups, encoded, strict=True)})

    def to_nni(self) -> dict[str, Any]:
        """The search space in NNI's experiment format: one `choice` for each group that has several."""
        return {
            name: {"_type": "choice", "_value": list(c)} for name, c in self._choices.items() if len(c) > 1
        }

    def from_nni(self, parameters: Mapping[str, Any]) -> Widths:
        """The network of a trial's parameters: a width for each group that `to_nni` offers.

        Raises:
            WidthError: Other groups than those, or a width that is no choice: they belong to another space.
        """
        offered = [name for name, c in self._choices.items() if len(c) > 1]
        for name in offered:
            if name not in parameters:
                raise WidthError(f"no width for group {name!r}: the parameters are of another search space")
        for name, width in parameters.items():
            if name not in offered:
                raise WidthError(
                    f"no channel group {name!r} to choose a width for{nearest(name, offered)}: "
                    "the parameters are of another search space"
                )
            if width not in self._choices[name]:
                raise WidthError(
                    f"{width!r} is no choice for group {name!r}, which has {self._choices[name]}"
                )
        return Widths({**self.smallest(), **parameters})

    def __contains__(self, widths: object) -> bool:
        return isinstance(widths, Mapping) and all(
            widths.get(g.name, g.size) in self._choices[g.name] for g in self.groups
        )
