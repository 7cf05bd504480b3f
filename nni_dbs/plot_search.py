"""Pictures of a search: how far its predictor can be trusted, what it tried, and what a budget buys.

As in `nni_dbs.plot`, every function returns a plain `matplotlib.figure.Figure`; its `save` writes these too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox, TransformedBbox

from nni_dbs.plot import (
    EDGE,
    INK,
    MAX_ROWS,
    MAX_SECTIONS,
    ROW,
    SOLID,
    TEXT,
    WHOLE,
    Section,
    count,
    decimals,
    header,
    name_sections,
    percent,
    quiet,
    shorten,
    si_prefix,
)

POINT, CHOSEN = "#9cc3e4", "#d1491b"
MANY = 150  # more points get smaller markers
NICE = (1, 2, 2.5, 5, 10)  # steps between ticks
GAP = 0.15  # inches between panels

# Where a name may stand, best first: offset in points, alignment.
Place = tuple[float, float, Literal["left", "center", "right"], Literal["bottom", "center", "top"]]
BESIDE_POINT: tuple[Place, ...] = (
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (6, 6, "left", "bottom"),
    (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
)
ALONG_LINE: tuple[Place, ...] = (
    (4, 3, "left", "bottom"),
    (4, -3, "left", "top"),
    (164, 3, "left", "bottom"),
    (164, -3, "left", "top"),
)


def pareto_front(cost: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The networks that no other beats, as indices by ascending cost.

    One network beats another if it scores higher and costs no more, or costs less and scores no lower. Equal
    networks do not beat each other: all of them are returned, in their order.

    Args:
        cost: (N,) in any unit.
        scores: (N,) higher is better.

    Raises:
        ValueError: No networks, different lengths, or numbers that are not finite.
    """
    costs, values = _series(cost=cost, scores=scores)
    front: list[int] = []
    for place in np.lexsort((-values, costs)).tolist():  # the cheapest first, among equal costs the best
        last = front[-1] if front else place
        equal = (costs[place], values[place]) == (costs[last], values[last])
        if equal or values[place] > values[last]:
            front.append(place)
    return front


def plot_predictions(
    predicted: Sequence[float],
    measured: Sequence[float],
    in_band: Sequence[bool] | None = None,
    tau: float | None = None,
    tau_in_band: float | None = None,
    unit: str = "accuracy (%)",
    title: str = "",
) -> Figure:
    """Show what a predictor says about held-out networks against what they really score.

    Use it to see how far a search can rely on its predictor: it needs the right order near the budget more
    than it needs the right values.

    Args:
        predicted: (N,) the predictor's scores.
        measured: (N,) the measured scores of the same networks.
        in_band: (N,) whether a network's cost is near the budget; these points stand out.
        tau: Kendall's tau of all networks. A NaN, as from equal scores, is written "undefined".
        tau_in_band: Kendall's tau of the networks near the budget.
        unit: What the scores are, for the axes.

    Raises:
        ValueError: No networks, different lengths, scores that are not finite, or `tau_in_band` without
            `in_band`.
    """
    guesses, truths = _series(predicted=predicted, measured=measured)
    band = np.ones(len(truths), dtype=bool) if in_band is None else np.asarray(in_band, dtype=bool)
    if band.shape != truths.shape:
        raise ValueError(f"in_band needs one entry for each network: {len(truths)}, not {band.size}")
    if in_band is None and tau_in_band is not None:
        raise ValueError("tau_in_band needs in_band: which networks is it about?")

    figure, (axes,) = _panels(1)
    limits = _limits([*guesses, *truths])
    diagonal = axes.plot(limits, limits, color=WHOLE, linewidth=1, zorder=1, label="predicted = measured")
    near, far = ("network", "") if in_band is None else ("near the budget", "other networks")
    points = [
        _dots(axes, truths[part], guesses[part], len(truths), colour, label)
        for part, colour, label in ((~band, POINT, far), (band, SOLID, near))  # the band is drawn on top
        if part.any()
    ]
    axes.set(xlim=limits, ylim=limits, xlabel=f"measured {unit}", ylabel=f"predicted {unit}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=NICE))
    axes.ticklabel_format(useOffset=False)
    quiet(axes, grid="both")
    _lay_out(figure, [axes], width=4.9, heights=[4.9])

    totals = [f"{count(len(truths), 'network')}{_tau('Kendall τ', tau)}"]
    if in_band is not None:
        totals.append(f"{band.sum()} near the budget{_tau('τ', tau_in_band)}")
    header(figure, title or "Predicted and measured", " · ".join(totals), [*points[::-1], *diagonal])
    return figure


def plot_search(
    used: Sequence[float],
    scores: Sequence[float],
    stages: Sequence[str],
    chosen: int | None = None,
    unit: str = "accuracy (%)",
    title: str = "",
) -> Figure:
    """Show every network that a search evaluated, in order: its score above, its share of the budget below.

    Networks above the budget are hollow and do not count for the best score so far. The best of many noisy
    measurements flatters, so a careful choice may well lie below that line.

    Use it to see what each round gained, and whether the search filled its budget.

    Args:
        used: (N,) cost divided by budget: 1.0 is the budget.
        scores: (N,) higher is better.
        stages: (N,) the stage of each evaluation, such as "start", "round 1"; neighbours with one label are
            one stage.
        chosen: Index of the network that the search chose.
        unit: What the scores are, for the axis.

    Raises:
        ValueError: No networks, different lengths, numbers that are not finite, a negative share, or `chosen`
            out of range.
    """
    shares, values = _series(used=used, scores=scores)
    if len(stages) != len(values):
        raise ValueError(f"stages needs one label for each network: {len(values)}, not {len(stages)}")
    _check_not_negative("used", shares)
    _check_chosen(chosen, len(values))

    figure, (top, bottom) = _panels(2)
    fits = shares <= 1
    _draw_evaluated(bottom, shares, fits, chosen)
    handles = _draw_evaluated(top, values, fits, chosen)
    best = np.maximum.accumulate(np.where(fits, values, -math.inf))
    if fits.any():
        first = int(fits.argmax())
        (line,) = top.plot(np.arange(first, len(best)) + 1, best[first:], drawstyle="steps-post")
        line.set(color=SOLID, linewidth=1.5, zorder=1.5, label="best so far")
        handles.append(line)
    handles.append(bottom.axhline(1, color=INK, linewidth=1, zorder=1, label="budget"))

    top.set(xlim=(0.4, len(values) + 0.6), ylim=_limits(values), ylabel=unit)
    top.yaxis.set_major_locator(MaxNLocator(6, steps=NICE))
    top.ticklabel_format(axis="y", useOffset=False)
    bottom.set(ylim=_limits([*shares, 1, 0.98]), ylabel="budget used", xlabel="evaluation")
    bottom.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    bottom.yaxis.set_major_locator(MaxNLocator(3, steps=NICE))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g} %"))
    _lay_out(figure, (top, bottom), width=9, heights=(3.2, 1.3), above=0.18)
    runs = _runs(stages)
    name_sections((top, bottom), _merged(runs), named=top, y=1.02)

    totals = [
        f"{count(len(values), 'network')} in {count(len(runs), 'stage')}",
        f"best {_score(best[-1])}" if fits.any() else "all above the budget",
    ]
    if chosen is not None:
        totals.append(f"chosen {_score(values[chosen])} at {percent(shares[chosen], 1)} of the budget")
    header(figure, title or "What the search tried", " · ".join(totals), handles)
    return figure


def plot_architecture(
    progress: Sequence[float],
    losses: Sequence[float],
    used: Sequence[float],
    unit: str = "loss of the task",
    title: str = "",
) -> Figure:
    """Show how an architecture was learnt: the task's loss above, the expected share of the budget below.

    For methods that learn widths while they train (DMCP, TAS, DSA). Use it to see whether the expected cost
    came to the budget in time; the network that is kept is inside of it in any case.

    Args:
        progress: (N,) of each step on the architecture, in [0, 1].
        losses: (N,) the task's loss there.
        used: (N,) expected cost divided by budget: 1.0 is the budget.
        unit: What the losses are, for the axis.

    Raises:
        ValueError: No steps, different lengths, numbers that are not finite, or a negative share.
    """
    at, values, shares = _series(progress=progress, losses=losses, used=used)
    _check_not_negative("used", shares)
    figure, (top, bottom) = _panels(2)
    window = max(len(values) // 20, 1)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    (noisy,) = top.plot(at, values, color=POINT, linewidth=0.8, label="each step")
    (mean,) = top.plot(at[window - 1 :], smooth, color=SOLID, linewidth=1.5, label=f"mean of {window}")
    bottom.plot(at, shares, color=SOLID, linewidth=1.5)
    band = bottom.axhspan(0.95, 1, color=POINT, alpha=0.5, linewidth=0, label="95 to 100 % of the budget")
    top.set(xlim=(0, 1), ylim=_limits(values), ylabel=unit)
    bottom.set(ylim=_limits([*shares, 1, 0.9]), ylabel="expected use", xlabel="progress of the training")
    for axes in (top, bottom):
        quiet(axes, "both")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
    bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g} %"))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g} %"))
    _lay_out(figure, (top, bottom), width=9, heights=(2.2, 2.2))
    totals = f"{count(len(values), 'step')} · at last {percent(shares[-1], 1)} of the budget expected"
    header(figure, title or "How the architecture was learnt", totals, [noisy, mean, band])
    return figure


def plot_prior(
    prior: Mapping[str, Mapping[int, float]], chosen: Mapping[str, int] | None = None, title: str = ""
) -> Figure:
    """Show which widths a search began with: a row for each group, dark where the chance is high.

    For PSE-Net. Use it to see what the training of the supernet told of the groups, and how far the chosen
    network is from it. Groups with one width are left out, and of more than 40 the names.

    Args:
        prior: Group name -> width -> chance.
        chosen: The widths that were chosen in the end.

    Raises:
        ValueError: No group has a choice, or chances that are not finite or negative.
    """
    rows = {name: dict(sorted(chances.items())) for name, chances in prior.items() if len(chances) > 1}
    if not rows:
        raise ValueError("no group has a choice, so there is no prior to show")
    for name, chances in rows.items():
        if not all(0 <= chance < math.inf for chance in chances.values()):
            raise ValueError(f"chances are finite and not negative; those of {name} are {chances}")

    figure, (axes,) = _panels(1)
    shade = LinearSegmentedColormap.from_list("chances", ["white", POINT, SOLID])
    for place, (name, chances) in enumerate(rows.items()):
        ratios = np.array(list(chances)) / max(chances)
        between = (ratios[1:] + ratios[:-1]) / 2
        edges = [max(2 * ratios[0] - between[0], 0), *between, 2 * ratios[-1] - between[-1]]
        values = np.array([list(chances.values())]) / (max(chances.values()) or 1)
        axes.pcolormesh(edges, [place - 0.42, place + 0.42], values, cmap=shade, vmin=0, vmax=1)
        if chosen is not None:
            _mark(axes, chosen[name] / max(chances), place).set(sizes=[26])
    named = len(rows) <= MAX_ROWS
    axes.set_yticks(range(len(rows)) if named else [], [shorten(name) for name in rows] if named else [])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, None)
    axes.set_xlabel("width, as a share of the widest")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    quiet(axes, grid="x")
    _lay_out(figure, [axes], width=6, heights=[max(len(rows) * (ROW if named else 0.08), 1.0)])
    handles: list[Artist] = [Patch(color=SOLID, label="the likeliest width of a group")]
    if chosen is not None:
        handles.append(
            Line2D([], [], color="white", marker="o", markerfacecolor=CHOSEN, markersize=8, label="chosen")
        )
    header(figure, title or "What the search began with", count(len(rows), "group"), handles)
    return figure


def plot_front(
    cost: Sequence[float],
    scores: Sequence[float],
    front: Sequence[int],
    chosen: int | None = None,
    unit: str = "FLOPs",
    budget: float | None = None,
    reference: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
    score_unit: str = "accuracy (%)",
) -> Figure:
    """Show what each budget buys: all evaluated networks, and the front of those that no other beats.

    The step line is the best score that was measured up to a cost. Use it to see whether a slightly larger
    budget would pay, and how far the search is ahead of simple networks.

    Args:
        cost: (N,) in `unit`.
        scores: (N,) in `score_unit`, higher is better.
        front: Indices of the networks on the front, as from `pareto_front`.
        chosen: Index of the network that was chosen.
        unit: The unit of the costs, for the axis.
        budget: In `unit`.
        reference: (cost, score) of other networks by name, such as "full" and "uniform". One that costs far
            more or less than all others becomes a dashed line at its score.
        score_unit: What the scores are, for the axis.

    Raises:
        ValueError: No networks, an empty front, different lengths, numbers that are not finite, a negative
            cost, a budget that is not positive, or an index out of range.
    """
    costs, values = _series(cost=cost, scores=scores)
    reference = reference or {}
    _check_not_negative("cost", costs)
    _check_chosen(chosen, len(costs))
    _check_front(front, len(costs))
    _check_budget_and_reference(budget, reference)

    figure, (axes,) = _panels(1)
    ascending = sorted(front, key=lambda place: (costs[place], values[place]))
    handles: list[Artist] = [_dots(axes, costs, values, len(costs), POINT, "evaluated")]
    (line,) = axes.plot(costs[ascending], values[ascending], drawstyle="steps-post", label="front")
    line.set(color=SOLID, linewidth=1.5, marker="o", markersize=4, zorder=3)
    handles.append(line)
    if chosen is not None:
        handles.append(_mark(axes, costs[chosen], values[chosen]))

    range_of_costs = [*costs, budget] if budget else list(costs)
    far = {name: point for name, point in reference.items() if _far_off(point[0], range_of_costs)}
    near = {name: point for name, point in reference.items() if name not in far}
    axes.set_xlim(_limits([*range_of_costs, *(x for x, _ in near.values())]))
    axes.set_ylim(_limits([*values, *(y for _, y in reference.values())]))
    factor, prefix = si_prefix(axes.get_xlim()[1] / 10)
    axes.set(xlabel=f"{prefix} {unit}".lstrip(), ylabel=score_unit)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=NICE))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / factor:.10g}"))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=NICE))
    axes.ticklabel_format(axis="y", useOffset=False)
    quiet(axes, grid="both")
    _lay_out(figure, [axes], width=7, heights=[4.2], above=0.18)

    marked = ascending if chosen is None else [*ascending, chosen]
    points = [*near.values(), *zip(costs[marked], values[marked], strict=True)]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(points)]
    if budget:
        taken.append(_draw_budget(axes, budget, f"budget {_si(budget)} {unit}"))
    for name, point in near.items():
        _draw_point(axes, point, shorten(name), taken)
    for name, (x, y) in far.items():
        _draw_level(axes, y, f"{shorten(name)}, {_si(x)} {unit}", taken)

    totals = [f"{count(len(costs), 'network')}, {len(front)} on the front"]
    if chosen is not None:
        totals.append(f"chosen {_score(values[chosen])} at {_si(costs[chosen])} {unit}")
        if budget:
            totals[-1] += f", {percent(costs[chosen], budget)} of the budget"
    header(figure, title or "What a budget buys", " · ".join(totals), handles)
    return figure


def _series(**given: Sequence[float]) -> list[np.ndarray]:
    """Each sequence as (N,) float64, once they are known to belong together."""
    arrays = [np.asarray(values, dtype=np.float64) for values in given.values()]
    names = " and ".join(given)
    for name, array in zip(given, arrays, strict=True):
        if array.ndim != 1:
            raise ValueError(f"{name} needs one number for each network; its shape is {array.shape}")
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(
            f"{names} need the same length; they have {' and '.join(str(len(a)) for a in arrays)}"
        )
    if not len(arrays[0]):
        raise ValueError(f"no networks: {names} are empty")
    for name, array in zip(given, arrays, strict=True):
        if not np.isfinite(array).all():
            place = int(np.argmin(np.isfinite(array)))
            raise ValueError(f"{name} must be finite; number {place} is {array[place]}")
    return arrays


def _check_not_negative(name: str, values: np.ndarray) -> None:
    if values.min() < 0:
        raise ValueError(f"{name} must not be negative; number {values.argmin()} is {values.min():g}")


def _check_chosen(chosen: int | None, networks: int) -> None:
    if chosen is not None and not 0 <= chosen < networks:
        raise ValueError(f"chosen is the index of a network, from 0 to {networks - 1}; got {chosen}")


def _check_front(front: Sequence[int], networks: int) -> None:
    if not len(front) or min(front) < 0 or max(front) >= networks:
        given = [int(place) for place in front[:5]]
        raise ValueError(f"front needs indices of networks, from 0 to {networks - 1}; got {given}")


def _check_budget_and_reference(budget: float | None, reference: Mapping[str, tuple[float, float]]) -> None:
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"a budget is positive and finite; got {budget}")
    for name, (cost, score) in reference.items():
        if not (0 <= cost < math.inf and math.isfinite(score)):
            raise ValueError(f"references are finite and cost at least 0; {name} has {cost} and {score}")


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """Panels from top to bottom that share x."""
    figure = Figure(facecolor="white")
    return figure, list(figure.subplots(number, 1, sharex=True, squeeze=False)[:, 0])


def _lay_out(
    figure: Figure, panels: Sequence[Axes], width: float, heights: Sequence[float], above: float = 0.0
) -> None:
    """Give the panels their size in inches, once their ticks are known; `above` them is room for names."""
    ticks = [tick for panel in panels for tick in panel.get_yticklabels()]
    left = EDGE + 0.3 + max((tick.get_window_extent().width for tick in ticks), default=0) / figure.dpi
    page = left + width + EDGE, 1.0 + above + sum(heights) + GAP * (len(heights) - 1) + 0.55
    figure.set_size_inches(*page)
    top = page[1] - 1.0 - above
    for panel, height in zip(panels, heights, strict=True):
        panel.set_position((left / page[0], (top - height) / page[1], width / page[0], height / page[1]))
        top -= height + GAP
    figure.align_ylabels(panels)


def _draw_evaluated(axes: Axes, heights: np.ndarray, fits: np.ndarray, chosen: int | None) -> list[Artist]:
    """A point for each evaluation, from 1 to N, hollow where it does not fit the budget."""
    numbers = np.arange(1, len(heights) + 1)
    handles: list[Artist] = []
    if fits.any():
        handles.append(_dots(axes, numbers[fits], heights[fits], len(heights), POINT, "evaluated"))
    if not fits.all():
        dots = _dots(axes, numbers[~fits], heights[~fits], len(heights), "white", "above the budget")
        dots.set(edgecolor=WHOLE, linewidth=1)
        handles.append(dots)
    if chosen is not None:
        axes.axvline(numbers[chosen], color=CHOSEN, linewidth=0.8, alpha=0.4, zorder=1)
        handles.append(_mark(axes, numbers[chosen], heights[chosen]))
    quiet(axes, grid="y")
    return handles


def _dots(axes: Axes, x: np.ndarray, y: np.ndarray, networks: int, colour: str, label: str) -> PathCollection:
    """Points with a thin white edge, so that neighbours stay apart; smaller in a crowd."""
    size = 14 if networks > MANY else 30
    return axes.scatter(x, y, s=size, color=colour, edgecolor="white", linewidth=0.5, zorder=2, label=label)


def _mark(axes: Axes, x: float, y: float) -> PathCollection:
    return axes.scatter(
        [x], [y], s=60, color=CHOSEN, edgecolor="white", linewidth=1, zorder=5, label="chosen"
    )


def _limits(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The range of `values` with a margin; equal values get a range around them."""
    low, high = float(min(values)), float(max(values))
    margin = 0.05 * (high - low)
    if math.isclose(low, high, rel_tol=1e-9):
        margin = 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _runs(stages: Sequence[str]) -> list[Section]:
    """The stages, at the evaluation numbers 1 to N."""
    runs, start = [], 1
    for label, members in groupby(stages):
        stop = start + len(list(members))
        runs.append(Section(label, start, stop))
        start = stop
    return runs


def _merged(runs: Sequence[Section]) -> list[Section]:
    """At most MAX_SECTIONS sections: where there are more runs, neighbours become one, "round 1 … 3"."""
    step = math.ceil(len(runs) / MAX_SECTIONS)
    merged = []
    for place in range(0, len(runs), step):
        first, last = runs[place], runs[min(place + step, len(runs)) - 1]
        stem = first.label.rpartition(" ")[0] + " "
        label = first.label if first is last else f"{first.label} … {last.label.removeprefix(stem)}"
        merged.append(Section(label, first.start, last.stop))
    return merged


def _draw_budget(axes: Axes, budget: float, name: str) -> Bbox:
    """A vertical rule, named above the axes and inwards at their ends; returns where it is on the page."""
    axes.axvline(budget, color=INK, linewidth=1, zorder=1)
    low, high = axes.get_xlim()
    fraction = (budget - low) / (high - low)
    side = "left" if fraction < 0.15 else "right" if fraction > 0.85 else "center"
    axes.text(budget, 1.015, name, transform=axes.get_xaxis_transform(), ha=side, color=INK, fontsize=TEXT)
    return TransformedBbox(Bbox([[budget, 0], [budget, 1]]), axes.get_xaxis_transform()).frozen()


def _draw_point(axes: Axes, point: tuple[float, float], name: str, taken: list[Bbox]) -> None:
    axes.scatter(*point, s=34, marker="D", color=INK, linewidth=0, zorder=4, label=name)
    label = axes.annotate(name, point, xytext=(0, 0), textcoords="offset points")
    _place_name(axes, label, BESIDE_POINT, taken)


def _draw_level(axes: Axes, score: float, name: str, taken: list[Bbox]) -> None:
    axes.axhline(score, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=name)
    start = axes.get_yaxis_transform()
    label = axes.annotate(name, (0, score), xytext=(0, 0), xycoords=start, textcoords="offset points")
    _place_name(axes, label, ALONG_LINE, taken)


def _place_name(axes: Axes, label: Annotation, places: Sequence[Place], taken: list[Bbox]) -> None:
    """Move a name to the first of `places` inside of the axes that nothing has `taken` yet, and take it."""
    label.set(
        color=INK, fontsize=TEXT, zorder=6, path_effects=[withStroke(linewidth=2.5, foreground="white")]
    )
    for right, up, ha, va in places:
        label.set(position=(right, up), ha=ha, va=va)
        box = label.get_window_extent()
        inside = Bbox.intersection(box, axes.bbox)
        if inside is not None and inside.bounds == box.bounds and not box.count_overlaps(taken):
            break
    taken.append(box)


def _far_off(cost: float, costs: Sequence[float]) -> bool:
    """Whether an axis that reaches `cost` would squeeze the others together."""
    low, high = min(costs), max(costs)
    reach = max(high - low, 0.1 * high)
    return not low - reach <= cost <= high + reach


def _tau(symbol: str, value: float | None) -> str:
    if value is None:
        return ""
    return f", {symbol} {'undefined' if math.isnan(value) else f'{value:.2f}'}"


def _score(value: float) -> str:
    """Four significant digits."""
    return f"{value:.{decimals(abs(value)) + 1}f}"


def _si(value: float) -> str:
    """Three significant digits and an SI prefix, such as "18.1 M"."""
    factor, prefix = si_prefix(value)
    return f"{value / factor:.{decimals(value / factor)}f} {prefix}".rstrip()
