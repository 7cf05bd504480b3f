"""The pruners of DMCP, TAS and DSA: with all evaluators, their choice, files, resuming and refusals."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nni
import pytest
import pytorch_lightning
import torch
from nni.compression import LightningEvaluator, TorchEvaluator
from nni.compression.pruning import L1NormPruner
from test_pruner import assert_same, parameter_count, state_of
from test_train_supernet import KINDS, Classifier, Kind, installed, make_data
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from nni_dbs import DMCPPruner, DSAPruner, TASPruner, WidthSpace, load_pruned, training
from nni_dbs.algorithms.dmcp import DMCPSearch, paper_choices
from nni_dbs.algorithms.tas import TASSearch
from nni_dbs.algorithms.tas_supernet import TASSupernet
from nni_dbs.config import Recipe
from nni_dbs.cost import Bounds, count_flops
from nni_dbs.errors import BudgetError, ConfigError, DataError, EvaluatorError, TrainingError
from nni_dbs.plugin.architecture import ArchitecturePruner
from nni_dbs.plugin.evaluator import _accumulated
from nni_dbs.projection import leaves_room
from nni_dbs.space import Widths
from nni_dbs.training import sgd, training_loop, training_step

PRUNERS: dict[str, type[ArchitecturePruner]] = {"dmcp": DMCPPruner, "tas": TASPruner, "dsa": DSAPruner}
IMAGE = torch.zeros(1, 3, 8, 8)
CONVS = [{"op_types": ["Conv2d"]}]
STEPS = 12
ARCHITECTURE_STEPS = {"dmcp": 6, "tas": 12, "dsa": 5}  # of 12


@pytest.fixture(params=PRUNERS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.last = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.last(self.b(self.bn(self.a(x)).relu()))).relu()


class Net(nn.Module):
    """Groups `stem.0` and, in blocks that can be removed, `blocks.0.a`, `blocks.1.a`, `blocks.2.a`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data(samples: int = 40, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    return TensorDataset(images, images.mean((2, 3)).argmax(1))


def accuracy(model: nn.Module) -> float:
    images, labels = data(seed=1).tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def evaluator_of(
    model: nn.Module,
    score: Callable[[nn.Module], float] | None = accuracy,
    checkpoint: Path | None = None,
    step: Any = None,
    batch_size: int = 8,
) -> TorchEvaluator:
    """Five steps an epoch, by the shell's own loop."""
    recipe = Recipe(epochs=1, lr=0.05, batch_size=batch_size)
    loop = training_loop(data(), recipe, device=torch.device("cpu"), checkpoint=checkpoint, quiet=True)
    optimizer = sgd(model, recipe, nni.trace(torch.optim.SGD))
    return TorchEvaluator(
        loop, optimizer, step or training_step(0.0), dummy_input=IMAGE, evaluating_func=score
    )


def pruner_of(
    method: str, evaluator: Callable[[nn.Module], Any] = evaluator_of, **options: Any
) -> ArchitecturePruner:
    model = make_net()
    options = {"budget": 0.5, "divisor": 1, "quiet": True, "config_list": CONVS, **options}
    return PRUNERS[method](model, evaluator=evaluator(model), **options)


def quietly(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without TAS's warning of removed blocks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="these widths remove the residual blocks")
        return run(*args, **kwargs)


def assert_fills(widths: Mapping[str, int], space: WidthSpace, bounds: Bounds) -> None:
    removed = {g.block for g in space.groups if widths[g.name] == 0}
    there = space.without([block for block in removed if block is not None])
    assert widths in there and bounds.fits(widths)
    assert not leaves_room(Widths(widths), there, bounds)


# --- what comes out ----------------------------------------------------------------------------------


def test_the_script_of_any_nni_pruner(method: str, tmp_path: Path) -> None:
    pruner = pruner_of(method)
    model = pruner.bound_model
    compressed, masks = quietly(pruner.compress, max_steps=STEPS)
    small = pruner.export(tmp_path)
    assert compressed is model
    assert pruner.evaluator is not None and pruner.evaluator.model is None
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    assert count_flops(small, IMAGE) == pruner.result.flops <= 0.5 * pruner.result.full_flops
    assert parameter_count(small) == pruner.result.params < pruner.result.full_params
    assert int(masks["stem.1"]["weight"].sum()) == pruner.widths["stem.0"]

    result = pruner.result
    assert (result.method, result.evaluations) == (method, 0)
    assert result.counts == {"supernet steps": STEPS, "architecture steps": ARCHITECTURE_STEPS[method]}
    assert {"supernet", "search"} <= set(result.seconds)
    progress = [entry["progress"] for entry in result.architecture]
    assert len(progress) == ARCHITECTURE_STEPS[method] and progress == sorted(progress)
    assert 0 <= progress[0] < progress[-1] < 1
    assert all(entry.keys() == {"progress", "loss", "used"} for entry in result.architecture)

    images = data().tensors[0]
    loaded = load_pruned(tmp_path, Net().eval())
    assert torch.equal(loaded(images), small.eval()(images))
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["widths"] == dict(pruner.widths) and stored["architecture"] == result.architecture


def test_it_trains_the_weights(method: str) -> None:
    pruner = pruner_of(method)
    quietly(pruner.compress, max_steps=STEPS)
    pruner.unwrap_model()
    trained, untrained = state_of(pruner.bound_model), make_net()
    unused = {"stem.1.weight", "stem.1.bias"} if method == "tas" else set()  # copies of them are trained
    for name, p in untrained.named_parameters():
        assert trained[name].isfinite().all()
        assert name in unused or not torch.equal(trained[name], p), name


def test_the_same_seed_gives_the_same_result(method: str) -> None:
    def found(seed: int) -> tuple[Any, ...]:
        pruner = pruner_of(method, seed=seed, **({"lr": 1.0} if method == "dsa" else {}))
        torch.manual_seed(100 + seed)
        quietly(pruner.compress, max_steps=STEPS)
        return pruner.widths, pruner.result.architecture, state_of(pruner.export())

    first, again, other = found(1), found(1), found(2)
    assert first[:2] == again[:2]
    assert_same(first[2], again[2])
    assert first[1] != other[1]


def test_it_compresses_again_from_the_start_of_a_search(method: str) -> None:
    pruner = pruner_of(method)
    quietly(pruner.compress, max_steps=STEPS)
    first = pruner.search
    pruner.unwrap_model()
    quietly(pruner.compress, max_steps=STEPS)
    assert pruner.search is not first
    assert pruner.result.counts["supernet steps"] == STEPS == len(first.log) * STEPS // len(pruner.search.log)
    assert_fills(pruner.widths, pruner.space, pruner.bounds)


@pytest.mark.parametrize(
    ("duration", "options", "steps"),
    [
        ({"max_steps": 7}, {}, 7),
        ({"max_epochs": 2}, {"steps_per_epoch": 5}, 10),
        ({"max_epochs": 2, "max_steps": 7}, {"steps_per_epoch": 5}, 7),
    ],
)
def test_schedules_run_over_the_whole_training(
    duration: dict[str, int], options: dict[str, int], steps: int, method: str
) -> None:
    pruner = pruner_of(method, **options)
    quietly(pruner.compress, **duration)
    assert pruner.result.counts["supernet steps"] == steps
    last = steps - 2 if method == "dsa" and steps % 2 == 0 else steps - 1
    assert pruner.search.log[-1]["progress"] == last / steps


def test_batches_of_the_architecture_are_the_second_loader() -> None:
    seen: list[tuple[int, bool]] = []

    def step(batch: Any, model: nn.Module) -> Tensor:
        seen.append((len(batch[0]), bool((batch[0] == 7).all())))
        return training_step(0.0)(batch, model)

    for method in PRUNERS:
        seen.clear()
        second = DataLoader(TensorDataset(torch.full((6, 3, 8, 8), 7.0), torch.arange(6) % 3), batch_size=3)
        pruner = pruner_of(method, lambda model: evaluator_of(model, step=step), second=second)
        quietly(pruner.compress, max_steps=4)
        own = [size for size, sevens in seen if sevens]
        assert own == [3] * len(pruner.search.log)
        assert {size for size, sevens in seen if not sevens} == {8}


def test_the_norms_of_tas_are_trained_by_the_evaluators_optimizer() -> None:
    groups: list[tuple[float, set[int]]] = []

    def watched(model: nn.Module) -> TorchEvaluator:
        evaluator = evaluator_of(model)
        loop = evaluator.training_func

        def training_func(model: nn.Module, optimizers: Any, *args: Any, **kwargs: Any) -> None:
            groups.extend((g["weight_decay"], {id(p) for p in g["params"]}) for g in optimizers.param_groups)
            loop(model, optimizers, *args, **kwargs)

        evaluator.training_func = training_func
        return evaluator

    pruner = pruner_of("tas", watched)
    quietly(pruner.compress, max_steps=2)
    assert isinstance(pruner.search, TASSearch)
    added = {id(p) for p in pruner.search.supernet.norms.parameters()}
    assert len(added) == 2 * (8 + 3 * (8 + 8))  # scale and shift of each candidate; the stem's at four norms
    assert [ids & added for decay, ids in groups if decay == 0] == [added]
    assert not any(ids & added for decay, ids in groups if decay > 0)


def test_the_norms_of_tas_follow_the_model_to_another_device() -> None:
    """Lightning moves a model as it starts and ends; here to the device `meta`, which has no values."""
    pruner, model = pruner_of("tas"), make_net().train()
    candidates = {name: pruner.space.options(name, 8) for name in pruner.space.names}
    mixed = TASSupernet(model, pruner.space.groups, candidates, IMAGE)
    search = TASSearch(mixed, pruner.space, pruner.bounds, steps=STEPS)
    model.to("meta")
    with search.weights_pass(0.0):
        assert model(data().tensors[0].to("meta")).device.type == "meta"
    assert {p.device.type for p in search.parameters.values()} == {"meta"}


# --- choices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dmcp", "tas"])
def test_of_several_candidates_the_best_is_chosen(method: str, tmp_path: Path) -> None:
    scores: list[tuple[int, float]] = []

    def most_parameters(model: nn.Module) -> float:
        scores.append((parameter_count(model), float(model.stem[0].out_channels)))
        return scores[-1][1]

    log = tmp_path / "search.jsonl"
    pruner = pruner_of(method, lambda m: evaluator_of(m, most_parameters), candidates=5, log=log)
    quietly(pruner.compress, max_steps=STEPS)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert 2 <= len(lines) == len(scores) == pruner.result.evaluations <= 5
    assert [line["score"] for line in lines] == [score for _, score in scores]
    assert len({Widths(line["widths"]) for line in lines}) == len(lines)
    assert all(line["stage"] == "sampled" and line["used"] <= 1 for line in lines)
    best = max(lines, key=lambda line: line["score"])
    assert dict(pruner.widths) == best["widths"]
    quietly(pruner.export, tmp_path / "out")


def test_scores_of_an_interrupted_run_are_taken_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "search.jsonl"
    first = pruner_of("dmcp", candidates=3, log=log)
    first.compress(max_steps=STEPS)
    lines = log.read_text().splitlines()
    log.write_text(lines[0] + "\n")
    scored: list[nn.Module] = []

    def score(model: nn.Module) -> float:
        scored.append(model)
        return accuracy(model)

    again = pruner_of("dmcp", lambda m: evaluator_of(m, score), candidates=3, log=log, resume=True)
    again.compress(max_steps=STEPS)
    assert again.widths == first.widths
    assert len(scored) == len(lines) - 1
    assert log.read_text().splitlines() == lines


def test_selected_layers_and_their_bounds_are_kept(method: str) -> None:
    config_list = [
        {"op_names": ["stem.0", "blocks.0.b", "blocks.1.b", "blocks.2.b"], "min_sparse_ratio": 0.5},
        {"op_names": ["blocks.1.a"], "max_sparse_ratio": 0.5},
    ]
    pruner = pruner_of(method, config_list=config_list, budget=0.6)
    quietly(pruner.compress, max_steps=STEPS)
    assert pruner.widths["stem.0"] <= 6
    assert 4 <= pruner.widths["blocks.1.a"] <= 8
    assert pruner.widths["blocks.0.a"] == pruner.widths["blocks.2.a"] == 8
    assert_fills(pruner.widths, pruner.space, pruner.bounds)


@pytest.mark.parametrize("given", ["function", "mapping"])
def test_a_papers_own_widths_take_the_place_of_the_grid(given: str) -> None:
    of_papers: Any = paper_choices
    if given == "mapping":
        of_papers = {"stem.0": (4, 8, 12), "blocks.0.a": (2, 8)}
    pruner = pruner_of("dmcp", choices=of_papers, divisor=4)
    expected = {g.name: paper_choices(g) for g in pruner.space.groups if g.frozen is None}
    if given == "mapping":
        expected = {"stem.0": (4, 8, 12), "blocks.0.a": (2, 8), "blocks.1.a": (4, 8), "blocks.2.a": (4, 8)}
    assert {name: pruner.space.choices(name) for name in expected} == expected
    with pytest.raises(ConfigError, match=r"choices: .*'blocks\.9\.a'"):
        pruner_of("dmcp", choices={"blocks.9.a": (2,)})


def test_several_limits_hold_at_once(method: str) -> None:
    pruner = pruner_of(method, budget={"flops": 0.6, "params": 0.4})
    quietly(pruner.compress, max_steps=STEPS)
    assert pruner.result.flops <= 0.6 * pruner.result.full_flops
    assert pruner.result.params <= 0.4 * pruner.result.full_params
    assert_fills(pruner.widths, pruner.space, pruner.bounds)


def test_dsa_keeps_the_channels_with_the_largest_scales_at_the_end() -> None:
    pruner = pruner_of("dsa")
    pruner.compress(max_steps=STEPS)
    pruner.unwrap_model()
    scales = pruner.bound_model.blocks[0].bn.weight.abs()
    kept = scales.argsort(descending=True)[: pruner.widths["blocks.0.a"]].sort().values
    small = pruner.export()
    assert torch.equal(small.blocks[0].bn.weight, pruner.bound_model.blocks[0].bn.weight[kept])


# --- removed blocks ----------------------------------------------------------------------------------


class Shallow(TASPruner):
    """TAS whose logits favour the smallest depth at the end."""

    def _search(self, model: nn.Module, steps: int) -> TASSearch:
        search = super()._search(model, steps)
        networks = search.networks

        def decided(n: int) -> list[Widths]:
            with torch.no_grad():
                search.depths.beta[:, 0] += 100
            return networks(n)

        search.networks = decided  # type: ignore[method-assign]
        return search


@pytest.mark.parametrize("candidates", [1, 3])
def test_removed_blocks_from_the_warning_to_the_reloaded_network(candidates: int, tmp_path: Path) -> None:
    model = make_net()
    pruner = Shallow(
        model, CONVS, evaluator_of(model), budget=0.25, divisor=1, quiet=True, candidates=candidates
    )
    with pytest.warns(UserWarning, match=r"remove the residual blocks blocks\.\d.*evaluate the model that"):
        pruner.compress(max_steps=STEPS)
    removed = [name for name, width in pruner.widths.items() if width == 0]
    assert removed == ["blocks.1.a", "blocks.2.a"]
    small = pruner.export(tmp_path)
    assert count_flops(small, IMAGE) == pruner.result.flops <= 0.25 * pruner.result.full_flops
    assert parameter_count(small) == pruner.result.params
    assert not any(name.startswith(("blocks.1.", "blocks.2.")) for name, _ in small.named_parameters())
    assert_fills(pruner.widths, pruner.space, pruner.bounds)

    images = data().tensors[0]
    loaded = load_pruned(tmp_path, Net().eval())
    assert torch.equal(loaded(images), small.eval()(images))
    optimizer = torch.optim.SGD(small.parameters(), 0.05)
    before = functional.cross_entropy(small.train()(images), data().tensors[1])
    before.backward()
    optimizer.step()
    assert functional.cross_entropy(small(images), data().tensors[1]) < before


def test_a_budget_that_only_removed_blocks_keep() -> None:
    pruner = pruner_of("tas", budget=0.5, min_ratio=0.9)
    assert not pruner.bounds.fits(pruner.space.smallest())
    with pytest.warns(UserWarning, match="remove the residual blocks"):
        pruner.compress(max_steps=STEPS)
    assert 0 in pruner.widths.values()
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    with pytest.raises(BudgetError, match="below the smallest network"):
        pruner_of("tas", budget=0.5, min_ratio=0.9, depth=False)


def test_blocks_with_a_largest_sparse_ratio_are_kept() -> None:
    config_list = [{"op_names": ["blocks.2.a"], "max_sparse_ratio": 0.75}, {"op_types": ["Conv2d"]}]
    model = make_net()
    pruner = Shallow(model, config_list, evaluator_of(model), budget=0.4, divisor=1, quiet=True)
    assert {g.name: g.block for g in pruner.space.groups}["blocks.2.a"] is None
    quietly(pruner.compress, max_steps=STEPS)
    assert pruner.widths["blocks.2.a"] >= 2
    assert pruner.widths["blocks.1.a"] == 0


@pytest.mark.parametrize("held", [{"exclude_op_names": ["blocks.2.b"]}, {"max_sparse_ratio": 0.5}])
def test_a_block_stays_where_a_layer_of_it_is_held(held: dict[str, Any]) -> None:
    """Also one that writes the residual stream, not only those of the groups inside."""
    config_list = [{"op_types": ["Conv2d"], "exclude_op_names": ["blocks.2.b"]}]
    if "max_sparse_ratio" in held:
        config_list = [{"op_types": ["Conv2d"], "exclude_op_names": ["blocks.2.b"]}]
        config_list += [{"op_names": ["blocks.2.b"], **held}]
    pruner = pruner_of("tas", config_list=config_list)
    blocks = {g.name: g.block for g in pruner.space.groups if g.frozen is None}
    assert blocks["blocks.2.a"] is None and blocks["blocks.1.a"] == "blocks.1"


def test_budgets_that_need_a_smaller_depth_are_reachable() -> None:
    options = {"budget": 0.12, "min_ratio": 0.5, "divisor": 2}
    with pytest.raises(BudgetError, match="below the smallest network"):
        pruner_of("dsa", **options)
    pruner = pruner_of("tas", **options)
    quietly(pruner.compress, max_steps=STEPS)
    assert_fills(pruner.widths, pruner.space, pruner.bounds)
    assert 0 in pruner.widths.values()


def test_a_network_made_smaller_for_its_latency_keeps_its_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its BatchNorms are those of the widths that are kept."""

    def clock(models: list[nn.Module], *args: Any, **kwargs: Any) -> list[float]:
        return [1 + sum(p.numel() for p in model.parameters()) / 1000 for model in models]

    monkeypatch.setattr("nni_dbs.latency.medians_ms", clock)
    pruner = pruner_of("tas", budget={"latency_ms": 0.7})
    assert pruner.latency is not None
    settled = []
    monkeypatch.setattr(
        TASSearch, "settle", lambda self, widths: settled.append(widths) or self.supernet.order
    )
    chosen = pruner.space.without(["blocks.1"]).largest()
    monkeypatch.setattr(TASSearch, "networks", lambda self, n: [chosen])
    measure = pruner.latency.measure
    pruner.latency.measure = lambda widths: measure(widths) * (9 if widths == chosen else 1)  # type: ignore[method-assign]
    quietly(pruner.compress, max_steps=STEPS)
    assert pruner.widths != chosen
    assert [name for name, width in pruner.widths.items() if width == 0] == ["blocks.1.a"]
    assert settled == [chosen, pruner.widths]


def test_depth_may_stay_as_it_is() -> None:
    pruner = pruner_of("tas", depth=False, budget=0.25)
    assert all(g.block is None for g in pruner.space.groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruner.compress(max_steps=STEPS)
    assert min(pruner.widths.values()) > 0
    assert isinstance(pruner.search, TASSearch) and not pruner.search.depths.stages


# --- evaluators --------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return installed(request.param)


def example_of(model: nn.Module) -> Any:
    image = make_data().tensors[0][:1]
    return {"pixel_values": image} if isinstance(model, Classifier) else image


@pytest.mark.parametrize("second", [False, True])
def test_every_evaluator_trains_the_same(kind: Kind, method: str, second: bool, tmp_path: Path) -> None:
    """As `TorchEvaluator` does on the same batches."""

    def found(kind: Kind, path: Path) -> tuple[Any, ...]:
        model = kind.make_model()
        evaluator = kind.make_evaluator(model, path)
        images, labels = make_data().tensors
        own: list[Any] = [[images[:5], labels[:5]], [images[5:], labels[5:]]]
        if isinstance(model, Classifier):
            own = [{"pixel_values": x, "labels": y} for x, y in own]
        pruner = PRUNERS[method](
            model,
            CONVS,
            evaluator,
            budget=0.5,
            divisor=1,
            quiet=True,
            example_inputs=example_of(model),
            second=own if second else None,
        )
        pruner.compress(max_steps=6)
        assert evaluator.model is None
        assert pruner.result.counts["supernet steps"] == 6
        assert_fills(pruner.widths, pruner.space, pruner.bounds)
        pruner.unwrap_model()
        state = {name.removeprefix("net."): t for name, t in model.state_dict().items()}
        return [*pruner.widths.values()], pruner.search.log, state

    widths, log, state = found(kind, tmp_path)
    expected = found(KINDS["torch"], tmp_path)
    assert widths == expected[0]
    assert len(log) == len(expected[1])
    for mine, theirs in zip(log, expected[1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)
    assert state.keys() == expected[2].keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[2][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "argument"),
    [("lightning", "accumulate_grad_batches"), ("transformers", "gradient_accumulation_steps")],
)
def test_schedules_follow_accumulated_gradients(name: str, argument: str, tmp_path: Path) -> None:
    for module in ("pytorch_lightning",) if name == "lightning" else ("accelerate", "transformers"):
        pytest.importorskip(module)
    model = KINDS[name].make_model()
    evaluator = KINDS[name].make_evaluator(model, tmp_path, **{argument: 3})
    options = {"budget": 0.5, "divisor": 1, "quiet": True, "example_inputs": example_of(model)}
    pruner = DMCPPruner(model, CONVS, evaluator, **options)
    pruner.compress(max_steps=4)
    assert pruner.result.counts == {"supernet steps": 12, "architecture steps": 6}
    assert pruner.search.log[-1]["progress"] == 11 / 12


def test_nothing_is_left_in_the_evaluator(kind: Kind, tmp_path: Path) -> None:
    model = kind.make_model()
    evaluator = kind.make_evaluator(model, tmp_path)
    pruner = TASPruner(
        model, CONVS, evaluator, budget=0.5, divisor=1, quiet=True, example_inputs=example_of(model)
    )
    pruner.compress(max_steps=3)
    pruner.unwrap_model()
    trained = {id(p) for p in model.parameters()}
    evaluator.bind_model(model)
    evaluator.train(max_steps=2)  # of the plain model again
    owner, name = kind.place(evaluator, model)
    assert "BilevelStep" not in type(getattr(owner, name)).__name__
    optimizers = getattr(evaluator, "_optimizers", None)
    if optimizers is not None:
        assert {id(p) for g in optimizers[0].param_groups for p in g["params"]} == trained
    evaluator.unbind_model()


# --- refusals ----------------------------------------------------------------------------------------


def test_accumulated_gradients_stretch_the_schedules() -> None:
    class Evaluator(LightningEvaluator):
        def __init__(self, **kwargs: Any) -> None:
            self.trainer = nni.trace(pytorch_lightning.Trainer)(
                logger=False, enable_checkpointing=False, enable_progress_bar=False, **kwargs
            )

    assert _accumulated(Evaluator()) == 1
    assert _accumulated(Evaluator(accumulate_grad_batches=4)) == 4


@pytest.mark.parametrize("second", [3, data()], ids=["number", "data set"])
def test_a_second_loader_gives_batches(second: Any) -> None:
    with pytest.raises(ConfigError, match="second must give batches, as a DataLoader does"):
        pruner_of("tas", second=second)


def test_dsa_decides_on_one_network() -> None:
    with pytest.raises(ConfigError, match="DSA decides on one network"):
        pruner_of("dsa", candidates=3)


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ({}, r"give compress\(\) max_steps or max_epochs"),
        ({"max_epochs": 2}, "give compress.. max_steps, or the pruner steps_per_epoch"),
        ({"max_steps": 0}, "give it more than 0 steps"),
        ({"max_steps": 1}, "give it more than 1 steps"),
    ],
)
def test_durations_that_cannot_be(duration: dict[str, int], message: str, method: str) -> None:
    pruner = pruner_of(method)
    with pytest.raises(ConfigError, match=message):
        pruner.compress(**duration)
    pruner.unwrap_model()
    assert_same(state_of(pruner.bound_model), state_of(make_net()))
    with pytest.raises(ConfigError, match=r"call compress\(\) first"):
        pruner.export()


def test_a_training_that_ends_too_early_is_told() -> None:
    pruner = pruner_of("dmcp", steps_per_epoch=100)
    with pytest.raises(ConfigError, match="ended after 5 of 100 steps, before the architecture was trained"):
        pruner.compress(max_epochs=1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (None, {"candidates": 0}, "candidates must be at least 1, not 0"),
        (None, {"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, not 0"),
        (None, {"lr": 0.0}, "lr must be positive, not 0.0"),
        (None, {"lr": float("nan")}, "lr must be positive, not nan"),
        (None, {"calibration_steps": -1}, "calibration_steps must not be negative"),
        ("dmcp", {"limit": 1}, "limit must be at least 2 widths, not 1"),
        ("tas", {"limit": 1}, "limit must be at least 2 widths, not 1"),
        ("dsa", {"warmup": 1.0}, r"warmup must lie in \[0, 1\), not 1.0"),
        ("dsa", {"warmup": -0.1}, r"warmup must lie in \[0, 1\), not -0.1"),
        ("dsa", {"every": 0}, "every must be at least 1, not 0"),
        ("dsa", {"candidates": 2}, "candidates: DSA decides on one network, not 2"),
        (None, {"second": data()}, "second must give batches.*wrap a data set in a DataLoader"),
    ],
)
def test_options_that_make_no_sense(method: str | None, options: dict[str, Any], message: str) -> None:
    for name in [method] if method is not None else PRUNERS:
        with pytest.raises(ConfigError, match=message):
            pruner_of(name, **options)


def test_unknown_options_are_refused(method: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'points'"):
        pruner_of(method, points=3)


def test_an_evaluator_is_needed(method: str) -> None:
    model, options = make_net(), {"budget": 0.5, "divisor": 1, "example_inputs": IMAGE}
    pruner = PRUNERS[method](model, CONVS, None, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{PRUNERS[method].__name__} needs an evaluator to train"):
        pruner.compress(max_steps=STEPS)


def test_several_candidates_need_a_score() -> None:
    pruner = pruner_of("dmcp", lambda model: evaluator_of(model, None), candidates=3)
    with pytest.raises(EvaluatorError, match="evaluating_func"):
        pruner.compress(max_steps=STEPS)


def test_a_budget_that_no_network_keeps_is_refused_at_once(method: str) -> None:
    with pytest.raises(BudgetError, match="below the smallest network"):
        pruner_of(method, budget=100, min_ratio=0.5)


def test_batches_too_small_for_two_halves_leave_the_model_usable() -> None:
    pruner = pruner_of("tas", lambda model: evaluator_of(model, batch_size=3))
    with pytest.raises(DataError, match="a batch of 3 samples cannot be halved"):
        pruner.compress(max_steps=STEPS)
    assert pruner.evaluator is not None and pruner.evaluator.model is None
    assert not any(
        "forward" in vars(m) for m in pruner.bound_model.modules() if not hasattr(m, "_nni_wrapper")
    )


def test_a_loss_that_is_not_finite_ends_the_search(method: str) -> None:
    def step(batch: Any, model: nn.Module) -> Tensor:
        return model(batch[0]).sum() * float("nan")

    pruner = pruner_of(method, lambda model: evaluator_of(model, step=step))
    by_whom = "the loss of 'train'" if method == "dmcp" else "a step on the architecture"  # DMCP's come later
    with pytest.raises(TrainingError, match=f"{by_whom} became nan.*lower"):
        pruner.compress(max_steps=STEPS)


def test_it_joins_no_other_compressor_before_it_is_done(method: str) -> None:
    model = make_net()
    evaluator = evaluator_of(model)
    first = PRUNERS[method](model, CONVS, evaluator, budget=0.5, divisor=1, quiet=True)
    second = L1NormPruner.from_compressor(
        first, [{"op_names": ["blocks.0.a"], "sparse_ratio": 0.5}], evaluator=evaluator
    )
    with pytest.raises(ConfigError, match=r"call its compress\(\) before another compressor joins it"):
        second.compress(max_steps=5, max_epochs=None)


def test_another_compressor_joins_it_afterwards() -> None:
    model = make_net()
    evaluator = evaluator_of(model)
    first = DMCPPruner(model, CONVS, evaluator, budget=0.5, divisor=1, quiet=True)
    first.compress(max_steps=STEPS)
    second = L1NormPruner.from_compressor(
        first, [{"op_names": ["blocks.0.a"], "sparse_ratio": 0.75}], evaluator=evaluator
    )
    _, masks = second.compress(max_steps=5, max_epochs=None)
    assert masks["stem.1"]["weight"].sum() == first.widths["stem.0"]
    assert isinstance(first.search, DMCPSearch)


# --- resuming ----------------------------------------------------------------------------------------


def test_an_interrupted_training_resumes_to_the_same_network(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "supernet.safetensors"

    def found(checkpoint: Path | None) -> tuple[Any, ...]:
        second = DataLoader(data(12, 3), batch_size=5, drop_last=True)
        pruner = pruner_of(
            method,
            lambda model: evaluator_of(model, checkpoint=checkpoint),
            second=second,
            steps_per_epoch=5,
            **({"lr": 1.0} if method == "dsa" else {}),
        )
        quietly(pruner.compress, max_epochs=4)
        return pruner.widths, pruner.result.architecture, pruner.result.counts, state_of(pruner.export())

    check, left = training._check_loss, 4

    def interrupt(*args: Any) -> None:  # called once in each epoch
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        check(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_check_loss", interrupt)
        found(path)
    assert path.exists()
    resumed, whole = found(path), found(None)
    assert resumed[:3] == whole[:3]
    assert_same(resumed[3], whole[3])
