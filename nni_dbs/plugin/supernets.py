"""NNI pruners that train the user's model as a supernet and search in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from nni.compression.utils.evaluator import Evaluator
from torch import nn

from nni_dbs.algorithms.dbs import DBSSearch
from nni_dbs.algorithms.pse_net import PSENetStep, WidthRecords
from nni_dbs.errors import ConfigError
from nni_dbs.guided import GuidedEvolution, GuidedSearch
from nni_dbs.plugin.evaluator import train_supernet
from nni_dbs.plugin.searching import CALIBRATION_STEPS, EvaluatingPruner, SearchPruner
from nni_dbs.pool import chances_by_width, chances_of, starting_points, tilted
from nni_dbs.predict import TransformerPredictor
from nni_dbs.sampling import RULES, RULES_OF_POINTS, Step
from nni_dbs.search import EvolutionSearch, Searcher
from nni_dbs.space import Widths
from nni_dbs.steps import SupernetStep
from nni_dbs.supernet import Supernet
from torch_pruning_adapters.errors import nearest


class SupernetPruner(EvaluatingPruner):
    """What the pruners share whose `compress(max_steps, max_epochs)` trains a supernet first.

    Training runs through the evaluator. `compress(max_steps=0)` trains nothing: for a model that was trained
    as a supernet before, or for few evaluations of a pretrained one. The model keeps the supernet's weights:
    train what `export` gives, or train it inside of the full one (`Slimmable`).

    Args:
        rule: Which networks a step trains, see `nni_dbs.sampling.RULES`: spfs or path_fair train starting
            points; spfs_options, sandwich, uniform and parallel networks of the whole space. With bcnet, a
            network's score is the mean of its first and its last channels'.
        per_step: Networks that a step draws, beside the largest and the smallest where the rule has these;
            at most all starting points. uniform and bcnet draw one.
        kwargs: See `EvaluatingPruner`.
    """

    trains_supernet = True

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        rule: str,
        per_step: int = 2,
        **kwargs: Any,
    ) -> None:
        if per_step < 1:
            raise ConfigError(f"per_step must be at least 1, not {per_step}")
        if rule not in RULES:
            raise ConfigError(f"rule: no training rule {rule!r}{nearest(rule, RULES)}")
        super().__init__(model, config_list, evaluator, existed_wrappers, **kwargs)
        self.rule = rule
        self.per_step = per_step
        self.mirrored = rule == "bcnet"

    def _train(self, model: nn.Module, points: Sequence[Widths]) -> None:
        """Trains the model as a supernet for the duration of this `compress`."""
        max_steps, max_epochs = self._duration
        if max_steps == 0 or max_epochs == 0:
            return
        if self.evaluator is None:
            raise ConfigError(f"{type(self).__name__} needs an evaluator to train and score networks")
        supernet = Supernet(model, self.space.groups, self.order)
        self.evaluator.bind_model(model)
        try:
            with (
                self._stage("supernet"),
                train_supernet(self.evaluator, supernet, self._steps(points), make=self._make_step) as step,
            ):
                self.evaluator.train(max_steps, max_epochs)
        finally:
            self.evaluator.unbind_model()
        self.counts["supernet steps"] = step.taken

    def _make_step(self, *args: Any) -> SupernetStep:
        return SupernetStep(*args)

    def _starting_points(self, n: int) -> Sequence[Widths]:
        """For a rule that trains some, where the search itself has none."""
        if self.rule not in RULES_OF_POINTS:
            return ()
        with self._stage("points"):
            generator = torch.Generator().manual_seed(self.seed)
            return starting_points(self.space, self.bounds, n, generator)

    def _steps(self, points: Sequence[Widths]) -> Iterator[Step]:
        generator = torch.Generator().manual_seed(self.seed)
        per_step = min(self.per_step, len(points)) if self.rule in RULES_OF_POINTS else self.per_step
        return RULES[self.rule](self.space, points, generator, per_step)


class SupernetSearchPruner(SupernetPruner, SearchPruner):
    """What the pruners share that train a supernet and search in it with a `Searcher`."""

    def _points(self, searcher: Searcher) -> Sequence[Widths]:
        """Those that the supernet is trained on, by the rules that have some: where the search begins."""
        if isinstance(searcher, GuidedSearch):
            return searcher.points
        return ()

    def _choose(self, model: nn.Module) -> Widths:
        with self._stage("points"):
            searcher = self._searcher()
        points = self._points(searcher)
        if points:
            self.counts["starting points"] = len(points)
        self._train(model, points)
        widths = self._search(model, searcher)
        if isinstance(searcher, GuidedSearch):
            self.counts["fits"] = len(searcher.fits)
        self._searched = searcher
        return widths

    def _compress(self) -> None:
        super()._compress()
        if not isinstance(self._searched, GuidedSearch):
            return
        predicted, measured, in_band = self._searched.held_out
        self.result.fits = [
            {name: None if math.isnan(value) else value for name, value in fit.items()}
            for fit in self._searched.fits
        ]
        self.result.held_out = {
            "predicted": predicted.tolist(),
            "measured": measured.tolist(),
            "in_band": in_band.tolist(),
        }


class DBSPruner(SupernetSearchPruner):
    """DBS: differentiable budget-aware search of the widths, in a supernet of the user's own model.

    The method of choice: `compress(max_steps, max_epochs)` draws starting points near the budget, trains the
    model as a supernet of them for that long through the evaluator (by the strict path-wise fair sandwich
    rule), evaluates them, and goes on in rounds: a Transformer predictor is fitted to all evaluations and
    frozen, widths are optimised by gradient through it under the budget, and the most promising networks are
    evaluated in turn. What is kept is chosen by the predictor fitted to all measurements.

    Sources and reconstructions: `nni_dbs.algorithms.dbs`.

    Args:
        points: Starting points; about a thousand at ImageNet's scale.
        evaluations: Networks to evaluate altogether, the starting points included.
        per_round: Networks of a round after them.
        rule, per_step: See `SupernetPruner`.
        latent: Search on latent features with a decoder, in place of relaxed widths.
        dim: Of the predictor's tokens.
        calibration_steps: See `EvaluatingPruner`.
        kwargs: See `WidthPruner`.
    """

    method = "dbs"

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        points: int = 64,
        evaluations: int = 96,
        per_round: int = 8,
        rule: str = "spfs",
        per_step: int = 2,
        latent: bool = False,
        dim: int = 16,
        calibration_steps: int = CALIBRATION_STEPS,
        **kwargs: Any,
    ) -> None:
        if points < 1 or evaluations < points:
            raise ConfigError(
                f"evaluations ({evaluations}) count the starting points ({points}), which are at least 1"
            )
        if dim < 16 or dim % 16:
            raise ConfigError(f"dim must be a multiple of 16, not {dim}")
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            rule=rule,
            per_step=per_step,
            evaluations=evaluations,
            per_round=per_round,
            calibration_steps=calibration_steps,
            **kwargs,
        )
        self.points = points
        self.latent = latent
        self.dim = dim

    def _searcher(self) -> DBSSearch:
        predictor = TransformerPredictor(
            self.space, self.bounds if self.latent else None, dim=self.dim, seed=self.seed
        )
        return DBSSearch(
            self.space, self.bounds, self.seed, points=self.points, latent=self.latent, predictor=predictor
        )

    def tuner_arguments(self) -> dict[str, Any]:
        return {
            "searcher": "dbs",
            "seed": self.seed,
            "per_round": self.per_round,
            "points": self.points,
            "latent": self.latent,
        }


class EvolutionPruner(SupernetSearchPruner):
    """Evolutionary search in a supernet of the user's own model, with or without a predictor.

    The classical search, which others are compared with: `compress(max_steps, max_epochs)` trains the model
    as a supernet for that long, by default by the sandwich rule, and evaluates networks in rounds; the best
    of them breed by mutation and crossover. With `predictor`, evolution runs on a predictor that is fitted to
    all evaluations, and only what it promises most of is evaluated, as Once-for-All searches: better than
    without at equal numbers of evaluations.

    Sources: MetaPruning and BCNet for the evolution, Once-for-All for that on a predictor; projection in
    place of rejection, the rounds, and all numbers but the mutants' are of this package.

    Args:
        evaluations: Networks to evaluate altogether, the initial ones included.
        per_round: Networks of a round.
        predictor: Breed on a predictor, by `GuidedEvolution`; else by `EvolutionSearch`.
        initial: Networks before evolution begins. With a predictor they are starting points; without one, a
            rule that trains starting points has as many, but others.
        parents: The best so many breed; without a predictor. Default: 8.
        mutation: Chance that a group of a mutant is drawn anew.
        rule, per_step: See `SupernetPruner`.
        calibration_steps: See `EvaluatingPruner`.
        kwargs: See `WidthPruner`.
    """

    method = "evolution"

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        evaluations: int = 96,
        per_round: int = 8,
        predictor: bool = False,
        initial: int = 16,
        parents: int | None = None,
        mutation: float = 0.1,
        rule: str = "sandwich",
        per_step: int = 2,
        calibration_steps: int = CALIBRATION_STEPS,
        **kwargs: Any,
    ) -> None:
        if predictor and parents is not None:
            raise ConfigError("parents: with a predictor a quarter of the population breeds; leave it out")
        parents = 8 if parents is None else parents
        if initial < 1 or evaluations < initial:
            raise ConfigError(
                f"evaluations ({evaluations}) count the initial networks ({initial}), which are at least 1"
            )
        if parents < 1:
            raise ConfigError(f"parents must be at least 1, not {parents}")
        if not 0 <= mutation <= 1:
            raise ConfigError(f"mutation must lie in [0, 1], not {mutation}")
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            rule=rule,
            per_step=per_step,
            evaluations=evaluations,
            per_round=per_round,
            calibration_steps=calibration_steps,
            **kwargs,
        )
        self.predictor = predictor
        self.initial = initial
        self.parents = parents
        self.mutation = mutation

    def _options(self) -> dict[str, Any]:
        """Of the searcher."""
        if self.predictor:
            return {"points": self.initial, "mutation": self.mutation}
        return {"initial": self.initial, "parents": self.parents, "mutation": self.mutation}

    def _searcher(self) -> Searcher:
        if self.predictor:
            return GuidedEvolution(self.space, self.bounds, self.seed, **self._options())
        prior = None if self.prior is None else chances_of(self.space, self.prior)
        return EvolutionSearch(self.space, self.bounds, self.seed, prior=prior, **self._options())

    def tuner_arguments(self) -> dict[str, Any]:
        name = "guided_evolution" if self.predictor else "evolution"
        return {"searcher": name, "seed": self.seed, "per_round": self.per_round, **self._options()}

    def _points(self, searcher: Searcher) -> Sequence[Widths]:
        return super()._points(searcher) or self._starting_points(self.initial)


class PSENetPruner(EvolutionPruner):
    """PSE-Net: parallel sub-networks train the supernet, and their losses guide an evolutionary search.

    The shortest training of a supernet: `compress(max_steps, max_epochs)` runs the largest network, the
    smallest and `per_step` random ones on parts of each batch, all in one pass at full width. What the parts
    lose, by the width of each group, becomes a prior distribution of the widths inside of the budget. From
    there evolution draws its first networks and the new genes of its mutants, and evaluates networks in
    rounds.

    Give the evaluator batches that `per_step + 2` divides, with 16 images or more for each network, and drop
    a last smaller one (`drop_last=True`). After a few dozen steps the prior is mostly noise. A model that
    computes its own loss, as most of Transformers' do, cannot be trained so.

    Sources and reconstructions: `nni_dbs.algorithms.pse_net`.

    Args:
        per_step: See `SupernetPruner`.
        kwargs: See `EvolutionPruner`, but for `rule` and `predictor`.

    Attributes:
        records: The losses of the training, after `compress`.
    """

    method = "pse_net"
    records: WidthRecords

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Evaluator,
        existed_wrappers: dict | None = None,
        *,
        per_step: int = 2,
        **kwargs: Any,
    ) -> None:
        for name in ("rule", "predictor"):
            if name in kwargs:
                raise ConfigError(
                    f"{name}: PSE-Net trains parallel networks and breeds from their losses; "
                    "EvolutionPruner has this choice"
                )
        super().__init__(
            model, config_list, evaluator, existed_wrappers, rule="parallel", per_step=per_step, **kwargs
        )

    def _make_step(self, *args: Any) -> SupernetStep:
        return PSENetStep(*args, records=self.records)

    def _choose(self, model: nn.Module) -> Widths:
        self.records = WidthRecords(self.space)
        self._train(model, ())
        with self._stage("search"):
            chances = tilted(self.space, self.bounds, errors=self.records.errors)
            self.prior = chances_by_width(self.space, chances)
            self._searched = self._searcher()
        return self._search(model, self._searched)

    def _compress(self) -> None:
        super()._compress()
        assert self.prior is not None
        self.result.prior = {
            name: {str(width): chance for width, chance in row.items()} for name, row in self.prior.items()
        }
