from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nni_dbs.errors import ModelError
from nni_dbs.models import build_model


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(
        "import torch\n"
        "small = 3\n"
        "def make(width=4):\n"
        "    return torch.nn.Linear(width, 2)\n"
        "def not_a_model():\n"
        "    return {}\n"
        "def broken():\n"
        "    raise RuntimeError('out of bricks')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)


def test_torchvision_model_with_arguments() -> None:
    model = build_model("resnet18", {"num_classes": 7})
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(("arguments", "width"), [(None, 4), ({}, 4), ({"width": 6}, 6)])
def test_own_model_from_the_working_directory(arguments: dict[str, Any] | None, width: int) -> None:
    model = build_model("own_nets:make", arguments)
    assert isinstance(model, nn.Linear)
    assert model.in_features == width


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet81", None, r"no model 'resnet81' \(did you mean 'resnet"),
        ("", None, "no model ''"),
        ("resnet18", {"depth": 3}, "cannot build 'resnet18' with .*depth"),
        ("resnet18", {"weights": "NOT_THERE"}, "cannot build 'resnet18'"),
        ("resnet18", [1, 2], "cannot build 'resnet18'"),
        (18, None, "named by a text"),
        ("own_nets:other", None, "cannot import.*other"),
        ("no_such_package:make", None, "cannot import.*no_such_package"),
        (":make", None, "cannot import"),
        ("own_nets:", None, "cannot import"),
        ("own_nets:small", None, "cannot build"),
        ("own_nets:not_a_model", None, "returned a dict"),
        ("own_nets:broken", None, "out of bricks"),
    ],
)
def test_mistakes(name: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, arguments)
