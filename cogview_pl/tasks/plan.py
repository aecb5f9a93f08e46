"""plan=true: what a run would cost; trains and writes nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cogview_pl.checkpoints.store import build_template, build_vqvae
from cogview_pl.config import ActivationCheckpointing, Config, Verb
from cogview_pl.data.sequences import SequenceBatch, SequenceCollator
from cogview_pl.generation.quantized import matrix_bytes
from cogview_pl.tasks.activation_memory import kept_bytes
from cogview_pl.tasks.fit_image_tokenizer import vqvae_settings
from cogview_pl.tasks.fit_sequence_model import predicted_ids, transformer_settings
from cogview_pl.tasks.generate import read_prompts
from cogview_pl.tasks.models import layout_settings, quantization, weights_dtype
from cogview_pl.transformer import Transformer
from cogview_pl.transformer.attention import AttentionFunction, fused_attention
from cogview_pl.transformer.flops import TRAINING, forward_flops
from cogview_pl.vocab import Template, Vocabulary


def run(config: Config) -> dict[str, float]:
    """Print parameters and FLOPs of both stages under this configuration."""
    vocabulary = Vocabulary(config.image_tokenizer.num_codes, config.text.num_pieces)
    template = build_template(layout_settings(config, config.template), vocabulary)
    figures = {**_image_tokenizer(config), **_sequence_model(config, template)}
    if config.verb == Verb.fit_sequence_model:
        figures |= _training_memory(config, template)
    if config.verb == Verb.generate:
        figures |= _generation_memory(config, template, figures)
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
        "image_tokenizer/flops_per_step": TRAINING * forward * config.data.batch_size,
    }


def _sequence_model(config: Config, template: Template) -> dict[str, float]:
    with torch.device("meta"):
        model = Transformer(**transformer_settings(config, template.vocabulary))
    batch = _longest(template, 1)
    forward = int(forward_flops(model, batch.weights, batch.slots, predicted_ids(config, template)))
    return {
        "sequence_model/parameters": sum(p.numel() for p in model.parameters()),
        "sequence_model/vocabulary": template.vocabulary.size,
        "sequence_model/longest_sequence": template.length,
        "sequence_model/flops_per_sequence": forward,
        "sequence_model/flops_per_step": TRAINING * forward * config.data.batch_size,
    }


def _longest(template: Template, count: int) -> SequenceBatch:
    """A batch of the longest training sequences; ids are of no account."""
    sequence = template.build({slot.name: [0] * slot.length for slot in template.slots})
    return SequenceCollator(template.vocabulary.pad)([sequence] * count)


def _training_memory(config: Config, template: Template) -> dict[str, float]:
    """Bytes of activations at the height of a step on one device, under each choice of activation_checkpointing.

        kept after the forward pass + (kept without checkpointing - kept) / layers

    The second term is the one block whose activations the backward pass has made anew. The forward pass runs without
    memory or arithmetic (fake tensors). Copies of the weights in half precision count where they are kept, and masks of
    dropout at their size on a CPU, of which a GPU needs a quarter or half. Not counted: weights, their gradients and
    the optimizer's state, and logits, of which the loss makes a few rows at a time.
    """
    kept = {choice.value: _kept_activations(config, template, choice) for choice in ActivationCheckpointing}
    everything = kept[ActivationCheckpointing.none.value]
    return {
        f"memory/activations_{name}_bytes": bytes_ + (everything - bytes_) // config.model.num_layers
        for name, bytes_ in kept.items()
    }


def _kept_activations(config: Config, template: Template, choice: ActivationCheckpointing) -> int:
    dtype = weights_dtype(config)
    settings = transformer_settings(config, template.vocabulary)
    attentions: list[AttentionFunction] | None = None
    if settings["attention"] == "fused":
        attentions = [_attention_of_gpus] * settings["num_layers"]
    with FakeTensorMode():
        model = Transformer(**settings)
        model.set_training_pass(recompute=choice.value)
        tokens = torch.zeros(config.data.batch_size, template.length - 1, dtype=torch.long)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return model.hidden(tokens, attentions=attentions)

        return kept_bytes(forward)


def _attention_of_gpus(
    q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BHLS: Tensor | None, dropout: float
) -> Tensor:
    """Fused kernels of GPUs keep no mask of the dropout; on a CPU dropout falls back to all L × L scores."""
    return fused_attention(q_BHLK, k_BHSK, v_BHSK, mask_BHLS, 0.0)


def _generation_memory(config: Config, template: Template, figures: dict[str, float]) -> dict[str, float]:
    """Bytes that stay allocated while painting: all models are loaded at once, one of them fills its cache."""
    size = weights_dtype(config).itemsize
    models = 1 + (config.rerank_with is not None) + (config.upscale_with is not None)
    positions = template.length
    if config.sampler.guidance != 1:
        positions *= 2  # every picture is painted with and without its text, side by side
    if config.upscale_with is not None:
        enlarging = build_template(layout_settings(config, config.upscale_template), template.vocabulary).length
        positions = max(positions, enlarging)
    cached = 2 * config.model.num_layers * config.model.width * positions  # a key and a value per layer and position
    pictures = min(config.sampler.batch_size, config.num_images * _num_prompts(config))
    each = figures["sequence_model/parameters"] * size
    weights = quantization(config)
    if weights is not None:
        width = config.model.width  # the matrices of a block have 12 · width² weights
        each -= config.model.num_layers * (12 * width**2 * size - matrix_bytes(weights, width))
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
