"""An equivalence relation on numbers, for many pairs at once."""

from __future__ import annotations

import numpy as np


class Relation:
    """Which of the numbers 0, 1, ... belong together (union-find on arrays)."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)

    def grow(self, count: int) -> np.ndarray:
        """`count` new numbers, each alone."""
        new = np.arange(len(self._parent), len(self._parent) + count)
        self._parent = np.concatenate([self._parent, new])
        return new

    def find(self, numbers: np.ndarray) -> np.ndarray:
        """The smallest number that each one belongs together with; same shape."""
        roots = self._parent[numbers]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[numbers] = roots
        return roots

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Puts the numbers of two arrays together, pair by pair; they are broadcast."""
        a, b = (x.reshape(-1) for x in np.broadcast_arrays(a, b))
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            self._parent[np.maximum(a, b)] = np.minimum(a, b)
