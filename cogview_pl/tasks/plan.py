"""plan=true: what a run would cost; trains and writes nothing."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_pl.checkpoints.store import build_template, build_vqvae
from cogview_pl.config import Config
from cogview_pl.tasks.fit_image_tokenizer import vqvae_settings
from cogview_pl.tasks.fit_sequence_model import transformer_settings
from cogview_pl.transformer import Transformer
from cogview_pl.vocab import Vocabulary

_BACKWARD = 3  # a training step costs the forward pass and twice as much again


def run(config: Config) -> dict[str, float]:
    """Print parameters and FLOPs of both stages under this configuration."""
    figures = {**_image_tokenizer(config), **_sequence_model(config)}
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {_readable(value)}")
    return figures


def _image_tokenizer(config: Config) -> dict[str, float]:
    options = config.image_tokenizer
    with torch.device("meta"):
        model = build_vqvae(vqvae_settings(options))
        images = torch.empty(1, 3, options.image_size, options.image_size)
        with FlopCounterMode(display=False) as counter:
            model.reconstruct_continuous(images)
    search = 2 * options.grid**2 * options.num_codes * options.code_dim
    forward = counter.get_total_flops() + search
    return {
        "image_tokenizer/parameters": sum(p.numel() for p in model.parameters()),
        "image_tokenizer/flops_per_picture": forward,
        "image_tokenizer/flops_per_step": _BACKWARD * forward * config.data.batch_size,
    }


def _sequence_model(config: Config) -> dict[str, float]:
    vocabulary = Vocabulary(config.image_tokenizer.num_codes, config.text.num_pieces)
    template = build_template({**vars(config.template), "text_length": config.text.max_length}, vocabulary)
    with torch.device("meta"):
        model = Transformer(**transformer_settings(config, vocabulary))
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, template.length, dtype=torch.long))
    return {
        "sequence_model/parameters": sum(p.numel() for p in model.parameters()),
        "sequence_model/vocabulary": vocabulary.size,
        "sequence_model/longest_sequence": template.length,
        "sequence_model/flops_per_sequence": counter.get_total_flops(),
        "sequence_model/flops_per_step": _BACKWARD * counter.get_total_flops() * config.data.batch_size,
    }


def _readable(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value:,.0f}  ({value / size:.2f} {unit})"
    return f"{value:,.0f}"
