"""The structure of the package, read from its sources: which room imports which, who takes the whole configuration."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "cogview_pl"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

FLOORS = (
    {"run"},
    {"tasks"},
    {"cli"},
    {"config"},
    {"assembly", "memory", "runs"},
    {"lit", "evaluation"},
    {"generation", "data", "toy_world"},
    {"checkpoints"},
    {"transformer", "vqvae"},
    {"kernels"},
    {"vocab"},
)
"""Rooms, high to low. A room may import those below it; those on one floor only where `BESIDE` says so."""
BESIDE = {
    ("assembly", "runs"),
    ("assembly", "memory"),
    ("memory", "assembly"),
    ("evaluation", "lit"),
    ("generation", "data"),
    ("data", "generation"),
    ("toy_world", "data"),
    ("data", "toy_world"),
}
CONFIG_ROOMS = {"tasks", "config", "run"}
"""Rooms whose functions may take the whole configuration."""
FOR_ALL = {"errors", "durable", "limits"}
"""Rooms that every room may import; they import none."""


def part(file: Path) -> str:
    """First name below the package: `data` for data/token_store/rows.py, `run` for run.py."""
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


def floor(room: str) -> int:
    found = [level for level, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{room}: a new room of the package needs its place in FLOORS"
    return found[0]


def may_import(room: str, other: str) -> bool:
    if other in FOR_ALL or room == other or (room, other) in BESIDE:
        return True
    if room in FOR_ALL:
        return False
    if not room:  # cogview_pl/__init__.py offers CogView, Sampling and run
        return other in {"assembly", "generation", "run"}
    return floor(room) < floor(other)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_direction_of_imports(file: Path) -> None:
    stray = {other for other in parts_imported(file) if not may_import(part(file), other)}
    assert not stray, f"{name_of(file)} must not import {', '.join(sorted(stray))}"


def test_no_verb_imports_a_verb() -> None:
    verbs = [file for file in FILES if part(file) == "tasks"]
    assert verbs
    for file in verbs:
        assert "tasks" not in parts_imported(file), f"{name_of(file)} imports another verb"


def takers_of_config(file: Path) -> Iterator[str]:
    """Functions of a file that take the whole configuration."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            hints = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
            if any(re.search(r"\bConfig\b", hint) for hint in hints):
                yield node.name


def test_only_verbs_take_the_whole_configuration() -> None:
    """Builders take the part that they need, so that their signature says what that is."""
    takers = {name_of(file): list(takers_of_config(file)) for file in FILES}
    assert sum(map(len, takers.values())) > 0  # the test can tell
    stray = {
        name: found for name, found in takers.items() if found and part(ROOT / name) not in {"tasks", "config", "run"}
    }
    assert not stray


def importers(library: str) -> set[str]:
    return {part(file) for file in FILES if library in third_parties(file)}


def test_who_knows_lightning() -> None:
    assert importers("lightning") | importers("pytorch_lightning") <= {"lit", "assembly", "runs"}
    assert "lit" in importers("lightning")  # the test can tell


def test_who_knows_hydra() -> None:
    assert importers("hydra") <= {"run", "config", "cli", "assembly"}
    assert "run" in importers("hydra")


@pytest.mark.parametrize("maths", ["transformer", "vqvae"])
def test_maths_import_torch_only(maths: str) -> None:
    files = [file for file in FILES if part(file) == maths]
    assert files
    for file in files:
        stray = third_parties(file) - set(sys.stdlib_module_names) - {PACKAGE, "torch"}
        assert not stray, f"{name_of(file)} imports {', '.join(sorted(stray))}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_stay_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
