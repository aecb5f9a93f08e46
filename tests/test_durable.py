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

from cogview_pl.durable import append, remove_drafts, replacing, write_text
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
    (tmp_path / "checkpoints" / ".last.ckpt.draft").write_bytes(b"half")
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"whole")
    remove_drafts(tmp_path)
    assert [file.name for file in tmp_path.rglob("*.*")] == ["last.ckpt"]
