"""Problems as files, and studies: proposals inside of the budget, results in any order, logs."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chain

from examples.cifar_resnet import resnet20
from nni_dbs import FlopsCost, Widths, WidthSpace
from nni_dbs.errors import BudgetError, ConfigError, ResultError, TrainingError
from nni_dbs.problem import Problem
from nni_dbs.search import EvolutionSearch
from nni_dbs.study import SEARCHERS, Study
from torch_pruning_adapters import WidthError, find_channel_groups, find_residual_blocks, prefix_order


def problem(budget: Any = 0.5) -> Problem:
    space, flops, params = chain(4, 32, 4)
    return Problem(space, {"flops": flops, "params": params}, prefix_order(space.groups), budget)


def quality(widths: Any) -> float:
    """A score that tells all networks apart."""
    return sum((i + 1) * w + w**0.5 / 1000 for i, w in enumerate(widths.values()))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def small_options(searcher: str) -> dict[str, Any]:
    few = {"points": 6}
    options = {"dbs": few, "guided_evolution": {**few, "generations": 4}, "evolution": {"initial": 6}}
    return options.get(searcher, {})


def test_a_loaded_problem_is_the_same_integer_for_integer(tmp_path: Path) -> None:
    saved = problem()
    saved.save(tmp_path / "problem.json")
    loaded = Problem.load(tmp_path / "problem.json")
    generator = torch.Generator().manual_seed(0)
    for widths in (saved.space.sample(generator) for _ in range(50)):
        for kind, cost in saved.costs.items():
            assert loaded.costs[kind].by_layer(widths) == cost.by_layer(widths)
            assert loaded.costs[kind](widths) == cost(widths)
    encoded = torch.stack([saved.space.encode(saved.space.sample(generator)) for _ in range(50)])
    assert torch.equal(loaded.costs["flops"].batch(encoded), saved.costs["flops"].batch(encoded))
    assert loaded.space.to_nni() == saved.space.to_nni() and loaded.space.groups == saved.space.groups
    assert loaded.order == {name: list(ranked) for name, ranked in saved.order.items()}
    assert loaded.bounds().limits[0][2] == saved.bounds().limits[0][2]


def test_a_loaded_problem_knows_removed_blocks(tmp_path: Path) -> None:
    model, x = resnet20(widths=(4, 6, 8)), torch.zeros(1, 3, 32, 32)
    groups = find_residual_blocks(model, find_channel_groups(model, x, verify=False), x)
    block = next(g.block for g in groups if g.block is not None)
    flops = FlopsCost(model, x, groups)
    Problem(WidthSpace(groups, 0, 1).without([block]), {"flops": flops}, {}, 0.5).save(tmp_path / "p.json")
    loaded = Problem.load(tmp_path / "p.json")
    removed = loaded.space.largest()
    assert 0 in removed.values()
    assert loaded.costs["flops"](removed) == flops(removed) < flops.full
    assert loaded.costs["flops"].batch(loaded.space.encode(removed)[None]).item() == flops(removed)


def test_evolution_begins_with_the_prior_of_its_problem(tmp_path: Path) -> None:
    """Also after the problem was a file, and in a part of its space."""
    plain = problem()
    prior = {name: {plain.space.choices(name)[0]: 1.0} for name in plain.space.names}
    dataclasses.replace(plain, prior=prior).save(tmp_path / "problem.json")
    loaded = Problem.load(tmp_path / "problem.json")
    assert loaded.prior == prior
    study = Study(loaded, None, searcher="evolution", initial=2)
    assert isinstance(study.searcher, EvolutionSearch)
    assert study.searcher.prior is not None
    assert study.searcher.prior.argmax(1).tolist() == [0] * len(prior)
    assert study.searcher.prior.amax(1).tolist() == [1] * len(prior)
    narrowed = {
        name: {"_type": "choice", "_value": entry["_value"][1:]}
        for name, entry in plain.space.to_nni().items()
    }
    study.narrow(narrowed)
    for name, row in zip(study.searcher.space.names, study.searcher.prior, strict=True):
        choices = len(study.searcher.space.choices(name))
        assert row[:choices].tolist() == pytest.approx([1 / choices] * choices)
    other = Study(loaded, None, searcher="random").propose()
    assert other is not None and plain.bounds().fits(other)


@pytest.mark.parametrize("text", ["", "{}", '{"groups": []}', "[1]", "groups"])
def test_a_damaged_problem_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "problem.json").write_text(text)
    with pytest.raises(ResultError, match="damaged"):
        Problem.load(tmp_path / "problem.json")


def test_a_missing_problem_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="nni-dbs prepare writes it"):
        Problem.load(tmp_path / "problem.json")


def test_parameters_of_a_trial_are_the_inverse_of_the_search_space() -> None:
    space = problem().space
    generator = torch.Generator().manual_seed(0)
    for widths in (space.sample(generator) for _ in range(20)):
        assert space.from_nni({name: widths[name] for name in space.to_nni()}) == widths
    fixed = space.among({space.names[0]: [8]})
    parameters = dict.fromkeys(fixed.to_nni(), 32)
    assert fixed.from_nni(parameters)[space.names[0]] == 8


def test_parameters_of_another_space_are_refused() -> None:
    space = problem().space
    parameters = dict.fromkeys(space.to_nni(), 32)
    with pytest.raises(WidthError, match="another search space"):
        space.from_nni({**parameters, "conv9": 32})
    with pytest.raises(WidthError, match="no width for group"):
        space.from_nni(dict(list(parameters.items())[1:]))
    with pytest.raises(WidthError, match="no choice"):
        space.from_nni({**parameters, space.names[0]: 31})


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_proposals_keep_the_budget_and_come_once(searcher: str, tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", searcher=searcher, **small_options(searcher))
    seen = set()
    for _ in range(14):
        widths = study.propose()
        assert widths is not None and study.bounds.fits(widths) and widths in study.problem.space
        assert widths not in seen
        seen.add(widths)
        study.learn(widths, quality(widths))
    assert study.best() in seen


def test_a_predictor_learns_from_results_that_come_late_and_in_any_order(tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", points=6, per_round=2)
    running = [study.propose() for _ in range(4)]
    for _ in range(10):
        widths = running.pop(2)
        assert widths is not None
        study.learn(widths, quality(widths))
        running.append(study.propose())
    fits = [fit["evaluations"] for fit in study.searcher.fits]  # type: ignore[attr-defined]
    assert len(fits) >= 2 and fits == sorted(set(fits))


def test_the_table_pairs_every_network_with_its_own_score(tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", searcher="random")
    proposed = [study.propose() for _ in range(6)]
    for i in (4, 0, 5, 2):
        assert proposed[i] is not None
        study.learn(proposed[i], quality(proposed[i]), trial=f"trial {i}")  # type: ignore[arg-type, union-attr]
    rows = rows_of(tmp_path / "results.csv")
    assert len(rows) == 6
    for i, (row, widths) in enumerate(zip(rows, proposed, strict=True)):
        assert widths is not None
        assert {name: int(row[name]) for name in study.problem.space.names} == dict(widths)
        assert int(row["flops"]) == study.problem.costs["flops"](widths)
        assert int(row["params"]) == study.problem.costs["params"](widths)
        done = i in (4, 0, 5, 2)
        assert row["score"] == (str(quality(widths)) if done else "")
        assert row["trial"] == (f"trial {i}" if done else "")


def test_a_study_on_the_same_log_goes_on(tmp_path: Path) -> None:
    first = Study(problem(), tmp_path / "log", searcher="evolution", initial=4)
    lost = first.propose()
    known = [first.propose() for _ in range(7)]
    for widths in known:
        assert widths is not None
        first.learn(widths, quality(widths))
    second = Study(problem(), tmp_path / "log", searcher="evolution", initial=4)
    assert second.scores == first.scores == dict(second.searcher.told)
    assert second.best() == first.best()
    again = [second.propose() for _ in range(8)]
    assert not set(again) & set(known) and again[0] == lost
    assert [row["score"] for row in rows_of(tmp_path / "results.csv")][:8] == [
        "",
        *(str(quality(w)) for w in known if w is not None),
    ]


def played(study: Study, n: int) -> list[Widths]:
    """One network after another."""
    found = []
    for i in range(n):
        widths = study.propose()
        assert widths is not None
        study.learn(widths, quality(widths), trial=f"t{i}")
        found.append(widths)
    return found


@functools.cache
def uninterrupted(searcher: str) -> tuple[list[Widths], Widths]:
    """Its proposals and its choice."""
    study = Study(problem(), None, searcher=searcher, **small_options(searcher))
    return played(study, 14), study.best()


@pytest.mark.parametrize(("kept", "stop"), [("log", 1), ("state", 7), ("log", 8), ("state", 11)])
@pytest.mark.parametrize("searcher", SEARCHERS)
def test_an_interrupted_study_goes_on_as_if_it_were_not(
    searcher: str, kept: str, stop: int, tmp_path: Path
) -> None:
    def begin(name: str) -> Study:
        log = tmp_path / name / "log" if kept == "log" else None
        return Study(problem(), log, searcher=searcher, **small_options(searcher))

    whole, best = uninterrupted(searcher)
    first = begin("killed")
    before = played(first, stop)
    interrupted = first.propose()
    state = json.loads(json.dumps(first.state_dict()))
    second = begin("killed")
    second.load_state_dict(state)
    assert second.scores == first.scores
    after = played(second, 14 - stop)
    assert before + after == whole and after[0] == interrupted
    assert second.best() == best
    if kept == "log":
        rows = rows_of(tmp_path / "killed" / "results.csv")
        trials = [f"t{i}" for i in (*range(stop), *range(14 - stop))]
        assert [row["trial"] for row in rows] == trials


def test_the_first_result_of_a_network_counts(tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", searcher="random")
    (widths,) = played(study, 1)
    study.learn(widths, 1.0, trial="again")
    assert study.scores == study.searcher.told == {widths: quality(widths)}
    (row,) = rows_of(tmp_path / "results.csv")
    assert float(row["score"]) == quality(widths) and row["trial"] == "t0"
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_log_of_another_seed_or_a_larger_budget_is_known(tmp_path: Path) -> None:
    first = Study(problem(0.9), tmp_path / "log", searcher="random")
    known = played(first, 6)
    second = Study(problem(0.4), tmp_path / "log", searcher="random", seed=1)
    assert list(second.scores) == known and not second.searcher.told
    assert all(second.bounds.fits(widths) for widths in played(second, 6))
    assert second.bounds.fits(second.best())


def test_a_table_of_another_search_is_told(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("trial,score,other\n,,3\n")
    with pytest.raises(ConfigError, match="is of another search"):
        Study(problem(), tmp_path / "log")


def test_starting_points_without_a_result_are_proposed_again_after_a_restart(tmp_path: Path) -> None:
    first = Study(problem(), tmp_path / "log", points=6, per_round=3)
    points = [first.propose() for _ in range(6)]
    assert points[1] is not None
    first.learn(points[1], 1.0)
    second = Study(problem(), tmp_path / "log", points=6, per_round=3)
    assert [second.propose() for _ in range(5)] == [p for p in points if p != points[1]]


def test_what_still_runs_when_a_study_is_resumed_is_not_proposed_again(tmp_path: Path) -> None:
    first = Study(problem(), tmp_path / "log", points=6, per_round=3)
    points = [first.propose() for _ in range(3)]
    assert points[1] is not None
    first.learn(points[1], 1.0)
    second = Study(problem(), tmp_path / "log", points=6, per_round=3, resumed=True)
    assert not {second.propose() for _ in range(5)} & set(points)
    assert [row["score"] for row in rows_of(tmp_path / "results.csv")].count("1.0") == 1


def test_a_small_space_runs_out(tmp_path: Path) -> None:
    space, flops, params = chain(1, 8, 4)
    tiny = Problem(space, {"flops": flops, "params": params}, {}, 1.0)
    study = Study(tiny, tmp_path / "log", searcher="random")
    found = list(itertools.takewhile(lambda w: w is not None, (study.propose() for _ in range(20))))
    assert len(found) == len(set(found)) == 1  # random shapes fill the budget: the full network
    assert study.propose() is None


def test_minimising_turns_the_order_around_and_leaves_the_log(tmp_path: Path) -> None:
    studies = [
        Study(problem(), tmp_path / mode / "log", searcher="random", optimize_mode=mode)
        for mode in ("maximize", "minimize")
    ]
    for study in studies:
        for _ in range(8):
            widths = study.propose()
            assert widths is not None
            study.learn(widths, quality(widths))
    best, worst = (quality(study.best()) for study in studies)
    assert best == max(studies[0].scores.values()) and worst == min(studies[1].scores.values())
    scores = [json.loads(line)["score"] for line in studies[1].log.read_text().splitlines()]
    assert scores == list(studies[1].scores.values())


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "93.1", True, [1.0]])
def test_a_result_that_is_no_number_is_refused_and_leaves_no_trace(score: Any, tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", searcher="random")
    widths = study.propose()
    assert widths is not None
    with pytest.raises(TrainingError, match="'default'"):
        study.learn(widths, score, "T")
    assert not study.log.exists() and not study.scores


def test_results_over_the_budget_are_kept_but_not_learnt(tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", searcher="random")
    largest = study.problem.space.largest()
    study.learn(largest, 99.0)
    widths = study.propose()
    assert widths is not None
    study.learn(widths, 1.0)
    assert study.best() == widths and study.scores[largest] == 99.0
    assert float(rows_of(tmp_path / "results.csv")[0]["used"]) > 1


def test_a_narrower_search_space_is_kept(tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", searcher="random")
    before = study.propose()
    assert before is not None
    study.learn(before, 1.0)
    offered = study.problem.space.to_nni()
    first = next(iter(offered))
    study.narrow({**offered, first: {"_type": "choice", "_value": [8, 12]}})
    for _ in range(8):
        widths = study.propose()
        assert widths is not None and widths[first] in (8, 12) and study.bounds.fits(widths)
    for width in (8, 12):
        study.narrow({**offered, first: {"_type": "choice", "_value": [width]}})
        widths = study.propose()
        assert widths is not None and widths[first] == width


def test_the_same_search_space_again_changes_nothing(tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", points=6, per_round=4)
    searcher, first = study.searcher, study.propose()
    study.narrow(study.problem.space.to_nni())
    assert study.searcher is searcher and study.propose() == searcher.points[1] != first  # type: ignore


def test_search_spaces_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    study = Study(problem(), tmp_path / "log", searcher="random")
    offered = study.problem.space.to_nni()
    first = next(iter(offered))
    with pytest.raises(ConfigError, match="'conv9' is in the search space only"):
        study.narrow({**offered, "conv9": offered[first]})
    with pytest.raises(ConfigError, match="is in the problem only"):
        study.narrow({first: offered[first]})
    with pytest.raises(ConfigError, match="expected a choice"):
        study.narrow({**offered, first: {"_type": "uniform", "_value": [0, 1]}})
    with pytest.raises(ConfigError, match="31 is not among"):
        study.narrow({**offered, first: {"_type": "choice", "_value": [31]}})
    widest = {name: {"_type": "choice", "_value": [32]} for name in offered}
    with pytest.raises(BudgetError, match="below the smallest network"):
        study.narrow(widest)


def test_a_log_of_another_problem_is_refused(tmp_path: Path) -> None:
    line = {"score": 1.0, "widths": {"layer1": 3}}
    (tmp_path / "log").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match="choose another log"):
        Study(problem(), tmp_path / "log")


def test_budgets_without_a_member_or_a_meaning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="below the smallest network"):
        Study(problem(), tmp_path / "log", budget=100)
    with pytest.raises(BudgetError, match="latency_ms"):
        Study(problem(), tmp_path / "log", budget={"latency_ms": 3})
    study = Study(problem(), tmp_path / "log", searcher="random", budget={"params": 0.3})
    widths = study.propose()
    assert isinstance(widths, Widths)
    assert study.problem.costs["params"](widths) <= 0.3 * study.problem.costs["params"].full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"searcher": "bds"}, r"no searcher 'bds' \(did you mean 'dbs'\?\)"),
        ({"point": 3}, r"no option 'point' \(did you mean 'points'\?\)"),
        ({"searcher": "random", "points": 3}, "'random' has no option 'points'"),
        ({"points": "many"}, "points: expected int, not 'many'"),
        ({"seed": 1.5}, "seed: expected int"),
        ({"latent": 1}, "latent: expected bool"),
        ({"per_round": 0}, "per_round must be at least 1"),
        ({"optimize_mode": "max"}, "maximize or minimize"),
        ({"searcher": "evolution", "mutation": 2}, "mutation"),
        ({"searcher": "evolution", "generations": 2}, "'evolution' has no option 'generations'"),
        ({"searcher": "evolution", "prior": [[0.5, 0.5]]}, "'evolution' has no option 'prior'"),
        ({"searcher": "guided_evolution", "generations": 0}, "generations at least 1"),
        ({"searcher": "guided_evolution", "latent": True}, "no option 'latent'"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Study(problem(), tmp_path / "log", **options)
