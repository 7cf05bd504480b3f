"""What tests of NNI's experiments share."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from nni.tools.nnictl.config_utils import Experiments


@pytest.fixture
def free_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A port, and a place of its own for NNI's list of experiments."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where the manager has it
    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path / "nni-experiments"),))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
