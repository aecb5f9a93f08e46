"""A replaced file has its old or its new content, and a full disk ends in one line."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cogview_pl.durable.write import (
    append,
    clear_for_writing,
    disk_full_named,
    is_disk_full,
    is_draft,
    replacing,
    write_bytes,
    write_text,
)
from cogview_pl.errors import UserError
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.runs.image_files import save_image

LIMIT = 1000


def limited(function: Callable[[], object]) -> str:
    """Message of the UserError that a function raises if files are limited to `LIMIT` bytes."""
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
        lambda file: save_image(Image.effect_noise((200, 200), 50), file),
    ],
    ids=["checkpoint", "weights", "text", "image"],
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
    """Links to files or folders outside the run are refused; links inside it are allowed."""
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
            write_text(run / "config.yaml", "a: 1")  # the link itself is deleted
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


# --- writing


def next_descriptor() -> int:
    """The lowest free file descriptor of this process."""
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def test_what_is_written_is_what_is_there(tmp_path: Path) -> None:
    file, free = tmp_path / "file", next_descriptor()
    for text in ("鹿", "two\nlines"):  # the second replaces the first
        write_text(file, text)
        assert file.read_bytes() == text.encode()
    write_bytes(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    append(file, b"ab")
    append(file, b"c")
    assert file.read_bytes() == b"\x00\xffabc"
    append(tmp_path / "new", b"d")
    assert (tmp_path / "new").read_bytes() == b"d" and sorted(os.listdir(tmp_path)) == ["file", "new"]
    assert next_descriptor() == free  # each file and folder has been closed


def test_files_have_the_rights_that_the_user_gives_to_new_ones(tmp_path: Path) -> None:
    for mask, wanted in ((0o000, 0o666), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            write_text(tmp_path / "replaced", "x")
            append(tmp_path / f"appended {mask}", b"x")
        finally:
            os.umask(before)
        for name in ("replaced", f"appended {mask}"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == wanted


def test_content_reaches_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another order a power cut could replace the old file by an empty one."""
    done: list[tuple[object, ...]] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("sync", place, place.read_text() if place.is_file() else None))
        sync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        done.append(("replace", old, new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    file = tmp_path / "file"
    with replacing(file) as draft:
        draft.write_text("new")
    assert draft.parent == tmp_path and is_draft(draft.name)
    assert done == [("sync", draft, "new"), ("replace", draft, file), ("sync", tmp_path, None)]
    append(file, b" and more")
    assert done[3:] == [("sync", file, "new and more")]


def test_a_draft_that_a_kill_left_is_written_over(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replacing(file) as draft:
        pass
    draft.write_text("half of something that was longer")
    write_text(file, "new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["file"]


# --- no space


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_no_space_at_any_call_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """The system may also fail at other calls: creating a name, syncing or renaming."""
    file = tmp_path / "file"
    write_text(file, "old")

    def full(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as context, pytest.raises(UserError) as error:
        context.setattr(os, call, full)
        write_text(file, "new")
    assert str(error.value).startswith(f"{file}: no space left on the disk") and "\n" not in str(error.value)
    assert str(error.value).endswith("; free some, then go on")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_folder_without_space_after_the_move_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, file = os.fsync, tmp_path / "file"

    def full(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)

    with monkeypatch.context() as context, pytest.raises(UserError, match=rf"^{file}: no space left"):
        context.setattr(os, "fsync", full)
        write_text(file, "new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def caused(error: Exception, by: Exception | None, of: Exception | None = None) -> Exception:
    """An error that has a full disk as its cause or context."""
    error.__cause__, error.__context__ = by, of
    return error


FULL = OSError(errno.ENOSPC, "x")
IS_FULL: dict[str, tuple[BaseException | None, bool]] = {
    "the disk": (FULL, True),
    "the quota": (OSError(errno.EDQUOT, "x"), True),
    "the largest file": (OSError(errno.EFBIG, "x"), True),
    "a library's words for the disk": (RuntimeError("I/O error: No space left on device (os error 28)"), True),
    "a library's words for the quota": (RuntimeError("write: Disk quota exceeded"), True),
    "a library's words for the largest file": (RuntimeError("File too large"), True),
    "the cause of the cause": (caused(ValueError("a"), caused(ValueError("b"), FULL)), True),
    "a context": (caused(ValueError("a"), None, FULL), True),
    "nothing": (None, False),
    "a broken disk": (OSError(errno.EIO, "x"), False),
    "another error with that number": (caused(ValueError(errno.ENOSPC), OSError(errno.EACCES, "x")), False),
}


@pytest.mark.parametrize("case", IS_FULL)
def test_what_counts_as_a_full_disk(case: str, tmp_path: Path) -> None:
    error, wanted = IS_FULL[case]
    assert is_disk_full(error) is wanted
    if error is not None:
        with pytest.raises(UserError if wanted else type(error)) as raised, disk_full_named(tmp_path / "file"):
            raise error
        assert (raised.value is error) is not wanted
        assert ("file: no space left" in str(raised.value)) is wanted


def test_the_file_that_found_no_space_first_is_named(tmp_path: Path) -> None:
    outer, inner = (disk_full_named(tmp_path / name) for name in ("outer", "inner"))
    with pytest.raises(UserError, match=r"inner: no space left"), outer, inner:
        raise FULL


# --- clearing


def test_only_names_of_ours_are_drafts() -> None:
    names = {".a.ckpt.cogview_pl-draft": True, "a.ckpt.cogview_pl-draft": False, ".a.draft": False, ".a": False}
    assert {name: is_draft(name) for name in names} == names


def test_nothing_is_cleared_away_where_something_is_refused(tmp_path: Path) -> None:
    """Drafts are deleted at any depth; folders and files of the user stay."""
    run = tmp_path / "run"
    drafts = [run / ".a.cogview_pl-draft", run / "b" / "c" / ".d.cogview_pl-draft"]
    (run / "b" / "c").mkdir(parents=True)
    (run / ".folder.cogview_pl-draft").mkdir()
    for file in (*drafts, run / "b" / "kept"):
        file.touch()
    (run / "b" / "up").symlink_to("c")
    (run / "z").mkdir()
    os.mkfifo(run / "z" / "pipe")
    with pytest.raises(UserError, match=rf"^{run}/z/pipe is neither a file nor a folder.*; delete it$"):
        clear_for_writing(run)
    (run / "z" / "pipe").unlink()
    (run / "z" / "link").symlink_to("../../elsewhere")
    with pytest.raises(UserError, match=r"z/link is a link that leads out of the run folder, to \.\./\.\./elsewhere; "):
        clear_for_writing(run)
    (run / "z" / "link").unlink()
    assert all(draft.exists() for draft in drafts)
    clear_for_writing(run)
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    assert left == [".folder.cogview_pl-draft", "b", "b/c", "b/kept", "b/up", "z"]
