"""Documents name only what exists: files, links, modules, nox sessions and configuration keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").glob("*/README.md")),
]
OURS = ("cogview_pl", "conf", "tests", "docs", "benchmarks", "experiments")
PLACEHOLDER = re.compile(r"[A-Z]{2,}|[…*]|^(my_|outputs/|model/|\.)")
"""Paths that a reader fills in, and files that a reader or a run makes."""
MADE_BY_RUNS = {
    "config.yaml",
    "config.resumed-2.yaml",
    "config.resumed-3.yaml",
    "metrics.json",
    "manifest.json",
    "bad_batch.json",
    "cogview_pl.json",
}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def code(document: Path) -> Iterator[str]:
    """Everything in backticks on one line, and every line of a shell block."""
    text = document.read_text(encoding="utf-8")
    yield from (span for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for span in block.splitlines())
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def paths(document: Path) -> Iterator[str]:
    """Files with an ending, and folders of the project, that a document names in backticks."""
    for span in code(document):
        if re.fullmatch(r"[\w./-]+\.(py|yaml|md|toml|json|bin)", span) or re.fullmatch(
            rf"({'|'.join(OURS)})(/[\w.-]+)*/?", span
        ):
            yield span


def exists(path: str, document: Path) -> bool:
    """Relative to the root, the package, the document, or, in a page on one room, to that room."""
    rooms = re.findall(r"`(\w+)/`", document.read_text(encoding="utf-8").splitlines()[0])
    places = [ROOT, ROOT / "cogview_pl", document.parent, *(ROOT / "cogview_pl" / room for room in rooms)]
    if any((place / path).exists() for place in places):
        return True
    return "/" not in path and any((ROOT / "cogview_pl").rglob(path))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_exist(document: Path) -> None:
    named = {path for path in paths(document) if path not in MADE_BY_RUNS and not PLACEHOLDER.search(path)}
    assert not {path for path in named if not exists(path, document)}


def test_paths_are_found() -> None:
    """The test can tell: it sees the paths of the page that names most, and misses one that is not there."""
    architecture = ROOT / "docs" / "architecture.md"
    found = set(paths(architecture))
    assert {"vocab/template.py", "tests/test_architecture.py", "conf/sampler/default.yaml"} <= found
    assert exists("vocab/template.py", architecture)
    assert not exists("vocab/no_such_file.py", architecture)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert not {link for link in links if not (document.parent / link).exists()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_modules_and_sessions_exist(document: Path) -> None:
    spans = list(code(document))
    modules = {
        name for span in spans for name in re.findall(r"python3? -m ((?:cogview_pl|benchmarks|tests)[\w.]+)", span)
    }
    files = {name: (ROOT / name.replace(".", "/")) for name in modules}
    assert not {
        name
        for name, file in files.items()
        if not (file.with_suffix(".py").exists() or (file / "__main__.py").exists())
    }
    sessions = {name for span in spans for name in re.findall(r"nox -s (\w+)", span)}
    known = set(re.findall(r"^def (\w+)\(", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE))
    assert sessions <= known


def known_keys() -> set[str]:
    """Groups, keys in the YAML files of the project, and fields of the dataclasses of options."""
    found = {file.parent.relative_to(ROOT / "conf").as_posix() for file in (ROOT / "conf").rglob("*.yaml")}
    for file in (*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")):
        found |= set(re.findall(r"^ *(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE))
    for file in (ROOT / "cogview_pl").rglob("config.py"):
        found |= set(re.findall(r"^    (\w+): ", file.read_text(encoding="utf-8"), re.MULTILINE))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_keys_exist(document: Path) -> None:
    """The last word of each KEY=VALUE is a key of some group; +KEY=VALUE adds one."""
    overrides = {key for span in code(document) for key in re.findall(r"(?:^|[\s'])([a-z_][\w./]*)=", span)}
    ours = {key for key in overrides if not re.match(r"hydra[./]", key)}  # Hydra has keys of its own
    assert not {key for key in ours if key.split(".")[-1] not in known_keys() | {"experiment", "weights_only"}}
