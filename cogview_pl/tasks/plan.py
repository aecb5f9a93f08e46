"""plan=true: what a run would cost; trains and writes nothing."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_pl.checkpoints.store import build_template, build_vqvae
from cogview_pl.config import Config, Verb
from cogview_pl.generation.quantized import matrix_bytes
from cogview_pl.tasks.fit_image_tokenizer import vqvae_settings
from cogview_pl.tasks.fit_sequence_model import transformer_settings
from cogview_pl.tasks.generate import read_prompts
from cogview_pl.tasks.models import layout_settings, weights_dtype
from cogview_pl.transformer import Transformer
from cogview_pl.vocab import Vocabulary

_BACKWARD = 3  # a training step costs the forward pass and twice as much again


def run(config: Config) -> dict[str, float]:
    """Print parameters and FLOPs of both stages under this configuration."""
    figures = {**_image_tokenizer(config), **_sequence_model(config)}
    if config.verb == Verb.generate:
        figures |= _generation_memory(config, figures)
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
    template = build_template(layout_settings(config, config.template), vocabulary)
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


def _generation_memory(config: Config, figures: dict[str, float]) -> dict[str, float]:
    """Bytes that stay allocated while painting: all models are loaded at once, one of them fills its cache."""
    size = weights_dtype(config).itemsize
    models = 1 + (config.rerank_with is not None) + (config.upscale_with is not None)
    vocabulary = Vocabulary(config.image_tokenizer.num_codes, config.text.num_pieces)
    positions = build_template(layout_settings(config, config.template), vocabulary).length
    if config.sampler.guidance != 1:
        positions *= 2  # every picture is painted with and without its text, side by side
    if config.upscale_with is not None:
        enlarging = build_template(layout_settings(config, config.upscale_template), vocabulary).length
        positions = max(positions, enlarging)
    cached = 2 * config.model.num_layers * config.model.width * positions  # a key and a value per layer and position
    pictures = min(config.sampler.batch_size, config.num_images * _num_prompts(config))
    each = figures["sequence_model/parameters"] * size
    if config.weights is not None:
        width = config.model.width  # the matrices of a block have 12 · width² weights
        each -= config.model.num_layers * (12 * width**2 * size - matrix_bytes(config.weights, width))
    parts = {
        "memory/sequence_models_bytes": models * each,
        "memory/kv_cache_bytes": cached * pictures * size,
        "memory/image_tokenizer_bytes": figures["image_tokenizer/parameters"] * torch.float32.itemsize,
    }
    return {**parts, "memory/total_bytes": sum(parts.values())}


def _num_prompts(config: Config) -> int:
    return config.num_prompts if config.prompts is None else len(read_prompts(config))


def _readable(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value:,.0f}  ({value / size:.2f} {unit})"
    return f"{value:,.0f}"
