"""Mistakes that a user can make, each told in one line that says what to do.

The command line prints the message of a `UserError` and exits with status 2; `UnsupportedModelError` and
`WidthError` of `torch_pruning_adapters` are treated alike.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can put right; the message says how."""


class BudgetError(UserError):
    """A budget that cannot be read, or that no network of the space keeps."""


class ConfigError(UserError):
    """A key, value or combination in a configuration that has no meaning."""


class DataError(UserError):
    """Data that is missing or cannot be used."""


class EvaluatorError(UserError):
    """An NNI evaluator that cannot do what a pruner needs."""


class ModelError(UserError):
    """A model that cannot be found or built."""


class ResultError(UserError):
    """An output directory that cannot be written, or read back."""


class TrainingError(UserError):
    """Training that went wrong: a loss that is not finite, or a training step that a supernet cannot use."""
