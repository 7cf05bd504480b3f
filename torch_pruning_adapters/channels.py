"""Which channels lie where on a tensor, and which of them are tied.

While a model runs, every channel of every parameter has a number. A tensor's channels are `Block`s: some of
its dimensions, with the number behind each entry. Two relations are kept on the numbers: the *same* channel
(the terms of a sum, a weight's columns and what they read), and channels cut *together* (one in each block
of a grouped convolution, one in each head). Operators (`operators.py`) and handlers of module types
(`register`) say what ties what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from torch_pruning_adapters.lengths import Length
from torch_pruning_adapters.relation import Relation

FIXED = 0  # the number of an entry that is no channel

FROM_INPUT = "tied to the network's input"
FROM_CONSTANT = "tied to a tensor of fixed size"
OUTPUT = "reaches the network's output"

Place = tuple[Tensor, int]
"""A tensor and one of its dimensions; negative ones count from the end."""


@dataclass(frozen=True)
class Block:
    """Channels on some dimensions of a tensor, alike at all positions of its other dimensions.

    Attributes:
        dims: The dimensions, ascending.
        numbers: The channel behind each entry, of the tensor's shape on these dimensions.
    """

    dims: tuple[int, ...]
    numbers: np.ndarray

    def spread(self, ndim: int) -> np.ndarray:
        """The numbers with length 1 in all other dimensions."""
        shape = [1] * ndim
        for dim, length in zip(self.dims, self.numbers.shape, strict=True):
            shape[dim] = length
        return self.numbers.reshape(shape)

    def along(self, dim: int) -> np.ndarray:
        """The numbers with `dim` as the last dimension: (R, length)."""
        numbers = np.moveaxis(self.numbers, self.dims.index(dim), -1)
        return numbers.reshape(-1, numbers.shape[-1])

    def moved(self, offset: int) -> Block:
        """The same on a tensor with `offset` more dimensions in front."""
        return Block(tuple(d + offset for d in self.dims), self.numbers)


@dataclass
class Facts:
    """What is known of a tensor: its blocks, and whether it depends on the network's input."""

    blocks: list[Block] = field(default_factory=list)
    from_input: bool = False

    @property
    def origin(self) -> str:
        return FROM_INPUT if self.from_input else FROM_CONSTANT

    def at(self, dim: int) -> Block | None:
        """The block that lies on a dimension."""
        return next((b for b in self.blocks if dim in b.dims), None)


@dataclass
class TensorAxis:
    """One dimension of a parameter or buffer.

    Attributes:
        names: (module, tensor), under each of its names.
        dim: The dimension.
        numbers: Of its channels: (length,), or (blocks * length,).
        blocks: How many blocks of channels share its entries (columns of a grouped convolution).
    """

    names: tuple[tuple[str, str], ...]
    dim: int
    numbers: np.ndarray
    blocks: int = 1


@dataclass(frozen=True)
class Count:
    """Multiply-adds of a matrix product outside of layers, and the channels along its dimensions."""

    module: str
    amount: int
    dims: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class SizeAxis:
    """An integer attribute of a module that counts these channels; `reader` runs where it is read."""

    module: str
    attribute: str
    reader: str
    numbers: np.ndarray


class Channels:
    """The channels of a model that runs, as operators and handlers see them.

    A handler of a module type (see `register`) uses `carry`, `read`, `write`, `tie`, `together`, `resize` and
    `freeze`.

    Attributes:
        axes: Of all parameters and buffers that ran.
        readers: Parameter or buffer (by id) -> names of the modules that ran when it was used.
        frozen: (numbers, why they cannot be cut), in the order of the run.
        sizes, counts: Attributes to set after a cut; products outside of layers.
        statistics: (module, numbers) that a mean or a norm runs over.
        passed: Normalisation layer -> the channels that it passed on, each time that it ran.
        stack: Names and modules that run, the innermost last.
    """

    def __init__(self, model: nn.Module) -> None:
        self._same, self._together = Relation(), Relation()
        self._produced = np.zeros(0, dtype=bool)
        self._consumed = np.zeros(0, dtype=bool)
        self._axis_of = np.zeros(0, dtype=np.int64)
        self._facts: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names: dict[int, list[tuple[str, str]]] = {}
        self._modules = {module: name for name, module in model.named_modules()}
        for layer, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._names.setdefault(id(tensor), []).append((layer, name))
        self.axes: list[TensorAxis] = []
        self._in_blocks: dict[int, TensorAxis] = {}
        self.readers: dict[int, set[str]] = {}
        self.frozen: list[tuple[np.ndarray, str]] = []
        self.sizes: list[SizeAxis] = []
        self.counts: list[Count] = []
        self.statistics: list[tuple[str, np.ndarray]] = []
        self.passed: dict[str, list[np.ndarray]] = {}
        self.stack: list[tuple[str, nn.Module]] = []
        self.new(1)

    # --- for handlers -------------------------------------------------------------------------------

    def carry(self, source: Place, target: Place) -> None:
        """The target's dimension holds the source's channels."""
        block = self._on(source)
        if block is not None:
            self._put(target, self._line(block, source[1] % source[0].dim()))

    def read(self, source: Place, weight: Place) -> None:
        """The weight's dimension is multiplied with the source's channels and summed: a consumer."""
        self.tie(source, weight)
        block = self._on(weight)
        if block is not None:
            self.consumed(block.numbers)

    def write(self, weight: Place, target: Place) -> None:
        """The weight's dimension computes the target's channels: a producer."""
        block = self._on(weight)
        if block is not None:
            self.produced(block.numbers)
            self._put(target, block.numbers.reshape(-1))

    def tie(self, *places: Place) -> None:
        """Equal positions on these dimensions, of one length, are the same channel."""
        self._pair(places, self.same)

    def together(self, *places: Place) -> None:
        """Equal positions on these dimensions, of one length, are cut together, but not the same."""
        self._pair(places, self.cut_together)

    def resize(self, module: nn.Module, attribute: str, place: Place) -> None:
        """The module's integer attribute is the number of these channels."""
        block = self._on(place)
        if block is not None:
            name = self._modules[module]
            line = self._line(block, place[1] % place[0].dim())
            self._count(SizeAxis(name, attribute, name, line))

    def freeze(self, place: Place, reason: str) -> None:
        """The channels on this dimension stay, for this reason."""
        block = self._on(place)
        if block is not None:
            self.fix(block.numbers, reason)

    # --- for operators ------------------------------------------------------------------------------

    def facts(self, tensor: Tensor) -> Facts:
        """What is known of a tensor; a parameter's or buffer's channels get their numbers here."""
        found = self._facts.get(tensor)
        if found is None:
            found = self._facts[tensor] = Facts()
            if id(tensor) in self._names and tensor.is_floating_point():
                found.blocks = self._number(tensor)
        if id(tensor) in self._names:
            self.readers.setdefault(id(tensor), set()).add(self.module)
        return found

    def learn(self, tensor: Tensor, facts: Facts) -> None:
        """Notes what is known of a tensor; what is written into a part of another one is in that one, too."""
        self._facts[tensor] = facts
        if facts.from_input and tensor._base is not None:
            self.facts(tensor._base).from_input = True

    def is_seen(self, tensor: Tensor) -> bool:
        """Whether an operator has used this parameter or buffer."""
        return id(tensor) in self.readers

    def readers_of(self, axis: TensorAxis) -> set[str]:
        """Names of the modules that ran when an operator used the tensor."""
        return next(found for key, found in self.readers.items() if self._names[key][0] == axis.names[0])

    @property
    def module(self) -> str:
        """Name of the innermost module that runs."""
        return self.stack[-1][0] if self.stack else ""

    def new(self, count: int, axis: int = -1) -> np.ndarray:
        """Numbers of `count` new channels, of this one of `axes`."""
        self._same.grow(count)
        self._produced = np.concatenate([self._produced, np.zeros(count, dtype=bool)])
        self._consumed = np.concatenate([self._consumed, np.zeros(count, dtype=bool)])
        self._axis_of = np.concatenate([self._axis_of, np.full(count, axis)])
        return self._together.grow(count)

    def same(self, a: np.ndarray, b: np.ndarray, origin: str = FROM_CONSTANT) -> None:
        """Pairs of numbers, broadcast, are the same channel; a partner of `FIXED` cannot be cut."""
        self._join(self._same, a, b, origin)
        self._join(self._together, a, b, origin)

    def cut_together(self, a: np.ndarray, b: np.ndarray, origin: str = FROM_CONSTANT) -> None:
        """Pairs of numbers, broadcast, are cut together."""
        self._join(self._together, a, b, origin)

    def fix(self, numbers: np.ndarray, reason: str) -> None:
        """These channels cannot be cut."""
        self.frozen.append((np.unique(numbers), reason))

    def fix_all(self, tensors: Iterable[Tensor], reason: str) -> None:
        """None of the channels on these tensors can be cut."""
        for tensor in tensors:
            for block in self.facts(tensor).blocks:
                self.fix(block.numbers, reason)

    def produced(self, numbers: np.ndarray) -> None:
        self._produced[numbers] = True

    def consumed(self, numbers: np.ndarray) -> None:
        self._consumed[numbers] = True

    def is_produced(self, numbers: np.ndarray) -> bool:
        return bool(self._produced[numbers].any())

    def is_consumed(self, numbers: np.ndarray) -> bool:
        return bool(self._consumed[numbers].any())

    def channel(self, numbers: np.ndarray) -> np.ndarray:
        """One number for each channel, the same for all that are tied."""
        return self._same.find(numbers)

    def unit(self, numbers: np.ndarray) -> np.ndarray:
        """One number for all channels that are cut together."""
        return self._together.find(numbers)

    def is_rigid(self, block: Block, dim: int) -> bool:
        """Whether the dimension keeps its length after any cut: what is dropped is dropped all along it."""
        units = self.unit(block.along(dim))
        return bool((units == units[:, :1]).all())

    def stiffen(self, block: Block, dim: int) -> None:
        """Lets the dimension keep its length: channels along it are cut together."""
        line = block.along(dim)
        self.cut_together(line, line[:, :1])

    def in_blocks(self, axis_number: int, blocks: int) -> np.ndarray:
        """The channels behind a weight's dimension that so many blocks share: (blocks * length,)."""
        axis = self._in_blocks.get(axis_number)
        if axis is None:
            original = self.axes[axis_number]
            numbers = self.new(blocks * len(original.numbers))
            axis = TensorAxis(original.names, original.dim, numbers, blocks)
            self._in_blocks[axis_number] = axis
            self.axes.append(axis)
            original.numbers = original.numbers[:0]
            self.split_in_blocks(numbers, blocks)
        return axis.numbers

    def axis_of(self, numbers: np.ndarray) -> int:
        """The axis of a parameter that numbers stand for; -1: none, or several."""
        found = np.unique(self._axis_of[numbers])
        return int(found[0]) if len(found) == 1 else -1

    def split_in_blocks(self, numbers: np.ndarray, blocks: int) -> None:
        """Every one of `blocks` equal parts keeps the same positions."""
        parts = numbers.reshape(blocks, -1)
        self.cut_together(parts, parts[:1])

    def follow(self, numbers: np.ndarray, length: Length) -> None:
        """The line of channels (R, n) is as long as `length` says: ties them to what that counts."""
        n = numbers.shape[1]
        if length.attribute is not None:
            self._count(SizeAxis(*length.attribute, self.module, numbers[0]))
        if length.channels is None or length.ratio * len(length.channels) != n:
            return
        counted = length.channels
        if self._in_proportion(numbers, counted):
            return
        if len(counted) % n == 0:
            parts = counted.reshape(-1, n)  # (k, n)
            if len(numbers) % len(parts) == 0:
                self.cut_together(numbers.reshape(-1, *parts.shape), parts)
            else:
                self.cut_together(parts[None], numbers[:, None])
        elif n % len(counted) == 0:
            self.cut_together(numbers.reshape(len(numbers), -1, len(counted)), counted)

    # --- inside -------------------------------------------------------------------------------------

    def _count(self, size: SizeAxis) -> None:
        """Notes what an attribute counts: it has one value, so all that it counts is cut together."""
        for known in self.sizes:
            if (known.module, known.attribute) == (size.module, size.attribute):
                if not self._in_proportion(size.numbers[None], known.numbers):
                    self.cut_together(size.numbers, known.numbers)
                break
        self.sizes.append(size)

    def _in_proportion(self, numbers: np.ndarray, counted: np.ndarray) -> bool:
        """Whether every cut takes the same share of each line (R, n) and of what is counted (m,)."""
        rows, n = numbers.shape
        common = math.gcd(n, len(counted))
        lines = [np.tile(numbers, len(counted) // common), np.tile(counted, (rows, n // common))]
        mine, its = (np.sort(self.unit(line)) for line in lines)
        return bool((mine == its).all())

    def _number(self, tensor: Tensor) -> list[Block]:
        """New numbers for every dimension of a parameter or buffer."""
        names = tuple(self._names[id(tensor)])
        blocks = []
        for dim, length in enumerate(tensor.shape):
            if length > 1 or dim < 2:
                numbers = self.new(length, len(self.axes))
                self.axes.append(TensorAxis(names, dim, numbers))
                blocks.append(Block((dim,), numbers))
        return blocks

    def _join(self, relation: Relation, a: np.ndarray, b: np.ndarray, origin: str) -> None:
        a, b = np.broadcast_arrays(a, b)
        free = (a != FIXED) & (b != FIXED)
        if not free.all():
            lonely = np.where(a == FIXED, b, a)[~free]
            if (lonely := lonely[lonely != FIXED]).size:
                self.fix(lonely, origin)
            a, b = a[free], b[free]
        relation.join(a, b)

    def _on(self, place: Place) -> Block | None:
        tensor, dim = place
        return self.facts(tensor).at(dim % tensor.dim())

    def _line(self, block: Block, dim: int) -> np.ndarray:
        """The numbers along a dimension, where it holds one at each position."""
        line = block.along(dim)
        if len(line) > 1:
            self.same(line, line[:1])
        return line[0]

    def _put(self, place: Place, numbers: np.ndarray) -> None:
        tensor, dim = place
        if len(numbers) != tensor.shape[dim]:
            raise ValueError(f"{len(numbers)} channels do not fit a dimension of {tensor.shape[dim]} entries")
        self.facts(tensor).blocks.append(Block((dim % tensor.dim(),), numbers))

    def _pair(self, places: Sequence[Place], join: Callable[[np.ndarray, np.ndarray], None]) -> None:
        lines = []
        for tensor, dim in places:
            block = self._on((tensor, dim))
            lines.append(
                np.full((1, tensor.shape[dim]), FIXED) if block is None else block.along(dim % tensor.dim())
            )
        for line in lines[1:]:
            if line.shape[1] != lines[0].shape[1]:
                raise ValueError(
                    f"channels are paired on dimensions of {lines[0].shape[1]} and {line.shape[1]} entries"
                )
            for row in line:
                join(lines[0], row)
