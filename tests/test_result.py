from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import get_model

from nni_dbs.errors import ModelError, ResultError
from nni_dbs.files import write
from nni_dbs.result import (
    Result,
    load_groups,
    load_pruned,
    load_result,
    load_search,
    load_source,
    load_widths,
    save_pruned,
    save_result,
)
from nni_dbs.space import Widths, WidthSpace
from torch_pruning_adapters import channel_order, shrink

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def make_net(width: int = 16, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.Flatten(),
        nn.Linear(24 * 16, classes),
    ).eval()


def make_result(widths: Widths) -> Result:
    return Result(
        method="uniform",
        seed=3,
        budget="flops <= 1K",
        widths=widths,
        flops=900,
        full_flops=2000,
        params=90,
        full_params=200,
        metrics={"pruned": 0.75},
        seconds={"search": 1.5},
    )


def save(directory: Path, source: dict[str, Any] | None = None) -> nn.Module:
    model = make_net()
    model(5 * torch.randn(4, 3, 8, 8))
    space = WidthSpace.from_model(model, IMAGES, divisor=1)
    widths = Widths({"0": 5, "3": 7})
    order = channel_order(model, space.groups)
    small = shrink(model, space.groups, widths, order)
    save_pruned(directory, small, space.groups, widths, order, make_result(widths), source)
    return small


def state_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    small = save(tmp_path)
    loaded = load_pruned(tmp_path, make_net())
    assert torch.equal(loaded(IMAGES), small(IMAGES))
    assert loaded[3].weight.shape == (7, 5, 3, 3)
    assert load_widths(tmp_path / "widths.yaml") == {"0": 5, "3": 7}
    assert load_result(tmp_path) == make_result(Widths({"0": 5, "3": 7}))
    assert [g.name for g in load_groups(tmp_path)] == ["0", "3"]
    assert load_source(tmp_path) == {}


def test_the_given_model_is_only_read(tmp_path: Path) -> None:
    save(tmp_path)
    model = make_net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load_pruned(tmp_path, model)
    assert loaded.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_model_named_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    source = {"model": f"{__name__}:make_net", "arguments": {"classes": 5}}
    small = save(tmp_path, source)
    assert load_source(tmp_path) == source
    assert torch.equal(load_pruned(tmp_path)(IMAGES), small(IMAGES))


def test_model_not_named(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(ResultError, match=r"give a full-size one: load_pruned\(directory, model\)"):
        load_pruned(tmp_path)


@pytest.mark.parametrize("name", ["resnet81", 5, None])
def test_model_named_wrongly(tmp_path: Path, name: Any) -> None:
    save(tmp_path, {"model": name})
    with pytest.raises(ModelError):
        load_pruned(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        make_net(classes=6),
        nn.Sequential(nn.Conv2d(3, 16, 3)),
        nn.Sequential(*make_net(), nn.Linear(5, 5)),
        nn.Linear(3, 3),
    ],
    ids=["other classes", "shorter", "longer", "different"],
)
def test_wrong_model(tmp_path: Path, model: nn.Module) -> None:
    save(tmp_path)
    with pytest.raises(ResultError, match=r"another model|does not fit this model") as caught:
        load_pruned(tmp_path, model)
    assert "\n" not in str(caught.value)


def cut_short(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def edit_json(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.99])
def test_truncated_weights(tmp_path: Path, share: float) -> None:
    save(tmp_path)
    cut_short(tmp_path / "weights.safetensors", share)
    with pytest.raises(ResultError, match=r"weights.safetensors is damaged.*save the weights again"):
        load_pruned(tmp_path, make_net())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("groups.json", lambda path: path.write_text("")),
        ("groups.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
        ("groups.json", lambda path: path.write_text("[]")),
        ("groups.json", lambda path: path.write_text("{}")),
        ("groups.json", lambda path: path.write_text('{"groups": 3}')),
        ("groups.json", lambda path: cut_short(path, 0.5)),
        ("groups.json", edit_json(lambda data: data["groups"][0].pop("size"))),
        ("groups.json", edit_json(lambda data: data["groups"][0].update(extra=1))),
        ("groups.json", edit_json(lambda data: data["groups"][0]["members"][0].update(spans=[[1]]))),
        ("widths.yaml", lambda path: path.write_text("")),
        ("widths.yaml", lambda path: path.write_text("widths: [")),
        ("widths.yaml", lambda path: path.write_text("widths: 3")),
        ("widths.yaml", lambda path: path.write_text("widths: {'0': wide}")),
        ("widths.yaml", lambda path: path.write_text("widths: {'0': 2.5}")),
        ("widths.yaml", lambda path: path.write_text("!!python/object/apply:os.getcwd []")),
    ],
)
def test_damaged_text(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ResultError, match=re.escape(str(tmp_path / file))) as caught:
        load_pruned(tmp_path, make_net())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "widths", ["{'0': 17}", "{'0': 0}", "{'0': -1}", "{nothing: 3}"], ids=lambda text: text
)
def test_impossible_widths(tmp_path: Path, widths: str) -> None:
    save(tmp_path)
    (tmp_path / "widths.yaml").write_text(f"widths: {widths}")
    with pytest.raises(ResultError, match="saved from another model"):
        load_pruned(tmp_path, make_net())


@pytest.mark.parametrize("file", ["weights.safetensors", "groups.json", "widths.yaml"])
def test_missing_file(tmp_path: Path, file: str) -> None:
    save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ResultError, match=file):
        load_pruned(tmp_path, make_net())


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no directory"):
        load_pruned(tmp_path / "nowhere", make_net())


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("flops"),
        lambda data: data.update(extra=1),
        lambda data: data.update(widths="wide"),
        lambda data: data.update(widths={"0": "wide"}),
    ],
)
def test_damaged_result(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    save(tmp_path)
    edit_json(change)(tmp_path / "result.json")
    with pytest.raises(ResultError, match=r"result.json is damaged"):
        load_result(tmp_path)


@pytest.mark.parametrize(
    "text", ["{'0': 5, '3': 7}", "{0: 5, 3: 7}", "model: resnet18\nwidths: {'0': 5, '3': 7}"]
)
def test_plain_widths_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert load_widths(tmp_path / "mine.yaml") == {"0": 5, "3": 7}


def test_no_write_access(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match=r"cannot write .*result.json: Not a directory|File exists"):
        save_result(tmp_path / "file" / "below", make_result(Widths()))
    with pytest.raises(ResultError, match="cannot write"):
        save(tmp_path / "file")


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(28, "No space left on device"), ResultError),
        (SafetensorError("No space left on device"), ResultError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, failure: BaseException, raised: type) -> None:
    path = tmp_path / "file.txt"
    write(path, lambda temporary: temporary.write_text("old"))

    def fails_midway(temporary: Path) -> None:
        temporary.write_text("ne")
        raise failure

    with pytest.raises(raised):
        write(path, fails_midway)
    assert state_of(tmp_path) == {"file.txt": b"old"}


def test_a_file_is_replaced_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    os.link(path, tmp_path / "link.txt")
    write(path, lambda temporary: temporary.write_text("new"))
    assert state_of(tmp_path) == {"file.txt": b"new", "link.txt": b"old"}


def test_a_failed_save_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = save(tmp_path)
    before = state_of(tmp_path)

    def breaks_off(model: nn.Module, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error")

    monkeypatch.setattr("nni_dbs.result.save_model", breaks_off)
    with pytest.raises(ResultError, match=r"cannot write .*weights.safetensors: I/O error"):
        save(tmp_path)
    assert state_of(tmp_path) == before
    assert torch.equal(load_pruned(tmp_path, make_net())(IMAGES), small(IMAGES))


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        save(tmp_path)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_shared_parameters(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)
            self.b = nn.Linear(8, 4)
            self.c = nn.Linear(4, 8)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    model = Tied()
    save_pruned(tmp_path, model, [], {}, {})
    loaded = load_pruned(tmp_path, Tied())
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), model(x))
    assert loaded.c.weight is loaded.a.weight


def test_widths_file_is_plain_yaml(tmp_path: Path) -> None:
    save(tmp_path, {"model": "resnet18", "arguments": {"num_classes": 3}})
    assert yaml.safe_load((tmp_path / "widths.yaml").read_text()) == {
        "model": "resnet18",
        "arguments": {"num_classes": 3},
        "widths": {"0": 5, "3": 7},
    }


# --- the log of a search -----------------------------------------------------------------------------

LINES = [{"stage": "points", "score": 90.1 + i, "flops": 10 * i, "widths": {"0": i + 1}} for i in range(3)]
TEXT = "".join(json.dumps(line) + "\n" for line in LINES)


def test_search_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    assert load_search(path) == []
    path.write_text("")
    assert load_search(path) == []
    path.write_text(TEXT)
    assert load_search(path) == LINES
    assert path.read_text() == TEXT


@pytest.mark.parametrize("cut", [1, 2, 20, len(json.dumps(LINES[2]))])
def test_a_last_line_cut_short_is_removed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "search.jsonl"
    path.write_text(TEXT[:-cut])
    assert load_search(path) == LINES[:2]
    assert path.read_text() == "".join(json.dumps(line) + "\n" for line in LINES[:2])


@pytest.mark.parametrize(
    "damaged",
    ["", "{", "[]", "3", '{"score": 1}', '{"widths": {"0": 1}}', '{"score": "x", "widths": {"0": 1}}'],
)
def test_other_damaged_lines_are_told_and_left(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "search.jsonl"
    path.write_text(f"{damaged}\n{TEXT}")
    with pytest.raises(ResultError, match=r"search.jsonl is damaged .*; delete it to evaluate again"):
        load_search(path)
    assert path.read_text() == f"{damaged}\n{TEXT}"


def test_modules_that_want_their_version(tmp_path: Path) -> None:
    """MNASNet refuses a state that does not say its version, and safetensors keeps none."""
    model = get_model("mnasnet0_5", weights=None, num_classes=5).eval()
    space = WidthSpace.from_model(model, torch.zeros(1, 3, 32, 32), divisor=1)
    widths, order = space.uniform(0.5), channel_order(model, space.groups)
    small = shrink(model, space.groups, widths, order)
    save_pruned(tmp_path, small, space.groups, widths, order, make_result(widths))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_pruned(tmp_path, model)(images), small(images))
