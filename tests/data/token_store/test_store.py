"""Token store: what goes in comes out, and a killed writer goes on as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError

from .stores import SETTINGS, append, content, edit_header, sample, tokenize


def test_rows_come_back(store: Path) -> None:
    for split, size in SETTINGS["splits"].items():
        rows = TokenStore.open(store).split(split)
        wanted = [found for found in (sample(split, i) for i in range(size)) if found]
        assert len(rows) == len(wanted)
        assert rows.keys() == [key for _, _, key in wanted]
        for index, (text_tokens, codes, _) in enumerate(wanted):
            assert rows[index][0]["text"] == text_tokens[:4]
            assert torch.equal(rows[index][1], codes) and rows[index][1].dtype == torch.int64
    assert rows[-1][0]["text"] == rows[len(rows) - 1][0]["text"]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_layout_on_disk(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS | {"splits": {"train": 2}})
    writer.append("train", {"text": [[1, 2], [3, 4, 5, 6, 7]]}, torch.arange(12).reshape(2, 2, 3), ["a\nb", "c"], 2)
    writer.finish()
    rows = np.fromfile(tmp_path / "train.bin", dtype="<u2").reshape(2, 10)
    assert rows.tolist() == [[1, 2, 65535, 65535, *range(6)], [3, 4, 5, 6, *range(6, 12)]]
    assert (tmp_path / "train.keys.txt").read_text() == "a b\nc\n"
    header = json.loads((tmp_path / "header.json").read_text())
    del header["crc32"]
    assert header == {
        "version": 1,
        "dtype": "uint16",
        "text_length": 4,
        "grid": [2, 3],
        "text_vocab_size": 500,
        "codebook_size": 64,
        "format": "native",
        "large": False,
        "text_tokenizer": "text-1",
        "image_tokenizer": "image-1",
        "splits": {
            "train": {
                "source": 2,
                "next": 2,
                "rows": 2,
                "truncated": 1,
                "key_bytes": 6,
                "keys_crc32": zlib.crc32(b"a b\nc\n"),
                "sums_crc32": zlib.crc32((tmp_path / "train.crc32").read_bytes()),
            }
        },
        "complete": True,
        "checksums": True,
    }


def test_a_store_from_before_large_codes_opens(store: Path) -> None:
    edit_header(store)
    header = json.loads((store / "header.json").read_text())
    del header["large"]
    (store / "header.json").write_text(json.dumps(header))
    assert TokenStore.open(store).split("train")[1][0]["text"] == sample("train", 1)[0]  # type: ignore[index]


def test_cut_captions_are_counted(store: Path) -> None:
    header = TokenStore.open(store).header
    assert header.splits["train"].truncated == sum(i % 7 > 4 for i in range(11) if i % 5 != 4) == 2
    assert header.splits["val"].truncated == 0


@pytest.mark.parametrize(
    ("text_vocab_size", "codebook_size", "dtype", "sentinel"),
    [
        (65535, 65535, "<u2", 65535),
        (65536, 8, "<i4", -1),
        (8, 65536, "<i4", -1),
    ],
)
def test_the_number_type_holds_the_largest_ids(
    tmp_path: Path, text_vocab_size: int, codebook_size: int, dtype: str, sentinel: int
) -> None:
    settings = SETTINGS | {"text_vocab_size": text_vocab_size, "codebook_size": codebook_size, "splits": {"train": 1}}
    writer = TokenStoreWriter(tmp_path, **settings)
    codes = torch.full((1, 2, 3), codebook_size - 1)
    writer.append("train", {"text": [[0, text_vocab_size - 1]]}, codes, ["a"], 1)
    writer.finish()
    rows = np.fromfile(tmp_path / "train.bin", dtype=dtype)
    assert rows.tolist() == [0, text_vocab_size - 1, sentinel, sentinel] + [codebook_size - 1] * 6
    text_tokens, found = TokenStore.open(tmp_path).split("train")[0]
    assert text_tokens == {"text": [0, text_vocab_size - 1]}
    assert torch.equal(found, codes[0])


def test_a_split_may_stay_empty(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS | {"splits": {"train": 2, "val": 0}})
    writer.append("train", {"text": []}, torch.empty(0, 2, 3, dtype=torch.int64), [], 2)
    writer.finish()
    store = TokenStore.open(tmp_path)
    assert len(store.split("train")) == len(store.split("val")) == 0
    assert store.split("val").keys() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same(store: Path, workers: int) -> None:
    rows = TokenStore.open(store).split("train")
    expected = [rows[i][1] for i in range(len(rows))]
    loader = DataLoader(rows, batch_size=None, shuffle=False, num_workers=workers)
    assert all(torch.equal(codes, want) for (_, codes), want in zip(loader, expected, strict=True))


def test_a_pickled_split_carries_no_rows(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS | {"splits": {"train": 1000}})
    writer.append(
        "train", {"text": [[i % 500] for i in range(1000)]}, torch.zeros(1000, 2, 3).long(), ["k"] * 1000, 1000
    )
    writer.finish()
    rows = TokenStore.open(tmp_path).split("train")
    assert rows[7][0]["text"] == [7]
    data = pickle.dumps(rows)
    assert len(data) < 2000
    assert pickle.loads(data)[7][0]["text"] == [7]


# --- resuming


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_store_does_not_depend_on_the_batches(store: Path, tmp_path: Path, batch: int) -> None:
    tokenize(tmp_path / "other", batch)
    assert content(tmp_path / "other") == content(store)


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_stopped_at_any_call_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, moment: str
) -> None:
    real = getattr(os, call)
    deaths = 0
    left = 0

    def deadly(*args: object) -> None:
        nonlocal left
        left -= 1
        if moment == "after" or left >= 0:
            real(*args)
        if left < 0:
            raise Killed

    for number in range(1000):
        left = number
        folder = tmp_path / str(number)
        monkeypatch.setattr(os, call, deadly)
        try:
            tokenize(folder)
            break
        except Killed:
            deaths += 1
        finally:
            monkeypatch.setattr(os, call, real)
        if (folder / "header.json").exists() and not json.loads((folder / "header.json").read_text())["complete"]:
            with pytest.raises(UserError, match=r"was not finished; run task=tokenize resume=true$"):
                TokenStore.open(folder)
        tokenize(folder, batch=3)
        assert content(folder) == content(store)
    assert deaths > 8  # at least one per batch and header


def test_a_writer_stopped_again_and_again_finishes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    folder = tmp_path / "again"
    left = 0

    def deadly(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(descriptor)

    for attempt in range(200):
        left = 9 + attempt % 5
        monkeypatch.setattr(os, "fsync", deadly)
        try:
            tokenize(folder)
            break
        except Killed:
            continue
    assert 3 < attempt < 199
    assert content(folder) == content(store)


def test_rows_after_the_last_header_are_written_again(store: Path, tmp_path: Path) -> None:
    """The file ends anywhere, within a row or with rows too many: what a kill during a write leaves."""
    folder = tmp_path / "part"
    writer = TokenStoreWriter(folder, **SETTINGS)
    writer.append("train", {"text": [[1]]}, torch.zeros(1, 2, 3, dtype=torch.int64), ["x"], 1)
    half = content(folder)
    for extra in [*range(1, 45), 1000]:
        for name, data in half.items():
            (folder / name).write_bytes(data + (b"\xab" * extra if name.startswith("train") else b""))
        again = TokenStoreWriter(folder, **SETTINGS)
        assert again.resume_index("train") == 1
        assert content(folder) == half


def test_an_old_header_with_newer_rows(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stale"
    TokenStoreWriter(folder, **SETTINGS)
    header = (folder / "header.json").read_bytes()
    for name, data in content(store).items():
        (folder / name).write_bytes(data)
    (folder / "header.json").write_bytes(header)
    (folder / ".header.json.cogview_pl-draft").write_bytes(b"{ half a hea")
    tokenize(folder)
    assert content(folder) == content(store)


def test_a_killed_process(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    program = (
        "import sys, time, stores as t\n"
        "from pathlib import Path\n"
        "real = t.TokenStoreWriter.append\n"
        "def slow(*args): real(*args); print('row', flush=True); time.sleep(0.05)\n"
        "t.TokenStoreWriter.append = slow\n"
        "t.tokenize(Path(sys.argv[1]))\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == b"row\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not json.loads((folder / "header.json").read_text())["complete"]
    assert TokenStoreWriter(folder, **SETTINGS).resume_index("train") >= 6
    tokenize(folder)
    assert content(folder) == content(store)


HOURS = 1e4


def test_rows_between_two_commits_are_made_again_after_a_kill(store: Path, tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path / "killed", **SETTINGS, commit_seconds=HOURS)
    append(writer, "train", 0, 6)
    writer.commit()
    append(writer, "train", 6, 11)
    append(writer, "val", 0, 2)
    again = TokenStoreWriter(tmp_path / "killed", **SETTINGS)
    assert [again.resume_index(split) for split in ("train", "val")] == [6, 0]
    tokenize(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(store)


def test_an_error_or_a_signal_in_the_block_loses_nothing(store: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed), TokenStoreWriter(tmp_path / "left", **SETTINGS, commit_seconds=HOURS) as writer:
        append(writer, "train", 0, 11)
        append(writer, "val", 0, 1)
        raise Killed
    again = TokenStoreWriter(tmp_path / "left", **SETTINGS)
    assert [again.resume_index(split) for split in ("train", "val")] == [11, 1]
    tokenize(tmp_path / "left")
    assert content(tmp_path / "left") == content(store)


def test_a_commit_that_has_failed_writes_nothing_twice(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        real(descriptor)
        if "keys" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(UserError, match=r"train\.keys\.txt: no space left on the disk"),
        TokenStoreWriter(tmp_path / "full", **SETTINGS, commit_seconds=HOURS) as writer,
    ):
        append(writer, "train", 0, 11)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            writer.commit()
    assert TokenStoreWriter(tmp_path / "full", **SETTINGS).resume_index("train") == 0
    tokenize(tmp_path / "full")
    assert content(tmp_path / "full") == content(store)


def test_a_finished_store_is_left_alone(store: Path) -> None:
    before = content(store)
    tokenize(store)
    assert content(store) == before
    with pytest.raises(ValueError, match="complete"):
        TokenStoreWriter(store, **SETTINGS).append("train", {"text": []}, torch.empty(0, 2, 3), [], 11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tokenizer": "text-2"}, "text_tokenizer text-1, this run has text-2"),
        ({"image_tokenizer": "image-2"}, "image_tokenizer image-1, this run has image-2"),
        ({"text_length": 5}, "text_length 4, this run has 5"),
        ({"grid": (3, 2)}, r"grid \(2, 3\), this run has \(3, 2\)"),
        ({"text_vocab_size": 501}, "text_vocab_size 500, this run has 501"),
        ({"codebook_size": 65}, "codebook_size 64, this run has 65"),
        ({"format": "cogview"}, "format native, this run has cogview"),
        ({"splits": {"train": 12, "val": 3}}, "samples of train 11, this run has 12"),
        ({"splits": {"train": 11}}, "samples of val 3, this run has None"),
        ({"splits": {"train": 11, "val": 3, "test": 1}}, "samples of test None, this run has 1"),
    ],
)
def test_another_run_does_not_go_on_with_the_store(store: Path, change: dict[str, Any], message: str) -> None:
    before = content(store)
    with pytest.raises(UserError, match=message + "; go on with that one, or start anew in another run_dir$") as error:
        TokenStoreWriter(store, **SETTINGS | change)
    assert str(store) in str(error.value) and "\n" not in str(error.value)
    assert content(store) == before
