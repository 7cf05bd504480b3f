"""PSE-Net: parallel sub-networks, and a prior distribution of widths for evolutionary search.

A supernet is trained with several sub-networks at once, each on its part of the batch (`nni_dbs.sampling.
in_parallel`). The parts' losses, which cost next to nothing, are kept by the widths that they ran through,
and become the errors from which the prior distribution of the widths is made. Evolution draws its first
generation and the replacement genes of its mutants from it.

Source: the abstract of PSE-Net (arXiv 2408.16233; Neural Networks, 2024). Known from there are the parallel
training by dropping features along the batch dimension, that the supernet interpolates the accuracy of
networks that were not sampled, and prior-distribution sampling for an evolutionary search. Everything else is
a reconstruction: BatchNorm by parts, which networks a step trains, the records, and the prior in closed form
(`nni_dbs.pool.tilted`), for which BCNet's released code has an optimisation of the same information.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nni_dbs.batches import part_of
from nni_dbs.bilevel import mean_over_ranks
from nni_dbs.errors import TrainingError
from nni_dbs.sampling import Step
from nni_dbs.space import Widths, WidthSpace
from nni_dbs.steps import NOT_CALLED, Distill, Record, SupernetStep, kl_divergence, loss_of, recorded
from nni_dbs.supernet import Replacement, Supernet, running
from torch_pruning_adapters.graph import tensors_in

FEWEST = 5.0  # records of a width that weigh as much as the mean of its group
_MEMORY = 0.9  # of the largest network's losses, from step to step


class WidthRecords:
    """What networks lost in training, by the width of each group, relative to the largest network.

    A part's loss tells of its network, of the images, and of how far the training has come. The largest
    network's loss, which every step has too, is taken off: not that of the same step, which has other
    images of its own, but a moving average, which has all images' difficulty and keeps up with the training.
    What is left of the images is noise; the means average over it, and are drawn towards the mean of their
    group where there are few records. (A reconstruction.)

    Args:
        space: Of the networks.

    Attributes:
        sums, counts: (G, K) float64, of the losses by group and choice, as `WidthSpace.padded_choices`.
        largest: The moving average; NaN before the first step.
    """

    def __init__(self, space: WidthSpace) -> None:
        self.space = space
        self._choices, _ = space.padded_choices()
        self.sums = torch.zeros_like(self._choices)
        self.counts = torch.zeros_like(self._choices)
        self.largest = torch.tensor(torch.nan, dtype=torch.float64)

    def add(self, networks: Sequence[Widths], losses: Sequence[float]) -> None:
        """Takes the losses of one step, the largest network's among them; the smallest one's is left out.

        The extremes are trained in every step; among the records of their widths they would drown all others.
        """
        lost = torch.tensor(losses, dtype=torch.float64)
        extremes = self.space.largest(), self.space.smallest()
        largest = lost[[widths == extremes[0] for widths in networks]].mean()
        self.largest = largest if self.largest.isnan() else torch.lerp(largest, self.largest, _MEMORY)
        for widths, loss in zip(networks, lost, strict=True):
            if widths in extremes:
                continue
            column = torch.searchsorted(self._choices, self.space.encode(widths).unsqueeze(1))
            self.sums.scatter_add_(1, column, (loss - self.largest).expand(len(column), 1))
            self.counts.scatter_add_(1, column, torch.ones(len(column), 1, dtype=torch.float64))

    @property
    def errors(self) -> Tensor:
        """What a group's width is expected to lose (G, K), 0 in the padding."""
        total = self.counts.sum(1, keepdim=True)
        mean = torch.where(total > 0, self.sums.sum(1, keepdim=True) / total.clamp(min=1), 0)
        shrunk = (self.sums + FEWEST * mean) / (self.counts + FEWEST)
        return shrunk.where(self._choices.isfinite(), 0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "counts": self.counts, "largest": self.largest}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state of records of the same space.

        Raises:
            TrainingError: It is of another space.
        """
        if state["sums"].shape != self.sums.shape:
            raise TrainingError("the saved records are of another space; start the supernet's training again")
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self.largest = state["largest"].clone()


class PSENetStep(SupernetStep):
    """A `SupernetStep` that keeps record of the losses of its parallel networks.

    The training step is called once more for each part of the batch, without gradients and with the outputs
    that the model gave already, so that only the loss is computed again. In a distributed training the
    losses are averaged over the ranks.

    Args:
        supernet, steps, training_step, distill: See `SupernetStep`; steps in parallel, not distilled.
        records: Where the losses go.

    Raises:
        TrainingError: As `SupernetStep`; or the model computes its own loss, of the whole batch.
    """

    def __init__(
        self,
        supernet: Supernet,
        steps: Iterable[Step],
        training_step: Callable[..., Any],
        distill: Distill = kl_divergence,
        *,
        records: WidthRecords,
    ) -> None:
        super().__init__(supernet, steps, training_step, distill)
        self.records = records

    def _take(self, args: Any, kwargs: Any) -> Any:
        with recorded(self.supernet.model) as record:
            output = super()._take(args, kwargs)
        if output is not None and self.last is not None:
            networks = self.last.networks
            losses = part_losses(self.supernet.model, self.training_step, args, kwargs, record, len(networks))
            self.records.add(networks, mean_over_ranks(losses).tolist())
        return output

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.records.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.records.load_state_dict(state)


def part_losses(
    model: nn.Module,
    training_step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    record: Record,
    parts: int,
) -> Tensor:
    """The losses (parts,) of the equal parts of a batch whose outputs are known already.

    Args:
        model: What the training step calls.
        training_step: Of the loss.
        args, kwargs: Of the training step, for the whole batch.
        record: The model's calls in it.
        parts: How many.

    Raises:
        TrainingError: The training step did not call the model, or the model computed its own loss.
    """
    if not record.outputs:
        raise TrainingError(NOT_CALLED)
    if any(t.dim() == 0 and t.requires_grad for t in tensors_in(record.outputs)):
        raise TrainingError(
            "the model computes its own loss, so those of parallel networks cannot be told apart; compute it "
            "in the training step from the logits"
        )
    sizes = [next(len(t) for t in inputs if t.dim()) for inputs in record.inputs]
    detached = record.detached().outputs
    losses = []
    for part in range(parts):
        given = [_part(outputs, size, part, parts) for outputs, size in zip(detached, sizes, strict=True)]
        with torch.no_grad(), running(model, {model: _Given(given)}):
            own = _part((args, kwargs), sizes[0], part, parts)
            losses.append(loss_of(training_step(*own[0], **own[1])).detach())
    return torch.stack(losses)


def _part(batch: Any, size: int, part: int, parts: int) -> Any:
    length = size // parts
    return part_of(batch, size, slice(part * length, (part + 1) * length))


class _Given(Replacement):
    """Outputs in place of a model, call by call."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.outputs = iter(outputs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return next(self.outputs)
