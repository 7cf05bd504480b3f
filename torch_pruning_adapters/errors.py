"""What can go wrong between a model and a smaller one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnsupportedModelError(ValueError):
    """The model's channels cannot be followed, so nothing of it can be pruned safely."""


class WidthError(ValueError):
    """A width, a group name or a channel order that does not fit the model."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
