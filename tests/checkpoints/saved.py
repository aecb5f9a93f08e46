"""Run folders of the smallest models, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

from cogview_pl.checkpoints.manifest import MANIFEST, write_manifest
from cogview_pl.checkpoints.model_folder import (
    ImageTokenizer,
    build_template,
    build_transformer,
    build_vqvae,
    load_image_tokenizer,
    save_image_tokenizer,
    save_sequence_model,
)
from cogview_pl.vocab import Vocabulary
from tests.make_models import quantizer_options, transformer_settings

from ..texts import learned_text

VQVAE = {
    "hidden_size": 8,
    "codebook_dim": 4,
    "codebook_size": 16,
    "downsampling": 8,
    "residual_blocks": 0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "quantizer": quantizer_options("ema", kmeans_iters=0),
}
TEMPLATE = {
    "layout": "[ROI1] {text} [BASE] [BOI1] {image:2x2} [EOI1]",
    "target": "image",
    "loss": {"image": 1.0},
    "restart_positions_at": None,
    "text_length": 8,
}


def save_tokenizer(folder: Path, **changes: object) -> ImageTokenizer:
    settings = {**VQVAE, **changes}
    save_image_tokenizer(folder, ImageTokenizer(build_vqvae(settings), {**settings, "image_size": 16}))
    return load_image_tokenizer(folder)


def save_run(folder: Path, images: ImageTokenizer) -> Path:
    """A run folder with a saved sequence model of random weights."""
    text = learned_text(["红色的圆形", "蓝色的心形"], vocab_size=300)
    vocabulary = Vocabulary(16, text.vocab_size)
    settings = transformer_settings(
        vocab_size=vocabulary.size,
        num_layers=1,
        hidden_size=16,
        num_heads=2,
        num_positions=build_template(TEMPLATE, vocabulary).num_positions,
    )
    save_sequence_model(
        folder / "model",
        build_transformer(settings),
        transformer=settings,
        template=TEMPLATE,
        vocabulary=vocabulary,
        text=text,
        image_tokenizer=images,
    )
    return folder


def forge_manifest(folder: Path) -> None:
    """Hashes of the files as they are now: what somebody does who changes them on purpose."""
    names = json.loads((folder / MANIFEST).read_text())
    write_manifest(folder, [name for name in names if (folder / name).exists()])
