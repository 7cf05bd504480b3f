"""Which widths can be chosen, and how they are written down."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import CASES
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nni_dbs import Widths, WidthSpace
from nni_dbs.space import width_choices
from torch_pruning_adapters import ChannelGroup, Member, Span, WidthError


def group(name: str, size: int, step: int = 1, frozen: str | None = None) -> ChannelGroup:
    member = Member(name, "producer", "conv", (("weight", 0),), size, (Span(0, 0, size),))
    return ChannelGroup(name, size, step, (member,), frozen)


GROUPS = (group("a", 64), group("b", 48, step=12), group("c", 10), group("d", 32, frozen="for a reason"))


@pytest.fixture
def space() -> WidthSpace:
    return WidthSpace(GROUPS, min_ratio=0.25, divisor=16)


# --- choices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "step", "min_ratio", "divisor", "expected"),
    [
        (6, 1, 0.0, 1, (1, 2, 3, 4, 5, 6)),
        (64, 1, 0.0, 16, (16, 32, 48, 64)),
        (64, 1, 0.5, 16, (32, 48, 64)),
        (10, 1, 0.0, 4, (4, 8, 10)),  # the full width is off the grid
        (10, 1, 0.0, 16, (10,)),  # narrower than the divisor
        (48, 12, 0.0, 1, (12, 24, 36, 48)),
        (48, 12, 0.0, 16, (12, 36, 48)),  # 16 -> 12, 32 -> 36
        (104, 26, 0.0, 8, (26, 52, 78, 104)),
        (64, 32, 0.1, 8, (32, 64)),
        (30, 10, 0.0, 15, (20, 30)),  # half way: upwards
        (8, 8, 0.0, 1, (8,)),
        (100, 1, 1.0, 8, (100,)),
        (100, 1, 0.55, 55, (55, 100)),  # 0.55 * 100 is above 55 in floating point
    ],
)
def test_choices(size: int, step: int, min_ratio: float, divisor: int, expected: tuple[int, ...]) -> None:
    assert width_choices(size, step, min_ratio, divisor) == expected


@given(
    blocks=st.integers(1, 80),
    step=st.integers(1, 12),
    divisor=st.integers(1, 40),
    min_ratio=st.floats(0, 1),
)
def test_choices_are_the_multiples_nearest_to_the_grid(
    blocks: int, step: int, divisor: int, min_ratio: float
) -> None:
    size = blocks * step
    choices = width_choices(size, step, min_ratio, divisor)
    assert list(choices) == sorted(set(choices))
    assert choices[-1] == size
    assert all(w % step == 0 and w >= min_ratio * size - 1e-6 for w in choices)
    grid = range(divisor, size, divisor)
    for w in choices[:-1]:
        assert min(abs(w - point) for point in grid) * 2 <= step
    for point in grid:
        low = point // step * step
        nearest = {w for w in (low, low + step) if abs(w - point) * 2 <= step}
        assert any(not 0 < w < size or w < min_ratio * size + 1e-6 or w in choices for w in nearest)


def test_frozen_groups_have_one_choice(space: WidthSpace) -> None:
    assert {n: space.choices(n) for n in space.names} == {
        "a": (16, 32, 48, 64),
        "b": (12, 36, 48),
        "c": (10,),
        "d": (32,),
    }
    assert space.smallest() == {"a": 16, "b": 12, "c": 10, "d": 32}
    assert space.largest() == {"a": 64, "b": 48, "c": 10, "d": 32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"min_ratio": -0.1}, "min_ratio"), ({"min_ratio": 1.1}, "min_ratio"), ({"divisor": 0}, "divisor")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(WidthError, match=message):
        WidthSpace(GROUPS, **settings)


def test_from_model() -> None:
    model, x = CASES["residual"].build()
    space = WidthSpace.from_model(model, x, min_ratio=0.5, divisor=1, ignore=["a"])
    assert space.choices("stem") == (3, 4, 5, 6)
    assert space.choices("a") == (4,)


# --- options and padding -----------------------------------------------------------------------------


def test_options_are_all_choices_of_narrow_groups(space: WidthSpace) -> None:
    assert [space.options(n) for n in space.names] == [space.choices(n) for n in space.names]
    assert space.options("a", limit=4) == (16, 32, 48, 64)


def test_options_are_thinned_evenly() -> None:
    space = WidthSpace([group("a", 19), group("b", 11), group("c", 100)], min_ratio=0, divisor=1)
    assert space.options("a") == (1, 3, 5, 7, 9, 11, 13, 15, 17, 19)
    assert space.options("a", limit=2) == (1, 19)
    assert space.options("b", limit=3) == (1, 6, 11)
    assert space.options("c") == tuple(range(1, 101, 11))


@given(size=st.integers(1, 200), limit=st.integers(2, 40), frozen=st.booleans())
def test_options_are_choices_with_both_ends_and_steps_that_differ_by_one(
    size: int, limit: int, frozen: bool
) -> None:
    space = WidthSpace([group("a", size, frozen="so" if frozen else None)], min_ratio=0, divisor=1)
    choices, options = space.choices("a"), space.options("a", limit)
    assert len(options) == min(len(choices), limit)
    assert (options[0], options[-1]) == (choices[0], choices[-1])
    assert set(options) <= set(choices)
    steps = [b - a for a, b in itertools.pairwise(options)]
    assert all(step > 0 for step in steps)
    assert max(steps, default=1) - min(steps, default=1) <= 1


def test_options_follow_bounds(space: WidthSpace) -> None:
    assert space.within({"a": (0.5, 0.75)}).options("a") == (32, 48)


def test_padded_choices(space: WidthSpace) -> None:
    inf = float("inf")
    padded, counts = space.padded_choices()
    assert padded.dtype == torch.float64
    assert padded.tolist() == [
        [16, 32, 48, 64],
        [12, 36, 48, inf],
        [10, inf, inf, inf],
        [32, inf, inf, inf],
    ]
    assert counts.dtype == torch.int64
    assert counts.tolist() == [4, 3, 1, 1]


def test_padded_choices_are_exact_for_wide_groups() -> None:
    """As float32, 2**24 + 1 would be even."""
    wide = WidthSpace([group("a", 2**24 + 1)], min_ratio=1.0, divisor=2**24)
    assert wide.padded_choices()[0].tolist() == [[2**24 + 1]]


def test_padded_choices_follow_bounds(space: WidthSpace) -> None:
    padded, counts = space.within({"a": (0.5, 0.75), "b": (1.0, 1.0)}).padded_choices()
    assert padded[:2].tolist() == [[32, 48], [48, float("inf")]]
    assert counts.tolist() == [2, 1, 1, 1]


def test_padded_choices_without_groups_can_be_indices() -> None:
    padded, counts = WidthSpace([]).padded_choices()
    assert padded.shape == (0, 1)
    assert counts.shape == (0,)
    assert counts.dtype == torch.int64


# --- picking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "a", "b"),
    [(0.0, 16, 12), (0.26, 16, 12), (0.5, 32, 12), (0.625, 32, 36), (0.9, 64, 48), (2, 64, 48)],
)
def test_uniform_takes_the_nearest_choice(space: WidthSpace, ratio: float, a: int, b: int) -> None:
    """0.625 of 64 lies half way between 32 and 48: the narrower one; so does 0.5 of 48."""
    assert space.uniform(ratio) == {"a": a, "b": b, "c": 10, "d": 32}


def test_samples_are_choices_and_reach_all_of_them(space: WidthSpace) -> None:
    generator = torch.Generator().manual_seed(1)
    samples = [space.sample(generator) for _ in range(300)]
    assert all(s in space for s in samples)
    for name in space.names:
        counts = [sum(s[name] == w for s in samples) for w in space.choices(name)]
        expected = 300 / len(counts)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in counts)


SAMPLE = """
import torch
from test_space import GROUPS
from nni_dbs import WidthSpace
generator = torch.Generator().manual_seed(7)
space = WidthSpace(GROUPS, min_ratio=0.25, divisor=1)
print([dict(space.sample(generator)) for _ in range(3)])
"""


def test_samples_follow_the_generator_in_a_fresh_process() -> None:
    generator = torch.Generator().manual_seed(7)
    space = WidthSpace(GROUPS, min_ratio=0.25, divisor=1)
    torch.manual_seed(123)
    here = [dict(space.sample(generator)) for _ in range(3)]
    fresh = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:] = {sys.path}\n{SAMPLE}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == str(here)
    assert len({str(s) for s in here}) == 3


# --- encodings ---------------------------------------------------------------------------------------


def test_encode_and_decode(space: WidthSpace) -> None:
    widths = Widths({"d": 32, "c": 10, "b": 12, "a": 48})
    encoded = space.encode(widths)
    assert encoded.dtype == torch.float64
    assert encoded.tolist() == [48, 12, 10, 32]
    assert space.decode(encoded) == widths
    assert space.encode({"a": 16}).tolist() == [16, 48, 10, 32]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        space.decode(encoded[:3])


def test_nni_format_has_only_what_can_vary(space: WidthSpace) -> None:
    assert space.to_nni() == {
        "a": {"_type": "choice", "_value": [16, 32, 48, 64]},
        "b": {"_type": "choice", "_value": [12, 36, 48]},
    }


def test_membership(space: WidthSpace) -> None:
    assert {"a": 16} in space
    assert {"a": 17} not in space
    assert {"d": 16} not in space
    assert "a" not in space


# --- bounds ------------------------------------------------------------------------------------------


def test_within_keeps_the_choices_between_the_bounds(space: WidthSpace) -> None:
    part = space.within({"a": (0.5, 0.75)})
    assert part.choices("a") == (32, 48)
    assert part.choices("b") == space.choices("b")
    assert space.choices("a") == (16, 32, 48, 64)
    assert part.groups == space.groups


def test_within_leaves_the_grid_where_nothing_on_it_fits(space: WidthSpace) -> None:
    assert space.within({"a": (0.3, 0.45)}).choices("a") == (28,)
    assert space.within({"b": (0.5, 0.6)}).choices("b") == (24,)


def test_within_survives_rounding() -> None:
    """1 - 0.43 is above 0.57, and 0.57 * 100 is below 57."""
    space = WidthSpace([group("a", 100)], min_ratio=0, divisor=1)
    assert space.within({"a": (1 - 0.43, 0.57)}).choices("a") == (57,)


@pytest.mark.parametrize("bounds", [{"b": (0.3, 0.4)}, {"a": (0.0, 0.01)}, {"d": (0.0, 0.5)}])
def test_within_refuses_bounds_without_a_width(space: WidthSpace, bounds: dict) -> None:
    (name,) = bounds
    with pytest.raises(WidthError, match=f"group '{name}' .* has no width between"):
        space.within(bounds)


# --- widths ------------------------------------------------------------------------------------------


def test_widths_are_an_immutable_mapping() -> None:
    widths: Any = Widths({"a": 3, "b": 4})
    assert widths == {"b": 4, "a": 3}
    assert {"b": 4, "a": 3} == widths
    assert widths != {"a": 3}
    assert list(widths.items()) == [("a", 3), ("b", 4)]
    assert Widths(widths) == Widths([("a", 3), ("b", 4)]) == widths
    with pytest.raises(TypeError):
        widths["a"] = 5
    with pytest.raises(TypeError):
        del widths["a"]
    with pytest.raises(AttributeError):
        widths.a = 5


def test_widths_do_not_follow_their_source() -> None:
    source = {"a": 3}
    widths = Widths(source)
    source["a"] = 4
    assert widths == {"a": 3}


def test_widths_hash_by_value() -> None:
    assert len({Widths({"a": 3, "b": 4}), Widths({"b": 4, "a": 3}), Widths({"a": 4, "b": 3})}) == 2


@pytest.fixture(params=range(pickle.HIGHEST_PROTOCOL + 1))
def protocol(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


def test_widths_pickle(protocol: int) -> None:
    widths = Widths({"a": 3, "b": 4})
    again = pickle.loads(pickle.dumps(widths, protocol))
    assert again == widths
    assert isinstance(again, Widths)
    assert hash(again) == hash(widths)


def test_widths_are_whole_numbers() -> None:
    widths = Widths({"a": torch.tensor(3), "b": 4.0})  # type: ignore[dict-item]
    assert [type(w) for w in widths.values()] == [int, int]
    assert repr(widths) == "Widths({'a': 3, 'b': 4})"


def test_space_of_a_model_without_groups() -> None:
    space = WidthSpace.from_model(nn.Linear(3, 4), torch.zeros(1, 3))
    assert space.smallest() == {}
    assert space.encode({}).shape == (0,)
