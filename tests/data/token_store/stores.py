"""A small token store for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cogview_pl.data.token_store.writer import TokenStoreWriter

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
            append(writer, split, start, min(start + batch, size))
    writer.finish()


def append(writer: TokenStoreWriter, split: str, start: int, stop: int, first: int = 0) -> None:
    """Samples `start` … `stop` - 1 of a part of the data set that begins with sample `first`."""
    good = [found for found in (sample(split, first + i) for i in range(start, stop)) if found]
    codes = torch.stack([codes for _, codes, _ in good]) if good else torch.empty(0, 2, 3, dtype=torch.int64)
    text_tokens = {"text": [text_tokens for text_tokens, _, _ in good]}
    writer.append(split, text_tokens, codes, [key for _, _, key in good], stop)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_header(folder: Path, **changes: object) -> None:
    """Change a header into another one of an earlier version, which has no checksums."""
    values = json.loads((folder / "header.json").read_text())
    values = {name: value for name, value in values.items() if name not in ("crc32", "checksums")}
    (folder / "header.json").write_text(json.dumps(values | changes))


# --- contents
