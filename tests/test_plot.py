"""What the pictures say, and that their words do not run into each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from nni_dbs import plot
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
    ("part", "said"), [(1000, "100 %"), (999, ">99 %"), (500, "50 %"), (1, "<1 %"), (0, "0 %")]
)
def test_percent_says_0_and_100_only_where_exact(part: int, said: str) -> None:
    assert plot._percent(part, 1000) == said


@pytest.mark.parametrize("draw", [plot.plot_widths, plot.plot_cost])
def test_mappings_that_do_not_belong_together(draw: Callable[..., Figure]) -> None:
    with pytest.raises(ValueError, match="empty"):
        draw({}, {})
    with pytest.raises(ValueError, match="only one of them has b, c"):
        draw({"a": 8, "b": 8}, {"a": 8, "c": 8})


def test_impossible_numbers() -> None:
    with pytest.raises(ValueError, match="b keeps 9 of 8"):
        plot.plot_widths({"a": 8, "b": 8}, {"a": 8, "b": 9})
    with pytest.raises(ValueError, match="a keeps 0 of 8"):
        plot.plot_widths({"a": 8}, {"a": 0})
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
from nni_dbs import plot
from nni_dbs.errors import ResultError
plot.save(plot.plot_widths({{"a": 8}}, {{"a": 4}}), {str(tmp_path / "a.png")!r})
assert matplotlib.get_backend(auto_select=False) is None
assert not {{"matplotlib.pyplot", "nni"}} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    )
