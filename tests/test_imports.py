from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nni_dbs
import torch_pruning_adapters

ROOT = Path(nni_dbs.__file__).parents[1]

LAYERS = (
    ("errors", "files", "batches"),
    ("space", "cost"),
    ("supernet", "latency", "projection", "pool", "slimmable", "sampling", "steps", "bilevel", "evaluate"),
    ("algorithms", "predict", "search", "guided"),
    ("models", "result", "problem", "study", "config", "data", "training", "plot", "plot_search", "report"),
    ("plugin",),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def modules_of(package: str) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports_of(path: Path) -> Iterator[str]:
    """All modules that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            assert node.module is not None
            yield node.module
            if node.module == "nni_dbs":
                yield from (f"nni_dbs.{name.name}" for name in node.names)


def part_of(module: str) -> str | None:
    """`plugin` for `nni_dbs.plugin.pruner`; None for the package itself and what is not ours."""
    names = module.split(".")
    return names[1] if names[0] == "nni_dbs" and len(names) > 1 else None


CORE = [m for m in modules_of("nni_dbs") if part_of(m) not in ("plugin", "cli")]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap() -> None:
    heavy = {"torch", "torchvision", "nni", "torch_pruning", "numpy", "yaml", "matplotlib"}
    assert run(f"import sys, nni_dbs; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_core_runs_without_nni() -> None:
    code = (
        "import importlib, sys\n"
        "sys.modules['nni'] = None\n"  # whoever imports it fails
        f"for name in {CORE}: importlib.import_module(name)\n"
        "import nni_dbs; nni_dbs.load_pruned, nni_dbs.WidthSpace, nni_dbs.FlopsCost\n"
    )
    run(code)


def test_adapters_run_alone() -> None:
    names = list(modules_of("torch_pruning_adapters"))
    code = (
        "import importlib, sys\n"
        "sys.modules['nni'] = sys.modules['nni_dbs'] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    run(code)


@pytest.mark.parametrize("module", modules_of("torch_pruning_adapters"))
def test_adapters_import_neither_package(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(modules_of("torch_pruning_adapters")[module])}
    assert not roots & {"nni", "nni_dbs"}


@pytest.mark.parametrize("module", [m for m in modules_of("nni_dbs") if part_of(m)])
def test_imports_run_one_way(module: str) -> None:
    part = part_of(module)
    assert part in RANK, f"say in LAYERS where {module} belongs"
    for imported in imports_of(modules_of("nni_dbs")[module]):
        assert imported.split(".")[0] != "nni" or part == "plugin", f"{module} imports {imported}"
        other = part_of(imported)
        if other is not None and other in RANK:
            assert RANK[other] <= RANK[part], f"{module} imports {imported}, which comes later"


def test_every_public_name_loads() -> None:
    assert set(nni_dbs.__all__) <= set(dir(nni_dbs))
    for name in nni_dbs.__all__:
        assert getattr(nni_dbs, name).__name__ == name
    for name in torch_pruning_adapters.__all__:
        assert getattr(torch_pruning_adapters, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DBSPrunner'"):
        nni_dbs.DBSPrunner  # noqa: B018
    with pytest.raises(ImportError, match="DBSPrunner"):
        from nni_dbs import DBSPrunner  # noqa: F401
