"""Makes finished runs with random weights and random tokens, without training.

`task=pretrain`, `task=generate` and other tasks then find a token store and models of the configured sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cogview_pl.assembly.model_specs import transformer_settings, vqvae_settings
from cogview_pl.checkpoints.model_folder import (
    ImageTokenizer,
    build_template,
    build_transformer,
    build_vqvae,
    save_image_tokenizer,
    save_sequence_model,
)
from cogview_pl.cli.overrides import quote_override
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config, register_schemas
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.vocab import TextTokenizer, Vocabulary
from cogview_pl.vocab.config import TextConfig

ROWS = {"train": 256, "val": 8}
_CONF = Path(__file__).parents[1] / "conf"
_FIRST_CHARACTER = 0x4E00  # first Chinese character in Unicode
_CHARACTERS = 20_000
_SEED_TEXT = ["红色的圆形", "蓝色的方块在左边", "一个大的绿色三角形"]


def composed(overrides: Sequence[str]) -> Config:
    """The configuration of a command line."""
    register_schemas()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(_CONF)):
        config = OmegaConf.to_object(hydra.compose("config", overrides=list(map(quote_override, overrides))))
    assert isinstance(config, Config)
    return config


def make_tokens(outputs: Path, overrides: Sequence[str]) -> None:
    """`OUTPUTS/tokenize/latest`: texts as long as the slot, random codes, and both tokenizers.

    Args:
        outputs: folder of the runs.
        overrides: overrides of `task=pretrain` that set the sizes.
    """
    config, folder = composed(overrides), outputs / "tokenize" / "latest"
    (folder / "token_store").mkdir(parents=True)
    images = _image_tokenizer(config)
    save_image_tokenizer(folder / "image_tokenizer", images)
    text = text_tokenizer(config.text)
    text.save(folder / "text.model")
    writer = TokenStoreWriter(
        folder / "token_store",
        text_length=config.text.max_length,
        grid=images.grid,
        text_vocab_size=text.vocab_size,
        codebook_size=images.model.codebook_size,
        text_tokenizer=text.identity,
        image_tokenizer=images.identity,
        splits=ROWS,
    )
    generator = torch.Generator().manual_seed(0)
    for split, rows in ROWS.items():
        text_tokens = torch.randint(3, text.vocab_size, (rows, config.text.max_length), generator=generator)
        codes = torch.randint(images.model.codebook_size, (rows, *images.grid), generator=generator)
        writer.append(split, {"text": text_tokens.tolist()}, codes, [f"{split} {row}" for row in range(rows)], rows)
    writer.finish()


def make_model(outputs: Path, overrides: Sequence[str]) -> None:
    """`OUTPUTS/pretrain/latest`: a sequence model with random weights in bf16; call `make_tokens` first."""
    config = composed(overrides)
    tokens = outputs / "tokenize" / "latest"
    text = TextTokenizer.load(tokens / "text.model")
    images = _image_tokenizer(config)
    vocabulary = Vocabulary(images.model.codebook_size, text.vocab_size)
    settings = transformer_settings(config.model, vocabulary)
    template = model_options(config).layout(config.template)
    build_template(template, vocabulary)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes a minute for them
        model = build_transformer(settings)
    save_sequence_model(
        outputs / "pretrain" / "latest" / "model",
        model.bfloat16().cpu(),
        transformer=settings,
        template=template,
        vocabulary=vocabulary,
        text=text,
        image_tokenizer=images,
    )


def text_tokenizer(options: TextConfig) -> TextTokenizer:
    """A tokenizer with exactly `vocab_size` text tokens: a learned one, filled up with invented Chinese words."""
    learned = TextTokenizer.train(_SEED_TEXT, options)
    found = ModelProto.FromString(learned.serialized)
    known = {piece.piece for piece in found.pieces}
    number, lowest = 0, min(piece.score for piece in found.pieces)
    while len(found.pieces) < options.vocab_size:
        first, second = divmod(number, _CHARACTERS)
        word = chr(_FIRST_CHARACTER + first) + chr(_FIRST_CHARACTER + second)
        number += 1
        if word not in known:
            found.pieces.add(piece=word, score=lowest - number)
    found.trainer_spec.vocab_size = options.vocab_size
    return TextTokenizer(found.SerializeToString())


def _image_tokenizer(config: Config) -> ImageTokenizer:
    """An image tokenizer with the same random weights at every call."""
    settings = vqvae_settings(config.image_tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageTokenizer(build_vqvae(settings), {**settings, "image_size": config.image_tokenizer.image_size})
