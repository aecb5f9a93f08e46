"""Stand-ins for the released files: their names, format and vocabulary, with two layers of random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.random_runs import text_tokenizer
from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.released import released_settings, save_transformer, save_vqvae
from cogview_pl.vocab import Vocabulary
from cogview_pl.vocab.config import TextConfig
from tests.make_models import make_transformer

CODES, TEXT_TOKENS = 8192, 50_000
TRANSFORMERS = ("cogview-base", "cogview-sr", "cogview-caption")


def make_release(folder: Path, *, num_positions: int, transformers: tuple[str, ...] = TRANSFORMERS) -> Path:
    """A folder of downloads. 1,089 positions are those of 32×32 codes, 96 those of 8×8."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_vqvae(build_vqvae(released_settings(8, 4, CODES)), folder / "tokenizer.pt")
    options = TextConfig(vocab_size=TEXT_TOKENS, model_type="bpe", character_coverage=1.0, max_length=1)
    text_tokenizer(options).save(folder / "cog-pretrain.model")
    vocabulary = Vocabulary(CODES, TEXT_TOKENS)
    sizes = {"vocab_size": vocabulary.size, "num_layers": 2, "hidden_size": 32, "num_heads": 2}
    for name in transformers:
        save_transformer(make_transformer(**sizes, num_positions=num_positions, init_std=0.2), folder / name)
    return folder
