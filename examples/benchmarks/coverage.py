"""What of torchvision can be pruned, how far, and does everything still work afterwards?

Every model of torchvision, with random weights and the smallest input that its architecture takes, in a
process of its own. A row says how many channel groups were found, why some are frozen, which share of the
FLOPs the others can give up, and how long that took. Then half of these FLOPs are removed (`project` onto
lowest + (full - lowest) / 2, any number of channels), and the network is checked:

* budget: it keeps the bound;
* outputs: they are finite and have the structure and shapes of the full network's;
* forward: a detector's own forward pass runs, with finite outputs;
* sliced: `Supernet.at` computes the same, to 1e-5 of the largest output;
* flops: `FlopsCost` is fvcore's count of it;
* reload: its state_dict gives exactly its outputs in another one, cut from a freshly built model;
* training: an SGD step runs, and every parameter gets a gradient that gets one in the full network;
* export, onnx: `torch.export`, and onnxruntime on an ONNX export, agree to 1e-4, if they
  do for the full network.

Shares of FLOPs hold at the input size that the row names. A detector's groups are found with its own forward
pass, on a list of images. They are used on its part before non-maximum suppression (`detection_heads.py`),
where all else happens; the number of groups found on that part stands beside theirs. "forward" is a check of
detectors only.

The results are written after each model, as JSON and as a Markdown table next to it, and a second run goes
on from there. Run from the root of the repository; the largest model (RegNet-Y-128GF) needs 14 GB of memory:

    python -m examples.benchmarks.coverage --processes 2
    python -m examples.benchmarks.coverage --models resnet18 video --fresh
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.benchmarks.coverage_checks import empty_row, examine
from examples.benchmarks.coverage_table import Row, table
from examples.benchmarks.measure import one_thread
from examples.benchmarks.torchvision_models import FAMILIES
from nni_dbs.files import write
from nni_dbs.latency import processor
from nni_dbs.result import package_versions

ROOT = Path(__file__).parents[2]


def in_own_process(name: str, timeout: float) -> Row:
    """The row of a model; as far as it got, if its process takes too long or dies."""
    command = [sys.executable, "-W", "ignore", "-m", "examples.benchmarks.coverage", "--one", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=timeout)
        output, stopped = done.stdout, None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [""]
            stopped = f"the process ended with {done.returncode}: {lines[-1][:300]}"
    except subprocess.TimeoutExpired as error:
        output, stopped = error.stdout or b"", f"stopped after {timeout:g} s"
    rows = [line for line in output.decode(errors="replace").splitlines() if line.startswith('{"name"')]
    row = Row(**json.loads(rows[-1])) if rows else empty_row(name)
    row.error = stopped or row.error
    return row


def selected(models: Iterable[str]) -> list[str]:
    """Names of models, of names and families."""
    names = [name for entry in models for name in FAMILIES.get(entry, [entry])]
    known = [name for family in FAMILIES.values() for name in family]
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"no model or family of torchvision: {', '.join(unknown)}")
    return [name for name in known if name in names]


def versions() -> dict[str, str]:
    found = package_versions()
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def load(out: Path) -> dict[str, Row]:
    """The rows of an earlier run."""
    if not out.exists():
        return {}
    record = json.loads(out.read_text())
    if record["versions"] != versions():
        raise SystemExit(f"{out} was written with other versions of packages; move it away")
    return {row["name"]: Row(**row) for row in record["rows"]}


def save(out: Path, settings: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    """Writes the JSON and the table, in torchvision's order."""
    ordered = [rows[name] for names in FAMILIES.values() for name in names if name in rows]
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "examples.benchmarks.coverage", *sys.argv[1:]]),
        "cpu": processor(),
        "threads": 1,
        "versions": versions(),
        "settings": settings,
        "rows": [asdict(row) for row in ordered],
    }
    text = json.dumps(record, indent=2) + "\n"
    write(out, lambda path: path.write_text(text))
    write(out.with_suffix(".md"), lambda path: path.write_text(table(record["versions"], ordered)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="JSON file")
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), help="names or families; default: all")
    parser.add_argument("--fresh", action="store_true", help="also the models that the file has already")
    parser.add_argument("--processes", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for a model")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--one", metavar="NAME", help="print the row of one model as JSON, as it grows")
    args = parser.parse_args()
    if args.one is not None:
        one_thread()
        examine(selected([args.one])[0], lambda row: print(json.dumps(asdict(row)), flush=True))
        return
    rows = load(args.out)
    names = [name for name in selected(args.models) if args.fresh or name not in rows]
    with ThreadPoolExecutor(args.processes) as pool:
        running = [pool.submit(in_own_process, name, args.timeout) for name in names]
        for done in tqdm(as_completed(running), total=len(names), desc="models", disable=args.quiet or None):
            row = done.result()
            rows[row.name] = row
            save(args.out, {"timeout": args.timeout, "processes": args.processes}, rows)
    failing = [row.name for row in rows.values() if row.problems]
    print(
        f"{len(rows)} models, {len(failing)} with an error or a failed check: {args.out.with_suffix('.md')}"
    )


if __name__ == "__main__":
    main()
