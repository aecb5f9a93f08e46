"""Training order: a token store is opened, mixed, and read on from the middle of an epoch."""

from __future__ import annotations

import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from benchmarks.scale.measure import Subject
from cogview_pl.data.mixing import mixed
from cogview_pl.data.token_store.header import SplitHeader, TokenStoreHeader, checksums_file, keys_file, rows_file
from cogview_pl.data.token_store.rows import CHECKSUM, WithoutText
from cogview_pl.data.token_store.store import TokenStore

_SIZES = (10_000, 1_000_000, 30_000_000)
_SHARE = 0.1  # of the samples, without text
_BATCHES, _BATCH_SIZE = 100, 16
_WINDOWS = 9  # of an image in super-resolution
_TEXT_LENGTH, _GRID, _VOCAB_SIZE = 64, (8, 8), 1000
_CHUNK = 2**20  # checksums written at once


class _Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        return index


def make_store(folder: Path, rows: int, grid: tuple[int, int] = _GRID) -> None:
    """A token store whose rows are zeros, in a sparse file; each has 64 text tokens and a grid of codes."""
    header = TokenStoreHeader(
        text_length=_TEXT_LENGTH,
        grid=grid,
        text_vocab_size=_VOCAB_SIZE,
        codebook_size=_VOCAB_SIZE,
        text_tokenizer="text",
        image_tokenizer="images",
        splits={},
        complete=True,
        checksums=True,
    )
    with rows_file(folder, "train").open("wb") as stream:
        stream.truncate(rows * header.row_bytes)
    keys_file(folder, "train").touch()
    one, sums = np.array([zlib.crc32(bytes(header.row_bytes))], CHECKSUM), 0
    with checksums_file(folder, "train").open("wb") as stream:
        for start in range(0, rows, _CHUNK):
            part = one.repeat(min(_CHUNK, rows - start)).tobytes()
            sums = zlib.crc32(part, sums)
            stream.write(part)
    header.splits = {"train": SplitHeader(source=rows, next=rows, rows=rows, sums_crc32=sums)}
    header.save(folder)


def _read_on(train: Dataset[Any], consumed: int) -> None:
    """Read batches as training does after a resume."""
    from cogview_pl.lit.data_module import DataModule

    data = DataModule(train, _Numbers(1), collate=list, batch_size=_BATCH_SIZE, num_workers=0, seed=0)
    data.load_state_dict({**data.state_dict(), "consumed": consumed, "batches": consumed // _BATCH_SIZE})
    for _ in islice(data.train_dataloader(), _BATCHES):
        pass


def _train(folder: Path, rows: int) -> None:
    store = TokenStore.open(folder)
    store.fingerprint()
    train = store.split("train")
    _read_on(mixed(train, WithoutText(train), _SHARE), rows // 2)


def _train_on_windows(folder: Path, images: int) -> None:
    _read_on(_Numbers(_WINDOWS * images), _WINDOWS * images // 2)


def _warm_up() -> None:
    _read_on(_Numbers(_BATCH_SIZE), 0)


SUBJECTS = (
    Subject("order, opened, mixed and resumed", "rows", _SIZES, make_store, _train, _warm_up),
    Subject("order of windows, resumed", "images", _SIZES, lambda folder, size: None, _train_on_windows, _warm_up),
)
