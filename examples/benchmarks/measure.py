"""What the speed benchmarks share: their command line, interleaved timing and the JSON record.

Times are CPU seconds of this process on one thread (`one_thread`), which other jobs on the machine disturb
least, beside wall seconds. What is compared is run in turns within one run, and only ratios of such medians
should be quoted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nni_dbs.files import write
from nni_dbs.latency import processor
from nni_dbs.models import build_model
from nni_dbs.result import package_versions

Row = dict[str, Any]


class Seconds(NamedTuple):
    """Time of one call."""

    cpu: float
    wall: float


def arguments(description: str | None, repeats: int) -> argparse.Namespace:
    """The command line of every benchmark: `out`, `repeats` and `quick`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=repeats, help="timings behind each median")
    parser.add_argument("--quick", action="store_true", help="a tiny setting that only shows that it runs")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


def one_thread() -> None:
    """Lets torch compute on one core, so that CPU time is the time of the work."""
    torch.set_num_threads(1)


def model_and_image(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """A torchvision model with random weights in eval mode, and one image of size x size."""
    torch.manual_seed(0)
    return build_model(name).eval(), torch.zeros(1, 3, size, size)


def timed(fn: Callable[[], object]) -> Seconds:
    """Runs `fn` once."""
    wall, cpu = time.perf_counter(), time.process_time()
    fn()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def medians(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Seconds]:
    """Median seconds of each function, run in turns, in alternating order, after an unmeasured turn."""
    for fn in functions.values():
        fn()
    found: dict[str, list[Seconds]] = {name: [] for name in functions}
    for i in range(repeats):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            found[name].append(timed(functions[name]))
    return {name: median(times) for name, times in found.items()}


def median(times: Sequence[Seconds]) -> Seconds:
    return Seconds(*(statistics.median(column) for column in zip(*times, strict=True)))


def collect(measure: Callable[..., list[Row]], cases: Sequence[Any]) -> list[Row]:
    """The rows that `measure` gives for each case, with a progress bar on a terminal."""
    return [row for case in tqdm(cases, desc="cases", disable=None) for row in measure(case)]


def report(args: argparse.Namespace, module: str, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Prints the rows as a table and writes them, with all that they depend on, to `args.out`."""
    rows = [
        {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    ]
    print_table(rows)
    if args.out is None:
        return
    record = {
        "command": shlex.join(["python", "-m", f"examples.benchmarks.{module}", *sys.argv[1:]]),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "settings": {"repeats": args.repeats, **settings},
        "rows": rows,
    }
    text = json.dumps(record, indent=2) + "\n"
    write(args.out, lambda path: path.write_text(text))


def print_table(rows: Sequence[Row]) -> None:
    """Rows with the same keys, as right-aligned columns."""
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)
