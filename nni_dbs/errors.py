"""Mistakes that a user can make, each told in one line that says what to do.

The command line prints the message and exits with status 2. `UnsupportedModelError` and `WidthError` of
`torch_pruning_adapters` belong to the same family.
"""

from __future__ import annotations


class BudgetError(ValueError):
    """A budget that cannot be read, or that no network of the space keeps."""


class ConfigError(ValueError):
    """A key, value or combination in a configuration that has no meaning."""


class ModelError(ValueError):
    """A model that cannot be found or built."""


class ResultError(ValueError):
    """An output directory that cannot be written, or read back."""


class TrainingError(RuntimeError):
    """Training went wrong (loss not finite)."""
