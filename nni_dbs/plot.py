"""Pictures of a pruned network: the widths it kept, and where its cost went.

Every function returns a plain `matplotlib.figure.Figure`. pyplot, the backend and the global style are not
touched, so the functions are safe inside a training script, a notebook or a server.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from nni_dbs.files import write

PALE, SOLID, WHOLE = "#c3d9ec", "#0b62a4", "#8a8a8a"
INK, FAINT, RULE = "#222222", "#666666", "#dddddd"
TEXT = 8.5

MAX_ROWS = 40  # more bars cannot be named one by one on a page
MAX_SECTIONS = 24  # more stages cannot be named below the columns
MAX_NAME = 34  # longer names lose their middle
LOG_FROM = 20  # columns that differ by this factor: on a linear scale the smallest would vanish

# Inches: a row; above, below and beside the axes; the longest bar; a column of numbers beside it.
ROW, HEAD, FOOT, EDGE, BARS, NUMBER = 0.215, 1.1, 0.6, 0.2, 5.0, 0.62


class Section(NamedTuple):
    """The neighbours `start` to `stop` (exclusive), under one label."""

    label: str
    start: int
    stop: int


def plot_widths(full: Mapping[str, int], kept: Mapping[str, int], title: str = "") -> Figure:
    """Show the width of every channel group before and after pruning, in the order of `full`.

    The pale bar is the full width, the solid bar the kept one; a group that kept everything, by choice or
    because it is frozen, is grey. Up to 40 groups get a named row each, with their numbers. Larger networks
    get a narrow column each, marked by stage, with the kept ratio in a panel below; there the widths are on a
    log scale where they differ too much.

    Use it to see where a search spent its channels.
    """
    _check_names(full, kept)
    for name, width in full.items():
        if not 0 <= kept[name] <= width:
            raise ValueError(
                f"kept widths lie between 0 and the full width; {name} keeps {kept[name]} of {width}"
            )

    names, before, after = list(full), list(full.values()), [kept[name] for name in full]
    if len(names) <= MAX_ROWS:
        texts = [(f"{a}", f"{b}", percent(b, a)) for a, b in zip(before, after, strict=True)]
        figure, axes = _rows(names, before, after, texts, ("full", "kept", "ratio"))
        axes.set_xlabel("width (channels)")
    else:
        figure = _columns(names, before, after)

    ratio = percent(sum(after), sum(before))
    summary = f"{sum(before):,} → {sum(after):,} channels ({ratio}) in {count(len(names), 'group')}"
    labels = ("full width", "kept", "kept whole, or frozen")
    header(figure, title or "Channel widths", summary, _patches(labels, _colours(before, after)))
    return figure


def plot_cost(
    before: Mapping[str, float], after: Mapping[str, float], unit: str = "FLOPs", title: str = ""
) -> Figure:
    """Show the cost of every layer before and after pruning, in the order of `before`, with the totals.

    The pale bar is the cost before, the solid bar after; what did not change is grey. More than 40 layers are
    added up by block or stage: neighbours that share a dotted prefix become one row.

    Use it to see which part of the network paid for the budget.
    """
    _check_names(before, after)
    for name, cost in [*before.items(), *after.items()]:
        if not 0 <= cost < math.inf:
            raise ValueError(f"costs are finite and not negative; {name} has {cost}")

    sections = _sections(list(before), MAX_ROWS)
    old, new = _sums(list(before.values()), sections), _sums([after[name] for name in before], sections)
    factor, prefix = si_prefix(max(old) / 10)
    digits = max(1, decimals(max(old) / factor))
    texts = [
        (f"{a / factor:.{digits}f}", f"{b / factor:.{digits}f}", percent(b, a))
        for a, b in zip(old, new, strict=True)
    ]
    labels = [section.label for section in sections]
    figure, axes = _rows(labels, old, new, texts, ("before", "after", "ratio"))
    axes.set_xlabel(f"{prefix} {unit}".lstrip())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:g}"))

    title = title or f"{unit} by {'layer' if len(sections) == len(before) else 'block'}"
    summary = f"{_total(sum(old), sum(new), unit)} in {count(len(before), 'layer')}"
    header(figure, title, summary, _patches(("before", "after", "unchanged"), _colours(old, new)))
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes `figure` as PNG; see `nni_dbs.files.write`."""
    write(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _check_names(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    if not before and not after:
        raise ValueError("nothing to plot: the mappings are empty")
    if odd := sorted(before.keys() ^ after.keys()):
        raise ValueError(f"both mappings need the same names; only one of them has {', '.join(odd[:5])}")


def _rows(
    names: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    texts: Sequence[Sequence[str]],
    headings: Sequence[str],
) -> tuple[Figure, Axes]:
    """One horizontal bar per name, top to bottom, with a table of `texts` at its right."""
    figure = Figure(facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    places = range(len(names))
    axes.barh(places, before, height=0.72, color=PALE)
    axes.barh(places, after, height=0.72, color=_colours(before, after))
    axes.set_yticks(places, _readable(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(*before, *after) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    quiet(axes, grid="x")

    labels = max(tick.get_window_extent().width for tick in axes.get_yticklabels()) / figure.dpi
    left, bars = EDGE + labels + 0.1, ROW * len(names)
    width, height = left + BARS + NUMBER * len(headings) + EDGE, HEAD + bars + FOOT
    figure.set_size_inches(width, height)
    axes.set_position((left / width, FOOT / height, BARS / width, bars / height))

    for column, heading in enumerate(headings, start=1):
        x = 1 + column * NUMBER / BARS
        above = 1 + 0.06 / bars
        axes.text(x, above, heading, transform=axes.transAxes, ha="right", color=FAINT, fontsize=TEXT)
        for place, row in enumerate(texts):
            text = axes.text(x, place, row[column - 1], transform=axes.get_yaxis_transform())
            text.set(ha="right", va="center_baseline", color=INK if column > 1 else FAINT, fontsize=TEXT)
    return figure, axes


def _columns(names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> Figure:
    """One narrow column per name, left to right: widths above, kept ratio below, stages named at the foot."""
    figure = Figure(figsize=(12, 6), facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    figure.subplots_adjust(left=0.07, right=0.98, top=0.83, bottom=0.09, hspace=0.08)
    places = range(len(names))
    colours = _colours(before, after)
    top.bar(places, before, width=0.8, color=PALE)
    top.bar(places, after, width=0.8, color=colours)
    top.set_ylabel("width (channels)")
    if max(before) >= LOG_FROM * min(before):
        top.set_ylabel("width (channels, log scale)")
        _log_scale(top, min((width for width in after if width), default=1))
    bottom.bar(places, [b / a for a, b in zip(before, after, strict=True)], width=0.8, color=colours)
    bottom.set_ylim(0, 1)
    bottom.set_yticks((0, 0.5, 1))
    bottom.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    bottom.set_ylabel("ratio kept")
    bottom.set_xlim(-0.6, len(names) - 0.4)
    for axes in (top, bottom):
        quiet(axes, grid="y")
    bottom.set_xticks([])
    name_sections((top, bottom), _sections(names, MAX_SECTIONS), named=bottom, y=-0.08)
    figure.align_ylabels()
    return figure


def name_sections(panels: Sequence[Axes], sections: Sequence[Section], named: Axes, y: float) -> None:
    """Rule off the sections in `panels` and name them beside `named` at the height `y`, a fraction of it.

    The largest are named first; a name that does not fit is left out.
    """
    for panel in panels:
        for section in sections[1:]:
            panel.axvline(section.start - 0.5, color="#b0b0b0", linewidth=0.8, zorder=0)
    page = named.figure.bbox
    taken: list[tuple[float, float]] = []
    for section in sorted(sections, key=lambda section: section.start - section.stop):
        centre = (section.start + section.stop - 1) / 2
        label = named.text(centre, y, shorten(section.label), transform=named.get_xaxis_transform())
        label.set(ha="center", va="top" if y < 0 else "bottom", color=INK, fontsize=TEXT)
        box = label.get_window_extent()
        hidden = box.x0 < page.x0 or page.x1 < box.x1
        if hidden or any(box.x0 - 6 < right and left < box.x1 + 6 for left, right in taken):
            label.remove()
        else:
            taken.append((box.x0, box.x1))


def quiet(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    """Leave the data, a faint grid, and small labels."""
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=RULE, linewidth=0.7)
    axes.tick_params(length=0, labelsize=TEXT, labelcolor=INK)
    axes.xaxis.label.set(color=FAINT, fontsize=TEXT)
    axes.yaxis.label.set(color=FAINT, fontsize=TEXT)


def _log_scale(axes: Axes, smallest: int) -> None:
    """Powers of two from just below `smallest`, so that the shortest bar can still be seen."""
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom=2.0 ** math.floor(math.log2(smallest) - 0.5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def header(figure: Figure, title: str, summary: str, handles: Sequence[Artist]) -> None:
    """Title, one line of totals, and a legend of the labelled `handles`, from the top left corner down."""
    width, height = figure.get_size_inches()
    left = EDGE / width
    figure.text(left, 1 - 0.18 / height, title, va="top", color=INK, fontsize=13, fontweight="bold")
    figure.text(left, 1 - 0.45 / height, summary, va="top", color=INK, fontsize=10)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left, 1 - 0.7 / height),
        ncols=len(handles),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        handleheight=0.8,
        columnspacing=1.6,
        fontsize=TEXT,
        labelcolor=INK,
    )


def _patches(labels: tuple[str, str, str], colours: Sequence[str]) -> list[Patch]:
    """What the legend of a bar chart explains: the colours that occur."""
    return [
        Patch(color=colour, label=label)
        for colour, label in zip((PALE, SOLID, WHOLE), labels, strict=True)
        if colour == PALE or colour in colours
    ]


def _colours(before: Sequence[float], after: Sequence[float]) -> list[str]:
    return [WHOLE if a == b else SOLID for a, b in zip(before, after, strict=True)]


def _sections(names: Sequence[str], limit: int) -> list[Section]:
    """At most `limit` sections of neighbours: by the longest dotted prefix that gives few enough.

    Names without a helpful hierarchy ("0", "1", ...) are cut into runs of equal length.
    """
    if len(names) <= limit:
        return [Section(name, place, place + 1) for place, name in enumerate(names)]
    short = [name.split(".") for name in _without_common_prefix(names)]
    for depth in range(max(map(len, short)) - 1, 0, -1):
        runs = [list(run) for _, run in groupby(range(len(names)), key=lambda place: short[place][:depth])]
        if 3 < len(runs) <= limit:
            return [Section(".".join(short[run[0]][:depth]), run[0], run[-1] + 1) for run in runs]
    step = math.ceil(len(names) / limit)
    starts = range(0, len(names), step)
    stops = [*starts[1:], len(names)]
    return [
        Section(f"{'.'.join(short[start])} … {'.'.join(short[stop - 1])}", start, stop)
        for start, stop in zip(starts, stops, strict=True)
    ]


def _sums(values: Sequence[float], sections: Sequence[Section]) -> list[float]:
    return [sum(values[section.start : section.stop]) for section in sections]


def _without_common_prefix(names: Sequence[str]) -> list[str]:
    """Drop the leading parts that all names share: "features.a.b", "features.c" -> "a.b", "c"."""
    parts = [name.split(".") for name in names]
    stems = zip(*(part[:-1] for part in parts), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, stems)))
    return [".".join(part[shared:]) for part in parts]


def _readable(names: Sequence[str]) -> list[str]:
    """The names themselves where all are short enough, else what tells them apart."""
    if max(map(len, names)) <= MAX_NAME:
        return list(names)
    return [shorten(name) for name in _without_common_prefix(names)]


def shorten(name: str) -> str:
    """A long name without its middle; both ends say most about where a layer is."""
    if len(name) <= MAX_NAME:
        return name
    head = (MAX_NAME - 1) // 2
    return f"{name[:head]}…{name[head + 1 - MAX_NAME :]}"


def percent(part: float, whole: float) -> str:
    """A ratio in whole percent that says 0 or 100 only where it is exact."""
    if whole == 0:
        return "-"
    rounded = round(100 * part / whole)
    if rounded == 100 and part != whole:
        return ">99 %" if part < whole else ">100 %"
    return "<1 %" if rounded == 0 < part else f"{rounded} %"


def si_prefix(value: float) -> tuple[float, str]:
    """The SI prefix to write `value` with."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return factor, prefix
    return 1.0, ""


def decimals(value: float) -> int:
    """Decimals that show three significant digits."""
    return max(0, 2 - math.floor(math.log10(value))) if value else 0


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _total(before: float, after: float, unit: str) -> str:
    """Such as "1.81 G → 0.90 G FLOPs (50 %)"."""
    factor, prefix = si_prefix(before)
    digits = decimals(before / factor)
    old, new = (f"{value / factor:.{digits}f} {prefix}".rstrip() for value in (before, after))
    return f"{old} → {new} {unit} ({percent(after, before)})"
