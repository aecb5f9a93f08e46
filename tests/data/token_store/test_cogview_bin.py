"""Data files of the original: written as it reads them, read with every id checked, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from cogview_pl.checkpoints.model_folder import ImageTokenizer, build_vqvae, save_image_tokenizer
from cogview_pl.data.token_store.cogview_bin import ReleasedFile, refuse_lmdb
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError
from cogview_pl.vocab import TextTokenizer
from tests.make_models import quantizer_options

from ...checkpoints import saved
from ...texts import learned_text

SIZES: dict[str, Any] = {"text_length": 4, "grid": (2, 3), "text_vocab_size": 500, "codebook_size": 64}
TEXT_TOKENS = [[], [0], [1, 2, 499], [3, 4, 5, 6, 7]]
ROWS = [
    [-1, -1, -1, -1, *range(0, 6)],
    [64, -1, -1, -1, *range(6, 12)],
    [65, 66, 563, -1, *range(12, 18)],
    [67, 68, 69, 70, *range(18, 24)],
]
"""TEXT_TOKENS and consecutive codes on disk: 64 codes come before the text tokens, and long texts are cut."""


def write(folder: Path, parts: list[slice]) -> Path:
    """A store in the original's format, written a part at a time, each by a writer that goes on with the folder."""
    codes = torch.arange(24).reshape(4, 2, 3)
    for part in parts:
        settings = {"text_tokenizer": "text", "image_tokenizer": "image", "splits": {"train": 4}, "format": "cogview"}
        writer = TokenStoreWriter(folder, **SIZES, **settings)
        keys = [str(i) for i in range(4)][part]
        writer.append("train", {"text": TEXT_TOKENS[part]}, codes[part], keys, part.stop)
    writer.finish()
    return folder / "train.bin"


def make_file(folder: Path, rows: list[list[int]] | np.ndarray) -> Path:
    file = folder / "rows.bin"
    np.asarray(rows, dtype="<i4").tofile(file)
    return file


def open_file(file: Path, val_fraction: float = 0.0, **changes: Any) -> ReleasedFile:
    return ReleasedFile.open(file, val_fraction=val_fraction, **SIZES | changes)


class TestWriting:
    def test_rows_are_int32_in_the_joint_vocabulary(self, tmp_path: Path) -> None:
        file = write(tmp_path, [slice(0, 4)])
        assert np.fromfile(file, dtype="<i4").reshape(4, 10).tolist() == ROWS

    def test_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        whole, parts = write(tmp_path / "whole", [slice(0, 4)]), write(tmp_path / "parts", [slice(0, 1), slice(1, 4)])
        assert whole.read_bytes() == parts.read_bytes()

    def test_the_folder_and_its_file_hold_the_same(self, tmp_path: Path) -> None:
        file = write(tmp_path, [slice(0, 4)])
        store, bare = TokenStore.open(tmp_path).split("train"), open_file(file).split("train")
        for i, text_tokens in enumerate(TEXT_TOKENS):
            assert store[i][0]["text"] == bare[i][0]["text"] == text_tokens[:4]
            assert store[i][1].tolist() == bare[i][1].tolist() == torch.arange(6 * i, 6 * i + 6).view(2, 3).tolist()
            assert bare[i][1].dtype == torch.int64


class TestReading:
    def test_unused_places_may_be_anywhere(self, tmp_path: Path) -> None:
        file = make_file(tmp_path, [[-1, 70, -1, 64, *range(6)]])
        assert open_file(file).split("train")[0][0]["text"] == [6, 0]

    def test_the_released_files_have_room_for_64_pieces(self, tmp_path: Path) -> None:
        np.full((2, 64 + 6), 63, dtype="<i4").tofile(tmp_path / "rows.bin")
        sizes = {name: size for name, size in SIZES.items() if name != "text_length"}
        with pytest.raises(UserError, match=r"row 0 has text id 63, it must be in \[64, 564\); rows must be 64 text"):
            ReleasedFile.open(tmp_path / "rows.bin", val_fraction=0.0, **sizes)

    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.3, 0.99])
    @pytest.mark.parametrize("count", [2, 3, 100])
    def test_splits_share_no_rows_and_leave_none_out(self, count: int, fraction: float, tmp_path: Path) -> None:
        rows = np.full((count, 10), -1)
        rows[:, 4:] = np.arange(count)[:, None] // 64
        rows[:, 5] = np.arange(count) % 64
        store = open_file(make_file(tmp_path, rows), fraction)
        splits = {name: store.split(name) for name in ("train", "val")}
        found = {name: [codes.tolist()[0][:2] for _, codes in rows] for name, rows in splits.items()}
        assert sorted(found["train"] + found["val"]) == rows[:, 4:6].tolist()
        assert found["train"]
        assert bool(found["val"]) == (fraction > 0)
        assert abs(len(found["val"]) - fraction * count) <= 1

    def test_a_single_row_is_for_training(self, tmp_path: Path) -> None:
        store = open_file(make_file(tmp_path, ROWS[:1]), 0.5)
        assert (len(store.split("train")), len(store.split("val"))) == (1, 0)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_read_the_same(self, tmp_path: Path, workers: int) -> None:
        rows = open_file(make_file(tmp_path, ROWS)).split("train")
        loader = DataLoader(rows, batch_size=None, shuffle=False, num_workers=workers)
        assert [texts["text"] for texts, _ in loader] == [text_tokens[:4] for text_tokens in TEXT_TOKENS]

    def test_a_pickled_split_carries_no_rows(self, tmp_path: Path) -> None:
        rows = open_file(make_file(tmp_path, ROWS * 100)).split("train")
        assert rows[2][0]["text"] == [1, 2, 499]
        data = pickle.dumps(rows)
        assert len(data) < 2000
        assert pickle.loads(data)[2][0]["text"] == [1, 2, 499]

    def test_the_file_stays_as_it_is(self, tmp_path: Path) -> None:
        file = make_file(tmp_path, ROWS)
        file.chmod(0o400)
        before = file.read_bytes()
        _, codes = open_file(file).split("train")[0]
        codes += 1
        assert file.read_bytes() == before


class TestFingerprint:
    def test_is_that_of_the_file_and_what_is_read_from_it(self, tmp_path: Path) -> None:
        file = make_file(tmp_path, ROWS * 10)
        found = [open_file(file, fraction).fingerprint() for fraction in (0.0, 0.1, 0.2)]
        found.append(open_file(file, text_vocab_size=501).fingerprint())
        assert open_file(file).fingerprint() == found[0] and len(found[0]) == 32
        time = file.stat().st_mtime_ns
        os.utime(file, ns=(time, time + 1))
        found.append(open_file(file).fingerprint())
        make_file(tmp_path, ROWS * 11)
        os.utime(file, ns=(time, time))
        found.append(open_file(file).fingerprint())
        assert len(set(found)) == 6


class TestRefused:
    def require_one_line(self, error: pytest.ExceptionInfo[UserError], name: Path) -> None:
        assert str(name) in str(error.value) and "\n" not in str(error.value)

    def test_what_is_no_file_is_never_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to("loop")
        for name, reason in (
            ("pipe", "is a named pipe, not a file"),
            ("loop", r"cannot be read \(Too many levels of symbolic links\)"),
            ("x" * 300, r"cannot be read \(File name too long\)"),
            (".", "is a folder, not a file"),
            ("none", "does not exist"),
        ):
            with pytest.raises(UserError, match=rf"^data\.token_store=\S+ {reason}; give a file of rows$") as error:
                open_file(tmp_path / name)
            self.require_one_line(error, tmp_path / name)
        for name in ("loop", "x" * 300):
            with pytest.raises(
                UserError, match=r"^data\.token_store=\S+ cannot be read \(.*\); give the folder of a run of"
            ):
                refuse_lmdb(tmp_path / name)

    @pytest.mark.parametrize("size", [0, 39, 41, 100])
    def test_size_that_is_no_whole_number_of_rows(self, tmp_path: Path, size: int) -> None:
        file = tmp_path / "rows.bin"
        file.write_bytes(bytes(size))
        message = (
            rf"^data\.token_store=.* has {size} bytes, a row has 40 \(4 text ids and 2x3 codes as int32\); .* set "
        )
        with pytest.raises(UserError, match=message) as error:
            open_file(file)
        self.require_one_line(error, file)

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            (0, 63, r"row 2 has text id 63, it must be in \[64, 564\)"),
            (3, 564, r"row 2 has text id 564, "),
            (1, -2, r"row 2 has text id -2, "),
            (4, 64, r"row 2 has code 64, it must be in \[0, 64\)"),
            (9, -1, r"row 2 has code -1, "),
        ],
    )
    def test_ids_outside_the_vocabulary(self, tmp_path: Path, column: int, value: int, message: str) -> None:
        rows = np.array(ROWS)
        rows[2, column] = value
        file = make_file(tmp_path, rows)
        with pytest.raises(
            UserError, match=rf"^data\.token_store=.*{message}.*text.model and image_tokenizer.path"
        ) as error:
            open_file(file)
        self.require_one_line(error, file)

    def test_an_id_that_opening_overlooks_is_found_when_read(self, tmp_path: Path) -> None:
        """A file may be too large to be read as a whole before training; no row is used unchecked all the same."""
        rows = np.array(ROWS * 1000)
        rows[3001, 5] = 64
        store = open_file(make_file(tmp_path, rows), 0.5)
        assert store.split("val")[1000][0]["text"] == []
        with pytest.raises(UserError, match=r"row 3001 has code 64"):
            store.split("val")[1001]

    def test_no_rows_left_to_train_on(self, tmp_path: Path) -> None:
        file = make_file(tmp_path, ROWS)
        with pytest.raises(UserError, match=r"^sequences\.val_fraction=1\.0 leaves no rows of") as error:
            open_file(file, 1.0)
        self.require_one_line(error, file)

    @pytest.mark.parametrize("name", ["set/data.mdb", "set.lmdb", "set.lmdb/", "set/"])
    def test_lmdb(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir()
            (path / "data.mdb").touch()
        else:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        rest = r"[^\n]* pickled [^\n]* run any code, [^\n]* convert it [^\n]*task=tokenize$"
        message = rf"^data\.token_store=\S+ is an LMDB: {rest}"
        with pytest.raises(UserError, match=message) as error:
            refuse_lmdb(path)
        self.require_one_line(error, path)

    @pytest.mark.parametrize("name", ["rows.bin", "run", "nowhere"])
    def test_anything_else_is_no_lmdb(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "rows.bin").touch()
        (tmp_path / "run").mkdir()
        refuse_lmdb(tmp_path / name)


REPOSITORY = Path(__file__).parents[3]
VQVAE = {**saved.VQVAE, "quantizer": quantizer_options("fixed")}


@pytest.fixture(scope="module")
def command_lines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The home of some command lines, and how each ended; all in one process."""
    home = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    save_image_tokenizer(home / "images", ImageTokenizer(build_vqvae(VQVAE), {**VQVAE, "image_size": 64}))
    learned_text(["大的红色圆形", "小的蓝色方块"], vocab_size=300).save(home / "text.model")
    (home / "lmdb").mkdir()
    (home / "lmdb" / "data.mdb").touch()
    (home / "short.bin").write_bytes(bytes(100))
    tokenizers = ["text.model=text.model", "image_tokenizer.path=images", "threads=1", "data.batch_size=4"]
    tokenize = ["task=tokenize", *tokenizers, "data.train_size=12", "data.val_size=4"]
    pretrain = ["task=pretrain", *tokenizers, "trainer.max_steps=1", "trainer.val_check_interval=1"]
    file = "data.token_store=tokens/token_store/train.bin"
    commands = {
        "tokenize": [*tokenize, "token_store.format=cogview", "run_dir=tokens"],
        "resume_in_another_format": [*tokenize, "token_store.format=native", "resume=tokens"],
        "pretrain": [*pretrain, file, "sequences.val_fraction=0.25", "run_dir=trained"],
        "lmdb": [*pretrain, "data.token_store=lmdb"],
        "short": [*pretrain, "data.token_store=short.bin"],
        "no_text_model": ["task=pretrain", file, "image_tokenizer.path=images"],
        "no_image_tokenizer": ["task=pretrain", file, "text.model=text.model"],
        "unknown_format": [*tokenize, "token_store.format=lmdb"],
    }
    cases, results = home / "cases.json", home / "results.json"
    cases.write_text(json.dumps([{"args": args, "cwd": str(home)} for args in commands.values()]))
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    driver = REPOSITORY / "tests" / "cli" / "in_process.py"
    subprocess.run([sys.executable, driver, cases, results], env=os.environ | environment, check=True, timeout=300)
    return home, dict(zip(commands, json.loads(results.read_text()), strict=True))


@pytest.mark.slow
class TestCommandLine:
    def test_tokenize_writes_a_file_that_pretrain_reads(self, command_lines) -> None:
        home, ended = command_lines
        assert ended["tokenize"]["code"] == 0, ended["tokenize"]["stderr"][-3000:]
        assert ended["pretrain"]["code"] == 0, ended["pretrain"]["stderr"][-3000:]
        rows = np.fromfile(home / "tokens" / "token_store" / "train.bin", dtype="<i4").reshape(12, 64 + 64)
        text, codes = rows[:, :64], rows[:, 64:]
        text_vocab_size = TextTokenizer.load(home / "text.model").vocab_size
        assert ((codes >= 0) & (codes < 16)).all()
        assert ((text == -1) | (text >= 16) & (text < 16 + text_vocab_size)).all()
        assert (home / "trained" / "model" / "text.model").read_bytes() == (home / "text.model").read_bytes()
        assert "val/loss" in json.loads((home / "trained" / "metrics.json").read_text())

    def test_captions_longer_than_the_text_slot_do_not_stop_it(self, command_lines) -> None:
        """Training cuts them, and so do the prompts that validation generates from."""
        home, ended = command_lines
        config = OmegaConf.load(home / "trained" / "config.yaml")
        rows = np.fromfile(home / "tokens" / "token_store" / "train.bin", dtype="<i4").reshape(12, 64 + 64)
        assert ((rows[-3:, :64] != -1).sum(1) > config.text.max_length).any()
        assert ended["pretrain"]["code"] == 0, ended["pretrain"]["stderr"][-3000:]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("lmdb", ["data.token_store=lmdb is an LMDB", "pickled", "task=tokenize"]),
            (
                "short",
                ["data.token_store=short.bin has 100 bytes", "64 text ids and 8x8 codes", "image_tokenizer.path"],
            ),
            ("no_text_model", ["data.token_store=tokens/token_store/train.bin", "text.model", "image_tokenizer.path"]),
            (
                "no_image_tokenizer",
                ["data.token_store=tokens/token_store/train.bin", "text.model", "image_tokenizer.path"],
            ),
            ("unknown_format", ["token_store.format", "lmdb", "native", "cogview"]),
            ("resume_in_another_format", ["tokens/token_store", "format cogview", "native"]),
        ],
    )
    def test_what_cannot_be_read_ends_in_one_line(self, command_lines, name: str, words: list[str]) -> None:
        ended = command_lines[1][name]
        assert ended["code"] == 2, ended["stderr"][-3000:]
        assert re.fullmatch(r"cogview_pl: [^\n]+\n", ended["stderr"])
        for word in words:
            assert word in ended["stderr"]
