"""Integers that remember which channels they count.

A forward pass turns widths into numbers (`b, n, c = x.shape`; `c // heads`; `self.hidden_dim`) and numbers
back into shapes (`x.view(b, n, heads, c // heads)`). After a cut the numbers must have changed with the
channels. While a model is traced, the shapes of tensors and the integers of its modules are `Length`s, so
that a reshape shows whether it would follow.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np


class Length(int):
    """An integer that follows the widths.

    Attributes:
        channels: Numbers of the channels on the axis that it is the length of, up to `ratio`; None if it is
            computed from widths in another way.
        ratio: Itself, divided by `len(channels)`.
        attribute: (module's name, attribute) that it was read from, unchanged.
        met: Called with an attribute's length and an axis' length that it is compared to.
    """

    channels: np.ndarray | None
    ratio: Fraction
    attribute: tuple[str, str] | None
    met: Callable[[Length, Length], None] | None

    def __new__(
        cls,
        value: int,
        channels: np.ndarray | None = None,
        ratio: Fraction | int = 1,
        attribute: tuple[str, str] | None = None,
        met: Callable[[Length, Length], None] | None = None,
    ) -> Length:
        self = super().__new__(cls, value)
        self.channels, self.ratio, self.attribute, self.met = channels, Fraction(ratio), attribute, met
        return self

    def __mul__(self, other: Any) -> Any:
        product = int.__mul__(self, other)
        if product is NotImplemented:
            return product
        if isinstance(other, Length) and other.channels is not None:
            return Length(product) if self.channels is not None else other._scaled(product, int(self))
        return self._scaled(product, int(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        quotient = int.__floordiv__(self, other)
        if quotient is NotImplemented:
            return quotient
        exact = int(other) * quotient == int(self)
        return self._scaled(quotient, Fraction(1, int(other))) if exact else Length(quotient)

    def __add__(self, other: Any) -> Any:
        total = int.__add__(self, other)
        return total if total is NotImplemented else Length(total)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        difference = int.__sub__(self, other)
        return difference if difference is NotImplemented else Length(difference)

    def __rsub__(self, other: Any) -> Any:
        difference = int.__rsub__(self, other)
        return difference if difference is NotImplemented else Length(difference)

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and isinstance(other, Length):
            for a, b in ((self, other), (other, self)):
                if a.attribute is not None and a.met is not None and b.channels is not None:
                    a.met(a, b)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def _scaled(self, value: int, factor: Fraction | int) -> Length:
        return Length(value, self.channels, self.ratio * factor)
