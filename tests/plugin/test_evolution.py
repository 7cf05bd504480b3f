"""EvolutionPruner: with and without a predictor, through an evaluator."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from test_searching import Count, assert_fills, by_widths, first_logit, lines_of
from torch import nn

from nni_dbs import EvolutionPruner, load_pruned
from nni_dbs.cost import count_flops
from nni_dbs.errors import ConfigError
from nni_dbs.guided import GuidedEvolution
from nni_dbs.plugin.register import NAMES
from nni_dbs.problem import Problem
from nni_dbs.projection import leaves_room
from nni_dbs.sampling import RULES
from nni_dbs.search import EvolutionSearch
from nni_dbs.space import Widths
from nni_dbs.study import Study

TINY = {
    "budget": 0.5,
    "divisor": 1,
    "initial": 4,
    "evaluations": 8,
    "per_round": 2,
    "calibration_steps": 1,
    "quiet": True,
}
both = pytest.mark.parametrize("predictor", [False, True])


def evolution(
    score: Callable[[nn.Module], float] = first_logit, batch_size: int = 2, **options: Any
) -> EvolutionPruner:
    model = make_net()
    evaluator = make_evaluator(model, score, IMAGE, batch_size)
    return EvolutionPruner(model, CONVS, evaluator, **{**TINY, **options})


@both
def test_the_script_of_any_nni_pruner(predictor: bool, tmp_path: Path) -> None:
    score = Count()
    model = make_net()
    evaluator = make_evaluator(model, score)
    log = tmp_path / "search.jsonl"
    options = {**TINY, "predictor": predictor}
    pruner = EvolutionPruner(model, CONVS, evaluator, example_inputs=IMAGE, log=log, **options)
    compressed, masks = pruner.compress(max_steps=3)
    small = pruner.export(tmp_path / "out")

    assert compressed is model and evaluator.model is None
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    assert count_flops(small, IMAGE) == pruner.result.flops <= 0.5 * pruner.result.full_flops
    for layer in ("stem.0", "block.0", "block.3", "block.6"):
        assert masks[layer]["weight"].shape == model.get_submodule(layer)._nni_wrapper.weight.shape
    assert int(masks["block.0"]["bias"].sum()) == pruner.widths["block.0"]

    result, lines = pruner.result, lines_of(log)
    assert result.method == "evolution"
    assert result.evaluations == len(score.models) == len(lines) == 8
    assert len({Widths(line["widths"]) for line in lines}) == 8
    assert dict(pruner.widths) in [line["widths"] for line in lines]
    for line, scored in zip(lines, score.models, strict=True):
        assert line["flops"] == count_flops(scored, IMAGE)
        assert line["params"] == parameter_count(scored)
        assert line["used"] <= 1
        assert line["score"] == first_logit(scored)
    stages = [line["stage"] for line in lines]
    if predictor:
        assert stages == ["points"] * 4 + ["round 1"] * 2 + ["round 2"] * 2
        assert result.counts == {"starting points": 4, "supernet steps": 3, "evaluations": 8, "fits": 3}
        assert [fit["evaluations"] for fit in result.fits] == [4, 6, 8]
        assert result.held_out["measured"] == [line["score"] for line in lines]
        assert result.held_out["in_band"] == [line["used"] >= 0.8 for line in lines]
    else:
        assert stages == [f"round {1 + i // 2}" for i in range(8)]
        assert result.counts == {"supernet steps": 3, "evaluations": 8}
        assert result.fits == [] and result.held_out == {}

    images = make_data().tensors[0]
    loaded = load_pruned(tmp_path / "out", Net().eval())
    assert torch.equal(loaded(images), small.eval()(images))
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stored["held_out"] == result.held_out and stored["fits"] == result.fits


def test_without_a_predictor_the_best_score_is_chosen(tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    pruner = evolution(by_widths, log=log, calibration_steps=0, evaluations=20)
    pruner.compress(max_steps=0)
    found = [(line, Widths(line["widths"])) for line in lines_of(log)]
    full = [line for line, widths in found if not leaves_room(widths, pruner.space, pruner.bounds)]
    assert len(full) > 10
    best = max(full, key=lambda line: line["score"])
    chosen = next(line for line in full if line["widths"] == dict(pruner.widths))
    assert chosen["score"] == best["score"]


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_starting_points_draw_as_many_as_are_evaluated_at_first(rule: str) -> None:
    pruner = evolution(rule=rule, initial=3, evaluations=3, batch_size=8)
    pruner.compress(max_epochs=1)
    counts = pruner.result.counts
    assert counts["supernet steps"] == STEPS_PER_EPOCH
    assert counts.get("starting points") == (3 if rule in ("spfs", "path_fair") else None)
    pruner.unwrap_model()
    weights = state_of(pruner.bound_model)
    assert all(not torch.equal(weights[name], p) for name, p in make_net().named_parameters())


@both
def test_the_sandwich_rule_trains_by_default(predictor: bool) -> None:
    weights = []
    for options in ({}, {"rule": "sandwich"}, {"rule": "spfs"}):
        pruner = evolution(predictor=predictor, evaluations=4, **options)
        pruner.compress(max_steps=3)
        pruner.unwrap_model()
        weights.append(state_of(pruner.bound_model))
    assert_same(weights[0], weights[1])
    assert not torch.equal(weights[0]["fc.weight"], weights[2]["fc.weight"])


@both
def test_without_steps_nothing_is_trained(predictor: bool) -> None:
    pruner = evolution(predictor=predictor, evaluations=4)
    pruner.compress(max_steps=0)
    assert "supernet steps" not in pruner.result.counts
    pruner.unwrap_model()
    assert_same(state_of(pruner.bound_model), state_of(make_net()))


@both
def test_the_same_seed_gives_the_same_result(predictor: bool, tmp_path: Path) -> None:
    def found(seed: int, name: str) -> tuple[Any, ...]:
        log = tmp_path / name
        pruner = evolution(seed=seed, predictor=predictor, log=log, evaluations=6)
        pruner.compress(max_steps=3)
        return log.read_text(), pruner.widths, pruner.result.fits, state_of(pruner.export())

    first, second, other = found(1, "a"), found(1, "b"), found(2, "c")
    assert first[:3] == second[:3]
    assert_same(first[3], second[3])
    assert first[0] != other[0]


@both
@pytest.mark.parametrize("kept", [3, 5])
def test_a_search_goes_on_from_a_log_that_was_cut_short(kept: int, predictor: bool, tmp_path: Path) -> None:
    log, cut = tmp_path / "search.jsonl", tmp_path / "cut.jsonl"
    whole = evolution(predictor=predictor, log=log)
    whole.compress(max_steps=3)
    lines = log.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:kept]) + lines[kept][:30])
    score = Count()
    pruner = evolution(score, predictor=predictor, log=cut, resume=True)
    pruner.compress(max_steps=3)
    assert len(score.models) == len(lines) - kept
    assert cut.read_text() == log.read_text()
    assert pruner.widths == whole.widths
    assert (pruner.result.counts, pruner.result.fits) == (whole.result.counts, whole.result.fits)


@both
@pytest.mark.parametrize("budget", [0.2, {"params": 0.5}, {"flops": 0.7, "params": 0.55}])
def test_never_above_the_budget_and_filling_it(budget: Any, predictor: bool) -> None:
    pruner = evolution(by_widths, budget=budget, predictor=predictor, calibration_steps=0, evaluations=6)
    pruner.compress(max_steps=0)
    small = pruner.export()
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    for limit, _, most in pruner.bounds.limits:
        counted = count_flops(small, IMAGE) if limit.kind == "flops" else parameter_count(small)
        assert counted <= most


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"parents": 3, "mutation": 0.2}, EvolutionSearch, {"initial": 4, "parents": 3, "mutation": 0.2}),
        ({"predictor": True, "mutation": 0.3}, GuidedEvolution, {"mutation": 0.3}),
    ],
)
def test_a_tuner_proposes_what_the_pruner_would(
    options: dict[str, Any], kind: type, expected: dict[str, Any]
) -> None:
    pruner = evolution(seed=3, **options)
    arguments = pruner.tuner_arguments()
    assert arguments["searcher"] in NAMES.values()
    problem = Problem(pruner.space, {"flops": pruner.flops, "params": pruner.params}, {}, 0.5)
    study = Study(problem, None, **arguments)
    searcher = pruner._searcher()
    assert type(searcher) is type(study.searcher) is kind
    for made in (searcher, study.searcher):
        assert len(getattr(made, "points", "four")) == 4
        assert {name: getattr(made, name) for name in expected} == expected
    for _ in range(4):
        for widths in searcher.ask(pruner.per_round):
            assert study.propose() == widths
            value = float(sum(widths.values()))
            searcher.tell(widths, value)
            study.learn(widths, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0}, r"initial networks \(0\), which are at least 1"),
        ({"initial": 10}, r"evaluations \(8\) count the initial networks \(10\)"),
        ({"per_round": 0}, "per_round must be at least 1"),
        ({"parents": 0}, "parents must be at least 1, not 0"),
        ({"parents": 4, "predictor": True}, "with a predictor a quarter of the population breeds"),
        ({"mutation": 1.5}, r"mutation must lie in \[0, 1\], not 1.5"),
        ({"rule": "sandwic"}, "no training rule 'sandwic' .did you mean 'sandwich'"),
        ({"calibration_steps": -1}, "calibration_steps must not be negative"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evolution(**options)


@pytest.mark.parametrize("max_steps", [0, 3])
def test_an_evaluator_is_needed(max_steps: int) -> None:
    missing: Any = None
    pruner = EvolutionPruner(make_net(), CONVS, missing, example_inputs=IMAGE, **TINY)
    with pytest.raises(ConfigError, match="EvolutionPruner needs an evaluator"):
        pruner.compress(max_steps=max_steps)
