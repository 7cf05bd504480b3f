"""What a search is about, as a file: enough to propose networks inside of a budget where the model is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nni_dbs.cost import Bounds, Budget, PolynomialCost
from nni_dbs.errors import ResultError
from nni_dbs.files import write
from nni_dbs.space import WidthSpace
from torch_pruning_adapters import ChannelGroup, WidthError
from torch_pruning_adapters.importance import Order


@dataclass(frozen=True)
class Problem:
    """A space of networks, what they cost, and the budget that they must keep.

    Attributes:
        space: Of the widths.
        costs: FLOPs and parameters, by kind. Latency is not among them: it belongs to one machine.
        order: Which channels of each group come first, as `shrink` takes it.
        budget: As `Budget.parse` takes it.
        prior: Group name -> width -> chance, where something is known of the widths before the search, as
            `nni_dbs.pool.chances_by_width` gives it; for an evolutionary search (PSE-Net). It belongs to the
            problem's own budget; under another one, evolution is as legal and less well advised.
    """

    space: WidthSpace
    costs: Mapping[str, PolynomialCost]
    order: Order
    budget: float | str | dict[str, float | str]
    prior: Mapping[str, Mapping[int, float]] | None = None

    def bounds(self, budget: float | str | Mapping[str, float | str] | None = None) -> Bounds:
        """The budget, or another one, on this model.

        Raises:
            BudgetError: It cannot be read, bounds a cost that is not known here, or no network keeps it.
        """
        bounds = Budget.parse(self.budget if budget is None else budget).bound(self.costs)
        bounds.check_reachable(self.space.smallest(), self.space.largest())
        return bounds

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        data = {
            "groups": [g.to_dict() for g in self.space.groups],
            "choices": {name: self.space.choices(name) for name in self.space.names},
            "costs": {kind: cost.to_dict() for kind, cost in self.costs.items()},
            "order": {name: np.asarray(ranked).tolist() for name, ranked in self.order.items()},
            "budget": self.budget,
            "prior": self.prior,
        }
        write(Path(path), lambda temporary: temporary.write_text(json.dumps(data)))

    @classmethod
    def load(cls, path: str | Path) -> Problem:
        """Reads what `save` wrote.

        Raises:
            ResultError: No such file, or it is damaged.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text())
            groups = tuple(ChannelGroup.from_dict(g) for g in data["groups"])
            space = WidthSpace(groups).among(data["choices"])
            costs = {kind: PolynomialCost.from_dict(groups, cost) for kind, cost in data["costs"].items()}
            return cls(space, costs, data["order"], data["budget"], _read_prior(data.get("prior")))
        except OSError as error:
            raise ResultError(
                f"cannot read {path}: {error.strerror or error}; nni-dbs prepare writes it"
            ) from error
        except (WidthError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(repr(error).split())[:200]
            raise ResultError(f"{path} is damaged ({reason}); nni-dbs prepare writes it anew") from error


def _read_prior(data: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[int, float]] | None:
    """JSON has texts as keys."""
    if data is None:
        return None
    return {name: {int(width): float(chance) for width, chance in row.items()} for name, row in data.items()}
