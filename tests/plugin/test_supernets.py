"""PSE-Net as a pruner: its prior from the training, evolution, the log, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pruner import CONVS, IMAGE, Net, assert_same, make_data, make_evaluator, make_net, state_of
from test_searching import Count, assert_fills, first_logit, lines_of

from nni_dbs import PSENetPruner, load_pruned
from nni_dbs.cost import count_flops
from nni_dbs.errors import ConfigError, DataError
from nni_dbs.pool import chances_of, tilted
from nni_dbs.search import EvolutionSearch
from nni_dbs.space import Widths

TINY = {
    "budget": 0.5,
    "divisor": 1,
    "initial": 4,
    "evaluations": 8,
    "per_round": 2,
    "calibration_steps": 1,
    "quiet": True,
}


def pse_net(score: Any = first_logit, batch_size: int = 8, **options: Any) -> PSENetPruner:
    model = make_net()
    evaluator = make_evaluator(model, score, IMAGE, batch_size)
    return PSENetPruner(model, CONVS, evaluator, **{**TINY, **options})


def test_the_script_of_any_nni_pruner(tmp_path: Path) -> None:
    score = Count()
    log = tmp_path / "search.jsonl"
    pruner = pse_net(score, log=log)
    model = pruner.bound_model
    compressed, masks = pruner.compress(max_steps=4)
    small = pruner.export(tmp_path / "out")

    assert compressed is model and pruner.evaluator.model is None
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    assert count_flops(small, IMAGE) == pruner.result.flops <= 0.5 * pruner.result.full_flops
    assert int(masks["block.0"]["bias"].sum()) == pruner.widths["block.0"]

    result, lines = pruner.result, lines_of(log)
    assert result.method == "pse_net"
    assert result.evaluations == len(score.models) == len(lines) == 8
    assert result.counts == {"supernet steps": 4, "evaluations": 8}
    assert len({Widths(line["widths"]) for line in lines}) == 8
    assert all(line["used"] <= 1 for line in lines)

    assert pruner.records.counts.sum() == 2 * 4 * len(pruner.space.names)  # two drawn networks a step
    expected = tilted(pruner.space, pruner.bounds, errors=pruner.records.errors)
    assert pruner.prior is not None
    torch.testing.assert_close(chances_of(pruner.space, pruner.prior), expected, rtol=1e-14, atol=1e-300)
    blind = tilted(pruner.space, pruner.bounds)
    assert (expected - blind).abs().max() > 0.01
    evolution = EvolutionSearch(pruner.space, pruner.bounds, 0, initial=4, prior=expected)
    assert [Widths(line["widths"]) for line in lines[:2]] == evolution.ask(2)
    assert set(result.prior) == set(pruner.space.names)

    images = make_data().tensors[0]
    loaded = load_pruned(tmp_path / "out", Net().eval())
    assert torch.equal(loaded(images), small.eval()(images))
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stored["prior"] == result.prior


def test_without_a_training_the_budget_alone_is_the_prior() -> None:
    pruner = pse_net()
    pruner.compress(max_steps=0)
    assert pruner.prior is not None and pruner.records.counts.sum() == 0
    found = chances_of(pruner.space, pruner.prior)
    torch.testing.assert_close(found, tilted(pruner.space, pruner.bounds), rtol=1e-14, atol=1e-300)
    pruner.unwrap_model()
    assert_same(state_of(pruner.bound_model), state_of(make_net()))


def test_the_same_seed_gives_the_same_result() -> None:
    def found(seed: int) -> tuple[Any, ...]:
        pruner = pse_net(seed=seed)
        pruner.compress(max_steps=3)
        return pruner.widths, pruner.result.prior, state_of(pruner.export())

    first, second, other = found(1), found(1), found(2)
    assert first[:2] == second[:2]
    assert_same(first[2], second[2])
    assert first[1] != other[1]


def test_it_compresses_again_from_the_start() -> None:
    pruner = pse_net()
    pruner.compress(max_steps=2)
    counts = pruner.records.counts.clone()
    pruner.compress(max_steps=2)
    assert torch.equal(pruner.records.counts.sum(), counts.sum())


def test_an_interrupted_search_resumes_to_the_same_network(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    log = tmp_path / "search.jsonl"
    whole = pse_net(log=tmp_path / "whole.jsonl")
    whole.compress(max_steps=3)

    score = Count()

    def fails(model: Any) -> float:
        if len(score.models) == 5:
            raise Interrupted
        return score(model)

    with pytest.raises(Interrupted):
        pse_net(fails, log=log).compress(max_steps=3)
    assert len(lines_of(log)) == 5
    rest = Count()
    resumed = pse_net(rest, log=log, resume=True)
    resumed.compress(max_steps=3)
    assert len(rest.models) == 3
    assert resumed.widths == whole.widths and resumed.result.prior == whole.result.prior
    assert log.read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0}, "at least 1"),
        ({"initial": 9}, r"evaluations \(8\) count the initial networks \(9\)"),
        ({"parents": 0}, "parents must be at least 1"),
        ({"mutation": 1.5}, r"mutation must lie in \[0, 1\]"),
        ({"per_step": 0}, "per_step must be at least 1"),
        ({"rule": "spfs"}, "rule: PSE-Net trains parallel networks"),
        ({"predictor": True}, "predictor: PSE-Net trains parallel networks"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pse_net(**options)


def test_batches_that_cannot_be_split_are_told() -> None:
    with pytest.raises(DataError, match="a multiple as batch size"):
        pse_net(batch_size=2).compress(max_steps=1)
