"""The table and the page that a run ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from nni_dbs import plot
from nni_dbs.config import Config
from nni_dbs.cost import PolynomialCost, readable
from nni_dbs.files import write
from nni_dbs.plot_search import (
    pareto_front,
    plot_architecture,
    plot_front,
    plot_predictions,
    plot_prior,
    plot_search,
)
from nni_dbs.result import Result, load_search
from nni_dbs.space import Widths
from torch_pruning_adapters import ChannelGroup, removed_blocks

SCORE = "validation accuracy (%)"
UNITS = {"flops": "FLOPs", "params": "parameters", "latency_ms": "ms"}


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
    """Draws `widths.png` and `flops.png`, and those of the search if there was one; returns their paths."""
    full = {g.name: g.size for g in groups}
    kept = {g.name: result.widths.get(g.name, g.size) for g in groups}
    plot.save(plot.plot_widths(full, kept, f"Widths chosen by {result.method}"), out / "widths.png")
    before, after = flops.by_layer({}), flops.by_layer(result.widths)
    plot.save(plot.plot_cost(before, after, title="Where the FLOPs went"), out / "flops.png")
    return [out / "widths.png", out / "flops.png", *_search_pictures(out, result)]


def _search_pictures(out: Path, result: Result) -> list[Path]:
    """Those of `search.jsonl`, and of predictions, an architecture and a prior, if the result has them."""
    figures: dict[str, Figure] = {}
    lines = load_search(out / "search.jsonl")
    if lines:
        scores = [line["score"] for line in lines]
        networks = [Widths(line["widths"]) for line in lines]
        chosen = networks.index(result.widths) if result.widths in networks else None
        figures["search"] = plot_search(
            [line["used"] for line in lines],
            scores,
            [line["stage"] for line in lines],
            chosen,
            unit=SCORE,
            title=f"The search of {result.method}",
        )
        taken = {"flops": result.flops, "params": result.params, "latency_ms": result.latency_ms or 0.0}
        kind = max(result.limits, key=lambda kind: taken[kind] / result.limits[kind])  # the tightest
        cost = [line[kind] for line in lines]
        front = pareto_front(cost, scores)
        figures["front"] = plot_front(
            cost, scores, front, chosen, UNITS[kind], result.limits[kind], score_unit=SCORE
        )
    if result.held_out and result.held_out["measured"]:
        figures["predictions"] = plot_predictions(
            result.held_out["predicted"],
            result.held_out["measured"],
            [bool(near) for near in result.held_out["in_band"]],
            _or_nan(result.fits[-1]["tau"]),
            _or_nan(result.fits[-1]["tau_in_band"]),
            unit=SCORE,
        )
    if result.architecture:
        steps = {key: [line[key] for line in result.architecture] for key in ("progress", "loss", "used")}
        figures["architecture"] = plot_architecture(
            steps["progress"], steps["loss"], steps["used"], title=f"What {result.method} learnt"
        )
    if any(len(chances) > 1 for chances in result.prior.values()):
        prior = {name: {int(w): c for w, c in row.items()} for name, row in result.prior.items()}
        figures["prior"] = plot_prior(prior, result.widths, f"The prior distribution of {result.method}")
    for name, figure in figures.items():
        plot.save(figure, out / f"{name}.png")
    return [out / f"{name}.png" for name in figures]


def _or_nan(tau: float | None) -> float:
    return math.nan if tau is None else tau


def _counts(result: Result) -> list[str]:
    if not result.counts:
        return []
    lines = [f"{name}: {count}" for name, count in result.counts.items()]
    if result.fits:
        last = result.fits[-1]
        for name, tau in (("held-out Kendall tau", last["tau"]), ("near the budget", last["tau_in_band"])):
            lines.append(f"{name}: {'undefined' if tau is None else format(tau, '.2f')}")
    return [f"Search: {', '.join(lines)}.", ""]


def write_report(
    out: Path,
    config: Config,
    result: Result,
    rows: Sequence[Row],
    groups: Sequence[ChannelGroup],
    flops: PolynomialCost,
) -> None:
    """`report.md` with its pictures."""
    pictures = write_pictures(out, result, groups, flops)
    latency = ""
    if result.latency_ms is not None and result.full_latency_ms is not None:
        latency = f" Latency when chosen: {result.latency_ms:.2f} of {result.full_latency_ms:.2f} ms."
    lines = [
        f"# {config.model} on {config.data['name']}, pruned by {result.method}",
        "",
        f"Budget: {result.budget}. The network has {result.flops:,} of {result.full_flops:,} FLOPs "
        f"({result.flops / result.full_flops:.1%}) and {result.params:,} of {result.full_params:,} "
        f"parameters ({result.params / result.full_params:.1%}).{latency}",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
        "",
        "FLOPs are multiply-adds of one sample. Latency is the median forward pass of one sample on "
        f"{result.device}; compare it within this table only.",
        "",
        *(line for path in pictures for line in (f"![{path.stem}]({path.name})", "")),
        *_counts(result),
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
    if removed := removed_blocks(groups, result.widths):
        lines += ["Removed blocks:", "", *(f"- `{block}`" for block in removed), ""]
    frozen = [(g.name, g.frozen) for g in groups if g.frozen is not None]
    if frozen:
        lines += ["Groups that keep their width:", "", *(f"- `{name}`: {why}" for name, why in frozen), ""]
    write(out / "report.md", lambda path: path.write_text("\n".join(lines)))
