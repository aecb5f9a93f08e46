"""Sizes and work of the models that a run uses: parameters, tokens and floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.memory.training import longest_batch
from cogview_pl.transformer.flops import TRAINING, forward_flops
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template


def image_tokenizer_figures(settings: Mapping[str, Any], edge: int, samples: int = 0) -> dict[str, float]:
    """Parameters, and operations per image of `edge` pixels.

    Args:
        settings: constructor arguments of the VQ-VAE.
        edge: pixels along an edge.
        samples: images of a training step; 0: it is not trained.
    """
    with torch.device("meta"):
        model = build_vqvae(settings)
        with FlopCounterMode(display=False) as counter:
            model.reconstruct_continuous(torch.empty(1, 3, edge, edge))
    codes = (edge // settings["downsampling"]) ** 2
    forward = counter.get_total_flops() + 2 * codes * settings["codebook_size"] * settings["codebook_dim"]
    figures: dict[str, float] = {
        "image_tokenizer/parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_tokenizer/flops_per_image": forward,
    }
    return figures | ({"image_tokenizer/flops_per_step": TRAINING * forward * samples} if samples else {})


def sequence_model_figures(
    model: Transformer, template: Template, slot_ids: Sequence[range] | None, samples: int = 0
) -> dict[str, float]:
    """Parameters, length and operations of a sequence model.

    Args:
        model: without adapters; may be on the meta device.
        template, slot_ids: its layout; see `sequence_loss`.
        samples: sequences of a training step; 0: it is not trained.
    """
    batch = longest_batch(template)
    forward = int(forward_flops(model, batch.weights, batch.slots, slot_ids))
    figures: dict[str, float] = {
        "sequence_model/parameters": sum(p.numel() for p in model.parameters()),
        "sequence_model/vocabulary": model.token_embedding.num_embeddings,
        "sequence_model/longest_sequence": template.length,
        "sequence_model/flops_per_sequence": forward,
    }
    if not samples:
        return figures
    return figures | {
        "sequence_model/tokens_per_step": samples * (template.length - 1),
        "sequence_model/flops_per_step": TRAINING * forward * samples,
    }
