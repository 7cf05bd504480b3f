"""The vocabulary of coupled channels: plain data, names and numbers only.

Nothing here refers to a module or a tensor, so groups can be pickled, written as YAML or JSON,
and applied to any other instance of the same architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Role = Literal["producer", "through", "consumer"]


@dataclass(frozen=True)
class Span:
    """A run of a layer's channel axis that a group occupies.

    Entries `start ... start + length * repeat - 1` of the axis hold the group's channels
    `root ... root + length - 1`, `repeat` consecutive entries each (flattened 7x7 maps: `repeat=49`;
    the second part of a concatenation: `start` = width of the first).
    """

    start: int
    root: int
    length: int
    repeat: int = 1


@dataclass(frozen=True)
class Member:
    """One layer's share in a channel group.

    Attributes:
        layer: Dotted name of the module; of the owning module for a bare parameter.
        role: `producer` computes the channels (rows of a convolution or linear layer), `consumer` reads
            them (its columns), `through` passes them on one by one (depthwise, normalisation, parameter).
        kind: `conv`, `linear`, `depthwise`, `norm`, `layernorm`, `groupnorm`, `prelu`, `embedding`,
            `parameter`; `size` for an integer attribute, `statistics` where a mean or a norm of no layer runs
            over the channels.
        tensors: The parameters and buffers to slice, each with its dimension.
        size: Length of the layer's channel axis.
        spans: Where the group's channels lie on that axis.
        blocks: A grouped convolution's `groups` (or a GroupNorm's): every block of the axis must keep
            the same pattern of channels.
        per_block: The weight's dimension covers one block only (columns of a grouped convolution).
        attribute: Integer attribute of the module that is the length of the axis; `shape[0]`: a part of one.
        reader: Dotted name of the module whose forward pass uses the tensors; None: the layer's own.
    """

    layer: str
    role: Role
    kind: str
    tensors: tuple[tuple[str, int], ...]
    size: int
    spans: tuple[Span, ...]
    blocks: int = 1
    per_block: bool = False
    attribute: str | None = None
    reader: str | None = None

    @property
    def axis(self) -> tuple[str, str, tuple[tuple[str, int], ...], str | None]:
        """What tells the axis from others: all groups on it have members with the same."""
        return self.layer, self.role, self.tensors, self.attribute

    @property
    def multiplicity(self) -> int:
        """Entries of the axis for each channel of the group (49 where 7x7 maps were flattened)."""
        roots = {(s.root, s.length) for s in self.spans}
        channels = max(root + length for root, length in roots)
        return sum(s.length * s.repeat for s in self.spans) // channels

    def blocks_of(self, tensor: str) -> int:
        """How many blocks of the axis share one entry of a tensor's dimension."""
        return self.blocks if self.per_block and tensor != "bias" else 1

    def apply(self, keep: np.ndarray, axis: np.ndarray) -> None:
        """Writes the group's mask `keep` (C,) into the mask of the layer's whole axis (size,)."""
        for s in self.spans:
            axis[s.start : s.start + s.length * s.repeat] = np.repeat(
                keep[s.root : s.root + s.length], s.repeat
            )


@dataclass(frozen=True)
class Product:
    """A matrix product along one of whose dimensions a group lies.

    It lies outside of layers (in attention, say), or is a layer's that runs for each channel.

    Attributes:
        layer: Dotted name of the module whose forward pass computes it.
        number: Which of the model's products it is.
        dimension: Which of its dimensions.
        amount: Its multiply-adds at full width.
        size: Length of the dimension.
        entries: How many of them are the group's.
    """

    layer: str
    number: int
    dimension: int
    amount: int
    size: int
    entries: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be cut together, over all the layers that they touch.

    Attributes:
        name: Dotted name of the first producer in the model's order, and of its parameter where it has
            several that produce; `name[a:b]` where the producer's channels fall into several groups.
        size: Number of channels.
        step: A width must be a multiple of it (grouped convolutions keep equally many in each group,
        attention
            in each head). The channels `p + b * size / step` for all b go together.
        members: Every layer that the group touches.
        frozen: `None`, or why the group must keep its full width.
        block: Dotted name of the residual block that is removed where the group has width 0; `None`: it
            cannot have that. See `find_residual_blocks`.
        products: What of the network's cost lies outside of its layers and depends on the group.
    """

    name: str
    size: int
    step: int
    members: tuple[Member, ...]
    frozen: str | None = None
    block: str | None = None
    products: tuple[Product, ...] = ()

    @property
    def producers(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.role == "producer")

    @property
    def consumers(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.role == "consumer")

    @property
    def statistics(self) -> Member | None:
        """A member that takes means, norms or scores over the group's channels, if there is one."""
        kinds = ("layernorm", "groupnorm", "statistics")
        return next((m for m in self.members if m.kind in kinds), None)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists, texts and numbers, for YAML or JSON; see `from_dict`."""
        data = asdict(self)
        data["members"] = [
            {
                **asdict(m),
                "tensors": [list(t) for t in m.tensors],
                "spans": [[s.start, s.root, s.length, s.repeat] for s in m.spans],
            }
            for m in self.members
        ]
        data["products"] = [asdict(p) for p in self.products]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChannelGroup:
        members = tuple(
            Member(
                **{
                    **m,
                    "tensors": tuple((str(name), int(dim)) for name, dim in m["tensors"]),
                    "spans": tuple(Span(*map(int, span)) for span in m["spans"]),
                }
            )
            for m in data["members"]
        )
        products = tuple(Product(**p) for p in data.get("products", ()))
        return cls(**{**data, "members": members, "products": products})


def lies_in(layer: str, blocks: Iterable[str]) -> bool:
    """Whether a layer is one of the blocks or inside of one, by dotted names."""
    return any(layer == block or layer.startswith(f"{block}.") for block in blocks)


def spans_of(index: np.ndarray, root: np.ndarray) -> tuple[Span, ...]:
    """The shortest runs that describe the map from an axis' entries to a group's channels.

    Args:
        index: (N,) ascending entries of the axis.
        root: (N,) the group's channel behind each.
    """
    n = len(index)
    if index[-1] - index[0] == n - 1 and np.array_equal(root, np.arange(n)):
        return (Span(int(index[0]), 0, n),)
    new_channel = np.ones(len(index), dtype=bool)
    new_channel[1:] = (np.diff(index) != 1) | (np.diff(root) != 0)
    first = np.flatnonzero(new_channel)  # (M,) where a channel's entries begin
    start, channel = index[first], root[first]
    repeat = np.diff(np.append(first, len(index)))
    new_span = np.ones(len(first), dtype=bool)
    new_span[1:] = (np.diff(channel) != 1) | (np.diff(repeat) != 0) | (np.diff(start) != repeat[:-1])
    begin = np.flatnonzero(new_span)
    length = np.diff(np.append(begin, len(first)))
    return tuple(
        Span(int(start[b]), int(channel[b]), int(n), int(repeat[b]))
        for b, n in zip(begin, length, strict=True)
    )
