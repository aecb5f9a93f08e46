"""The import direction of the package, read from its sources.

run → tasks → {lit, evaluation, planning} → {generation, data, checkpoints} → {transformer | vqvae} → {linear, gpu},
and vocab
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "cogview_pl"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

MIDDLE = {"generation", "data", "checkpoints"}
MATHS = {"transformer", "vqvae", "vocab"}

ALLOWED = {
    "errors": set(),
    "durable": set(),
    "files": set(),
    "stopping": set(),
    "gpu": set(),
    "linear": set(),
    "vocab": set(),
    "transformer": {"linear", "gpu"},
    "vqvae": {"linear", "gpu"},
    "data": MATHS,
    "checkpoints": MATHS,
    "generation": MATHS | {"checkpoints", "gpu"},
    "evaluation": MIDDLE | MATHS,
    "lit": MIDDLE | MATHS,
    "planning": MIDDLE | MATHS | {"linear"},
    "choices": set(),
    "config": {"choices"},
    "limits": set(),
    "sweep": set(),
    "shell": set(),
    "streams": set(),
    "tasks": MIDDLE | MATHS | {"evaluation", "planning", "lit", "config", "choices", "gpu"},
    "run": {"tasks", "choices", "config", "limits", "sweep", "shell", "streams"},
    "": {"generation"},  # cogview_pl/__init__.py offers CogView
}
"""Part of the package → the parts that it may import besides itself and those that all may import."""
FOR_ALL = {"errors", "durable", "files", "stopping"}


def part(file: Path) -> str:
    """First name below the package: `data` for data/toy/draw.py, `run` for run.py."""
    first = file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(file: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, anywhere in it."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from cogview_pl import data` names a part as well as `from cogview_pl.data import …`.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts_imported(file: Path) -> set[str]:
    names = (name.split(".") for name in imported(file))
    return {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}


def third_parties(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(file)}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_direction_of_imports(file: Path) -> None:
    assert part(file) in ALLOWED, f"{name_of(file)}: a new part of the package needs its place in ALLOWED"
    stray = parts_imported(file) - ALLOWED[part(file)] - {part(file)} - FOR_ALL
    assert not stray, f"{name_of(file)} must not import {', '.join(sorted(stray))}"


def importers(library: str) -> set[str]:
    return {part(file) for file in FILES if library in third_parties(file)}


def test_only_lit_and_tasks_know_lightning() -> None:
    assert importers("lightning") | importers("pytorch_lightning") <= {"lit", "tasks"}
    assert "lit" in importers("lightning")  # the test can tell


def test_only_run_config_and_sweep_know_hydra() -> None:
    assert importers("hydra") <= {"run", "config", "sweep"}
    assert "run" in importers("hydra")


@pytest.mark.parametrize("maths", ["transformer", "vqvae"])
def test_maths_import_torch_only(maths: str) -> None:
    files = [file for file in FILES if part(file) == maths]
    assert files
    for file in files:
        known = {"torch", "triton"} if file.name == "gpu_kernels.py" else {"torch"}
        stray = third_parties(file) - set(sys.stdlib_module_names) - {PACKAGE} - known
        assert not stray, f"{name_of(file)} imports {', '.join(sorted(stray))}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_stay_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
