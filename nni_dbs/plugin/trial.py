"""One trial of an experiment: `python -m nni_dbs.plugin.trial`, with an experiment directory to work in.

NNI tells it the widths of a network, and it reports the network's score on the search-validation data, with
the widths and costs along: `{"default": score, "flops": ..., "params": ..., "widths": {...}, "trial": id}`.
The network is cut out of the directory's weights and its BatchNorm statistics are estimated anew: what a
pruner on one machine does, and the same score. With `--train` it has its final training first, alone, and
reports each epoch.

A trial is a process, whose imports take longer than many a score: this module leaves out what it can.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nni
import torch
from torch import Tensor, nn

from nni_dbs.config import Config, Recipe, load_config
from nni_dbs.data import Splits
from nni_dbs.errors import ConfigError, UserError
from nni_dbs.evaluate import cumulative_batchnorm
from nni_dbs.models import build_model
from nni_dbs.problem import Problem
from nni_dbs.result import load_weights
from nni_dbs.space import Widths
from nni_dbs.training import (
    Batch,
    accuracy,
    load_splits,
    reinitialise,
    resolve_device,
    sgd,
    training_loop,
    training_step,
)
from torch_pruning_adapters import WidthError, mirrored_order, shrink


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores the network that NNI asks for; 0, or 2 with one line on stderr for a mistake of the user's."""
    options = _parse(arguments)
    try:
        trial = Trial(options.directory)
        parameters = nni.get_next_parameter()
        if not parameters:
            raise ConfigError("no widths to score: it is an NNI experiment that starts this command")
        widths = trial.problem.space.from_nni(parameters)
        if options.train:
            score = trial.trained_score(widths, nni.report_intermediate_result)
        else:
            score = trial.score(widths, options.recipe, options.calibration_steps, options.mirrored)
    except (UserError, WidthError) as error:
        print(f"nni-dbs: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    costs = {kind: cost(widths) for kind, cost in trial.problem.costs.items()}
    nni.report_final_result({"default": score, **costs, "widths": dict(widths), "trial": nni.get_trial_id()})
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nni_dbs.plugin.trial", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=Path(), help="of the experiment")
    parser.add_argument("--train", action="store_true", help="train each network, alone")
    parser.add_argument(
        "--recipe", choices=("supernet", "finetune"), default="supernet", help="whose batches"
    )
    parser.add_argument(
        "--calibration-steps", type=int, default=20, help="batches for BatchNorm; 0: as it is"
    )
    parser.add_argument(
        "--mirrored", action="store_true", help="the mean score of the first and of the last channels"
    )
    return parser.parse_args(arguments)


@dataclass
class Trial:
    """The model, data and problem of an experiment directory.

    Raises:
        ConfigError, ModelError, DataError, ResultError: The directory's files cannot be used.
    """

    directory: Path

    def __post_init__(self) -> None:
        self.problem = Problem.load(self.directory / "problem.json")
        self.config: Config = load_config(self.directory / "config.yaml")
        self.splits: Splits = load_splits(self.config)
        self.device = resolve_device(self.config.device)
        torch.manual_seed(self.config.seed)
        self.model = build_model(self.config.model, self.config.arguments)
        load_weights(self.model, self.directory / "weights.safetensors")
        self.model.to(self.device)

    def score(self, widths: Widths, recipe: str, calibration_steps: int, mirrored: bool = False) -> float:
        """Accuracy (%) of a network with the full model's weights, after estimating BatchNorm anew.

        Args:
            widths: The network.
            recipe: Whose batches and training step BatchNorm sees: `supernet` or `finetune`.
            calibration_steps: How many of the batches.
            mirrored: Take the mean score of the network on its first channels and on its last ones.
        """
        orders = [self.problem.order]
        if mirrored:
            orders.append(mirrored_order(self.problem.space.groups, self.problem.order))
        scores = []
        for order in orders:
            small = shrink(self.model, self.problem.space.groups, widths, order)
            if calibration_steps:
                self._recalibrate(small, getattr(self.config, recipe), calibration_steps)
            scores.append(self._accuracy(small))
        return statistics.mean(scores)

    def trained_score(self, widths: Widths, report: Callable[[float], object]) -> float:
        """Accuracy (%) of a network after the configuration's final training, without teacher.

        Args:
            widths: The network.
            report: Gets the accuracy after each epoch but the last.
        """
        small = shrink(self.model, self.problem.space.groups, widths, self.problem.order)
        recipe = self.config.finetune
        if self.config.final == "scratch":
            reinitialise(small, self.config.seed)
        if recipe.epochs:
            plain, steps = training_step(recipe.label_smoothing), 0
            per_epoch = max(len(self.splits.train) // recipe.batch_size, 1)  # type: ignore[arg-type]

            def step(batch: Batch, model: nn.Module) -> Tensor:
                nonlocal steps
                if steps and steps % per_epoch == 0:
                    report(self._accuracy(model))
                steps += 1
                return plain(batch, model)

            self._loop(recipe)(small, sgd(small, recipe), step)
        return self._accuracy(small)

    def _recalibrate(self, model: nn.Module, recipe: Recipe, steps: int) -> None:
        """As `nni_dbs.plugin.evaluator.recalibrate_batchnorm` does: the training loop, without training."""
        plain = training_step(recipe.label_smoothing)

        def step(batch: Batch, model: nn.Module) -> Tensor:
            with torch.no_grad():
                return plain(batch, model).requires_grad_()

        with cumulative_batchnorm(model) as layers:
            if layers:
                model.train()
                self._loop(recipe)(model, sgd(model, recipe), step, max_steps=steps)

    def _loop(self, recipe: Recipe) -> Callable[..., None]:
        config = self.config
        return training_loop(
            self.splits.train,
            recipe,
            device=self.device,
            seed=config.seed,
            workers=config.workers,
            name="trial",
            quiet=True,
        )

    def _accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.splits.validation, device=self.device, workers=self.config.workers)


if __name__ == "__main__":
    sys.exit(main())
