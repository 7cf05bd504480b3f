"""The table and the page that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nni_dbs import plot
from nni_dbs.config import Config
from nni_dbs.cost import PolynomialCost, readable
from nni_dbs.files import write
from nni_dbs.result import Result
from torch_pruning_adapters import ChannelGroup


@dataclass
class Row:
    """One stage of a run; `latency_ms` is the median of a forward pass of one sample."""

    stage: str
    flops: int = 0
    params: int = 0
    test_accuracy: float = 0.0
    latency_ms: float = 0.0


HEADER = ("stage", "FLOPs", "params", "test accuracy", "latency")


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.stage,
        readable(row.flops),
        readable(row.params),
        f"{row.test_accuracy:.2f} %",
        f"{row.latency_ms:.2f} ms",
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for first, *others in (header, *rows):
        aligned = (cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_pictures(
    out: Path, result: Result, groups: Sequence[ChannelGroup], flops: PolynomialCost
) -> list[Path]:
    """Draws `widths.png` and `flops.png`; returns their paths."""
    full = {g.name: g.size for g in groups}
    kept = {g.name: result.widths.get(g.name, g.size) for g in groups}
    plot.save(plot.plot_widths(full, kept, f"Widths chosen by {result.method}"), out / "widths.png")
    before, after = flops.by_layer({}), flops.by_layer(result.widths)
    plot.save(plot.plot_cost(before, after, title="Where the FLOPs went"), out / "flops.png")
    return [out / "widths.png", out / "flops.png"]


def write_report(
    out: Path,
    config: Config,
    result: Result,
    rows: Sequence[Row],
    groups: Sequence[ChannelGroup],
    flops: PolynomialCost,
) -> None:
    """`report.md` with its pictures."""
    write_pictures(out, result, groups, flops)
    lines = [
        f"# {config.model} on {config.data['name']}, pruned by {result.method}",
        "",
        f"Budget: {result.budget}. The network has {result.flops:,} of {result.full_flops:,} FLOPs "
        f"({result.flops / result.full_flops:.1%}) and {result.params:,} of {result.full_params:,} "
        f"parameters ({result.params / result.full_params:.1%}).",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
        "",
        "FLOPs are multiply-adds of one sample. Latency is the median forward pass of one sample on "
        f"{result.device}; compare it within this table only.",
        "",
        "![widths](widths.png)",
        "",
        "![FLOPs](flops.png)",
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in result.seconds.items()),
        "",
        "```python",
        "from nni_dbs import load_pruned",
        f'model = load_pruned("{out}")',
        "```",
        "",
    ]
    frozen = [(g.name, g.frozen) for g in groups if g.frozen is not None]
    if frozen:
        lines += ["Groups that keep their width:", "", *(f"- `{name}`: {why}" for name, why in frozen), ""]
    write(out / "report.md", lambda path: path.write_text("\n".join(lines)))
