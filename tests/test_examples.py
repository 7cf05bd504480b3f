"""The scripts of the examples run to their end, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nni_dbs.config import load_config
from nni_dbs.plugin.job import check_options, method

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_one(path: Path) -> None:
    config = load_config(path)
    check_options(config.options, method(config.method))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dbs", "fine-tuned: "),
        ("slimmable", "cut out at 25%: "),
        ("drop_in", "params "),
        ("nas", "of the test images"),
    ],
)
def test_a_script_runs(name: str, said: str) -> None:
    command = [sys.executable, "-m", f"examples.{name}"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert said in finished.stdout.splitlines()[-1]
