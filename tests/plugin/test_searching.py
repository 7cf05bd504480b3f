"""The pruners that evaluate networks: their choice, log, resuming, latency and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from nni.compression.pruning import L1NormPruner
from test_pruner import (
    CONVS,
    IMAGE,
    STEPS_PER_EPOCH,
    Net,
    assert_same,
    make_data,
    make_evaluator,
    make_net,
    parameter_count,
    state_of,
)
from torch import nn

import nni_dbs.latency
from nni_dbs import DBSPruner, RandomPruner, WidthSpace, load_pruned
from nni_dbs.cost import Bounds, count_flops
from nni_dbs.errors import BudgetError, ConfigError, ResultError
from nni_dbs.sampling import RULES
from nni_dbs.search import RandomSearch
from nni_dbs.space import Widths
from torch_pruning_adapters import mirrored_order, shrink

TINY = {
    "budget": 0.5,
    "divisor": 1,
    "points": 6,
    "evaluations": 10,
    "per_round": 2,
    "calibration_steps": 1,
    "dim": 16,
    "quiet": True,
}


def first_logit(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model.eval()(make_data().tensors[0])[:, 0].mean())


class Count:
    """A score that counts how often it is asked."""

    def __init__(self, score: Callable[[nn.Module], float] = first_logit) -> None:
        self.score = score
        self.models: list[Any] = []

    def __call__(self, model: nn.Module) -> float:
        self.models.append(model)
        return self.score(model)


def dbs(score: Callable[[nn.Module], float] = first_logit, batch_size: int = 2, **options: Any) -> DBSPruner:
    model = make_net()
    evaluator = make_evaluator(model, score, IMAGE, batch_size)
    return DBSPruner(model, CONVS, evaluator, **{**TINY, **options})


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def can_grow(widths: Mapping[str, int], space: WidthSpace, bounds: Bounds) -> bool:
    """Whether the next choice of some group, alone, still fits."""
    for name in space.names:
        wider = [w for w in space.choices(name) if w > widths[name]]
        if wider and bounds.fits({**widths, name: wider[0]}):
            return True
    return False


def assert_fills(widths: Widths, space: WidthSpace, bounds: Bounds) -> None:
    assert widths in space
    assert bounds.fits(widths)
    assert bounds.used(widths) >= 0.98 or not can_grow(widths, space, bounds)


# --- DBS through an evaluator ------------------------------------------------------------------------


@pytest.mark.parametrize("latent", [False, True])
def test_the_script_of_any_nni_pruner(latent: bool, tmp_path: Path) -> None:
    score = Count()
    model = make_net()
    evaluator = make_evaluator(model, score)
    log = tmp_path / "search.jsonl"
    pruner = DBSPruner(model, CONVS, evaluator, example_inputs=IMAGE, latent=latent, log=log, **TINY)
    compressed, masks = pruner.compress(max_steps=3)
    small = pruner.export(tmp_path / "out")

    assert compressed is model
    assert evaluator.model is None
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    assert count_flops(small, IMAGE) == pruner.result.flops <= 0.5 * pruner.result.full_flops
    for layer in ("stem.0", "block.0", "block.3", "block.6"):
        wrapped = model.get_submodule(layer)._nni_wrapper
        assert masks[layer]["weight"].shape == wrapped.weight.shape
    assert int(masks["block.0"]["bias"].sum()) == pruner.widths["block.0"]

    result = pruner.result
    assert result.method == "dbs"
    assert result.evaluations == len(score.models) == 10
    assert result.counts == {"starting points": 6, "supernet steps": 3, "evaluations": 10, "fits": 3}
    assert [fit["evaluations"] for fit in result.fits] == [6, 8, 10]
    assert set(result.seconds) == {"points", "supernet", "search", "evaluate"}
    assert all(seconds > 0 for seconds in result.seconds.values())

    lines = lines_of(log)
    assert [line["stage"] for line in lines] == ["points"] * 6 + ["round 1"] * 2 + ["round 2"] * 2
    assert result.held_out["measured"] == [line["score"] for line in lines]
    assert result.held_out["in_band"] == [line["used"] >= 0.8 for line in lines]
    assert len(result.held_out["predicted"]) == 10
    assert len({Widths(line["widths"]) for line in lines}) == 10
    assert dict(pruner.widths) in [line["widths"] for line in lines]
    for line, scored in zip(lines, score.models, strict=True):
        assert line["flops"] == count_flops(scored, IMAGE) == pruner.flops(line["widths"])
        assert line["params"] == parameter_count(scored)
        assert line["used"] == pruner.bounds.used(line["widths"]) <= 1
        assert line["score"] == first_logit(scored)

    images = make_data().tensors[0]
    loaded = load_pruned(tmp_path / "out", Net().eval())
    assert torch.equal(loaded(images), small.eval()(images))
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stored["held_out"] == result.held_out and stored["fits"] == result.fits


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_the_model(rule: str) -> None:
    pruner = dbs(rule=rule, points=3, evaluations=3, batch_size=8)
    pruner.compress(max_epochs=1)
    assert pruner.result.counts["supernet steps"] == STEPS_PER_EPOCH
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    pruner.unwrap_model()
    weights = state_of(pruner.bound_model)
    untrained = make_net()
    assert all(not torch.equal(weights[name], p) for name, p in untrained.named_parameters())
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_under_bcnet_a_score_is_the_mean_of_both_sides(tmp_path: Path) -> None:
    score = Count()
    pruner = dbs(score, rule="bcnet", points=3, evaluations=3, log=tmp_path / "log")
    pruner.compress(max_steps=2)
    pruner.unwrap_model()
    firsts, lasts = score.models[::2], score.models[1::2]
    for line, first, last in zip(lines_of(tmp_path / "log"), firsts, lasts, strict=True):
        assert line["score"] == (first_logit(first) + first_logit(last)) / 2
        for model, order in (
            (first, pruner.order),
            (last, mirrored_order(pruner.space.groups, pruner.order)),
        ):
            cut = shrink(pruner.bound_model, pruner.space.groups, line["widths"], order)
            assert_same(dict(cut.named_parameters()), dict(model.named_parameters()))
    assert first_logit(firsts[0]) != first_logit(lasts[0])


@pytest.mark.parametrize("duration", [{"max_steps": 0}, {"max_epochs": 0}])
def test_without_steps_nothing_is_trained(duration: dict[str, int]) -> None:
    pruner = dbs(points=3, evaluations=3)
    pruner.compress(**duration)
    assert "supernet steps" not in pruner.result.counts
    pruner.unwrap_model()
    assert_same(state_of(pruner.bound_model), state_of(make_net()))


def test_networks_are_scored_in_the_trained_weights_with_their_own_statistics() -> None:
    score = Count()
    pruner = dbs(score, points=3, evaluations=3, calibration_steps=2)
    pruner.compress(max_steps=3)
    pruner.unwrap_model()
    trained = pruner.bound_model.fc.bias
    assert not torch.equal(trained, make_net().fc.bias)
    for model in score.models:
        assert torch.equal(model.fc.bias, trained)
        kept = {tuple(row.flatten().tolist()) for row in model.stem[0].weight}
        assert kept <= {tuple(row.flatten().tolist()) for row in pruner.bound_model.stem[0].weight}
        assert model.stem[1].num_batches_tracked == 2


def test_the_same_seed_gives_the_same_result() -> None:
    def found(seed: int) -> tuple[Any, ...]:
        pruner = dbs(seed=seed, points=5, evaluations=6)
        pruner.compress(max_steps=3)
        return pruner.widths, pruner.result.fits, pruner.result.held_out, state_of(pruner.export())

    first, second, other = found(1), found(1), found(2)
    assert first[:3] == second[:3]
    assert_same(first[3], second[3])
    assert first[2] != other[2]


def test_it_compresses_again_from_the_start() -> None:
    pruner = dbs(points=4, evaluations=5)
    pruner.compress(max_steps=0)
    first = pruner.result
    pruner.compress(max_steps=0)
    assert (pruner.widths, pruner.result.fits, pruner.result.counts) == (
        first.widths,
        first.fits,
        first.counts,
    )


def test_fewer_networks_than_evaluations_end_the_search() -> None:
    model = make_net()
    config_list = [{"op_names": ["block.0"], "min_sparse_ratio": 0.5, "max_sparse_ratio": 0.75}]
    options = {**TINY, "budget": 1.0, "points": 5, "evaluations": 40}
    pruner = DBSPruner(model, config_list, make_evaluator(model, first_logit, IMAGE), **options)
    pruner.compress(max_steps=0)
    assert 0 < pruner.result.evaluations <= len(pruner.space.choices("block.0")) == 7
    assert pruner.widths["block.0"] <= 12


# --- refusals ----------------------------------------------------------------------------------------


def test_a_duration_is_needed() -> None:
    with pytest.raises(ConfigError, match="give compress\\(\\) max_steps or max_epochs"):
        dbs().compress()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "at least 1"),
        ({"points": 11}, r"evaluations \(10\) count the starting points \(11\)"),
        ({"per_round": 0}, "per_round must be at least 1"),
        ({"calibration_steps": -1}, "calibration_steps must not be negative"),
        ({"per_step": 0}, "per_step must be at least 1"),
        ({"dim": 8}, "dim must be a multiple of 16, not 8"),
        ({"rule": "spsf"}, "no training rule 'spsf' .did you mean 'spfs'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dbs(**options)


@pytest.mark.parametrize("max_steps", [0, 3])
def test_an_evaluator_is_needed(max_steps: int) -> None:
    pruner = DBSPruner(make_net(), CONVS, None, example_inputs=IMAGE, **TINY)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="DBSPruner needs an evaluator"):
        pruner.compress(max_steps=max_steps)


def test_it_joins_no_other_compressor_before_it_is_done() -> None:
    first = dbs(points=3, evaluations=3)
    evaluator = first.evaluator
    second = L1NormPruner.from_compressor(
        first, [{"op_names": ["fc"], "sparse_ratio": 0.3}], evaluator=evaluator
    )
    with pytest.raises(ConfigError, match=r"call its compress\(\) before another compressor joins it"):
        second.compress(max_steps=STEPS_PER_EPOCH, max_epochs=None)


def test_joined_later_it_keeps_its_choice() -> None:
    first = dbs(points=3, evaluations=3)
    _, masks = first.compress(max_steps=3)
    widths = first.widths
    second = L1NormPruner.from_compressor(
        first, [{"op_names": ["fc"], "sparse_ratio": 0.3}], evaluator=first.evaluator
    )
    _, joined = second.compress(max_steps=STEPS_PER_EPOCH, max_epochs=None)
    assert first.widths == widths
    assert all(torch.equal(joined[layer]["weight"], masks[layer]["weight"]) for layer in masks)


# --- an interrupted search ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DBSPruner]:
    """A finished search and its log."""
    log = tmp_path_factory.mktemp("search") / "search.jsonl"
    pruner = dbs(log=log)
    pruner.compress(max_steps=3)
    return log, pruner


@pytest.mark.parametrize("kept", [4, 7])
def test_a_search_goes_on_from_a_log_that_was_cut_short(
    kept: int, logged: tuple[Path, DBSPruner], tmp_path: Path
) -> None:
    log, whole = logged
    lines = log.read_text().splitlines(keepends=True)
    cut = tmp_path / "search.jsonl"
    cut.write_text("".join(lines[:kept]) + lines[kept][:30])
    score = Count()
    pruner = dbs(score, log=cut, resume=True)
    pruner.compress(max_steps=3)
    assert len(score.models) == len(lines) - kept
    assert cut.read_text() == log.read_text()
    assert pruner.widths == whole.widths
    assert (pruner.result.counts, pruner.result.fits) == (whole.result.counts, whole.result.fits)
    assert pruner.result.held_out == whole.result.held_out


def test_without_resume_the_log_begins_anew(tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    log.write_text("not even JSON\n")
    score = Count()
    dbs(score, log=log, points=3, evaluations=3).compress(max_steps=0)
    assert len(lines_of(log)) == len(score.models) == 3


def test_a_damaged_line_is_told(logged: tuple[Path, DBSPruner], tmp_path: Path) -> None:
    lines = logged[0].read_text().splitlines(keepends=True)
    damaged = tmp_path / "search.jsonl"
    damaged.write_text("".join([lines[0], lines[1][:20] + "\n", *lines[2:]]))
    with pytest.raises(ResultError, match=r"is damaged .*; delete it to evaluate again"):
        dbs(log=damaged, resume=True).compress(max_steps=0)


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pruner = dbs(log=tmp_path / "file" / "search.jsonl", points=3, evaluations=3)
    with pytest.raises(ResultError, match="cannot write"):
        pruner.compress(max_steps=0)


# --- budgets -----------------------------------------------------------------------------------------


def by_widths(model: Any) -> float:
    return model.fc.in_features + 0.3 * model.block[0].out_channels


@pytest.mark.parametrize("budget", [0.2, 0.35, "40%", {"params": 0.5}, {"flops": 0.7, "params": 0.55}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_never_above_the_budget_and_filling_it(budget: Any, seed: int) -> None:
    pruner = dbs(by_widths, budget=budget, seed=seed, points=4, evaluations=5, calibration_steps=0)
    pruner.compress(max_steps=0)
    small = pruner.export()
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    for limit, _, most in pruner.bounds.limits:
        found = count_flops(small, IMAGE) if limit.kind == "flops" else parameter_count(small)
        assert found <= most


def test_a_better_network_that_leaves_budget_unused_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    propose = RandomSearch._propose
    monkeypatch.setattr(RandomSearch, "_propose", lambda s, n: [s.space.smallest(), *propose(s, n)])
    log = tmp_path / "search.jsonl"
    pruner = random(lambda model: -parameter_count(model), budget=0.5, log=log)
    pruner.compress()
    best = max(lines_of(log), key=lambda line: line["score"])
    assert best["widths"] == dict(pruner.space.smallest())
    assert_fills(pruner.widths, pruner.space, pruner.bounds)


def odd_groups_count(model: nn.Module) -> float:
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return float(sum((i % 3) * layer.out_channels for i, layer in enumerate(layers)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnet50"])
def test_never_above_the_budget_on_large_networks(name: str) -> None:
    """5 budgets and 3 seeds each, counted on the network that comes out."""
    image = torch.zeros(1, 3, 32, 32)
    for budget in (0.15, 0.3, 0.5, 0.7, 0.9):
        for seed in range(3):
            model = torchvision.models.get_model(name)
            evaluator = make_evaluator(model, odd_groups_count, image)
            options = {"points": 6, "evaluations": 8, "calibration_steps": 0, "divisor": 8, "seed": seed}
            pruner = DBSPruner(model, CONVS, evaluator, **{**TINY, **options, "budget": budget})
            pruner.compress(max_steps=0)
            assert_fills(pruner.widths, pruner.space, pruner.bounds)
            assert count_flops(pruner.export(), image) == pruner.result.flops
            assert pruner.result.flops <= budget * pruner.result.full_flops


# --- latency -----------------------------------------------------------------------------------------


class Clock:
    """Takes the place of `medians_ms`; `slower` is what chosen networks differ from the fitted ones."""

    def __init__(self) -> None:
        self.slower: Callable[[Any], float] = lambda model: 1.0

    def time(self, model: Any) -> float:
        return (0.2 + 0.003 * parameter_count(model)) * self.slower(model)

    def __call__(self, models: Sequence[nn.Module], *args: Any, **length: Any) -> list[float]:
        reference, *others = models
        return [0.2 + 0.003 * parameter_count(reference), *map(self.time, others)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    replaced = Clock()
    monkeypatch.setattr(nni_dbs.latency, "medians_ms", replaced)
    return replaced


def random(score: Callable[[nn.Module], float], **options: Any) -> RandomPruner:
    model = make_net()
    evaluator = make_evaluator(model, score, IMAGE)
    options = {"candidates": 8, "calibration_steps": 0, "divisor": 1, "quiet": True, **options}
    return RandomPruner(model, CONVS, evaluator, **options)


def measured(pruner: Any, clock: Clock) -> float:
    found = clock.time(pruner.export())
    assert pruner.result.latency_ms == pytest.approx(found, rel=1e-9)
    assert found <= pruner.most_latency * (1 + 1e-9)
    limit = pruner.budget.limits[-1]
    asked = limit.amount * (pruner.latency.full if limit.relative else 1)
    assert pruner.most_latency == pytest.approx(0.95 * asked)
    assert pruner.result.limits["latency_ms"] == pytest.approx(asked)
    return found / pruner.most_latency


def test_flops_and_latency_at_once(clock: Clock, tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    pruner = dbs(budget={"flops": 0.7, "latency_ms": 0.6}, points=4, evaluations=5, log=log)
    pruner.compress(max_steps=3)
    measured(pruner, clock)
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    assert pruner.result.flops <= 0.7 * pruner.result.full_flops
    assert pruner.result.full_latency_ms == pytest.approx(clock.time(make_net()), rel=1e-9)
    assert {"latency model", "measure"} <= set(pruner.result.seconds)
    assert pruner.result.counts["latency measurements"] == pruner.latency.measurements > 8
    assert pruner.result.limits["flops"] == pruner.bounds.limits[0][2]
    for line in lines_of(log):
        assert line["latency_ms"] == pruner.costs["latency_ms"](line["widths"]) <= pruner.most_latency


@pytest.mark.parametrize("make", [dbs, random])
def test_a_network_slower_than_predicted_is_made_smaller(
    make: Callable[..., Any], clock: Clock, tmp_path: Path
) -> None:
    log = tmp_path / "search.jsonl"
    few = {"points": 4, "evaluations": 4} if make is dbs else {}
    pruner = make(by_widths, budget={"latency_ms": 0.6}, log=log, **few)
    clock.slower = lambda model: 1.1
    pruner.compress(**({"max_steps": 0} if make is dbs else {}))
    assert measured(pruner, clock) > 0.9
    lines = lines_of(log)
    assert dict(pruner.widths) in [line["widths"] for line in lines]
    smaller = [line["latency_ms"] for line in lines if line["stage"] == "smaller"]
    others = [line["latency_ms"] for line in lines if line["stage"] != "smaller"]
    assert smaller and max(smaller) <= 0.99 * max(others)
    assert len(lines) == pruner.result.evaluations == pruner.counts["evaluations"] > few.get("evaluations", 8)


def test_the_best_of_those_that_keep_the_budget_when_measured(clock: Clock, tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    pruner = random(by_widths, budget={"latency_ms": 0.6}, log=log)
    kept = 9
    clock.slower = lambda model: 1.0 if model.fc.in_features <= kept else 1.1
    pruner.compress()
    lines, space = lines_of(log), (pruner.space, pruner.bounds)
    lines.sort(key=lambda line: line["score"], reverse=True)
    assert lines[0]["widths"]["stem.0"] > kept
    full = (line for line in lines if line["used"] >= 0.98 or not can_grow(line["widths"], *space))
    best = next(line for line in full if line["widths"]["stem.0"] <= kept)
    assert dict(pruner.widths) == best["widths"]


def test_a_latency_in_milliseconds(clock: Clock) -> None:
    pruner = random(by_widths, budget={"latency_ms": f"{0.7 * clock.time(make_net())}ms"})
    pruner.compress()
    assert measured(pruner, clock) > 0.9


def test_the_whole_latency_needs_nothing_held_back(clock: Clock) -> None:
    pruner = random(by_widths, budget={"latency_ms": 1.0, "flops": 0.5})
    assert pruner.most_latency == pruner.latency.full
    pruner.compress()
    assert_fills(pruner.widths, pruner.space, pruner.bounds)


def test_a_latency_that_leaves_nothing_to_hold_back_is_refused_at_once(clock: Clock) -> None:
    pruner = random(by_widths, budget={"latency_ms": 0.9})
    least = pruner.latency(pruner.space.smallest())
    with pytest.raises(BudgetError, match="more than 95% of it, which leaves no room"):
        random(by_widths, budget={"latency_ms": f"{1.01 * least}ms"})


def test_a_latency_that_no_network_keeps(clock: Clock) -> None:
    pruner = random(by_widths, budget={"latency_ms": 0.6})
    clock.slower = lambda model: 100.0
    with pytest.raises(BudgetError, match=r"no network of this shape keeps .* \(5% is held back"):
        pruner.compress()
    with pytest.raises(ConfigError, match=r"call compress\(\) first"):
        pruner.export()


def test_a_latency_that_no_smaller_network_lowers(clock: Clock) -> None:
    pruner = random(by_widths, budget={"latency_ms": 0.9})
    clock.slower = lambda model: 1.01 * pruner.most_latency / unhurried(model)
    with pytest.raises(BudgetError, match="no network of this shape keeps"):
        pruner.compress()


def unhurried(model: nn.Module) -> float:
    return 0.2 + 0.003 * parameter_count(model)


def test_latencies_are_kept_in_the_table(clock: Clock, tmp_path: Path) -> None:
    table = tmp_path / "latency.json"
    first = random(by_widths, budget={"latency_ms": 0.6}, latency_table=table)
    first.compress()
    content = table.read_text()
    clock.slower = lambda model: pytest.fail("measured again")
    second = random(by_widths, budget={"latency_ms": 0.6}, latency_table=table)
    second.compress()
    assert second.widths == first.widths
    assert second.result.latency_ms == first.result.latency_ms
    assert table.read_text() == content
