"""Files that are replaced are the old or the new ones, and a full disk is one line."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cogview_pl.durable import append, clear_for_writing, replacing, write_text
from cogview_pl.errors import UserError
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.tasks.pictures import save_picture

LIMIT = 1000


def limited(function: Callable[[], object]) -> str:
    """The message of the UserError that a function raises where no file may be larger than `LIMIT` bytes."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        try:
            function()
            message = "no error"
        except UserError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        os.write(send, message.encode())
        os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive) as stream:
        return stream.read()


def torch_checkpoint(file: Path) -> None:
    DurableCheckpointIO().save_checkpoint({"a": torch.zeros(5000)}, file)


def safetensors(file: Path) -> None:
    with replacing(file) as draft:
        save_file({"a": torch.zeros(5000)}, draft)


@pytest.mark.parametrize(
    "write",
    [
        torch_checkpoint,
        safetensors,
        lambda file: write_text(file, "x" * 5000),
        lambda file: save_picture(Image.effect_noise((200, 200), 50), file),
    ],
    ids=["checkpoint", "weights", "text", "picture"],
)
def test_a_full_disk_leaves_the_old_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    message = limited(lambda: write(file))
    assert message.startswith(f"{file}: no space left on the disk") and "\n" not in message
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_appending_to_a_full_disk_says_so(tmp_path: Path) -> None:
    file = tmp_path / "rows.bin"
    append(file, b"0123")
    assert "no space left" in limited(lambda: append(file, bytes(5000)))
    assert file.read_bytes()[:4] == b"0123"


def test_an_error_on_the_way_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    with pytest.raises(ZeroDivisionError), replacing(file) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_drafts_of_killed_runs_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "last.ckpt"
    file.write_bytes(b"whole")
    (tmp_path / "checkpoints" / ".chapter1.draft").write_text("somebody else's")
    child = os.fork()
    if not child:
        with replacing(file) as draft:
            draft.write_bytes(b"half")
            os._exit(0)  # as a kill does
    os.waitpid(child, 0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    clear_for_writing(tmp_path)
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == [".chapter1.draft", "last.ckpt"]
    assert file.read_bytes() == b"whole"


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Neither a file nor a folder inside a run leads out of it; links that stay inside are fine."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    (outside / "diary.txt").write_text("dear diary")
    (run / "inside.txt").write_text("x")
    (run / "link").symlink_to("inside.txt")
    clear_for_writing(run)
    with replacing(run / "config.yaml") as draft:
        name = draft.name
    for place in (run / name, run / "samples.jsonl"):
        place.symlink_to(outside / "diary.txt")
        with pytest.raises(UserError, match=rf"{place} is a link that leads out of the run folder"):
            clear_for_writing(run)
        if place.name == name:
            write_text(run / "config.yaml", "a: 1")  # the link itself goes away
        else:
            with pytest.raises(OSError):
                append(place, b"more")
            place.unlink()
    (run / "checkpoints").symlink_to(outside)
    with pytest.raises(UserError, match="checkpoints is a link"):
        clear_for_writing(run)
    (run / "checkpoints").unlink()
    os.mkfifo(run / "pipe")
    with pytest.raises(UserError, match="pipe is neither a file nor a folder"):
        clear_for_writing(run)
    assert (outside / "diary.txt").read_text() == "dear diary" and os.listdir(outside) == ["diary.txt"]
