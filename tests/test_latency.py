"""Latencies: the measurement, its table, and the model fitted to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nni_dbs.latency
from examples.cifar_resnet import BasicBlock, CifarResNet
from nni_dbs import Budget, FlopsCost, LatencyCost, ParamsCost, WidthSpace, project
from nni_dbs.errors import BudgetError, ConfigError, ResultError
from nni_dbs.latency import drift_free, fit, held_out_error, medians_ms, spread
from torch_pruning_adapters import (
    ChannelGroup,
    WidthError,
    find_channel_groups,
    find_residual_blocks,
    removed_blocks,
    shrink,
)
from torch_pruning_adapters.calls import call

Truth = Callable[[nn.Module], float]


class Clock:
    """Takes the place of `medians_ms`: exact times, multiplied by a drift that differs in every call."""

    def __init__(self, truth: Truth, drift: float = 0.5, calls: float = math.inf) -> None:
        self.truth = truth
        self.drift = drift
        self.left = calls
        self.count = 0

    def __call__(self, models: Sequence[nn.Module], inputs: Any, threads: int, **length: Any) -> list[float]:
        if self.count >= self.left:
            raise KeyboardInterrupt
        self.count += 1
        factor = 1 + self.drift * math.sin(self.count)
        for model in models:
            assert not any(module.training for module in model.modules())
            with torch.no_grad():
                call(model, inputs)  # it was cut right
        return [self.truth(model) * factor for model in models]


def by_parameters(model: nn.Module) -> float:
    """A latency that the common rates describe."""
    return 0.2 + 0.003 * sum(p.numel() for p in model.parameters())


def by_layers(model: nn.Module) -> float:
    """Every layer takes another time for each of its parameters."""
    return 0.2 + sum(0.001 * (1 + 3 * (i % 3)) * p.numel() for i, p in enumerate(model.parameters()))


def falling(model: nn.Module) -> float:
    """Wider is faster, which no prediction may follow."""
    return 100 / sum(p.numel() for p in model.parameters())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def use(truth: Truth = by_parameters, **kwargs: Any) -> Clock:
        replaced = Clock(truth, **kwargs)
        monkeypatch.setattr(nni_dbs.latency, "medians_ms", replaced)
        return replaced

    return use


def case(name: str = "residual") -> tuple[nn.Module, Tensor, WidthSpace]:
    model, x = CASES[name].build()
    return model, x, WidthSpace.from_model(model, x, min_ratio=0, divisor=1)


def latency(name: str = "residual", **kwargs: Any) -> LatencyCost:
    model, x, space = case(name)
    return LatencyCost(model, x, space, **{"quiet": True, "samples": 16, **kwargs})


def everything(cost: LatencyCost, space: WidthSpace) -> dict[str, Any]:
    """All that a table decides."""
    rows = torch.stack([space.encode(w) for w in spread(space, 30, 7)])
    return {"full": cost.full, "error": cost.error, "batch": cost.batch(rows).tolist()}


# --- measuring ---------------------------------------------------------------------------------------


def test_drift_is_divided_out_within_each_turn() -> None:
    drift = np.array([1.0, 4.0, 2.0, 3.0, 100.0])[:, None]
    times = drift * [[2.0, 1.0, 5.0]]
    times[0, 1] *= 9  # an interruption of one turn
    assert drift_free(times).tolist() == [6.0, 3.0, 15.0]


class Witness(nn.Module):
    """Records under which conditions it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, bool]] = set()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.seen.add((torch.get_num_threads(), torch.is_grad_enabled()))
        return x * scale


@pytest.mark.parametrize("inputs", [torch.zeros(2), (torch.zeros(2), 2.0), {"x": torch.zeros(2)}])
def test_models_run_without_gradients_on_the_threads_that_are_asked_for(inputs: Any) -> None:
    before = torch.get_num_threads()
    models = [Witness(), Witness(), Witness()]
    times = medians_ms(models, inputs, threads=before + 1, turns=2, seconds=1e-5)
    assert len(times) == 3
    assert all(math.isfinite(t) and t > 0 for t in times)
    assert [model.seen for model in models] == [{(before + 1, False)}] * 3
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_threads_come_back_when_a_model_fails() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        medians_ms([nn.Linear(3, 3)], torch.zeros(2, 4), threads=before + 1)
    assert torch.get_num_threads() == before


def test_a_real_measurement(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    cost = latency(samples=8, table=table, threads=1)
    widths = {"stem": 1, "a": 1}
    found = [cost.full, cost(widths), cost.measure(widths), cost.measure({})]
    assert all(math.isfinite(ms) and ms > 0 for ms in found)
    assert math.isfinite(cost.error) and cost.error >= 0
    data = json.loads(table.read_text())
    assert (data["threads"], data["inputs"]) == (1, [[[2, 3, 8, 8], "torch.float64"]])
    assert [[1, 1], [6, 4]] == sorted(w for w, *_ in data["measured"] if w in ([1, 1], [6, 4]))


def test_measured_is_the_network_beside_the_reference(clock: Callable[..., Clock]) -> None:
    """Whatever the drift, ratios of measurements are those of the true times."""
    clock()
    model, _, space = case()
    cost = latency()
    for widths in (space.smallest(), space.uniform(0.5), {"stem": 3}):
        params = ParamsCost(model, space.groups)
        truth = (0.2 + 0.003 * params(widths)) / (0.2 + 0.003 * params.full)
        assert cost.measure(widths) / cost.full == pytest.approx(truth, rel=1e-12)
    assert cost.measure({}) == cost.full == cost.measure(space.largest())


def test_milliseconds_are_those_of_the_median_reference(clock: Callable[..., Clock]) -> None:
    clock(drift=0)
    model, _, _ = case()
    assert latency().full == pytest.approx(by_parameters(model), rel=1e-12)


def test_what_was_measured_is_not_measured_again(clock: Callable[..., Clock]) -> None:
    counted = clock()
    cost, (_, _, space) = latency(), case()
    drawn = spread(space, 16, 0)
    assert counted.count == len(drawn)
    new = next(widths for widths in spread(space, 100, 1) if widths not in drawn)
    first = cost.measure(new)
    assert cost.measure(dict(reversed(list(new.items())))) == first
    assert cost.measure({name: np.int64(width) for name, width in new.items()}) == first
    assert counted.count == len(drawn) + 1


@pytest.mark.parametrize("name", ["grouped", "depthwise", "concat", "flattened", "squeeze_excite"])
def test_every_kind_of_group_is_cut_and_measured(name: str, clock: Callable[..., Clock]) -> None:
    clock(by_layers)
    cost, (_, _, space) = latency(name), case(name)
    assert cost.measure(space.smallest()) < cost.measure({})
    assert cost(space.smallest()) < cost({})


def test_the_model_comes_back_as_it_was(clock: Callable[..., Clock]) -> None:
    clock()
    model, x = CASES["plain"].build()
    model.train()
    model.bn.eval()
    model.a.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    space = WidthSpace.from_model(model, x, min_ratio=0, divisor=1)
    cost = LatencyCost(model, x, space, samples=8, quiet=True)
    cost.measure(space.smallest())
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, False, *[True] * 5]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_that_was_cut_meanwhile_can_be_measured(clock: Callable[..., Clock]) -> None:
    clock()
    model, x, space = case()
    cost = LatencyCost(model, x, space, samples=8, quiet=True)
    model.a = nn.Conv2d(6, 1, 1)
    assert cost.measure({"stem": 5, "a": 3}) < cost.full


# --- the networks that are measured ------------------------------------------------------------------


def wide_space(groups: int = 6) -> WidthSpace:
    return WidthSpace([ChannelGroup(f"g{i}", 64 << i % 3, 1, ()) for i in range(groups)])


def test_networks_cover_all_sizes() -> None:
    space = wide_space()
    networks = spread(space, 48, seed=0)
    assert len(networks) == len(set(networks)) <= 48
    assert all(widths in space for widths in networks)
    assert {space.smallest(), space.largest()} <= set(networks)
    mean = [np.mean([w[g.name] / g.size for g in space.groups]) for w in networks]
    assert np.histogram(mean, bins=10, range=(0.1, 1))[0].min() >= 2
    drawn = [space.sample(torch.Generator().manual_seed(i)) for i in range(48)]
    mean = [np.mean([w[g.name] / g.size for g in space.groups]) for w in drawn]
    assert np.histogram(mean, bins=10, range=(0.1, 1))[0].min() == 0  # why they are not simply drawn
    assert len({round(w["g0"] / 64, 2) - round(w["g3"] / 64, 2) for w in networks}) > 5


def test_networks_follow_the_seed() -> None:
    space = wide_space()
    assert spread(space, 20, 3) == spread(space, 20, 3)
    assert spread(space, 20, 3) != spread(space, 20, 4)


def test_a_space_with_few_networks() -> None:
    assert len(spread(WidthSpace([ChannelGroup("g", 3, 1, ())], 0, 1), 48, 0)) == 3
    assert len(spread(WidthSpace([ChannelGroup("g", 3, 1, (), frozen="why")], 0, 1), 48, 0)) == 1


# --- the model ---------------------------------------------------------------------------------------


def test_a_latency_of_the_common_rates_is_found_exactly(clock: Callable[..., Clock]) -> None:
    clock()
    cost, (model, _, space) = latency(), case()
    assert cost.error < 1e-9
    params = ParamsCost(model, space.groups)
    for widths in spread(space, 40, 5):
        truth = (0.2 + 0.003 * params(widths)) / (0.2 + 0.003 * params.full) * cost.full
        assert cost(widths) == pytest.approx(truth, rel=1e-9)


def test_layers_may_differ(clock: Callable[..., Clock]) -> None:
    """FLOPs and parameters alone err by 8 % here."""
    clock(by_layers)
    cost, (_, _, space) = latency("plain", samples=48), case("plain")
    assert 0 < cost.error < 0.03
    networks = spread(space, 40, 5)
    errors = [abs(cost(w) / cost.measure(w) - 1) for w in networks]
    assert np.mean(errors) < 0.03


def test_the_error_counts_noise(clock: Callable[..., Clock]) -> None:
    noise = np.random.default_rng(0).uniform(0.8, 1.25, size=1000)
    calls = iter(noise)
    half = by_parameters(latency_reference())
    clock(lambda m: by_parameters(m) * (1 if by_parameters(m) == half else next(calls)))
    assert 0.03 < latency(samples=48).error < 0.3


def latency_reference() -> nn.Module:
    model, x, space = case()
    return LatencyCost(model, x, space, samples=8, quiet=True)._reference


def test_held_out_error_is_that_of_rows_that_the_fit_did_not_see() -> None:
    constant = np.array([[1.0, 0, 0], [1.0, 0, 0]])
    assert held_out_error(constant, np.array([1.0, 2.0])) == pytest.approx((1 + 0.5) / 2, rel=1e-12)
    assert held_out_error(constant[:1], np.array([3.0])) == 0


def test_fit_minimises_the_relative_error() -> None:
    """For a constant c and ratios y that is sum((c / y - 1)^2): c = sum(1 / y) / sum(1 / y^2)."""
    y = np.array([0.5, 1.0, 4.0])
    design = np.array([[1.0, 0, 0]] * 3)
    assert fit(design, y)[0] == pytest.approx((1 / y).sum() / (1 / y**2).sum(), rel=1e-12)


@pytest.mark.parametrize("truth", [by_parameters, by_layers, falling])
def test_batch_is_the_call(truth: Truth, clock: Callable[..., Clock]) -> None:
    clock(truth)
    cost, (_, _, space) = latency("plain"), case("plain")
    networks = spread(space, 40, 5)
    rows = torch.stack([space.encode(w) for w in networks])
    one_by_one = [cost(w) for w in networks]
    assert cost.batch(rows).dtype == torch.float64
    assert cost.batch(rows).tolist() == cost.batch(rows.long()).tolist() == one_by_one
    assert cost.groups == space.groups
    assert cost({}) == cost(space.largest())


def test_gradient_is_the_finite_difference(clock: Callable[..., Clock]) -> None:
    clock(by_layers)
    cost = latency("plain")
    widths = torch.rand(3, len(cost.groups), dtype=torch.float64) * 3 + 1
    assert torch.autograd.gradcheck(cost.batch, widths.requires_grad_(), atol=1e-7)
    (gradient,) = torch.autograd.grad(cost.batch(widths).sum(), widths)
    assert bool((gradient > 0).any())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_prediction_never_falls_when_a_width_grows(data: st.DataObject) -> None:
    """Whatever was measured: here any times at all."""
    times = data.draw(st.lists(st.floats(0.01, 100), min_size=40, max_size=40))
    name = data.draw(st.sampled_from(["plain", "residual", "grouped", "depthwise"]))
    truth = iter(times)
    model, x, space = SPACES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nni_dbs.latency, "medians_ms", lambda *_, **length: [1.0, next(truth)])
        cost = LatencyCost(model, x, space, samples=8, quiet=True)
    narrow = {n: data.draw(st.sampled_from(space.choices(n))) for n in space.names}
    wide = {n: data.draw(st.sampled_from([c for c in space.choices(n) if c >= narrow[n]])) for n in narrow}
    assert 0 <= cost(narrow) <= cost(wide)
    rows = torch.stack([space.encode(narrow), space.encode(wide)])
    below, above = cost.batch(rows).tolist()
    assert below <= above


SPACES = {name: case(name) for name in ("plain", "residual", "grouped", "depthwise")}


def test_a_network_without_choice_takes_what_was_measured(clock: Callable[..., Clock]) -> None:
    clock(drift=0)
    model, x = CASES["residual"].build()
    space = WidthSpace.from_model(model, x, ignore=["stem", "a", "b"])
    assert all(g.frozen for g in space.groups)
    cost = LatencyCost(model, x, space, quiet=True)
    assert cost.error == 0
    assert cost({}) == pytest.approx(cost.full, rel=1e-3)


def test_bad_arguments(clock: Callable[..., Clock]) -> None:
    clock()
    with pytest.raises(ConfigError, match="samples must be at least 8, not 7"):
        latency(samples=7)
    with pytest.raises(ConfigError, match="threads must be at least 1, not 0"):
        latency(threads=0)
    cost = latency()
    for ask in (cost, cost.measure):
        with pytest.raises(WidthError, match="no channel group 'stemm'"):
            ask({"stemm": 2})
        with pytest.raises(WidthError, match="cannot have 7 channels"):
            ask({"stem": 7})


# --- budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"latency_ms": 0.5}, {"latency_ms": "60%", "flops": 0.5}])
def test_projection_fills_a_latency(budget: dict[str, Any], clock: Callable[..., Clock]) -> None:
    clock(by_layers)
    model, x, space = case("plain")
    cost = LatencyCost(model, x, space, quiet=True)
    costs = {"latency_ms": cost, "flops": FlopsCost(model, x, space.groups)}
    bounds = Budget.parse(budget).bound(costs)
    widths = project(space.uniform(0.7), space, bounds)
    assert bounds.fits(widths)
    assert 0.7 < bounds.used(widths) <= 1
    for name, c in ((n, space.choices(n)) for n in space.names):
        wider = [w for w in c if w > widths[name]]
        assert not wider or not bounds.fits({**widths, name: wider[0]})
    with pytest.raises(BudgetError, match=r"latency_ms: 0.01 ms is below the smallest network"):
        project(widths, space, Budget.parse({"latency_ms": "0.01ms"}).bound(costs))


# --- the table ---------------------------------------------------------------------------------------


def test_the_same_table_gives_the_same_model_without_measuring(
    tmp_path: Path, clock: Callable[..., Clock]
) -> None:
    clock(by_layers)
    table, (_, _, space) = tmp_path / "new" / "table.json", case()
    first = latency(table=table)
    extra = first.measure({"stem": 5, "a": 3})
    clock(calls=0)
    again = latency(table=table)
    assert everything(again, space) == everything(first, space)
    assert again.measure({"stem": 5, "a": 3}) == extra
    assert [p.name for p in table.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize("calls", [1, 7])
def test_a_killed_run_goes_on_where_it_stopped(
    calls: int, tmp_path: Path, clock: Callable[..., Clock]
) -> None:
    table, (_, _, space) = tmp_path / "table.json", case()
    clock(by_layers, drift=0)
    uninterrupted = latency()
    clock(by_layers, drift=0, calls=calls)
    with pytest.raises(KeyboardInterrupt):
        latency(table=table)
    assert len(json.loads(table.read_text())["measured"]) == calls
    rest = clock(by_layers, drift=0)
    resumed = latency(table=table)
    assert rest.count == len(spread(space, 16, 0)) - calls
    assert everything(resumed, space) == everything(uninterrupted, space)


def test_tables_serve_other_spaces_and_seeds_of_the_model(
    tmp_path: Path, clock: Callable[..., Clock]
) -> None:
    table, (model, x, space) = tmp_path / "table.json", case()
    first = clock()
    latency(table=table)
    second = clock()
    narrower = WidthSpace(space.groups, min_ratio=0.4, divisor=2)
    LatencyCost(model, x, narrower, table=table, seed=1, samples=16, quiet=True)
    assert 0 < second.count < len(spread(narrower, 16, 1))
    assert len(json.loads(table.read_text())["measured"]) == first.count + second.count


def other_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "__version__", "1.0.0")


def other_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nni_dbs.latency, "device_name", lambda device: "a toaster")


def measured_as(model: nn.Module, x: Tensor, **kwargs: Any) -> LatencyCost:
    space = WidthSpace.from_model(model, x, min_ratio=0, divisor=1)
    return LatencyCost(model, x, space, samples=8, quiet=True, **kwargs)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda patch, **k: latency("plain", **k), "architecture"),
        (
            lambda patch, **k: measured_as(CASES["residual"].build()[0].float(), torch.ones(2, 3, 8, 8), **k),
            "inputs",
        ),
        (
            lambda patch, **k: measured_as(
                CASES["residual"].build()[0], torch.ones(1, 3, 8, 8).double(), **k
            ),
            "inputs",
        ),
        (lambda patch, **k: latency(**{**k, "threads": 2}), "threads"),
        (lambda patch, **k: (other_torch(patch), latency(**k)), "torch"),
        (lambda patch, **k: (other_device(patch), latency(**k)), "device"),
    ],
    ids=["model", "dtype", "batch", "threads", "torch", "device"],
)
def test_a_table_of_other_conditions_is_refused(
    change: Callable[..., Any],
    key: str,
    tmp_path: Path,
    clock: Callable[..., Clock],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock()
    table = tmp_path / "table.json"
    latency(table=table, threads=1)
    before = table.read_text()
    with pytest.raises(ResultError) as caught:
        change(monkeypatch, table=table, threads=1)
    assert f"{table} was measured with another {key} (" in str(caught.value)
    assert "delete it or give another path" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert table.read_text() == before


def test_strides_and_activations_are_part_of_the_architecture(
    tmp_path: Path, clock: Callable[..., Clock]
) -> None:
    """The same parameters can take another time."""
    clock()
    x = torch.zeros(1, 3, 8, 8)

    def net(stride: int, activation: nn.Module) -> nn.Module:
        conv = nn.Conv2d(3, 4, 3, stride, 1)
        return nn.Sequential(conv, activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    table = tmp_path / "table.json"
    measured_as(net(1, nn.ReLU()), x, table=table)
    for other in (net(2, nn.ReLU()), net(1, nn.Hardswish())):
        with pytest.raises(ResultError, match="another architecture"):
            measured_as(other, x, table=table)
    measured_as(net(1, nn.ReLU()), x, table=table)  # other weights, the same architecture


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "3",
        lambda text: "{}",
        lambda text: text.replace('"measured": [', '"measured": [[[1, 2], 3],'),
        lambda text: text.replace('"measured": [', '"measured": [[[1, 2], -1.0, 1.0],'),
        lambda text: text.replace('"measured": [', '"measured": [[[1, 2], NaN, 1.0],'),
        lambda text: text.replace('"measured": [', '"measured": [[[1, 2], "fast", 1.0],'),
    ],
)
def test_a_damaged_table_is_refused(
    damage: Callable[[str], str], tmp_path: Path, clock: Callable[..., Clock]
) -> None:
    clock()
    table = tmp_path / "table.json"
    latency(table=table)
    table.write_text(damage(table.read_text()))
    with pytest.raises(ResultError) as caught:
        latency(table=table)
    assert str(caught.value).startswith(f"{table} is no table of latencies, or damaged (")
    assert "delete it or give another path" in str(caught.value)


def test_a_table_that_cannot_be_read_or_written(tmp_path: Path, clock: Callable[..., Clock]) -> None:
    clock()
    with pytest.raises(ResultError, match="cannot read"):
        latency(table=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="cannot write"):
        latency(table=tmp_path / "file" / "table.json")


def test_removed_blocks_are_measured_predicted_and_expected(clock: Callable[..., Clock]) -> None:
    """A latency with a constant for each block, that widths alone could not tell."""

    def truth(model: nn.Module) -> float:
        blocks = sum(isinstance(m, BasicBlock) for m in model.modules())
        return 0.2 + 0.3 * blocks + 1e-5 * sum(p.numel() for p in model.parameters())

    clock(truth)
    model, x = CifarResNet(14, num_classes=3), torch.zeros(1, 3, 8, 8)
    groups = find_residual_blocks(model, find_channel_groups(model, x), x)
    space = WidthSpace(groups, divisor=4)
    blocks = {g.block for g in groups if g.block is not None}
    networks = spread(space, 40, seed=0)
    gone = [set(removed_blocks(groups, widths)) for widths in networks]
    assert set().union(*gone) == blocks and set() in gone and any(g != blocks for g in gone if g)
    cost = LatencyCost(model, x, space, threads=1, quiet=True)
    assert cost.error < 0.03
    for block in blocks:  # each block's own rate is held small, so that a part of its 0.3 ms is missed
        widths, whole = space.without([block]).uniform(0.5), space.uniform(0.5)
        saved = truth(shrink(model, groups, whole)) - truth(shrink(model, groups, widths))
        assert cost(whole) - cost(widths) == pytest.approx(saved, rel=0.3)
    mean = space.encode(space.uniform(0.5)).unsqueeze(0)
    block = min(blocks)
    there = cost.batch(mean)
    left = cost.batch(space.encode(space.without([block]).uniform(0.5)).unsqueeze(0))
    half = {block: torch.full((1,), 0.5, dtype=torch.float64)}
    expected = cost.expected(mean, torch.zeros_like(mean), half)
    torch.testing.assert_close(expected, (there + left) / 2, rtol=1e-9, atol=0)
