"""Checkpoints of other runs are refused in one line."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule

from cogview_pl.assembly.strategy import DEEPSPEED
from cogview_pl.errors import UserError
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.resume import checkpoint_of, remember_in_checkpoints, require_same_run
from cogview_pl.runs.run_folder import RunFolder

IDENTITY: dict[str, Any] = {
    "kind": "sequence_model",
    "settings": {"hidden_size": 96},
    "inputs": {"data.token_store": "aa"},
}
WHOLE: dict[str, Any] = {
    "state_dict": {"w": torch.zeros(2)},
    "optimizer_states": [{"state": {}}],
    "lr_schedulers": [],
    "loops": {"fit_loop": {}},
    "callbacks": {},
    "global_step": 7,
    "cogview_pl": {**IDENTITY, "metrics": {"val/loss": 0.5}},
}
CHANGES: dict[str, tuple[Any, str]] = {
    "no dictionary": ([1], "cannot be read"),
    "nothing of ours": ({"cogview_pl": None}, "cannot be read"),
    "a list of ours": ({"cogview_pl": [1]}, "cannot be read"),
    "settings that are a list": ({"cogview_pl": {**WHOLE["cogview_pl"], "settings": [1]}}, "its settings are no dict"),
    "inputs that are a text": ({"cogview_pl": {**WHOLE["cogview_pl"], "inputs": "aa"}}, "its inputs are no dictionary"),
    "metrics that are a list": ({"cogview_pl": {**WHOLE["cogview_pl"], "metrics": [1]}}, "its metrics are no dict"),
    "no kind": (
        {"cogview_pl": {**WHOLE["cogview_pl"], "kind": None}},
        "of stage None, this task trains",
    ),
    "schedules of another type": ({"lr_schedulers": {}}, "its lr_schedulers are no list, or empty"),
    "callbacks of another type": ({"callbacks": [1]}, "its callbacks are no dict, or empty"),
    "no settings": ({"cogview_pl": {"kind": "sequence_model"}}, "it has no 'settings'"),
    "no optimizer": ({"optimizer_states": []}, "optimizer_states"),
    "no loops": ({"loops": {}}, "loops"),
    "no weights": ({"state_dict": [1]}, "state_dict"),
    "metrics without numbers": ({"cogview_pl": {**IDENTITY, "metrics": {"a": "x"}}}, "cannot be read"),
    "another stage": ({"cogview_pl": {**WHOLE["cogview_pl"], "kind": "image_tokenizer"}}, "of stage image_tokenizer"),
    "another model": (
        {"cogview_pl": {**WHOLE["cogview_pl"], "settings": {"hidden_size": 64}}},
        "trained with hidden_size=64",
    ),
    "a setting more": (
        {"cogview_pl": {**WHOLE["cogview_pl"], "settings": {"hidden_size": 96, "depth": 2}}},
        "depth=2, this",
    ),
    "a setting less": ({"cogview_pl": {**WHOLE["cogview_pl"], "settings": {}}}, "hidden_size=None, this run has 96"),
    "other data": (
        {"cogview_pl": {**WHOLE["cogview_pl"], "inputs": {"data.token_store": "bb"}}},
        "data.token_store has changed",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    content, words = CHANGES[change]
    torch.save({**WHOLE, **content} if isinstance(content, dict) else content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=words) as error:
        require_same_run(tmp_path / "last.ckpt", IDENTITY, verify=True)
    assert "\n" not in str(error.value) and "last.ckpt" in str(error.value)


def test_what_fits_gives_its_metrics(tmp_path: Path) -> None:
    checkpoint = deepcopy(WHOLE)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert require_same_run(tmp_path / "last.ckpt", IDENTITY, verify=True) == (7, {"val/loss": 0.5})
    others = {**IDENTITY, "inputs": {"data.token_store": "bb"}}
    assert require_same_run(tmp_path / "last.ckpt", others, verify=False) == (7, {"val/loss": 0.5})


def test_checkpoints_of_earlier_versions_note_no_inputs(tmp_path: Path) -> None:
    ours = {name: value for name, value in WHOLE["cogview_pl"].items() if name != "inputs"}
    torch.save({**WHOLE, "cogview_pl": {**ours, "metrics": {"val/loss": 2}}}, tmp_path / "last.ckpt")
    _, metrics = require_same_run(tmp_path / "last.ckpt", IDENTITY, verify=True)
    assert metrics == {"val/loss": 2.0} and type(metrics["val/loss"]) is float


def test_a_damaged_checkpoint_names_the_newest_other_one(tmp_path: Path) -> None:
    """Torch loads flipped bits of weights without an error."""
    file = tmp_path / "last.ckpt"
    torch.save({**WHOLE, "state_dict": {"w": torch.full((99,), 2.0)}}, file)
    data = bytearray(file.read_bytes())
    data[data.index(b"\x00\x00\x00\x40" * 9)] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError) as error:
        require_same_run(file, IDENTITY, verify=True)
    assert str(error.value).startswith(f"resume: {file} cannot be read (the checksum of ")
    assert str(error.value).endswith("/data/0 is wrong); it is damaged or not one of our checkpoints")
    for name in ("step_4.ckpt", "step_2.ckpt", "step_9.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"checkpoints; go on from another one: resume={tmp_path}/step_4\.ckpt$"):
        require_same_run(file, IDENTITY, verify=True)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    torch.save({**WHOLE, "callbacks": {"any": Touch(tmp_path / "touched")}}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read \(Weights only load failed"):
        require_same_run(tmp_path / "last.ckpt", IDENTITY, verify=True)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"half of a file"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read \(File is not a zip file\); it is damaged"):
        require_same_run(tmp_path / "last.ckpt", IDENTITY, verify=True)


def test_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """The named checkpoint, else the last one of the folder; DeepSpeed's last one is a folder."""

    def of(resume: object, kind: StrategyKind = StrategyKind.single) -> Path | None:
        return checkpoint_of(folder, resume, folders=kind in DEEPSPEED)

    folder = RunFolder(tmp_path, None, goes_on=True)
    last, step = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "step_4.ckpt"))
    assert of(str(tmp_path)) is None and of(True) is None  # a run that ended before its first checkpoint
    step.parent.mkdir()
    step.touch()
    last.touch()
    assert of(None) is None
    assert of(True) == of(str(tmp_path)) == last
    assert of(str(step)) == step
    last.unlink()
    last.mkdir()
    for kind in (StrategyKind.deepspeed_2, StrategyKind.deepspeed_3):
        assert of(True, kind) == last
    assert require_same_run(last, IDENTITY, verify=True) == (0, {})  # DeepSpeed checks its own checkpoints
    for kind in (StrategyKind.single, StrategyKind.ddp, StrategyKind.fsdp):
        with pytest.raises(UserError, match=rf"^resume: {last} is a folder, as DeepSpeed's checkpoints are; "):
            of(True, kind)


class Module(LightningModule):
    """A module that adds an entry of its own to checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


def test_a_checkpoint_carries_its_run_and_the_metrics_that_were_logged_last() -> None:
    module = Module()
    remember_in_checkpoints(module, IDENTITY, {"train/loss": 0.5, "val/loss": 0.75})
    module.trainer = SimpleNamespace(callback_metrics={"train/loss": torch.tensor(0.25)})  # type: ignore[assignment]
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint == {"mine": 1, "cogview_pl": {**IDENTITY, "metrics": {"train/loss": 0.25, "val/loss": 0.75}}}
    assert type(checkpoint["cogview_pl"]["metrics"]["train/loss"]) is float
