from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nni_dbs.config import Config, Recipe, Teaching, load_config
from nni_dbs.errors import ConfigError, UserError

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits" / "config.yaml"


def test_the_example_is_read_and_survives_its_own_yaml(tmp_path: Path) -> None:
    config = load_config(EXAMPLE)
    assert config.model == "resnet18" and config.train == Recipe(epochs=6, lr=0.05)
    again = tmp_path / "config.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("budget=300M", lambda c: c.budget == "300M"),
        ("budget={flops: 0.5, params: 1M}", lambda c: c.budget == {"flops": 0.5, "params": "1M"}),
        ("train.lr=1e-4", lambda c: c.train.lr == 1e-4),
        ("train.lr=1", lambda c: c.train.lr == 1.0 and isinstance(c.train.lr, float)),
        ("options={candidates: 3}", lambda c: c.options == {"candidates": 3}),
        ("options.points=3", lambda c: c.options["points"] == 3 and len(c.options) == 3),
        ("final=distill", lambda c: c.final == "distill"),
        ("supernet.epochs=0", lambda c: c.supernet.epochs == 0),
        ("budget={latency_ms: 3}", lambda c: c.budget == {"latency_ms": 3}),
        ("seed=7", lambda c: c.seed == 7),
        ("teacher.weight=0.9", lambda c: c.teacher == Teaching(weight=0.9, temperature=4.0)),
        ("teacher={weight: 1, temperature: 2}", lambda c: c.teacher == Teaching(1.0, 2.0)),
        ("teacher.temperature=0.5", lambda c: c.teacher.weight == 0.0),
    ],
)
def test_overrides(override: str, read: object) -> None:
    assert callable(read) and read(load_config(EXAMPLE, [override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write key=value"),
        ("seed.x=1", "'seed' has no keys"),
        ("seed=yes", "seed: expected int"),
        ("seed=[", "not valid YAML"),
        ("train=3", "train: expected a mapping"),
        ("train.lr=fast", "train.lr: expected a number"),
        ("train.lr=0", "must be positive"),
        ("data.max_shit=1", "did you mean 'max_shift'?"),
        ("config_list={}", "config_list: expected list"),
        ("final=scrach", "did you mean 'scratch'?"),
        ("final=3", "final: expected str"),
        ("supernet.lr=0", "supernet: epochs, batch_size and lr must be positive"),
        ("supernet.epoch=1", "unknown key 'supernet.epoch' (did you mean 'epochs'?)"),
        ("budget={latency: 3}", "bounds flops or params"),
        ("teacher=0.9", "teacher: expected a mapping"),
        ("teacher.wieght=0.9", "unknown key 'teacher.wieght' (did you mean 'weight'?)"),
        ("teacher.weight=1.1", "teacher: weight must lie in [0, 1], and temperature be positive"),
        ("teacher.weight=-0.1", "teacher: weight must lie in [0, 1]"),
        ("teacher.weight=.nan", "teacher: weight must lie in [0, 1]"),
        ("teacher.temperature=0", "temperature be positive"),
        ("teacher.temperature=.inf", "temperature be positive"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(EXAMPLE, [override])
    assert message in str(caught.value)


def test_a_distilled_network_takes_no_second_teacher() -> None:
    with pytest.raises(ConfigError, match=r"final: distill has the full network as its teacher already"):
        load_config(EXAMPLE, ["final=distill", "teacher.weight=0.5"])
    assert load_config(EXAMPLE, ["final=distill", "teacher.weight=0"]).final == "distill"


@pytest.mark.parametrize("missing", ["model", "data", "budget"])
def test_missing_keys(missing: str, tmp_path: Path) -> None:
    data = yaml.safe_load(EXAMPLE.read_text())
    del data[missing]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=f"'{missing}' is missing"):
        load_config(path)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "3"])
def test_files_that_are_no_configuration(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)


def test_defaults_are_valid() -> None:
    Config(model="resnet18", data={"name": "digits"}, budget=0.5)
