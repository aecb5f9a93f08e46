"""Folders and archives with any content: reading them gives a result, or an error in one line.

Manifests are written anew after each change, as somebody does who changes files on purpose; nothing else would get past
them. Always the same 800 cases, in this process.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cogview_pl.checkpoints.adapter_folder import load_adapted
from cogview_pl.checkpoints.model_folder import load_sequence_model
from cogview_pl.errors import UserError
from cogview_pl.evaluation.features import open_features
from cogview_pl.runs.record import RECORD, RunRecord

from ..checkpoints.saved import forge_manifest, save_run, save_tokenizer
from ..checkpoints.test_adapter_folder import finetune
from .test_fuzz import ANY_TEXT, SHARED, TREES

pytestmark = pytest.mark.slow

LARGE = st.sampled_from([0, -1, 10**9, 10**12, 2**63, 1e308, "x", None, [], {}, True, "${oc.env:HOME}"])


@contextmanager
def one_line_at_most() -> Iterator[None]:
    """Call a function; it must return a result, or raise a UserError in one line."""
    try:
        yield
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error) and "Traceback" not in str(error)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small sequence model, and another one with an adapter for it."""
    folder = tmp_path_factory.mktemp("folders")
    found = save_run(folder / "run", save_tokenizer(folder / "tokenizer" / "model"))
    finetune(folder / "finetune", found)
    return found


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """A file with other content and a forged manifest inside the block; both are restored."""
    manifest = file.with_name("manifest.json")
    before, noted = file.read_bytes(), manifest.read_bytes()
    try:
        file.write_bytes(content)
        if file != manifest:
            forge_manifest(file.parent)
        if file.parent.name == "image_tokenizer":
            forge_manifest(file.parents[1])
        yield
    finally:
        file.write_bytes(before)
        manifest.write_bytes(noted)
        if file.parent.name == "image_tokenizer":
            forge_manifest(file.parents[1])


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of the values of nested mappings and lists."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(found for key, value in inner for found in paths(value, (*path, key)))][0 if path else 1 :]


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one value changed."""
    tree = copy.deepcopy(tree)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


CONFIGS = ["run/model", "run/model/image_tokenizer", "finetune/adapter"]


@settings(max_examples=200, **SHARED)
@given(data=st.data())
def test_settings_of_folders(run: Path, data: st.DataObject) -> None:
    """Any value of a config.yaml is changed."""
    file = run.parent / data.draw(st.sampled_from(CONFIGS)) / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    path = data.draw(st.sampled_from(paths(tree)))
    tree = with_value(tree, path, data.draw(st.one_of(LARGE, TREES)))
    with changed(file, yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "replace")), one_line_at_most():
        load_adapted(run.parent / file.relative_to(run.parent).parts[0])


@settings(max_examples=150, **SHARED)
@given(
    name=st.sampled_from(CONFIGS),
    content=st.one_of(st.binary(max_size=200), ANY_TEXT.map(lambda t: t.encode("utf-8", "surrogatepass"))),
)
@example("run/model", b"[" * 60_000)
@example("run/model", b"a: &a [*a]")
@example("run/model", b"\xff\xfe")
def test_any_bytes_as_settings(run: Path, name: str, content: bytes) -> None:
    file = run.parent / name / "config.yaml"
    with changed(file, content), pytest.raises(UserError) as error:
        load_adapted(run.parent / name.split("/")[0])
    assert "\n" not in str(error.value)


@settings(max_examples=150, **SHARED)
@given(data=st.data())
def test_headers_of_weights(run: Path, data: st.DataObject) -> None:
    """Bytes of the header of a safetensors file, including its length."""
    name = data.draw(
        st.sampled_from(["run/model/weights", "run/model/image_tokenizer/weights", "finetune/adapter/adapter"])
    )
    file = run.parent / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for place in data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    with changed(file, bytes(content)), one_line_at_most():
        load_adapted(run.parent / name.split("/")[0])


@settings(max_examples=100, **SHARED)
@given(content=st.one_of(st.binary(max_size=100), TREES.map(lambda tree: json.dumps(tree).encode())))
@example(b"[" * 100_000)
def test_manifests(run: Path, content: bytes) -> None:
    with changed(run / "model" / "manifest.json", content), pytest.raises(UserError) as error:
        load_sequence_model(run)
    assert "\n" not in str(error.value) and "manifest.json" in str(error.value)


@settings(max_examples=100, **SHARED)
@given(content=st.one_of(st.binary(max_size=100), TREES.map(lambda tree: json.dumps(tree).encode())))
@example(b"[" * 100_000)
def test_records_of_runs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(UserError) as error:
        RunRecord.load(tmp_path)
    assert "\n" not in str(error.value) and RECORD in str(error.value)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The entries of a TorchScript archive that writes a file when it is called."""

    class Writes(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch.save("written", "written.pt")
            return images.flatten(1)

    file = tmp_path_factory.mktemp("program") / "program.pt"
    torch.jit.save(torch.jit.script(Writes()), file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def respelled(name: str, how: str) -> str:
    return {"as is": name, "upper": name.upper(), "title": name.title(), "backslash": name.replace("/", "\\")}[how]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(max_examples=100, **SHARED)
@given(data=st.data())
def test_programs_are_never_opened_unasked(
    program: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """With any spelling, repetition, order, compression or omission of its entries, and with any bytes before them."""
    home = tmp_path / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    names = data.draw(st.lists(st.sampled_from(sorted(program)), min_size=1, max_size=len(program) + 2))
    with zipfile.ZipFile(tmp_path / "network.pt", "w") as archive:
        for name in names:
            spelled = respelled(name, data.draw(st.sampled_from(["as is", "as is", "upper", "title", "backslash"])))
            kind = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
            archive.writestr(spelled, program[name], compress_type=kind)
    content = data.draw(st.binary(max_size=8)) + (tmp_path / "network.pt").read_bytes()
    (tmp_path / "network.pt").write_bytes(content)
    monkeypatch.chdir(home)
    with pytest.raises(UserError) as error:
        open_features(tmp_path / "network.pt", device="cpu", resolution=8, trust=False, verify=True)
    assert "\n" not in str(error.value) and os.listdir(home) == []
