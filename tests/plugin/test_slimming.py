"""AutoSlim as a pruner: through NNI's evaluator, its log, one run for all budgets, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
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
from test_searching import Clock, Count, assert_fills, first_logit, lines_of, measured
from torch import nn

import nni_dbs.latency
from nni_dbs import AutoSlimPruner, load_pruned
from nni_dbs.algorithms.autoslim import narrower
from nni_dbs.cost import count_flops
from nni_dbs.errors import BudgetError, ConfigError, EvaluatorError
from nni_dbs.sampling import RULES
from nni_dbs.space import Widths
from torch_pruning_adapters import shrink

Score = Any


def autoslim(score: Score = first_logit, batch_size: int = 2, **options: Any) -> AutoSlimPruner:
    model = make_net()
    evaluator = make_evaluator(model, score, IMAGE, batch_size)
    options = {"budget": 0.5, "divisor": 1, "limit": 5, "quiet": True, **options}
    return AutoSlimPruner(model, CONVS, evaluator, **options)


def test_the_script_of_any_nni_pruner(tmp_path: Path) -> None:
    score = Count()
    log = tmp_path / "search.jsonl"
    pruner = autoslim(score, log=log)
    model, evaluator = pruner.bound_model, pruner.evaluator
    compressed, masks = pruner.compress(max_steps=3)
    small = pruner.export(tmp_path / "out")

    assert compressed is model
    assert evaluator.model is None
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    assert count_flops(small, IMAGE) == pruner.result.flops <= 0.5 * pruner.result.full_flops
    for layer in ("stem.0", "block.0", "block.3", "block.6"):
        wrapped = model.get_submodule(layer)._nni_wrapper
        assert masks[layer]["weight"].shape == wrapped.weight.shape
    assert int(masks["block.0"]["bias"].sum()) == pruner.widths["block.0"] < 24

    result = pruner.result
    lines = lines_of(log)
    assert result.method == "autoslim"
    assert result.evaluations == len(score.models) == len(lines)
    assert result.counts == {"supernet steps": 3, "evaluations": len(lines)}
    assert set(result.seconds) == {"supernet", "evaluate", "search"}
    for line, scored in zip(lines, score.models, strict=True):
        assert line["flops"] == count_flops(scored, IMAGE)
        assert line["params"] == parameter_count(scored)
        assert line["used"] == pruner.bounds.used(line["widths"])
        assert line["score"] == first_logit(scored)
    assert max(line["used"] for line in lines) > 1

    images = make_data().tensors[0]
    loaded = load_pruned(tmp_path / "out", Net().eval())
    assert torch.equal(loaded(images), small.eval()(images))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["method"] == "autoslim"


def test_the_log_tells_each_choice(tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    pruner = autoslim(budget=0.25, log=log)
    pruner.compress(max_steps=3)
    lines, way = lines_of(log), pruner.trajectory
    rounds = len(way) - 1
    assert way[0] == pruner.space.largest() and rounds > 2
    for number, (before, after) in enumerate(pairwise(way), 1):
        tried = [line for line in lines if line["stage"] == f"round {number}"]
        assert [line["widths"] for line in tried] == [dict(w) for w in narrower(before, pruner.space, 5)]
        best = max(tried, key=lambda line: line["score"])
        assert best["widths"] == dict(after)
        assert pruner.bounds.fits(after) == (number == rounds)
    last = lines[-1]
    assert last["stage"] == "grown" and last["widths"] == dict(pruner.widths)
    assert len({line["stage"] for line in lines}) == rounds + 1


def test_a_budget_of_the_whole_network_needs_no_step(tmp_path: Path) -> None:
    pruner = autoslim(budget=1.0, log=tmp_path / "search.jsonl")
    pruner.compress(max_steps=0)
    assert pruner.widths == pruner.space.largest()
    assert pruner.trajectory == [pruner.space.largest()]
    assert [line["stage"] for line in lines_of(tmp_path / "search.jsonl")] == ["grown"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_the_model(rule: str) -> None:
    pruner = autoslim(rule=rule, batch_size=8)
    pruner.compress(max_epochs=1)
    assert pruner.result.counts["supernet steps"] == STEPS_PER_EPOCH
    assert ("points" in pruner.result.seconds) == (rule in ("spfs", "path_fair"))
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    pruner.unwrap_model()
    weights = state_of(pruner.bound_model)
    assert all(not torch.equal(weights[name], p) for name, p in make_net().named_parameters())


def test_without_steps_nothing_is_trained() -> None:
    pruner = autoslim()
    pruner.compress(max_steps=0)
    assert set(pruner.result.counts) == {"evaluations"}
    pruner.unwrap_model()
    assert_same(state_of(pruner.bound_model), state_of(make_net()))


def test_the_same_seed_gives_the_same_result() -> None:
    def found(seed: int) -> tuple[Any, ...]:
        pruner = autoslim(seed=seed)
        pruner.compress(max_steps=3)
        return (pruner.widths, pruner.trajectory, pruner.counts), state_of(pruner.export())

    first, second, other = found(1), found(1), found(2)
    assert first[0] == second[0]
    assert_same(first[1], second[1])
    assert not torch.equal(first[1]["fc.bias"], other[1]["fc.bias"])


def test_it_compresses_again_from_the_start() -> None:
    pruner = autoslim()
    pruner.compress(max_steps=0)
    first, way = pruner.result, pruner.trajectory
    pruner.compress(max_steps=0)
    assert (pruner.widths, pruner.result.counts, pruner.trajectory) == (first.widths, first.counts, way)


# --- statistics of the networks ----------------------------------------------------------------------


def test_networks_normalise_by_the_evaluated_batch_itself() -> None:
    images = make_data().tensors[0]
    outputs = []

    def score(model: Any) -> float:
        with torch.no_grad():
            outputs.append((model.eval()(images), model))
        return first_logit(model)

    pruner = autoslim(score)
    pruner.compress(max_steps=3)
    pruner.unwrap_model()
    chosen = shrink(pruner.bound_model, pruner.space.groups, pruner.widths, pruner.order).train()
    with torch.no_grad():
        expected = chosen(images)  # in train mode
    found, model = outputs[-1]
    assert torch.equal(found, expected)
    assert torch.equal(model.fc.bias, pruner.bound_model.fc.bias)
    assert pruner.bound_model.stem[1].running_mean is not None


@pytest.mark.parametrize("steps", [0, 2])
def test_or_by_training_batches_or_by_the_full_models_statistics(steps: int) -> None:
    score = Count()
    pruner = autoslim(score, calibration_steps=steps)
    pruner.compress(max_steps=3)
    pruner.unwrap_model()
    full = pruner.bound_model.stem[1]
    for model in score.models:
        assert model.stem[1].num_batches_tracked == (steps or full.num_batches_tracked)
        kept = model.stem[1].running_mean.tolist()
        assert (set(kept) <= set(full.running_mean.tolist())) == (steps == 0)


def test_a_batch_too_small_for_statistics_is_told() -> None:
    def one_pixel(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model.eval()(torch.zeros(1, 3, 1, 1)).sum())

    with pytest.raises(EvaluatorError, match="evaluate in larger batches, or give calibration_steps"):
        autoslim(one_pixel).compress(max_steps=0)
    autoslim(one_pixel, calibration_steps=1).compress(max_steps=0)

    def broken(model: nn.Module) -> float:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match=r"^no such file$"):
        autoslim(broken).compress(max_steps=0)


# --- one run for all budgets -------------------------------------------------------------------------


LARGER: tuple[Any, ...] = (0.5, "80%", 1.0, {"params": 0.6}, {"flops": 0.7, "params": 0.55})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoSlimPruner, Path]:
    """A run for a small budget, and its log."""
    log = tmp_path_factory.mktemp("autoslim") / "search.jsonl"
    pruner = autoslim(budget=0.3, log=log)
    pruner.compress(max_steps=3)
    return pruner, log


@pytest.mark.parametrize("budget", LARGER, ids=str)
def test_a_single_run_equals_separate_runs(
    budget: Any, single: tuple[AutoSlimPruner, Path], tmp_path: Path
) -> None:
    whole, log = single
    separate = autoslim(budget=budget, log=tmp_path / "search.jsonl")
    separate.compress(max_steps=3)
    assert whole.within(budget) == separate.widths
    assert whole.trajectory[: len(separate.trajectory)] == separate.trajectory
    assert len(separate.trajectory) < len(whole.trajectory)
    scores, own = (
        {Widths(line["widths"]): (line["stage"], line["score"]) for line in lines_of(path)}
        for path in (log, tmp_path / "search.jsonl")
    )
    assert all(scores[widths] == found for widths, found in own.items() if found[0] != "grown")
    assert whole.within(0.3) == whole.widths


def test_the_network_of_a_larger_budget_can_be_cut_out(single: tuple[AutoSlimPruner, Path]) -> None:
    pruner = single[0]
    widths = pruner.within(0.6)
    with pruner._plain_model() as model:
        small = shrink(model, pruner.space.groups, widths, pruner.order)
    assert 0.55 < count_flops(small, IMAGE) / pruner.flops.full <= 0.6


def test_a_smaller_budget_is_refused_with_what_to_do(single: tuple[AutoSlimPruner, Path]) -> None:
    with pytest.raises(BudgetError, match="run for the smallest budget that you need"):
        single[0].within(0.1)
    with pytest.raises(BudgetError, match="below the smallest network of this space"):
        single[0].within("1K")
    with pytest.raises(BudgetError, match="the same log and resume=True"):
        single[0].within({"latency_ms": 0.9, "flops": 0.9})
    with pytest.raises(ConfigError, match=r"call compress\(\) first"):
        autoslim().within(0.6)


def by_widths(model: Any) -> float:
    return model.fc.in_features + 0.3 * model.block[0].out_channels


@pytest.mark.parametrize("budget", [0.2, 0.35, "40%", {"params": 0.5}, {"flops": 0.7, "params": 0.55}])
@pytest.mark.parametrize("limit", [2, 5, 30])
def test_never_above_the_budget_and_filling_it(budget: Any, limit: int) -> None:
    pruner = autoslim(by_widths, budget=budget, limit=limit)
    pruner.compress(max_steps=0)
    small = pruner.export()
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    for kind, _, most in pruner.bounds.limits:
        found = count_flops(small, IMAGE) if kind.kind == "flops" else parameter_count(small)
        assert found <= most


def test_a_group_that_never_matters_is_narrowed_first() -> None:
    pruner = autoslim(lambda model: model.fc.in_features, budget=0.3)
    pruner.compress(max_steps=0)
    first = [widths["block.0"] for widths in pruner.trajectory[:5]]
    assert first == list(pruner.space.options("block.0", 5))[::-1]
    assert all(widths["stem.0"] == 16 for widths in pruner.trajectory[:5])


# --- an interrupted search ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 5, None])
def test_a_search_goes_on_from_a_log_that_was_cut_short(
    kept: int | None, single: tuple[AutoSlimPruner, Path], tmp_path: Path
) -> None:
    whole, log = single
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) > 6
    cut = tmp_path / "search.jsonl"
    cut.write_text("".join(lines[:kept]) + ("" if kept is None else lines[kept][:30]))
    score = Count()
    pruner = autoslim(score, budget=0.3, log=cut, resume=True)
    pruner.compress(max_steps=3)
    assert len(score.models) == len(lines) - (len(lines) if kept is None else kept)
    assert cut.read_text() == log.read_text()
    assert (pruner.widths, pruner.trajectory) == (whole.widths, whole.trajectory)
    assert pruner.result.counts == whole.result.counts


def test_another_budget_goes_on_from_the_same_log(
    single: tuple[AutoSlimPruner, Path], tmp_path: Path
) -> None:
    whole, log = single
    copied = tmp_path / "search.jsonl"
    copied.write_bytes(log.read_bytes())
    score = Count()
    smaller = autoslim(score, budget=0.2, log=copied, resume=True)
    smaller.compress(max_steps=3)
    assert 0 < len(score.models) < smaller.result.evaluations
    assert smaller.trajectory[: len(whole.trajectory)] == whole.trajectory
    fresh = autoslim(budget=0.2)
    fresh.compress(max_steps=3)
    assert (smaller.widths, smaller.result.counts) == (fresh.widths, fresh.result.counts)


def test_without_resume_the_log_begins_anew(tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    log.write_text("not even JSON\n")
    pruner = autoslim(log=log)
    pruner.compress(max_steps=0)
    assert len(lines_of(log)) == pruner.result.evaluations


# --- latency -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    replaced = Clock()
    monkeypatch.setattr(nni_dbs.latency, "medians_ms", replaced)
    return replaced


@pytest.mark.parametrize("slower", [1.0, 1.1])
def test_a_latency_is_kept_when_it_is_measured(slower: float, clock: Clock, tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    pruner = autoslim(budget={"flops": 0.7, "latency_ms": 0.6}, log=log)
    clock.slower = lambda model: slower
    pruner.compress(max_steps=3)
    assert measured(pruner, clock) > 0.85
    assert pruner.result.flops <= 0.7 * pruner.result.full_flops
    assert pruner.result.counts["latency measurements"] > 8
    for line in lines_of(log):
        assert line["latency_ms"] == pruner.costs["latency_ms"](line["widths"])
    grown = Widths(lines_of(log)[-1]["widths"])
    assert pruner.bounds.fits(grown) and (pruner.widths == grown) == (slower == 1.0)


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 1}, "limit must be at least 2"),
        ({"calibration_steps": -1}, "calibration_steps must not be negative"),
        ({"per_step": 0}, "per_step must be at least 1"),
        ({"rule": "sandwic"}, "no training rule 'sandwic' .did you mean 'sandwich'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        autoslim(**options)


def test_an_impossible_budget_is_refused_at_once() -> None:
    with pytest.raises(BudgetError, match="below the smallest network of this space"):
        autoslim(budget="1K")


def test_a_duration_is_needed() -> None:
    with pytest.raises(ConfigError, match="give compress\\(\\) max_steps or max_epochs"):
        autoslim().compress()


@pytest.mark.parametrize("max_steps", [0, 3])
def test_an_evaluator_is_needed(max_steps: int) -> None:
    options: Sequence[Any] = (make_net(), CONVS, None)
    pruner = AutoSlimPruner(*options, example_inputs=IMAGE, budget=0.5, divisor=1, quiet=True)
    with pytest.raises(ConfigError, match="AutoSlimPruner needs an evaluator"):
        pruner.compress(max_steps=max_steps)
