"""The rows of `coverage.py`, and the Markdown table of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nni_dbs.cost import readable

CHECKS = ("budget", "outputs", "forward", "sliced", "flops", "reload", "training", "export", "onnx")
UNPRUNED = "unpruned fails too: "


@dataclass
class Row:
    """What was found out about a model; `None` and missing checks: not reached, or not asked of it.

    Attributes:
        inputs: Their shapes.
        flops: Of the full network, like `lowest_flops` (every free group at its step) and `pruned_flops`
            multiply-adds at these inputs.
        prunable_share: 1 - lowest_flops / flops.
        groups: Of the model's own forward pass, frozen ones included; these are used.
        groups_before_suppression: Of the part of a detector that is compared, or the error.
        frozen: Reason -> {"groups": number of them, "example": name of one}.
        seconds: Wall seconds to "trace" (find the groups without verification), to "verify" (with it), to
            "shrink", and of "all".
        checks: Name -> "ok", or what is wrong.
        differences: Relative to the largest output, of the checks that compare numbers.
        error: Why the row ends early.
    """

    name: str
    family: str
    inputs: str
    params: int | None = None
    flops: int | None = None
    groups: int | None = None
    groups_before_suppression: int | str | None = None
    frozen: dict[str, dict[str, Any]] = field(default_factory=dict)
    lowest_flops: int | None = None
    prunable_share: float | None = None
    pruned_flops: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def problems(self) -> list[str]:
        """What pruning broke; nothing that the full network cannot do either."""
        failed = [f"{k}: {v}" for k, v in self.checks.items() if v != "ok" and not v.startswith(UNPRUNED)]
        return ([self.error] if self.error else []) + failed

    @property
    def limits(self) -> list[str]:
        """What the full network cannot do either."""
        return [f"{key}: {text}" for key, text in self.checks.items() if text.startswith(UNPRUNED)]


COLUMNS = (
    *("model", "inputs", "groups", "frozen", "params", "FLOPs", "lowest", "prunable"),
    *("trace s", "verify s", "shrink s", *CHECKS),
)
INTRODUCTION = """# Pruning torchvision's models

Written by `examples/benchmarks/coverage.py`, which says what is checked and how.

{versions}

{count} models; {sound} pass every check, {partly} of them except for exports of which the full network is not
capable either. FLOPs, and the shares of them that can be pruned, hold at the inputs of the second column. The
checks are of the network without half of its prunable FLOPs: + passed, **no** failed, (+) the full network
fails too, empty: not reached, or not asked of this family. Groups of a detector are those of its own forward
pass; in brackets, those of its part before non-maximum suppression.
"""


def table(versions: Mapping[str, str], rows: Sequence[Row]) -> str:
    """A Markdown document: the versions, a table for each family, what fails and why groups are frozen."""
    sound = [row for row in rows if not row.problems]
    parts = [
        INTRODUCTION.format(
            versions=", ".join(f"{package} {number}" for package, number in versions.items()),
            count=len(rows),
            sound=len(sound),
            partly=sum(bool(row.limits) for row in sound),
        )
    ]
    for family in dict.fromkeys(row.family for row in rows):
        members = [row for row in rows if row.family == family]
        lines = [_line(COLUMNS), _line(["---", "---", *["---:"] * (len(COLUMNS) - 2)])]
        lines += [_line(_cells(row)) for row in members]
        parts.append(f"## {family.capitalize()}\n\n" + "\n".join(lines) + "\n")
    parts.append(_listed("What fails", {row.name: row.problems for row in rows}))
    parts.append(_listed("What the full network cannot do either", {row.name: row.limits for row in rows}))
    parts.append(_listed("Why groups are frozen", {row.name: _frozen(row) for row in rows}))
    return "\n".join(part for part in parts if part)


def _cells(row: Row) -> list[str]:
    frozen = sum(entry["groups"] for entry in row.frozen.values())
    before = row.groups_before_suppression
    bracket = "" if before is None else f" ({before if isinstance(before, int) else 'error'})"
    return [
        row.name,
        row.inputs,
        "" if row.groups is None else f"{row.groups}{bracket}",
        "" if row.groups is None else str(frozen),
        *("" if n is None else readable(n) for n in (row.params, row.flops, row.lowest_flops)),
        "" if row.prunable_share is None else f"{row.prunable_share:.1%}",
        *(f"{row.seconds[key]:.3g}" if key in row.seconds else "" for key in ("trace", "verify", "shrink")),
        *(_mark(row.checks.get(key)) for key in CHECKS),
    ]


def _mark(text: str | None) -> str:
    if text is None:
        return ""
    return "+" if text == "ok" else "(+)" if text.startswith(UNPRUNED) else "**no**"


def _frozen(row: Row) -> list[str]:
    return [f"{entry['groups']} (`{entry['example']}`): {reason}" for reason, entry in row.frozen.items()]


def _listed(title: str, texts: Mapping[str, Iterable[str]]) -> str:
    """A section with one point for each text, and models that share their texts together."""
    models: dict[tuple[str, ...], list[str]] = {}
    for name, found in texts.items():
        if found:
            models.setdefault(tuple(found), []).append(name)
    points = [f"- {', '.join(names)}: {'; '.join(found)}" for found, names in models.items()]
    return f"## {title}\n\n" + "\n".join(points) + "\n" if points else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
