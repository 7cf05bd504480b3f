"""What a network takes on this device: measured, and predicted from measurements.

Latency is no function of FLOPs alone: memory traffic, elementwise layers and the framework's overhead take
their share, and kernels like some widths better than others. So some networks of the space are measured,
and a model is fitted to them that answers for all others.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

from nni_dbs.cost import FlopsCost, ParamsCost, PolynomialCost, block_costs, weighted_sum, width_costs
from nni_dbs.errors import ConfigError, ResultError
from nni_dbs.files import write
from nni_dbs.space import Widths, WidthSpace
from torch_pruning_adapters import check_widths, prefix_order, shrink
from torch_pruning_adapters.calls import Inputs, call, tensors_in

LEAST_SAMPLES = 8
FOLDS = 6
LONG: dict[str, Any] = {"turns": 9, "seconds": 0.2}  # a measurement that has to be right by itself
COMMON = 3  # features of the model that are not penalised: constant, multiply-adds, parameters
PENALTY = 0.001  # of what single layers and groups add to the common rates; chosen on held-out widths

Pair = tuple[float, float]
"""Milliseconds of a network, and of another one measured beside it."""


class LatencyCost:
    """Milliseconds of one forward pass on the present device, for any widths.

    Use it where the time on one kind of device is what counts, on that device: half the FLOPs are seldom
    half the time, and how far they are from it differs between devices, batch sizes and numbers of threads.
    The constructor measures networks of all sizes, from the smallest to the full one, and fits a model; then
    `__call__` and `batch` predict without measuring, and `measure` tells what a chosen network really takes.

    Measured is the cut model in eval mode without gradients, after a warm-up, in turns with a reference
    network of half the widths. Its label is the median ratio of the two within a turn, times the
    reference's median over all networks: clocks that drift and neighbours that interfere hit both and cancel.
    `measure` takes its time, and takes turns with the full network.

    The model is a constant, a rate for all multiply-adds and one for all parameters (memory traffic), and
    what each layer's multiply-adds and each group's channels take beyond that. Its coefficients are not
    negative, so it never falls when a width grows, and minimise the relative error; those of single layers
    and groups are held small (ridge), as there are more of them than measurements.

    On Linux the C library may hand large activations back to the system in every run on the CPU, or not, as
    its heap happens to lie; where images are large that alone can move a time by half. It keeps them if the
    environment sets both `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` to 2000000000: if `error` is
    large, try that, and measure as you deploy.

    Args:
        model: The full model, on the device that counts; it is copied and comes back as it was.
        example_inputs: As for `find_channel_groups`; the latency is that of this batch.
        space: The networks to choose from.
        samples: How many networks are measured to fit the model, at least 8.
        threads: Of the CPU; default: torch's present number.
        table: A JSON file of measurements. Every one is added at once and none is taken twice (those for the
            model and those of `measure` apart), so a run that was killed goes on where it stopped, and with
            the same table comes to the same model. Tables are for one device, number of threads, torch
            version, architecture and input.
        seed: Of the networks that are measured.
        quiet: No progress bar.

    Attributes:
        groups: The variables, in the order of the columns of `batch`; G of them.
        full: Milliseconds at full width, measured.
        error: Mean relative error of the model's predictions on widths held out from the fit (6-fold
            cross-validation); 0.05 means 5 %. Noise of the measurements is part of it.

    Raises:
        ConfigError: Fewer than 8 samples, or less than one thread.
        ResultError: A table that is damaged, of another device and so on, or cannot be written.
        UnsupportedModelError: As for `FlopsCost`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        space: WidthSpace,
        *,
        samples: int = 48,
        threads: int | None = None,
        table: str | Path | None = None,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        if samples < LEAST_SAMPLES:
            raise ConfigError(f"samples must be at least {LEAST_SAMPLES}, not {samples}")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        self.groups = space.groups
        self._example_inputs = example_inputs
        self._threads = threads or torch.get_num_threads()
        self._order = prefix_order(self.groups)
        half = WidthSpace(self.groups, min_ratio=0, divisor=1).uniform(0.5)
        flops, params = FlopsCost(model, example_inputs, self.groups), ParamsCost(model, self.groups)
        self._full = shrink(model, self.groups, {}, self._order).eval()
        self._reference = shrink(model, self.groups, half, self._order).eval()
        self._table = _Table(
            None if table is None else Path(table),
            {
                **_conditions(model, example_inputs, flops),
                "threads": self._threads,
                "groups": {g.name: g.size for g in self.groups},
                "reference": list(self._key(half)),
            },
        )
        networks = spread(space, samples, seed)
        full, beside = self._pair({}, long=True)
        pairs = [
            self._pair(widths)
            for widths in tqdm(
                networks, desc="latency", unit="network", disable=True if quiet else None, leave=False
            )
        ]
        self._reference_ms = float(np.median([reference for _, reference in pairs]))
        self.full = full / beside * self._reference_ms
        own = (flops.layers(), width_costs(self.groups), block_costs(self.groups))
        features = [flops, params, *(feature for costs in own for feature in costs.values())]
        self._fit(features, networks, np.array([ms / reference for ms, reference in pairs]))

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Predicted milliseconds of a network; missing groups at full width.

        Raises:
            WidthError: Unknown group, or a width that the group cannot take.
        """
        return self._model(widths) * self._unit

    def batch(self, widths: Tensor) -> Tensor:
        """Predicted milliseconds (B,) float64 of widths (B, G), integer or real; differentiable.

        Columns follow `groups`. Widths are not checked: real ones are relaxations.
        """
        return self._model.batch(widths) * self._unit

    def expected(self, mean: Tensor, variance: Tensor, present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Expected milliseconds (B,); arguments as for `PolynomialCost.expected`."""
        return self._model.expected(mean, variance, present) * self._unit

    def measure(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of a network, measured now, or what the table has for these widths.

        At length and in turns with the full network, of whose `full` milliseconds it is a share: for networks
        that are to be kept. Missing groups at full width. A measurement does not change the fitted model.

        Raises:
            WidthError: Unknown group, or a width that the group cannot take.
        """
        check_widths(self.groups, widths)
        key = self._key(widths)
        if key == self._key({}):
            return self.full
        if key not in self._table.chosen:
            full, ms = self._turns(self._full, widths, long=True)
            self._table.chosen[key] = ms, full
            self._table.save()
        ms, full = self._table.chosen[key]
        return ms / full * self.full

    @property
    def measurements(self) -> int:
        """How many there are in the table."""
        return len(self._table.measured) + len(self._table.chosen)

    def _pair(self, widths: Mapping[str, int], long: bool = False) -> Pair:
        """Milliseconds of a network and of the reference, measured now or found in the table."""
        key = self._key(widths)
        if key not in self._table.measured:
            reference, ms = self._turns(self._reference, widths, long)
            self._table.measured[key] = ms, reference
            self._table.save()
        return self._table.measured[key]

    def _turns(self, beside: nn.Module, widths: Mapping[str, int], long: bool) -> list[float]:
        small = shrink(self._full, self.groups, widths, self._order)
        length = LONG if long else {}
        return medians_ms([beside, small], self._example_inputs, self._threads, **length)

    def _key(self, widths: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(int(widths.get(g.name, g.size)) for g in self.groups)

    def _fit(
        self, features: Sequence[PolynomialCost], networks: Sequence[Widths], ratios: np.ndarray
    ) -> None:
        """Fits the model to `ratios` (N,) of the networks to the reference."""
        rows = torch.tensor([self._key(widths) for widths in networks])  # (N, G)
        scales = [max(feature.full, 1) for feature in features]
        shares = [(f.batch(rows) / scale).numpy() for f, scale in zip(features, scales, strict=True)]
        design = np.stack([np.ones(len(rows)), *shares], axis=1)  # (N, 1 + F)
        self.error = held_out_error(design, ratios)
        constant, *slopes = fit(design, ratios) * self._reference_ms
        self._unit = 2.0 ** (math.frexp(self.full)[1] - 50)  # so small that coefficients are whole numbers
        weights = [slope / scale / self._unit for slope, scale in zip(slopes, scales, strict=True)]
        self._model = weighted_sum(features, weights, constant / self._unit)


def medians_ms(
    models: Sequence[nn.Module],
    example_inputs: Inputs,
    threads: int | None = None,
    turns: int = 3,
    seconds: float = 0.03,
) -> list[float]:
    """Milliseconds of one forward pass of each model, without gradients, measured in turns.

    The first model is the reference: its time is its median over the turns, and that of any other model is
    the median of its ratio to the reference within a turn, times the reference's time. So compare times of
    one call, and divide by the reference's before comparing times of several calls.

    Args:
        models: In the mode in which they are to be measured, on the inputs' device.
        example_inputs: As for `find_channel_groups`.
        threads: Of the CPU, during the measurement; default: torch's present number.
        turns: How often every model has its turn, after a warm-up.
        seconds: How long a turn lasts at least, beside the two runs that `Timer` warms up with. Where other
            processes interfere, few long turns tell more than many short ones.
    """
    timers = [
        Timer(
            "call(model, inputs)",
            globals={"call": call, "model": model, "inputs": example_inputs},
            num_threads=threads or torch.get_num_threads(),
        )
        for model in models
    ]
    with torch.no_grad():
        runs = [max(math.ceil(seconds / timer.timeit(1).mean), 2) for timer in timers]
        times = [
            [timer.timeit(number).mean * 1e3 for timer, number in zip(timers, runs, strict=True)]
            for _ in range(turns)
        ]
    return drift_free(np.array(times)).tolist()


def drift_free(times: np.ndarray) -> np.ndarray:
    """Times (turns, M) of models measured in turns -> (M,), relative to the first model within each turn."""
    return np.median(times / times[:, :1], axis=0) * np.median(times[:, 0])


def spread(space: WidthSpace, samples: int, seed: int) -> list[Widths]:
    """At most `samples` different networks that cover all sizes evenly, the smallest and largest among them.

    A quarter has all groups at one level of their choices. The random ones lie around levels that are
    spread evenly between the smallest and the largest network, as far around as the choices allow;
    independent choices would nearly all come out half as large. Where residual blocks can go, half of the
    random ones are without some of them, from nearly none to nearly all.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = samples // 4
    levels = torch.linspace(0, 1, uniform)[:, None].expand(-1, len(space.groups))  # (U, G)
    random = samples - uniform
    centre = (torch.arange(random) + torch.rand(random, generator=generator)) / random
    room = torch.minimum(centre, 1 - centre)
    offset = 2 * torch.rand(random, len(space.groups), generator=generator) - 1  # (R, G)
    levels = torch.cat([levels, centre[:, None] + room[:, None] * offset])
    choices = [space.choices(name) for name in space.names]
    blocks = sorted({g.block for g in space.groups if g.block is not None})
    goes = torch.rand(len(levels), len(blocks), generator=generator) if blocks else None
    networks: dict[Widths, None] = {}
    for number, row in enumerate(levels):
        widths = {
            name: c[round(float(level) * (len(c) - 1))]
            for name, c, level in zip(space.names, choices, row, strict=True)
        }
        if goes is not None and number >= uniform and number % 2:
            share = (number - uniform) / random
            removed = {block for block, chance in zip(blocks, goes[number], strict=True) if chance < share}
            widths |= {g.name: 0 for g in space.groups if g.block in removed}
        networks[Widths(widths)] = None
    return list(networks)


def fit(design: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Non-negative coefficients (F,) that minimise the relative error of `design @ coefficients`.

    Args:
        design: (N, F): a constant, the common features, and those of single layers and groups, each at most
            1; the last ones are penalised.
        ratios: (N,) what is to be predicted, about 1.
    """
    own = design.shape[1] - COMMON
    penalty = np.eye(design.shape[1])[COMMON:] * math.sqrt(PENALTY) * own  # (own, F)
    rows = np.vstack([design / ratios[:, None], penalty])
    wanted = np.concatenate([np.ones(len(ratios)), np.zeros(own)])
    return LinearRegression(positive=True, fit_intercept=False).fit(rows, wanted).coef_


def held_out_error(design: np.ndarray, ratios: np.ndarray) -> float:
    """Mean relative error of `fit` on rows that it did not see; 0 where there is but one."""
    count = len(ratios)
    if count == 1:
        return 0.0
    folds = np.arange(count) % min(FOLDS, count)
    predicted = np.empty(count)
    for fold in np.unique(folds):
        held_out = folds == fold
        predicted[held_out] = design[held_out] @ fit(design[~held_out], ratios[~held_out])
    return float(np.mean(np.abs(predicted / ratios - 1)))


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the instructions that torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()})"


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _conditions(model: nn.Module, example_inputs: Inputs, flops: FlopsCost) -> dict[str, Any]:
    """What a latency depends on beside the widths and the number of threads."""
    device = next(model.parameters()).device
    structure = {
        "modules": [(name, type(module).__name__) for name, module in model.named_modules()],
        "parameters": [(name, list(p.shape), str(p.dtype)) for name, p in model.named_parameters()],
        "flops": flops.by_layer({}),
    }
    return {
        "device": device_name(device),
        "torch": str(torch.__version__),
        "inputs": [[list(t.shape), str(t.dtype)] for t in tensors_in(example_inputs)],
        "architecture": hashlib.sha256(json.dumps(structure).encode()).hexdigest()[:16],
    }


class _Table:
    """Measurements by widths, kept in a file where there is a path.

    Attributes:
        measured: Beside the reference network: the full network and those that the model is fitted to.
        chosen: At length, beside the full network.
    """

    def __init__(self, path: Path | None, conditions: dict[str, Any]) -> None:
        self.path = path
        self.conditions = conditions
        self.measured: dict[tuple[int, ...], Pair] = {}
        self.chosen: dict[tuple[int, ...], Pair] = {}
        if path is not None and path.exists():
            self._read(path)

    def save(self) -> None:
        if self.path is not None:
            write(self.path, lambda path: path.write_text(self._text()))

    def _text(self) -> str:
        head = json.dumps(self.conditions, indent=1).removesuffix("\n}")
        return f'{head},\n "measured": {_rows(self.measured)},\n "chosen": {_rows(self.chosen)}\n}}\n'

    def _read(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            self.measured, self.chosen = _pairs(found.pop("measured")), _pairs(found.pop("chosen"))
        except OSError as error:
            raise ResultError(f"cannot read {path}: {error.strerror or error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ResultError(
                f"{path} is no table of latencies, or damaged ({error}); delete it or give another path"
            ) from error
        for key, value in self.conditions.items():
            if found.get(key) != value:
                raise ResultError(
                    f"{path} was measured with another {key} ({_brief(found.get(key))}, here "
                    f"{_brief(value)}); delete it or give another path"
                )


def _rows(pairs: Mapping[tuple[int, ...], Pair]) -> str:
    lines = (json.dumps([list(widths), *pair]) for widths, pair in pairs.items())
    return "[\n  " + ",\n  ".join(lines) + "\n ]"


def _pairs(rows: Any) -> dict[tuple[int, ...], Pair]:
    pairs = {tuple(widths): (float(ms), float(beside)) for widths, ms, beside in rows}
    if not all(math.isfinite(t) and t > 0 for pair in pairs.values() for t in pair):
        raise ValueError("a time that is not positive")
    return pairs


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
