"""Token store: what goes in comes out, and a killed writer goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cogview_pl.data.token_store.store import TokenStore, TokenStoreWriter
from cogview_pl.errors import UserError

SETTINGS: dict[str, Any] = {
    "text_length": 4,
    "grid": (2, 3),
    "text_vocab_size": 500,
    "codebook_size": 64,
    "text_tokenizer": "text-1",
    "image_tokenizer": "image-1",
    "splits": {"train": 11, "val": 3},
}


def sample(split: str, index: int) -> tuple[list[int], torch.Tensor, str] | None:
    """A made-up source sample; every fifth cannot be read, and caption i has i % 7 text tokens."""
    if index % 5 == 4:
        return None
    seed = index + 100 * (split == "val")
    text_tokens = [(31 * seed + i) % 500 for i in range(index % 7)]
    return text_tokens, (torch.arange(6).reshape(2, 3) * 7 + seed) % 64, f"{split}/图{index}"


def tokenize(folder: Path, batch: int = 2) -> None:
    """What the task does: from where the store is to the end."""
    writer = TokenStoreWriter(folder, **SETTINGS)
    for split, size in SETTINGS["splits"].items():
        while (start := writer.resume_index(split)) < size:
            stop = min(start + batch, size)
            good = [found for found in (sample(split, i) for i in range(start, stop)) if found]
            codes = torch.stack([codes for _, codes, _ in good]) if good else torch.empty(0, 2, 3, dtype=torch.int64)
            writer.append(
                split, {"text": [text_tokens for text_tokens, _, _ in good]}, codes, [key for _, _, key in good], stop
            )
    writer.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    tokenize(tmp_path / "token_store")
    return tmp_path / "token_store"


def edit_header(folder: Path, **changes: object) -> None:
    """Change a header into another one of an earlier version, which has no checksums."""
    values = json.loads((folder / "header.json").read_text())
    values = {name: value for name, value in values.items() if name not in ("crc32", "checksums")}
    (folder / "header.json").write_text(json.dumps(values | changes))


# --- contents


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
        "import sys, time, test_store as t\n"
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
    with pytest.raises(UserError, match=message + "; delete the folder or choose another run_dir$") as error:
        TokenStoreWriter(store, **SETTINGS | change)
    assert str(store) in str(error.value) and "\n" not in str(error.value)
    assert content(store) == before


def test_lost_rows_are_not_papered_over(store: Path) -> None:
    edit_header(store, complete=False)
    for name in ("train.bin", "val.keys.txt"):
        data = (store / name).read_bytes()
        (store / name).write_bytes(data[:-1])
        with pytest.raises(UserError, match=rf"{name} has {len(data) - 1} bytes.*data were lost; delete the folder"):
            TokenStoreWriter(store, **SETTINGS)
        (store / name).write_bytes(data)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS)
    before = content(tmp_path)
    codes = torch.zeros(1, 2, 3, dtype=torch.int64)
    calls: list[tuple[Any, ...]] = [
        ({"text": [[1]]}, codes, ["a", "b"], 2),
        ({"text": [[1], [2]]}, codes, ["a"], 2),
        ({"text": [[1]]}, codes.mT, ["a"], 1),
        ({"text": [[1]]}, codes, ["a"], 0),
        ({"text": [[1]]}, codes, ["a"], 12),
        ({"text": [[1]]}, codes + 64, ["a"], 1),
        ({"text": [[1]]}, codes - 1, ["a"], 1),
        ({"text": [[500]]}, codes, ["a"], 1),
        ({"text": [[-1]]}, codes, ["a"], 1),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            writer.append("train", *call)
    with pytest.raises(ValueError, match="split train: 0 of 11 samples are done"):
        writer.finish()
    assert content(tmp_path) == before


# --- opening


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "header.json").unlink(),
            r"has no header\.json: not a token store; run task=tokenize$",
        ),
        (lambda f: (f / "header.json").write_text("{"), r"header\.json is not JSON .*delete the folder"),
        (lambda f: (f / "header.json").write_bytes(b"\xff"), r"header\.json is not JSON"),
        (lambda f: (f / "header.json").write_text("[]"), r"has version None, this program reads 1"),
        (lambda f: edit_header(f, version=2), r"has version 2, this program reads 1; delete the folder"),
        (lambda f: (f / "header.json").write_text('{"version": 1}'), r"header\.json is damaged \('dtype'\)"),
        (lambda f: edit_header(f, other=2), r"header\.json is damaged \(.*'other'"),
        (lambda f: edit_header(f, grid=3), r"header\.json is damaged"),
        (lambda f: edit_header(f, format="lmdb"), r"header\.json is damaged \(format is lmdb"),
        (lambda f: edit_header(f, dtype="int32"), r"damaged \(dtype is int32, the sizes ask for uint16\)"),
        (
            lambda f: edit_header(f, complete=False),
            r": the token store was not finished; run task=tokenize resume=true$",
        ),
        (
            lambda f: os.truncate(f / "train.bin", 179),
            r"train\.bin has 179 bytes, .* 9 rows of 20; .* truncated",
        ),
        (lambda f: os.truncate(f / "val.bin", 80), r"val\.bin has 80 bytes"),
        (lambda f: (f / "val.bin").unlink(), r"val\.bin has 0 bytes"),
    ],
)
def test_what_is_wrong_with_a_store(store: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(store)
    with pytest.raises(UserError, match=message) as error:
        TokenStore.open(store)
    assert str(store) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none has no header\.json: not a token store; run task=tokenize"):
        TokenStore.open(tmp_path / "none")


def test_a_store_from_before_there_were_formats(store: Path) -> None:
    edit_header(store)
    values = json.loads((store / "header.json").read_text())
    del values["format"]
    (store / "header.json").write_text(json.dumps(values))
    assert TokenStore.open(store).split("train")[1][0]["text"] == sample("train", 1)[0]  # type: ignore[index]


def test_an_unknown_split(store: Path) -> None:
    with pytest.raises(UserError, match=r": no split test in the token store, only train, val; "):
        TokenStore.open(store).split("test")


def test_the_tokenizers_must_be_those_of_the_store(store: Path) -> None:
    opened = TokenStore.open(str(store))
    opened.require(text_tokenizer="text-1", image_tokenizer="image-1")
    with pytest.raises(UserError, match=r"made with text_tokenizer text-1, this run uses text-2; use that one"):
        opened.require(text_tokenizer="text-2", image_tokenizer="image-1")
    with pytest.raises(UserError, match=r"made with image_tokenizer image-1, this run uses image-2; .*task=tokenize"):
        opened.require(text_tokenizer="text-1", image_tokenizer="image-2")


# --- damage


@pytest.mark.parametrize("name", ["header.json", "train.bin", "train.crc32", "train.keys.txt"])
def test_a_flipped_bit_is_never_read_as_something_else(store: Path, name: str) -> None:
    wanted = everything(store)
    file = store / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        try:
            found = everything(store)
        except UserError as error:
            assert str(store) in str(error) and "\n" not in str(error)
        else:
            assert name == "header.json"  # white space says nothing
            assert found == wanted


def everything(store: Path) -> list[tuple[str, list[int], list[list[int]]]]:
    rows = TokenStore.open(store).split("train")
    samples = [(key, *rows[index]) for index, key in enumerate(rows.keys())]
    return [(key, text_tokens, codes.tolist()) for key, text_tokens, codes in samples]


def test_one_key_is_compared_with_the_checksum_of_all(store: Path) -> None:
    rows = TokenStore.open(store).split("train")
    assert [rows.key(0), rows.key(-1)] == ["train/图0", "train/图10"]
    file = store / "train.keys.txt"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1  # far behind the first key, which the same object has read before
    file.write_bytes(data)
    for read in (rows.keys, lambda: rows.key(0)):
        with pytest.raises(
            UserError, match=r"train\.keys\.txt is damaged, its checksum is wrong; copy the token store"
        ):
            read()
    file.unlink()
    with pytest.raises(UserError, match=r"train\.keys\.txt does not exist; copy the token store again"):
        rows.keys()


def test_keys_of_an_earlier_version_are_read_without_a_checksum(store: Path) -> None:
    values = json.loads((store / "header.json").read_text())
    for split in values["splits"].values():
        del split["keys_crc32"]
    edit_header(store, splits=values["splits"])
    rows = TokenStore.open(store).split("train")
    assert rows.keys()[1] == rows.key(1) == "train/图1"
    data = (store / "train.keys.txt").read_bytes()
    for damaged, message in (
        (data.replace("图0".encode(), b"\xff\xff\xff\xff"), r"is damaged, it is not UTF-8 text; copy the token store"),
        (data.replace(b"\n", b" ", 1), r"has 8 keys for 9 rows; copy the token store"),
    ):
        (store / "train.keys.txt").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            TokenStore.open(store).split("train").keys()
    with pytest.raises(UserError, match=r"has no key for row 8; copy the token store"):
        TokenStore.open(store).split("train").key(8)


def test_a_writer_that_goes_on_with_damaged_keys_does_not_vouch_for_them(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS)
    writer.append("train", {"text": [[1]]}, torch.zeros(1, 2, 3, dtype=torch.int64), ["x"], 1)
    (tmp_path / "train.keys.txt").write_bytes(b"y\n")
    tokenize(tmp_path)
    with pytest.raises(UserError, match=r"train\.keys\.txt is damaged"):
        TokenStore.open(tmp_path).split("train").keys()


@pytest.mark.parametrize("name", ["header.json", "train.bin", "train.keys.txt", "train.crc32"])
def test_what_is_no_file_is_never_opened(store: Path, name: str) -> None:
    rows = TokenStore.open(store).split("train")
    (store / name).unlink()
    os.mkfifo(store / name)
    with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file; copy the token store again"):
        TokenStore.open(store)
    if name != "header.json":
        with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file; copy the token store again"):
            rows.keys() if "keys" in name else rows[0]
    with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file; "):
        TokenStoreWriter(store, **SETTINGS)
    (store / name).unlink()
    (store / name).symlink_to(name)
    with pytest.raises(
        UserError, match=rf"{name} cannot be read \(Too many levels of symbolic links\); copy the token"
    ):
        TokenStore.open(store)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Too many levels of symbolic links\); "):
        TokenStoreWriter(store, **SETTINGS)


def test_a_header_of_absurd_size_is_not_read(store: Path) -> None:
    os.truncate(store / "header.json", 2**40)
    with pytest.raises(UserError, match=r"header\.json has 1,099,511,627,776 bytes, at most 1,048,576 are read; "):
        TokenStore.open(store)


# --- fingerprint


def test_the_fingerprint_is_that_of_header_rows_and_keys(store: Path, tmp_path: Path) -> None:
    fingerprint = TokenStore.open(store).fingerprint()
    assert len(fingerprint) == 32
    tokenize(tmp_path / "again", batch=3)
    assert TokenStore.open(tmp_path / "again").fingerprint() == fingerprint

    def of(text_token: int, key: str, **change: object) -> str:
        folder = tmp_path / f"{text_token}{key}{''.join(change)}"
        writer = TokenStoreWriter(folder, **SETTINGS | {"splits": {"train": 1}} | change)
        writer.append("train", {"text": [[text_token]]}, torch.zeros(1, 2, 3, dtype=torch.int64), [key], 1)
        writer.finish()
        return TokenStore.open(folder).fingerprint()

    others = [of(1, "a"), of(2, "a"), of(1, "b"), of(1, "a", text_tokenizer="text-2"), of(1, "a", codebook_size=65)]
    assert len({fingerprint, *others}) == 6


def test_rows_of_another_store_are_refused_though_their_checksums_are_right(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "swapped")
    rows, sums = (tmp_path / "swapped" / f"train.{kind}" for kind in ("bin", "crc32"))
    data, size = rows.read_bytes(), rows.stat().st_size // (sums.stat().st_size // 4)
    rows.write_bytes(data[size:] + data[:size])
    sums.write_bytes(sums.read_bytes()[4:] + sums.read_bytes()[:4])
    with pytest.raises(UserError, match=r"train\.crc32 is damaged or of another store"):
        TokenStore.open(tmp_path / "swapped").fingerprint()


def test_the_fingerprint_of_a_store_without_checksums_is_that_of_its_files(store: Path) -> None:
    edit_header(store)
    before = TokenStore.open(store).fingerprint()
    assert TokenStore.open(store).fingerprint() == before
    time = (store / "train.bin").stat().st_mtime_ns
    os.utime(store / "train.bin", ns=(time, time + 1))
    assert TokenStore.open(store).fingerprint() != before


def test_a_damaged_row_is_named(store: Path) -> None:
    file = store / "train.bin"
    data = bytearray(file.read_bytes())
    data[2 * 20 + 5] ^= 16
    file.write_bytes(data)
    rows = TokenStore.open(store).split("train")
    assert rows[1][0]["text"] == sample("train", 1)[0]  # type: ignore[index]
    with pytest.raises(UserError, match=r"train\.bin: row 2 is damaged, its checksum is wrong; copy the token store"):
        rows[2]


def test_a_store_that_shrinks_or_vanishes_while_it_is_read(store: Path) -> None:
    rows = TokenStore.open(store).split("train")
    assert rows[0]
    os.truncate(store / "train.bin", 45)
    with pytest.raises(UserError, match=r"train\.bin has become shorter: row 5 is missing"):
        rows[5]
    (store / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train\.bin does not exist; copy the token store again"):
        pickle.loads(pickle.dumps(rows))[0]


def test_a_store_without_checksums_is_gone_on_with(tmp_path: Path, store: Path) -> None:
    """One that an earlier version began."""
    folder = tmp_path / "begun"
    TokenStoreWriter(folder, **SETTINGS)
    edit_header(folder)
    for name in SETTINGS["splits"]:
        (folder / f"{name}.crc32").unlink()
    tokenize(folder)
    assert not TokenStore.open(folder).header.checksums
    assert [file.name for file in folder.glob("*.crc32")] == []
    assert (folder / "train.bin").read_bytes() == (store / "train.bin").read_bytes()
