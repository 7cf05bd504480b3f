"""The scripts of the examples run to their end, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [("dbs", "fine-tuned: "), ("slimmable", "cut out at 25%: "), ("drop_in", "params ")],
)
def test_a_script_runs(name: str, said: str) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", f"examples.{name}"]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert said in finished.stdout.splitlines()[-1]
