"""The token store: opened, read at random, written in small batches, and made from images by `task=tokenize`."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from benchmarks.scale.measure import Subject
from benchmarks.scale.order import make_store
from cogview_pl.checkpoints.model_folder import ImageTokenizer, build_vqvae, save_image_tokenizer
from cogview_pl.data.sequence_dataset import SequenceCollator, SequenceDataset
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.vocab import Template, Vocabulary

_SIZES = (10_000, 1_000_000, 30_000_000)
_GRID = (32, 32)
_LAYOUT = "[ROI1] {text} [BASE] [BOI1] {image:32x32} [EOI1]"
_VOCABULARY = Vocabulary(codebook_size=1000, text_vocab_size=1000)
_TEXT_LENGTH = 64
_SEQUENCES, _BATCH_SIZE = 1000, 16
_WRITTEN, _APPENDED = (1_000, 10_000, 100_000), 32  # rows, and rows of a batch
_IMAGES = (100, 1_000, 10_000)
_IMAGE_TOKENIZER = {
    "hidden_size": 8,
    "codebook_dim": 4,
    "codebook_size": 16,
    "downsampling": 8,
    "residual_blocks": 0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "quantizer": {"_target_": "cogview_pl.vqvae.quantizer.FixedQuantizer", "commitment_weight": 0.25},
    "image_size": 64,
}


def _open(folder: Path, rows: int) -> None:
    TokenStore.open(folder).split("train")


def _read(folder: Path, rows: int) -> None:
    """Batches of training sequences of 1,092 tokens from random rows."""
    train = TokenStore.open(folder).split("train")
    template = Template(_LAYOUT, target="image", loss={"image": 1.0}, vocabulary=_VOCABULARY, text_length=_TEXT_LENGTH)
    sequences, collate = SequenceDataset(train, template, _GRID), SequenceCollator(_VOCABULARY.pad)
    chosen = random.Random(0).choices(range(rows), k=_SEQUENCES)
    for start in range(0, _SEQUENCES, _BATCH_SIZE):
        collate([sequences[row] for row in chosen[start : start + _BATCH_SIZE]])


def _write(folder: Path, rows: int) -> None:
    codes = torch.zeros(_APPENDED, *_GRID, dtype=torch.int64)
    with TokenStoreWriter(
        folder,
        text_length=_TEXT_LENGTH,
        grid=_GRID,
        text_vocab_size=_VOCABULARY.text_vocab_size,
        codebook_size=_VOCABULARY.codebook_size,
        text_tokenizer="text",
        image_tokenizer="images",
        splits={"train": rows},
        commit_seconds=5,
    ) as writer:
        for start in range(0, rows, _APPENDED):
            count = min(_APPENDED, rows - start)
            texts = {"text": [[7] * _TEXT_LENGTH] * count}
            writer.append("train", texts, codes[:count], [f"{start + i:09}" for i in range(count)], start + count)


def _make_store(folder: Path, rows: int) -> None:
    make_store(folder, rows, _GRID)


def _make_nothing(folder: Path, rows: int) -> None:
    pass


def _make_image_tokenizer(folder: Path, images: int) -> None:
    torch.manual_seed(0)
    settings = {name: value for name, value in _IMAGE_TOKENIZER.items() if name != "image_size"}
    save_image_tokenizer(folder / "images", ImageTokenizer(build_vqvae(settings), dict(_IMAGE_TOKENIZER)))


def _tokenize(folder: Path, images: int) -> None:
    from cogview_pl.run import run

    run(
        "task=tokenize",
        f"image_tokenizer.path={folder / 'images'}",
        f"run_dir={folder / 'run'}",
        f"data.train_size={images}",
        "data.val_size=8",
        "data.num_workers=0",
        "threads=1",
    )


def _warm_up() -> None:
    import cogview_pl.assembly.tokenization
    import cogview_pl.run  # noqa: F401


SUBJECTS = (
    Subject("store, opened", "rows", _SIZES, _make_store, _open, _warm_up),
    Subject("store, 1,000 random sequences", "rows", _SIZES, _make_store, _read, _warm_up),
    Subject("store, written by 32", "rows", _WRITTEN, _make_nothing, _write, _warm_up),
    Subject("tokenize", "images", _IMAGES, _make_image_tokenizer, _tokenize, _warm_up),
)
