"""What tests with a real manager of NNI share."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from nni.tools.nnictl.config_utils import Experiments


@pytest.fixture
def free_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A port, whose successor is free too, and a place of its own for NNI's list of experiments."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where the manager has it
    monkeypatch.setattr(Experiments.__init__, "__defaults__", (str(tmp_path / "nni-experiments"),))
    for _ in range(100):
        with socket.socket() as probe, socket.socket() as successor:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if successor.connect_ex(("127.0.0.1", port + 1)) != 0:
                return port
    raise OSError("no two free ports")
