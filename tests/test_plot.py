"""What the pictures say, and that their words do not run into each other."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from nni_dbs import plot, plot_search
from nni_dbs.errors import ResultError


@pytest.fixture(autouse=True)
def untouched_globals() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def resnet18() -> dict[str, int]:
    widths = {"conv1": 64, "layer1.0.conv1": 64, "layer1.1.conv1": 64}
    for stage, width in ((2, 128), (3, 256), (4, 512)):
        widths |= {f"layer{stage}.{name}": width for name in ("0.conv1", "0.conv2", "1.conv1")}
    return widths


def resnet50() -> dict[str, int]:
    widths = {"conv1": 64}
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            widths |= {f"layer{stage}.{block}.conv{conv}": width for conv in (1, 2)}
            if block == 0:
                widths[f"layer{stage}.0.conv3"] = 4 * width
    return widths


def densenet201() -> dict[str, int]:
    widths = {"features.conv0": 64}
    for stage, layers in enumerate((6, 12, 48, 32), start=1):
        for layer in range(1, layers + 1):
            prefix = f"features.denseblock{stage}.denselayer{layer}"
            widths |= {f"{prefix}.conv1": 128, f"{prefix}.conv2": 32}
        if stage < 4:
            widths[f"features.transition{stage}.conv"] = (128, 256, 896)[stage - 1]
    return widths


def halved(widths: dict[str, int]) -> dict[str, int]:
    """Every width halved but the last, which stays whole."""
    last = list(widths)[-1]
    return {name: width if name == last else width // 2 for name, width in widths.items()}


def texts(figure: Figure) -> list[Text]:
    """What can be read in the picture; the ticks outside of the limits are not drawn."""
    figure.draw_without_rendering()
    hidden = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    found = figure.findobj(Text)
    return [t for t in found if isinstance(t, Text) and t.get_text() and t.get_visible() and t not in hidden]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def bars(figure: Figure, panel: int = 0) -> list[Rectangle]:
    return [patch for patch in figure.axes[panel].patches if isinstance(patch, Rectangle)]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    return [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if Bbox.intersection(box, other)]


def outside(figure: Figure) -> list[str]:
    page = figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    return [
        name
        for name, box in boxes
        if box.x0 < page.x0 or box.y0 < page.y0 or box.x1 > page.x1 or box.y1 > page.y1
    ]


@pytest.mark.parametrize(("network", "groups"), [(resnet18, 12), (resnet50, 37)])
def test_each_group_has_a_row(network: Callable[[], dict[str, int]], groups: int) -> None:
    full = network()
    kept = halved(full)
    figure = plot.plot_widths(full, kept, title="a network")

    pale, solid = bars(figure)[:groups], bars(figure)[groups:]
    assert [bar.get_width() for bar in pale] == list(full.values())
    assert [bar.get_width() for bar in solid] == list(kept.values())
    assert {to_hex(bar.get_facecolor()) for bar in solid[:-1]} == {plot.SOLID}
    assert to_hex(solid[-1].get_facecolor()) == plot.WHOLE
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == list(full)
    assert figure.axes[0].yaxis_inverted(), "the first group is at the top"

    said = words(figure)
    assert said.count("50 %") == groups - 1 and said.count("100 %") == 1
    assert {"a network", "width (channels)", "full width", "kept", "kept whole, or frozen"} <= set(said)
    assert any(f"{sum(full.values()):,} → {sum(kept.values()):,} channels" in word for word in said)
    assert not overlaps(figure)
    assert not outside(figure)


def test_many_groups_become_columns_marked_by_stage() -> None:
    full = densenet201()
    figure = plot.plot_widths(full, halved(full))
    assert len(full) == 200
    assert len(bars(figure)) == 400
    assert [bar.get_height() for bar in bars(figure, panel=1)] == pytest.approx([0.5] * 199 + [1])
    assert figure.axes[0].get_yscale() == "log"
    assert {f"denseblock{stage}" for stage in (1, 2, 3, 4)} <= set(words(figure))
    assert not overlaps(figure)
    assert not outside(figure)


def test_legend_names_only_what_occurs() -> None:
    figure = plot.plot_widths({"a": 8, "b": 16}, {"a": 4, "b": 8})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["full width", "kept"]


def test_long_names_lose_what_they_share_and_then_their_middle() -> None:
    names = [f"model.encoder.layers.block{i}.attention.projection.inner.dense" for i in (0, 1)]
    widths = dict.fromkeys(names, 16)
    labels = [label.get_text() for label in plot.plot_widths(widths, widths).axes[0].get_yticklabels()]
    assert all(label.startswith("block") and label.endswith("dense") and "…" in label for label in labels)
    assert max(map(len, labels)) <= plot.MAX_NAME


def test_cost_totals_are_in_the_summary() -> None:
    before = {"conv1": 1.0e9, "layer1.conv": 0.8e9, "fc": 0.01e9}
    figure = plot.plot_cost(before, {"conv1": 0.6e9, "layer1.conv": 0.295e9, "fc": 0.01e9})
    said = words(figure)
    assert "1.81 G → 0.91 G FLOPs (50 %) in 3 layers" in said
    assert {"FLOPs by layer", "M FLOPs", "1000.0", "600.0", "before", "after", "unchanged"} <= set(said)
    assert not overlaps(figure)
    assert not outside(figure)


def test_many_layers_are_added_up_by_block() -> None:
    names = [*resnet50(), *(f"layer4.2.extra{i}" for i in range(10)), "fc"]
    before = dict.fromkeys(names, 1e6)
    figure = plot.plot_cost(before, {name: cost / 4 for name, cost in before.items()}, title="ResNet-50")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:3] == ["conv1", "layer1.0", "layer1.1"] and labels[-2:] == ["layer4.2", "fc"]
    pale = bars(figure)[: len(labels)]
    assert pale[-2].get_width() == 12e6
    assert sum(bar.get_width() for bar in pale) == sum(before.values())
    assert not overlaps(figure)


def test_layers_without_hierarchy_are_cut_into_runs() -> None:
    before = {str(i): 1.0 for i in range(300)}
    figure = plot.plot_cost(before, before, unit="ms")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) <= plot.MAX_ROWS
    assert labels[0] == "0 … 7" and labels[-1] == "296 … 299"
    assert "300 → 300 ms (100 %) in 300 layers" in words(figure)


def test_layers_that_cost_nothing_or_grow_are_shown() -> None:
    figure = plot.plot_cost({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.1}, unit="ms")
    assert {"-", "110 %"} <= set(words(figure))
    assert "0 → 0 ms (-) in 1 layer" in words(plot.plot_cost({"a": 0}, {"a": 0}, unit="ms"))


@pytest.mark.parametrize(
    ("part", "said"),
    [(1001, ">100 %"), (1000, "100 %"), (999, ">99 %"), (500, "50 %"), (1, "<1 %"), (0, "0 %")],
)
def test_percent_says_0_and_100_only_where_exact(part: int, said: str) -> None:
    assert plot.percent(part, 1000) == said


@pytest.mark.parametrize("draw", [plot.plot_widths, plot.plot_cost])
def test_mappings_that_do_not_belong_together(draw: Callable[..., Figure]) -> None:
    with pytest.raises(ValueError, match="empty"):
        draw({}, {})
    with pytest.raises(ValueError, match="only one of them has b, c"):
        draw({"a": 8, "b": 8}, {"a": 8, "c": 8})


def test_impossible_numbers() -> None:
    with pytest.raises(ValueError, match="b keeps 9 of 8"):
        plot.plot_widths({"a": 8, "b": 8}, {"a": 8, "b": 9})
    with pytest.raises(ValueError, match="a keeps -1 of 8"):
        plot.plot_widths({"a": 8}, {"a": -1})
    with pytest.raises(ValueError, match="a has nan"):
        plot.plot_cost({"a": 8}, {"a": float("nan")})


def test_save_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "widths.png"
    figure = plot.plot_widths({"a": 8}, {"a": 4})
    plot.save(figure, target)
    picture = target.read_bytes()
    assert picture.startswith(b"\x89PNG")

    def dies_half_way(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", dies_half_way)
    with pytest.raises(ResultError, match="disk full"):
        plot.save(figure, target)
    assert target.read_bytes() == picture
    assert list(tmp_path.iterdir()) == [target]


def test_plotting_leaves_pyplot_backend_and_nni_alone(tmp_path: Path) -> None:
    script = f"""
import sys, matplotlib
from nni_dbs import plot, plot_search
from nni_dbs.errors import ResultError
plot.save(plot.plot_widths({{"a": 8}}, {{"a": 4}}), {str(tmp_path / "a.png")!r})
plot.save(plot_search.plot_search([0.9, 1.0], [1, 2], ["start", "start"], 1), {str(tmp_path / "b.png")!r})
assert matplotlib.get_backend(auto_select=False) is None
assert not {{"matplotlib.pyplot", "nni"}} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    )


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    found = [c for c in axes.collections if isinstance(c, PathCollection) and c.get_label() == label]
    return [(float(x), float(y)) for c in found for x, y in np.asarray(c.get_offsets())]


def line(axes: Axes, label: str) -> Line2D:
    (found,) = (line for line in axes.lines if line.get_label() == label)
    return found


def data(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def all_points_are_visible(figure: Figure) -> bool:
    for axes in figure.axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for collection in axes.collections:
            for x, y in np.asarray(collection.get_offsets()):
                if not (left < x < right and low < y < high):
                    return False
    return True


def a_search(rounds: int = 4, seed: int = 0) -> tuple[list[float], list[float], list[str]]:
    """48 starting networks and rounds of 8 better ones: budget used, accuracy, stage."""
    rng = np.random.default_rng(seed)
    stages = ["start"] * 48 + [f"round {i}" for i in range(1, rounds + 1) for _ in range(8)]
    used = np.concatenate([rng.uniform(0.6, 1, 48), rng.uniform(0.98, 1, 8 * rounds)])
    return used.tolist(), (90 + 3 * used + rng.normal(0, 0.3, len(used))).tolist(), stages


numbers = st.integers(0, 4).map(float)  # few values, so that many are equal


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12))
def test_pareto_front_is_what_no_other_network_beats(networks: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return (a[0] <= b[0] and a[1] > b[1]) or (a[0] < b[0] and a[1] >= b[1])

    unbeaten = [i for i, b in enumerate(networks) if not any(beats(a, b) for a in networks)]
    expected = sorted(unbeaten, key=lambda i: networks[i][0])
    assert plot_search.pareto_front(*zip(*networks, strict=True)) == expected


def test_predictions_near_the_budget_stand_out() -> None:
    predicted, measured = [91.0, 92.5, 90.0, 93.0], [90.5, 92.0, 91.0, 94.0]
    figure = plot_search.plot_predictions(predicted, measured, [True, False, False, True], 0.6667, 1.0)
    (axes,) = figure.axes
    assert points(axes, "near the budget") == [(90.5, 91.0), (94.0, 93.0)]
    assert points(axes, "other networks") == [(92.0, 92.5), (91.0, 90.0)]
    near, far = (c for c in reversed(axes.collections) if isinstance(c, PathCollection))
    assert (to_hex(near.get_facecolor()[0]), to_hex(far.get_facecolor()[0])) == (
        plot.SOLID,
        plot_search.POINT,
    )
    assert legend(figure) == ["near the budget", "other networks", "predicted = measured"]
    assert "4 networks, Kendall τ 0.67 · 2 near the budget, τ 1.00" in words(figure)
    assert {"measured accuracy (%)", "predicted accuracy (%)"} <= set(words(figure))


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [
        ([93.1], [92.7]),
        ([93.1, 94.0], [93.1, 90.0]),
        ([93.1] * 5, [93.1] * 5),
        ([0.0] * 3, [0.0] * 3),
        ([-1.5, -1.5 + 1e-13], [-1.5, -1.5]),
        ([70.0] * 40, list(range(60, 100))),
        (np.linspace(50, 90, 600).tolist(), np.linspace(60, 99, 600).tolist()),
    ],
)
def test_predictions_and_measurements_share_one_square_scale(
    predicted: list[float], measured: list[float]
) -> None:
    figure = plot_search.plot_predictions(predicted, measured)
    (axes,) = figure.axes
    assert points(axes, "network") == list(zip(measured, predicted, strict=True))
    assert axes.get_xlim() == axes.get_ylim()
    low, high = axes.get_xlim()
    assert data(line(axes, "predicted = measured")) == [(low, low), (high, high)]
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist()
    assert axes.bbox.width == pytest.approx(axes.bbox.height, rel=1e-12)
    assert all_points_are_visible(figure)
    assert ("1 network" if len(measured) == 1 else f"{len(measured)} networks") in words(figure)
    assert not overlaps(figure)
    assert not outside(figure)


def test_crowds_get_smaller_points() -> None:
    def size(networks: int) -> float:
        axes = plot_search.plot_predictions(range(networks), range(networks)).axes[0]
        (dots,) = (c for c in axes.collections if isinstance(c, PathCollection))
        return float(dots.get_sizes()[0])

    assert size(151) < size(150) == size(1)


def test_an_undefined_tau_and_an_empty_band_are_said() -> None:
    figure = plot_search.plot_predictions([1, 1], [2, 2], [False, False], float("nan"), None, title="flat")
    assert {"flat", "2 networks, Kendall τ undefined · 0 near the budget"} <= set(words(figure))
    assert legend(figure) == ["other networks", "predicted = measured"]


def test_search_shows_every_evaluation_in_both_panels() -> None:
    used, scores, stages = a_search()
    figure = plot_search.plot_search(used, scores, stages, chosen=70)
    top, bottom = figure.axes
    count = range(1, 81)
    assert points(top, "evaluated") == list(zip(count, scores, strict=True))
    assert points(bottom, "evaluated") == list(zip(count, used, strict=True))
    assert points(top, "chosen") == [(71, scores[70])]
    assert points(bottom, "chosen") == [(71, used[70])]
    assert data(line(top, "best so far")) == [(n, max(scores[:n])) for n in count]
    assert line(top, "best so far").get_drawstyle() == "steps-post"
    assert set(line(bottom, "budget").get_ydata()) == {1}
    assert top.get_xlim() == bottom.get_xlim()
    assert legend(figure) == ["evaluated", "chosen", "best so far", "budget"]
    assert (
        f"80 networks in 5 stages · best {max(scores):.2f} · chosen {scores[70]:.2f} at 99 % of the budget"
        in words(figure)
    )
    assert all_points_are_visible(figure)
    assert not overlaps(figure)
    assert not outside(figure)


@pytest.mark.parametrize("steps", [1, 60])
def test_an_architecture_shows_its_loss_and_its_way_to_the_budget(steps: int) -> None:
    progress = [0.5 + 0.5 * i / steps for i in range(steps)]
    losses = [2.0 - i / steps + 0.1 * (i % 2) for i in range(steps)]
    used = [0.3 + 0.67 * (i + 1) / steps for i in range(steps)]
    figure = plot_search.plot_architecture(progress, losses, used)
    top, bottom = figure.axes
    assert data(line(top, "each step")) == list(zip(progress, losses, strict=True))
    window = max(steps // 20, 1)
    assert data(line(top, f"mean of {window}")) == [
        (progress[i], pytest.approx(sum(losses[i - window + 1 : i + 1]) / window))
        for i in range(window - 1, steps)
    ]
    assert data(bottom.lines[0]) == list(zip(progress, used, strict=True))
    (band,) = bottom.patches
    assert (band.get_y(), band.get_height()) == (0.95, pytest.approx(0.05))
    assert bottom.get_ylim()[0] < min(used) and bottom.get_ylim()[1] > 1
    assert f"{plot.count(steps, 'step')} · at last 97 % of the budget expected" in words(figure)
    assert not overlaps(figure)
    assert not outside(figure)
    with pytest.raises(ValueError):
        plot_search.plot_architecture([], [], [])


@pytest.mark.parametrize("groups", [1, 12, 60])
def test_a_prior_is_dark_where_widths_are_likely(groups: int) -> None:
    prior = {f"layer.{i}": {8: 0.1, 16: 0.4, 32: 0.2, 64: 0.3} for i in range(groups)} | {"frozen": {64: 1.0}}
    chosen = {**dict.fromkeys(prior, 16), "frozen": 64}
    figure = plot_search.plot_prior(prior, chosen)
    (axes,) = figure.axes
    meshes = [c for c in axes.collections if isinstance(c, QuadMesh)]
    assert len(meshes) == groups
    for place, mesh in enumerate(meshes):
        assert mesh.get_array().flatten().tolist() == pytest.approx([0.25, 1.0, 0.5, 0.75])
        corners = mesh.get_coordinates()
        assert corners[0, :, 0].tolist() == pytest.approx([0.0625, 0.1875, 0.375, 0.75, 1.25])
        assert corners[:, 0, 1].mean() == pytest.approx(place)
    points = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert [tuple(c.get_offsets()[0]) for c in points] == [(0.25, place) for place in range(groups)]
    assert plot.count(groups, "group") in words(figure)
    assert not overlaps(figure)
    assert not outside(figure)


@pytest.mark.parametrize("prior", [{}, {"a": {8: 1.0}}, {"a": {8: -0.1, 16: 1.1}}])
def test_a_prior_that_shows_nothing_is_refused(prior: dict[str, dict[int, float]]) -> None:
    with pytest.raises(ValueError, match=r"no group has a choice|finite and not negative"):
        plot_search.plot_prior(prior)


def test_stages_are_ruled_off_and_named_above_their_evaluations() -> None:
    used, scores, stages = a_search()
    figure = plot_search.plot_search(used, scores, stages)
    top, bottom = figure.axes
    for panel in (top, bottom):
        rules = [line.get_xdata()[0] for line in panel.lines if line.get_color() == "#b0b0b0"]
        assert rules == [48.5, 56.5, 64.5, 72.5]
    names = {text.get_text(): text.get_position()[0] for text in top.texts}
    assert names == {"start": 24.5, "round 1": 52.5, "round 2": 60.5, "round 3": 68.5, "round 4": 76.5}


def test_many_stages_are_joined_and_named_where_there_is_room() -> None:
    used, scores, _ = a_search()
    figure = plot_search.plot_search(used, scores, [f"generation {i // 2}" for i in range(80)])
    top = figure.axes[0]
    rules = [line.get_xdata()[0] for line in top.lines if line.get_color() == "#b0b0b0"]
    assert rules == [4.5 + 4 * i for i in range(19)]
    names = {text.get_text(): text.get_position()[0] for text in top.texts}
    assert names["generation 0 … 1"] == 2.5 and len(names) > 3
    assert any(word.startswith("80 networks in 40 stages") for word in words(figure))
    assert not overlaps(figure)
    assert not outside(figure)


def test_a_name_that_would_leave_the_page_is_left_out() -> None:
    used, scores, _ = a_search()
    stages = ["start"] * 79 + ["the last one has a very long name"]
    figure = plot_search.plot_search(used, scores, stages)
    assert [text.get_text() for text in figure.axes[0].texts] == ["start"]
    assert not outside(figure)


def test_networks_above_the_budget_are_hollow_and_never_the_best() -> None:
    used, scores = [1.2, 0.9, 1.0, math.nextafter(1, 2), 0.8], [95.0, 91.0, 90.0, 94.0, 92.0]
    figure = plot_search.plot_search(used, scores, ["start"] * 5, chosen=3)
    top, bottom = figure.axes
    assert points(top, "above the budget") == [(1, 95.0), (4, 94.0)]
    assert points(bottom, "above the budget") == [(1, 1.2), (4, used[3])]
    assert points(top, "evaluated") == [(2, 91.0), (3, 90.0), (5, 92.0)]
    assert data(line(top, "best so far")) == [(2, 91.0), (3, 91.0), (4, 91.0), (5, 92.0)]
    assert "5 networks in 1 stage · best 92.00 · chosen 94.00 at >100 % of the budget" in words(figure)
    assert all_points_are_visible(figure)

    figure = plot_search.plot_search([1.5, 1.2], [90, 91], ["start", "start"])
    assert "2 networks in 1 stage · all above the budget" in words(figure)
    assert legend(figure) == ["above the budget", "budget"]


@pytest.mark.parametrize(
    ("used", "scores"),
    [([0.99], [93.0]), ([1.0], [0.0]), ([0.0] * 3, [50.0] * 3), ([1.0] * 300, [-2.0] * 300)],
)
def test_a_search_without_spread_is_drawn(used: list[float], scores: list[float]) -> None:
    figure = plot_search.plot_search(used, scores, ["start"] * len(used), chosen=0)
    low, high = figure.axes[1].get_ylim()
    assert low < 0.98 and 1 < high, "a hair's breadth is not magnified"
    ticks = [x for x in figure.axes[1].get_xticks() if 0.4 < x < len(used) + 0.6]
    assert ticks and all(x == int(x) for x in ticks)
    assert all_points_are_visible(figure)
    assert not overlaps(figure)
    assert not outside(figure)


def test_front_is_a_step_line_over_all_networks() -> None:
    cost, scores = [30e6, 18e6, 24e6, 36e6, 20e6], [93.0, 90.0, 92.0, 92.5, 89.0]
    front = plot_search.pareto_front(cost, scores)
    figure = plot_search.plot_front(
        cost, scores, front[::-1], 2, "FLOPs", 27e6, {"full": (37e6, 93.4), "uniform": (26.5e6, 91.0)}
    )
    (axes,) = figure.axes
    assert points(axes, "evaluated") == list(zip(cost, scores, strict=True))
    assert data(line(axes, "front")) == [(18e6, 90.0), (24e6, 92.0), (30e6, 93.0)]
    assert line(axes, "front").get_drawstyle() == "steps-post"
    assert points(axes, "chosen") == [(24e6, 92.0)]
    assert points(axes, "full") == [(37e6, 93.4)] and points(axes, "uniform") == [(26.5e6, 91.0)]
    assert 27e6 in [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    said = words(figure)
    assert "5 networks, 3 on the front · chosen 92.00 at 24.0 M FLOPs, 89 % of the budget" in said
    assert {"full", "uniform", "budget 27.0 M FLOPs", "M FLOPs", "20", "accuracy (%)"} <= set(said)
    assert legend(figure) == ["evaluated", "front", "chosen"]
    assert all_points_are_visible(figure)
    assert not overlaps(figure)
    assert not outside(figure)


def test_a_reference_far_away_in_cost_becomes_a_level() -> None:
    cost, scores = np.linspace(0.98e9, 1e9, 30).tolist(), np.linspace(70, 74, 30).tolist()
    far = {"full": (1.81e9, 76.1), "half": (0.5e9, 60.0), "uniform": (0.91e9, 71.0)}
    figure = plot_search.plot_front(cost, scores, [29], budget=1e9, reference=far, score_unit="top-1 (%)")
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert 0.9e9 < low < 0.91e9 and 1e9 < high < 1.01e9
    assert list(line(axes, "full, 1.81 G FLOPs").get_ydata()) == [76.1, 76.1]
    assert list(line(axes, "half, 500 M FLOPs").get_ydata()) == [60.0, 60.0]
    assert points(axes, "uniform") == [(0.91e9, 71.0)]
    assert {"full, 1.81 G FLOPs", "half, 500 M FLOPs", "uniform", "top-1 (%)"} <= set(words(figure))
    assert axes.get_ylim()[0] < 60 and axes.get_ylim()[1] > 76.1
    assert not overlaps(figure)
    assert not outside(figure)


@pytest.mark.parametrize(
    ("networks", "cost", "score"), [(1, 18e6, 93.0), (200, 18e6, 93.0), (1, 0.0, 0.0), (2, 3.2, -1.5)]
)
def test_a_front_without_spread_is_drawn(networks: int, cost: float, score: float) -> None:
    costs, scores = [cost] * networks, [score] * networks
    front = plot_search.pareto_front(costs, scores)
    assert front == list(range(networks))
    reference = {"full": (cost, score), "uniform": (cost, score)}
    figure = plot_search.plot_front(costs, scores, front, 0, "ms", budget=cost or None, reference=reference)
    assert {"full", "uniform"} <= set(words(figure))
    assert all_points_are_visible(figure)
    assert not overlaps(figure)
    assert not outside(figure)


def search_of(used: Sequence[float], scores: Sequence[float]) -> object:
    return plot_search.plot_search(used, scores, ["start"] * len(used))


def front_of(cost: Sequence[float], scores: Sequence[float]) -> object:
    return plot_search.plot_front(cost, scores, [0])


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        (plot_search.pareto_front, ("cost", "scores")),
        (plot_search.plot_predictions, ("predicted", "measured")),
        (search_of, ("used", "scores")),
        (front_of, ("cost", "scores")),
    ],
)
def test_numbers_that_cannot_be_drawn(draw: Callable[..., object], names: tuple[str, str]) -> None:
    first, second = names
    with pytest.raises(ValueError, match=f"no networks: {first} and {second} are empty"):
        draw([], [])
    with pytest.raises(ValueError, match=f"{first} and {second} need the same length; they have 2 and 1"):
        draw([1, 1], [1])
    with pytest.raises(ValueError, match=f"{first} must be finite; number 1 is nan"):
        draw([1, float("nan")], [1, 1])
    with pytest.raises(ValueError, match=f"{second} must be finite; number 0 is -inf"):
        draw([1, 1], [float("-inf"), 1])
    with pytest.raises(
        ValueError, match=rf"{second} needs one number for each network; its shape is \(2, 1\)"
    ):
        draw([1, 1], [[1], [1]])


def test_arguments_that_do_not_belong_to_the_networks() -> None:
    with pytest.raises(ValueError, match="in_band needs one entry for each network: 2, not 1"):
        plot_search.plot_predictions([1, 2], [1, 2], [True])
    with pytest.raises(ValueError, match="tau_in_band needs in_band"):
        plot_search.plot_predictions([1, 2], [1, 2], tau_in_band=1.0)
    with pytest.raises(ValueError, match="stages needs one label for each network: 2, not 1"):
        plot_search.plot_search([1, 1], [1, 2], ["start"])
    with pytest.raises(ValueError, match=r"used must not be negative; number 1 is -0\.5"):
        plot_search.plot_search([1, -0.5], [1, 2], ["start", "start"])
    with pytest.raises(ValueError, match="cost must not be negative; number 0 is -1"):
        plot_search.plot_front([-1, 1], [1, 2], [0])
    for chosen in (-1, 2):
        with pytest.raises(ValueError, match=f"chosen is the index of a network, from 0 to 1; got {chosen}"):
            plot_search.plot_search([1, 1], [1, 2], ["start", "start"], chosen)
        with pytest.raises(ValueError, match=f"chosen is the index of a network, from 0 to 1; got {chosen}"):
            plot_search.plot_front([1, 1], [1, 2], [0], chosen)
    for front in ([], [0, 2], [-1]):
        with pytest.raises(ValueError, match="front needs indices of networks, from 0 to 1"):
            plot_search.plot_front([1, 1], [1, 2], front)
    for budget in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a budget is positive and finite"):
            plot_search.plot_front([1, 1], [1, 2], [0], budget=budget)
    for point in ((-1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="references are finite and cost at least 0; full has"):
            plot_search.plot_front([1, 1], [1, 2], [0], reference={"full": point})
