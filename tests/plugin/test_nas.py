"""NAS: the model space, strategies that submit trials, strategies that train weights and widths together."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from nni.mutable import SampleValidationError
from nni.nas.evaluator import FunctionalEvaluator
from nni.nas.evaluator.pytorch import ClassificationModule, DataLoader, Lightning, Trainer
from nni.nas.execution import ExecutionEngine, SequentialExecutionEngine
from nni.nas.execution.event import FinalMetricEvent, TrainingEndEvent
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.space import ModelStatus, RawFormatModelSpace, SimplifiedModelSpace, model_context
from nni.nas.strategy import TPE, Random, RegularizedEvolution, Strategy
from nni.nas.strategy.middleware import Chain, Filter
from pytorch_lightning import Callback, LightningDataModule
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nni_dbs
from nni_dbs import DBSStrategy, DMCPStrategy, DSAStrategy, EvolutionStrategy, TASStrategy, Widths
from nni_dbs import WidthModelSpace as Space
from nni_dbs.errors import BudgetError, ConfigError, ModelError, ResultError, TrainingError
from nni_dbs.models import build_model
from nni_dbs.plugin.experiment import loopback
from nni_dbs.plugin.nas import sample_of
from nni_dbs.plugin.strategy import ArchitectureStrategy, SearchStrategy
from nni_dbs.result import load_search
from torch_pruning_adapters import shrink

MODEL = {
    "model": "examples.cifar_resnet:resnet20",
    "input": (3, 8, 8),
    "budget": 0.5,
    "arguments": {"widths": [4, 8, 16]},
    "divisor": 2,
}
SEARCHES: list[Callable[..., SearchStrategy]] = [
    lambda **options: DBSStrategy(points=3, per_round=2, **options),
    lambda **options: EvolutionStrategy(initial=3, per_round=2, **options),
]
METHODS: list[type[ArchitectureStrategy]] = [DMCPStrategy, TASStrategy, DSAStrategy]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def space(**changes: Any) -> Space:
    return Space(**{**MODEL, **changes})


def some(widths: Space, seed: int = 0) -> Widths:
    return widths.widths.sample(torch.Generator().manual_seed(seed))


def outputs(model: nn.Module) -> Tensor:
    return model.eval()(X)


def quality(widths: Mapping[str, int]) -> float:
    return sum((i + 1) * w + w**0.5 / 1000 for i, w in enumerate(widths.values()))


class TestSpace:
    def test_a_frozen_space_is_the_users_own_model_cut_to_the_sample(self) -> None:
        widths = space()
        network = some(widths)
        small = widths.freeze(sample_of(widths.widths, network))
        assert type(small) is type(widths.model)
        expected = shrink(widths.model, widths.widths.groups, network, widths.order)
        assert torch.equal(outputs(small), outputs(expected))

    def test_its_choices_are_those_of_the_width_space(self) -> None:
        widths = space()
        choices = {name: list(choice.values) for name, choice in widths.simplify().items()}
        assert choices == {name: entry["_value"] for name, entry in widths.widths.to_nni().items()}
        assert torch.equal(outputs(widths), outputs(widths.model))

    def test_a_trial_builds_the_same_network_from_what_nni_sends_it(self, tmp_path: Path) -> None:
        trained = build_model(MODEL["model"], MODEL["arguments"])
        save_model(trained, str(tmp_path / "weights.safetensors"))
        widths = space(weights=str(tmp_path / "weights.safetensors"))
        assert torch.equal(outputs(widths.model), outputs(trained))
        network = some(widths)
        frozen = SimplifiedModelSpace.from_model(widths).freeze(sample_of(widths.widths, network))
        received = nni.load(nni.dump(frozen))
        assert torch.equal(
            outputs(received.executable_model()), outputs(shrink(trained, widths.widths.groups, network))
        )

    def test_a_callable_builds_the_model_too(self) -> None:
        from examples.cifar_resnet import resnet20

        widths = space(model=resnet20)
        sample = sample_of(widths.widths, some(widths))
        with model_context(sample):
            small = space(model=resnet20)
        assert type(small) is type(widths.model)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"budget": 0.0001}, BudgetError, "below the smallest network"),
            ({"budget": {"latency_ms": 3}}, BudgetError, "latency_ms"),
            ({"model": "resnet19"}, ModelError, "did you mean"),
            ({"weights": "nowhere.safetensors"}, ResultError, "nowhere.safetensors is missing"),
        ],
    )
    def test_arguments_without_a_meaning_are_refused(
        self, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            space(**changes)

    def test_weights_of_another_model_are_refused(self, tmp_path: Path) -> None:
        save_model(nn.Linear(3, 4), str(tmp_path / "w.safetensors"))
        with pytest.raises(ResultError, match="does not fit this model"):
            space(weights=str(tmp_path / "w.safetensors"))

    def test_samples_of_another_model_are_refused(self) -> None:
        widths = space()
        sample = sample_of(widths.widths, some(widths))
        assert widths.contains(sample)
        name = next(iter(sample))
        for wrong in ({**sample, name: 3}, {k: v for k, v in sample.items() if k != name}):
            assert not widths.contains(wrong)
            with pytest.raises(SampleValidationError):
                widths.freeze(wrong)

    def test_what_is_missing_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
        for name in [name for name in sys.modules if name.startswith("nni.nas")]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("nas", "strategy"):
            monkeypatch.delitem(sys.modules, f"nni_dbs.plugin.{name}")
        with pytest.raises(ImportError, match=r"DBSStrategy, need Lightning: pip install 'nni-dbs\[nas\]'"):
            _ = nni_dbs.DBSStrategy


Scored = list[tuple[Widths, float]]


@pytest.fixture
def scored(free_port: int) -> Scored:
    """What trials were asked for, in this process."""
    return []


def evaluator(widths: Space, scored: Scored, score: Callable[[Widths], Any] = quality) -> FunctionalEvaluator:
    def evaluate(model: nn.Module) -> None:
        network = widths.widths.from_nni(nni.get_current_parameter().sample)
        expected = shrink(widths.model, widths.widths.groups, network)
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())
        value = score(network)
        scored.append((network, value))
        nni.report_final_result(value)

    return FunctionalEvaluator(evaluate)


def experiment(
    folder: Path,
    widths: Space,
    evaluator: Any,
    strategy: Strategy,
    number: int = 8,
    form: str = "raw",
    first: str | None = None,
) -> NasExperiment:
    config = NasExperimentConfig("sequential", form, "local")
    config.max_trial_number = number
    config.experiment_working_directory = folder
    config.execution_engine.continue_on_failure = True
    return NasExperiment(widths, evaluator, strategy, config, id=first)


def run(done: NasExperiment) -> NasExperiment:
    try:
        done.start()
    finally:
        done.stop()
    return done


@pytest.mark.parametrize("form", ["raw", "simplified"])
@pytest.mark.parametrize("search", SEARCHES)
def test_trials_are_different_networks_that_fill_the_budget(
    search: Callable[..., SearchStrategy], form: str, tmp_path: Path, scored: Scored
) -> None:
    widths = space()
    done = run(experiment(tmp_path, widths, evaluator(widths, scored), strategy := search(), 8, form))
    networks = [network for network, _ in scored]
    assert len(set(networks)) == len(networks) == 8
    assert all(widths.bounds.fits(network) for network in networks)
    assert strategy.study.scores == dict(scored)
    samples = done.export_top_models(8, formatter="dict")
    assert samples == [sample_of(widths.widths, network) for network in strategy.study.ranked()]
    assert samples[0] == sample_of(widths.widths, strategy.study.best()) and len(samples) == 8
    (best,) = done.export_top_models(1, formatter="instance")
    assert torch.equal(outputs(best), outputs(widths.freeze(samples[0]))) or form == "simplified"


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_resumed_experiment_goes_on_as_if_nothing_had_happened(
    search: Callable[..., SearchStrategy], logged: bool, tmp_path: Path, scored: Scored
) -> None:
    widths = space()
    run(experiment(tmp_path, widths, evaluator(widths, whole := []), search(), 8))

    def until_the_fifth(network: Widths) -> float:
        if len(scored) == 4:
            raise KeyboardInterrupt
        return quality(network)

    options = {"log": tmp_path / "search.jsonl"} if logged else {}
    first = experiment(tmp_path, widths, evaluator(widths, scored, until_the_fifth), search(**options))
    with pytest.raises(KeyboardInterrupt):
        run(first)
    assert scored == whole[:4]
    again: Scored = []
    second = experiment(tmp_path, widths, evaluator(widths, again), search(**options), 9, first=first.id)
    try:
        second.resume()
    finally:
        second.stop()
    assert again == whole[4:]
    assert second.strategy.study.scores == dict(whole)
    assert [m.metric for m in second.strategy.list_models()] == [
        dict(whole)[network] for network in second.strategy.study.ranked()
    ]
    if logged:
        assert {Widths(line["widths"]): line["score"] for line in load_search(options["log"])} == dict(whole)


def test_networks_of_a_log_that_are_over_the_budget_are_not_exported(tmp_path: Path, scored: Scored) -> None:
    wide, log = space(budget=1.0), tmp_path / "search.jsonl"
    run(experiment(tmp_path, wide, evaluator(wide, scored), EvolutionStrategy(log=log), 3))
    narrow = space(budget=0.4)
    strategy = EvolutionStrategy(log=log)
    run(experiment(tmp_path, narrow, evaluator(narrow, scored), strategy, 3))
    assert len(list(strategy.list_models())) == 3
    assert all(narrow.fits(model) for model in strategy.list_models())


class Swapping(ExecutionEngine):
    """Two workers; the end of each trial is told as the other's, as NNI's local service may."""

    def __init__(self, widths: Space, number: int) -> None:
        super().__init__()
        self.widths, self.number = widths, number
        self.submitted: list[Any] = []
        self.running: list[Any] = []

    def submit_models(self, *models: Any) -> None:
        for model in models:
            model.status = ModelStatus.Training
            self.submitted.append(model)
            self.running.append(model)

    def idle_worker_available(self) -> bool:
        if len(self.running) == 2:
            self.end(self.running[0], ended=self.running[1])
        return True

    def end(self, model: Any, ended: Any) -> None:
        network = self.widths.widths.from_nni(model.sample)
        self.dispatch_model_event(TrainingEndEvent(ended, ModelStatus.Trained))
        self.idle_worker_available_after(model)
        self.dispatch_model_event(FinalMetricEvent(model, quality(network)))
        self.running.remove(model)

    def idle_worker_available_after(self, model: Any) -> None:
        """A proposal may be asked for between the two messages."""

    def budget_available(self) -> bool:
        return len(self.submitted) < self.number

    def wait_models(self, *models: Any) -> None:
        while self.running:
            self.end(self.running[0], ended=self.running[-1])

    def list_models(self, status: Any = None) -> list[Any]:
        return self.submitted


def test_a_trials_end_that_names_another_trial_loses_no_result(tmp_path: Path) -> None:
    widths = space()
    strategy, engine = EvolutionStrategy(initial=3), Swapping(widths, 7)
    engine.idle_worker_available_after = lambda model: strategy._learn()  # type: ignore[method-assign]
    strategy(SimplifiedModelSpace.from_model(widths, FunctionalEvaluator(quality)), engine)
    networks = [widths.widths.from_nni(model.sample) for model in engine.submitted]
    assert strategy.study is not None
    assert strategy.study.scores == {network: quality(network) for network in networks} and len(networks) == 7


def test_the_same_seed_gives_the_same_trials(tmp_path: Path, scored: Scored) -> None:
    widths = space()
    runs: list[Scored] = [[], [], []]
    for seed, found in zip((1, 1, 2), runs, strict=True):
        run(experiment(tmp_path, widths, evaluator(widths, found), DBSStrategy(points=3, seed=seed), 5))
    assert runs[0] == runs[1] != runs[2]


def test_trials_that_fail_or_report_no_number_are_left_out(tmp_path: Path, scored: Scored) -> None:
    widths = space()
    asked: list[Widths] = []

    def score(network: Widths) -> Any:
        asked.append(network)
        if len(asked) == 2:
            raise RuntimeError("out of memory")
        if len(asked) == 3:
            return float("nan")
        return {"default": quality(network), "loss": 1.0}

    strategy = EvolutionStrategy(initial=3)
    run(experiment(tmp_path, widths, evaluator(widths, scored, score), strategy, 6))
    assert len(set(asked)) == 6
    assert strategy.study.scores == {n: quality(n) for i, n in enumerate(asked) if i not in (1, 2)}


def test_a_space_may_have_fewer_networks_than_the_experiment_has_trials(
    tmp_path: Path, scored: Scored
) -> None:
    widths = space(arguments={"widths": [1, 1, 2]}, divisor=1, budget=1.0)
    run(experiment(tmp_path, widths, evaluator(widths, scored), strategy := EvolutionStrategy(), 100))
    assert 0 < len(scored) < 100 and len(dict(scored)) == len(scored)
    assert list(strategy.list_models(sort=False))


@pytest.mark.parametrize("form", ["raw", "simplified"])
@pytest.mark.parametrize(
    "strategy",
    [
        lambda: Random(seed=1),
        lambda: RegularizedEvolution(population_size=3, sample_size=2, mutation_prob=0.3, seed=1),
        lambda: TPE(seed=1),
    ],
)
def test_nnis_own_strategies_keep_the_budget_by_its_filter(
    strategy: Callable[[], Strategy],
    form: str,
    tmp_path: Path,
    scored: Scored,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widths = space(budget=0.4)
    monkeypatch.setattr("nni.nas.strategy.hpo.time.sleep", lambda seconds: None)
    chain = Chain(strategy(), budget := Filter(widths.fits))
    done = run(experiment(tmp_path, widths, evaluator(widths, scored), chain, 6, form))
    assert len(scored) == 6 and all(widths.bounds.fits(network) for network, _ in scored)
    assert budget.state_dict()["filter_count_total"] > 0
    (best,) = done.export_top_models(1, formatter="dict")
    assert quality(widths.widths.from_nni(best)) == max(value for _, value in scored)


def test_evaluators_with_choices_and_other_spaces_are_refused(tmp_path: Path, scored: Scored) -> None:
    class Other(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    choosy = FunctionalEvaluator(quality, lr=nni.choice("lr", [0.1, 0.2]))
    with pytest.raises(ConfigError, match=r"evaluator offers choices too \(lr\)"):
        run(experiment(tmp_path, space(), choosy, DBSStrategy()))
    with pytest.raises(ConfigError, match="expected a WidthModelSpace, not a Other"):
        run(experiment(tmp_path, Other(), FunctionalEvaluator(quality), DBSStrategy()))
    with pytest.raises(ConfigError, match="no option 'point'"):
        DBSStrategy(point=3)
    for name, value in (("searcher", "random"), ("optimize_mode", "minimize"), ("resumed", True)):
        with pytest.raises(ConfigError, match=f"no option '{name}'"):
            EvolutionStrategy(**{name: value})
    with pytest.raises(RuntimeError, match="has not been run"):
        list(DBSStrategy().list_models())


CODE = """
import nni
from nni_dbs.space import Widths

def net():
    from examples.cifar_resnet import resnet20
    return resnet20(widths=(4, 8, 16))

def evaluate(model):
    import time
    widths = nni.get_current_parameter().sample
    value = sum((i + 1) * w + w**0.5 / 1000 for i, w in enumerate(widths.values()))
    time.sleep(value % 1.5)
    nni.report_final_result(value)
"""


@pytest.mark.slow
def test_nnis_training_service_pairs_every_network_with_its_own_score(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quick.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    root = str(Path(__file__).parents[2])
    paths = [str(tmp_path), root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    quick = importlib.import_module("quick")
    widths = Space(quick.net, (3, 8, 8), 0.5, divisor=2)
    config = NasExperimentConfig("ts", "simplified", "local")
    config.max_trial_number, config.trial_concurrency = 5, 2
    config.experiment_working_directory = tmp_path / "nni"
    strategy = EvolutionStrategy(initial=3, log=tmp_path / "search.jsonl")
    done = NasExperiment(widths, FunctionalEvaluator(quick.evaluate), strategy, config)
    with loopback():
        try:
            done.run(free_port)
            samples = done.export_top_models(5, formatter="dict")
        finally:
            done.stop()
    scores = {Widths(line["widths"]): line["score"] for line in load_search(tmp_path / "search.jsonl")}
    assert len(scores) == 5 and strategy.study.scores == scores
    for network, score in scores.items():
        assert widths.bounds.fits(network)
        assert score == quality(sample_of(widths.widths, network))
    assert {Widths(s) for s in samples} == {Widths(sample_of(widths.widths, n)) for n in scores}


def data(n: int, seed: int) -> DataLoader:
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), 16)


def lightning(
    folder: Path, epochs: int = 2, callbacks: list[Callback] | None = None, **changes: Any
) -> Lightning:
    torch.manual_seed(0)
    module = ClassificationModule(num_classes=10, learning_rate=0.01)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        **{"max_epochs": epochs, "accelerator": "cpu", **quiet, **changes},
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        default_root_dir=folder,
    )
    return Lightning(module, trainer, train_dataloaders=data(128, 0), val_dataloaders=data(48, 1))


def seeded() -> Space:
    torch.manual_seed(3)
    return space()


@pytest.mark.parametrize("method", METHODS)
def test_one_shot_strategies_export_a_network_inside_of_the_budget(
    method: type[ArchitectureStrategy], tmp_path: Path, free_port: int
) -> None:
    found = []
    for _ in range(2):
        widths = seeded()
        before = outputs(widths.model)
        strategy, fitted = method(seed=1), lightning(tmp_path)
        done = NasExperiment(widths, fitted, strategy)
        done.config.experiment_working_directory = tmp_path
        run(done)
        (sample,) = done.export_top_models(1, formatter="dict")
        (small,) = done.export_top_models(1, formatter="instance")
        network = widths.widths.from_nni(sample)
        assert network == strategy.widths and widths.bounds.fits(network)
        assert len(strategy.search.log) > 1
        expected = shrink(widths.model, widths.widths.groups, network, widths.order)
        assert torch.equal(outputs(small), outputs(expected))
        assert not torch.equal(outputs(widths.model), before)
        assert widths.state_dict().keys() == space().state_dict().keys()
        assert fitted.trainer.callbacks == [
            c for c in fitted.trainer.callbacks if "nni_dbs" not in type(c).__module__
        ]
        assert "training_step" not in vars(fitted.module)
        found.append((network, outputs(small)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_what_tas_trains_beside_the_model_is_trained(tmp_path: Path, free_port: int) -> None:
    strategy = TASStrategy()
    begun: dict[str, Tensor] = {}
    search = strategy._search

    def remembered(widths: Space, steps: int) -> Any:
        made = search(widths, steps)
        begun.update({name: p.detach().clone() for name, p in made.parameters.items()})
        return made

    strategy._search = remembered  # type: ignore[method-assign]
    run(NasExperiment(seeded(), lightning(tmp_path), strategy))
    moved = [name for name, p in strategy.search.parameters.items() if not torch.equal(p, begun[name])]
    assert len(moved) == len(begun) > 0


class Stop(Callback):
    """Kills the training in its last epoch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        if trainer.current_epoch == 2 and number == 3:
            raise KilledError


class KilledError(Exception):
    pass


@pytest.mark.parametrize("told", [True, False], ids=["stopped", "killed"])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_resumes_to_the_same_network(
    method: type[ArchitectureStrategy], told: bool, tmp_path: Path, free_port: int
) -> None:
    def trained(folder: str, *callbacks: Callback, first: str | None = None) -> NasExperiment:
        saving = ModelCheckpoint(tmp_path / folder, save_last=True)
        fitted = lightning(tmp_path, 3, [saving, *callbacks])
        config = NasExperimentConfig("sequential", "raw", "local")
        config.experiment_working_directory = tmp_path
        return NasExperiment(seeded(), fitted, method(seed=1), config, id=first)

    whole = run(trained("whole"))
    killed = trained("killed", Stop())
    begun = killed.strategy.state_dict  # NNI writes it as the experiment begins, and as it ends
    if not told:
        killed.strategy.state_dict = dict
    with pytest.raises(KilledError):
        run(killed)
    assert ("ckpt_path" in begun()) and (tmp_path / "killed" / "last.ckpt").exists()
    resumed = trained("killed", first=killed.id)
    try:
        resumed.resume()
    finally:
        resumed.stop()
    mine, other = resumed.strategy, whole.strategy
    assert mine.search.log == other.search.log and len(mine.search.log) > 1
    assert mine.widths == other.widths
    assert torch.equal(outputs(mine.supernet.model), outputs(other.supernet.model))


def searched(fitted: Lightning, strategy: ArchitectureStrategy) -> ArchitectureStrategy:
    strategy.initialize(RawFormatModelSpace(seeded(), fitted), SequentialExecutionEngine())
    strategy.run()
    return strategy


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, 16),
        ({"accumulate_grad_batches": 3}, 16),
        ({"max_epochs": -1, "max_steps": 8}, 8),
        ({"max_epochs": -1, "max_steps": 8, "accumulate_grad_batches": 2}, 16),
        ({"limit_train_batches": 4}, 8),
    ],
)
def test_schedules_run_over_the_whole_training(
    changes: dict[str, Any], calls: int, tmp_path: Path, free_port: int
) -> None:
    log = searched(lightning(tmp_path, **changes), TASStrategy()).search.log
    assert [line["progress"] for line in log] == [i / calls for i in range(calls)]


class Data(LightningDataModule):
    """Data that is there only once a training begins."""

    def setup(self, stage: str) -> None:
        self.train, self.val = data(128, 0), data(48, 1)

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return [self.val]


class Own(ClassificationModule):
    """A module with data, and an optimizer, of its own."""

    def setup(self, stage: str) -> None:
        self.data = Data()
        self.data.setup(stage)

    def train_dataloader(self) -> Any:
        return self.data.train

    def val_dataloader(self) -> Any:
        return self.data.val

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.model.model.parameters() if p.dim() > 1]
        norms = [p for p in self.model.model.parameters() if p.dim() == 1]
        return torch.optim.Adam([{"params": weights}, {"params": norms}], 0.01)


def test_batches_may_come_from_anywhere(tmp_path: Path, free_port: int) -> None:
    given = lightning(tmp_path)
    others = [
        Lightning(lightning(tmp_path).module, lightning(tmp_path).trainer, datamodule=Data()),
        Lightning(Own(num_classes=10), lightning(tmp_path).trainer),
    ]
    listed = lightning(tmp_path)
    listed.val_dataloaders = [listed.val_dataloaders]
    found = searched(given, DSAStrategy(seed=1))
    for fitted in (others[0], listed):
        again = searched(fitted, DSAStrategy(seed=1))
        assert again.search.log == found.search.log and again.widths == found.widths
    own = searched(others[1], TASStrategy())
    step = own.search
    begun = [torch.ones(()), torch.zeros(())]
    assert all(not any(torch.equal(p, b.expand_as(p)) for b in begun) for p in step.parameters.values())


def test_evaluators_that_give_no_training_are_refused(tmp_path: Path, free_port: int) -> None:
    def refused(fitted: Any, message: str, strategy: ArchitectureStrategy | None = None) -> None:
        with pytest.raises(ConfigError, match=message):
            searched(fitted, strategy or TASStrategy())

    refused(FunctionalEvaluator(quality), "a FunctionalEvaluator gives no access to its training")
    refused(lightning(tmp_path, -1), "give the Trainer max_epochs, or max_steps")
    refused(lightning(tmp_path), "none of the training's 16 steps", DSAStrategy(warmup=0.95))
    by_hand = lightning(tmp_path)
    by_hand.module.automatic_optimization = False
    refused(by_hand, "remove automatic_optimization = False")
    only = lightning(tmp_path)
    only.train_dataloaders = None
    refused(only, "validation batches only")
    several = lightning(tmp_path)
    several.val_dataloaders = [data(16, 1), data(16, 2)]
    refused(several, "give second= the batches to take")
    searched(used := lightning(tmp_path), TASStrategy())
    refused(used, "make a new one")
    with pytest.raises(ConfigError, match="lr must be positive"):
        DSAStrategy(lr=0)
    with pytest.raises(ConfigError, match="wrap a data set in a DataLoader"):
        DSAStrategy(second=data(4, 0).dataset)


def test_a_failed_training_exports_nothing(tmp_path: Path, scored: Scored) -> None:
    fitted = lightning(tmp_path, 3, [ModelCheckpoint(tmp_path), Stop()])
    failing = experiment(tmp_path, seeded(), fitted, DMCPStrategy())
    with pytest.raises(TrainingError, match="the training failed"):
        run(failing)
    with pytest.raises(RuntimeError, match="has not been run"):
        failing.export_top_models()
