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
from nni_dbs.steps import Distill, Record, SupernetStep, kl_divergence, loss_of, recorded
from nni_dbs.supernet import Replacement, Supernet, running
from torch_pruning_adapters.calls import tensors_in

SHRINKAGE = 5.0  # records of a width that weigh as much as the mean of its group
_MEMORY = 0.9  # of the drawn networks' mean losses, from step to step


class WidthRecords:
    """What networks lost in training, by the width of each group, beyond what networks lost at the time.

    A part's loss tells of its network, of its images, and of how far the training has come. What comes from
    the training is taken off: a moving average of the losses of the networks that were drawn in the steps
    before. (The largest network's loss, which is there too, falls at another pace than the others'.) What the
    images add differs from part to part and has no bias, so that the means average over it; they are drawn
    towards the mean of their group where there are few records. (A reconstruction.)

    Args:
        space: Of the networks.

    Attributes:
        sums, counts: (G, K) float64, of the losses by group and choice, as `WidthSpace.padded_choices`.
        usual: The moving average; NaN before the first step.
    """

    def __init__(self, space: WidthSpace) -> None:
        self.space = space
        self._choices, _ = space.padded_choices()
        self.sums = torch.zeros_like(self._choices)
        self.counts = torch.zeros_like(self._choices)
        self.usual = torch.tensor(torch.nan, dtype=torch.float64)

    def add(self, networks: Sequence[Widths], losses: Sequence[float]) -> None:
        """Takes the losses of one step; those of the largest and the smallest network are left out.

        They are trained in every step; among the records of their widths they would drown all others. A step
        with a loss that is not finite is left out, too.
        """
        lost = torch.tensor(losses, dtype=torch.float64)
        extremes = self.space.largest(), self.space.smallest()
        drawn = [number for number, widths in enumerate(networks) if widths not in extremes]
        if not drawn or not lost.isfinite().all():
            return
        mean = lost[drawn].mean()
        usual = mean if self.usual.isnan() else self.usual
        for number in drawn:
            column = torch.searchsorted(self._choices, self.space.encode(networks[number]).unsqueeze(1))
            self.sums.scatter_add_(1, column, (lost[number] - usual).expand(len(column), 1))
            self.counts.scatter_add_(1, column, torch.ones(len(column), 1, dtype=torch.float64))
        self.usual = torch.lerp(mean, usual, _MEMORY)

    @property
    def errors(self) -> Tensor:
        """What a group's width is expected to lose (G, K), 0 in the padding."""
        total = self.counts.sum(1, keepdim=True)
        mean = torch.where(total > 0, self.sums.sum(1, keepdim=True) / total.clamp(min=1), 0)
        shrunk = (self.sums + SHRINKAGE * mean) / (self.counts + SHRINKAGE)
        return shrunk.where(self._choices.isfinite(), 0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"choices": self._choices, "sums": self.sums, "counts": self.counts, "usual": self.usual}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state of records of the same space.

        Raises:
            TrainingError: It is of another space.
        """
        if not torch.equal(state["choices"], self._choices):
            raise TrainingError("the saved records are of another space; start the supernet's training again")
        self.sums, self.counts = state["sums"].clone(), state["counts"].clone()
        self.usual = state["usual"].clone()


class PSENetStep(SupernetStep):
    """A `SupernetStep` that keeps record of the losses of its parallel networks.

    The training step is called once more for each part of the batch, without gradients and with the outputs
    that the model gave already, so that little but the loss is computed again; what else it does, such as
    logging, it does again. In a distributed training the losses are averaged over the ranks.

    Args:
        supernet, steps, training_step, distill: See `SupernetStep`; steps in parallel, not distilled.
        records: Where the losses go.

    Raises:
        TrainingError: As `SupernetStep`; or the loss of a part cannot be computed: the model computes its own
            loss, the training step draws random numbers for its inputs, or the batch cannot be split.
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
            self.records.add(networks, mean_over_ranks(losses, self._device()).tolist())
        return output

    def _device(self) -> torch.device | None:
        """That the ranks of a distributed training communicate by."""
        return next((p.device for p in self.supernet.parameters()), None)

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
        TrainingError: See `PSENetStep`.
    """
    calls = [
        (inputs, outputs) for inputs, outputs in zip(record.inputs, record.detached().outputs, strict=True)
    ]
    if not calls or not any(t.dim() for t in calls[0][0]):
        raise TrainingError(f"{_PARTS}, but the training step did not call the model itself with a batch")
    if any(t.dim() == 0 and t.requires_grad for t in tensors_in(record.outputs)):
        raise TrainingError(
            f"{_PARTS}, but the model computes its own; compute it in the training step from the logits "
            "(a Trainer does, with label_smoothing_factor or compute_loss_func), or train by another method"
        )
    size = _size(calls[0][0])
    losses = []
    for part in range(parts):
        given = _Given([_part(call, _size(call[0]), part, parts) for call in calls])
        own_args, own_kwargs = _part((args, kwargs), size, part, parts)
        with torch.no_grad(), torch.random.fork_rng(), running(model, {model: given}):
            try:
                losses.append(loss_of(training_step(*own_args, **own_kwargs)).detach())
            except TrainingError:
                raise
            except Exception as error:
                raise TrainingError(
                    f"{_PARTS}, which failed ({error}): it takes batches of tensors, in tuples, lists, "
                    "mappings or dataclasses, and a training step that reads nothing else"
                ) from error
    return torch.stack(losses)


_PARTS = "PSE-Net computes the loss of each part of a batch"


def _size(inputs: Sequence[Tensor]) -> int:
    """Samples of a call."""
    return next((len(t) for t in inputs if t.dim()), 0)


def _part(batch: Any, size: int, part: int, parts: int) -> Any:
    length = size // parts
    return part_of(batch, size, slice(part * length, (part + 1) * length))


class _Given(Replacement):
    """Outputs in place of a model, call by call, for the inputs that they belong to.

    Args:
        calls: (inputs, outputs) of each.
    """

    def __init__(self, calls: Sequence[tuple[list[Tensor], Any]]) -> None:
        self.calls = iter(calls)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        inputs, outputs = next(self.calls, ([], None))
        mine = tensors_in((args, kwargs))
        if len(mine) != len(inputs) or not all(map(torch.equal, mine, inputs)):
            raise TrainingError(
                f"{_PARTS}, but the training step gave the model other inputs for it than for the batch; "
                "augment in the data loader, and let it take no batch apart by itself"
            )
        return outputs
