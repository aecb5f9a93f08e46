"""Sizes of the models that a run uses: parameters, tokens and floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_pl.assembly.model_specs import ImageTokenizerSpec, SequenceModelSpec
from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.strategy import num_devices, tensor_parts
from cogview_pl.checkpoints.model_folder import build_transformer, build_vqvae
from cogview_pl.memory.training import longest_batch
from cogview_pl.transformer.config import LoRAConfig
from cogview_pl.transformer.flops import TRAINING, forward_flops
from cogview_pl.transformer.lora import add_lora
from cogview_pl.vqvae.external import EXTERNAL, build_external


def image_tokenizer_figures(images: ImageTokenizerSpec, samples: int = 0) -> dict[str, float]:
    """Parameters, and operations per image; `samples`: images of a training step, 0 if it is not trained."""
    settings, edge = images.settings, images.edge
    if EXTERNAL in settings:
        return {"image_tokenizer/parameters": sum(p.numel() for p in build_external(settings).parameters())}
    with torch.device("meta"):
        model = build_vqvae(settings)
        with FlopCounterMode(display=False) as counter:
            model.reconstruct_continuous(torch.empty(1, 3, edge, edge))
    codes = images.grid[0] * images.grid[1]
    forward = counter.get_total_flops() + 2 * codes * settings["codebook_size"] * settings["codebook_dim"]
    figures: dict[str, float] = {
        "image_tokenizer/parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_tokenizer/flops_per_image": forward,
    }
    return figures | ({"image_tokenizer/flops_per_step": TRAINING * forward * samples} if samples else {})


def sequence_model_figures(
    spec: SequenceModelSpec, slot_ids: Sequence[range] | None, lora: LoRAConfig, samples: int = 0
) -> dict[str, float]:
    """Parameters, length and operations of a sequence model and of its image tokenizer.

    Args:
        spec: sizes and layout.
        slot_ids: see `sequence_loss`.
        lora: adapters that are trained.
        samples: sequences of a training step; 0: it is not trained.
    """
    template, batch = spec.template, longest_batch(spec.template)
    with torch.device("meta"):
        model = build_transformer(spec.settings)
    forward = int(forward_flops(model, batch.weights, batch.slots, slot_ids))
    figures: dict[str, float] = image_tokenizer_figures(spec.images) | {
        "sequence_model/parameters": sum(p.numel() for p in model.parameters()),
        "sequence_model/vocabulary": model.token_embedding.num_embeddings,
        "sequence_model/longest_sequence": template.length,
        "sequence_model/flops_per_sequence": forward,
    }
    if not samples:
        return figures
    if lora.rank:
        add_lora(model, lora, held=torch.float32)
    return figures | {
        "sequence_model/tokens_per_step": samples * (template.length - 1),
        "sequence_model/flops_per_step": TRAINING * forward * samples,
        "sequence_model/trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def batch_of_all_devices(batch: int, options: TrainingOptions) -> int:
    """Samples of a training step on all devices; those of tensor parallelism share a batch."""
    batches = options.trainer["accumulate_grad_batches"] * num_devices(options.trainer)
    return int(batch * (batches // tensor_parts(options.strategy, options.trainer)))
