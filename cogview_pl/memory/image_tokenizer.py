"""What the image tokenizer allocates: a training step, encoding, decoding; on tensors without memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.memory.sequence_step import ACTIVATIONS, BATCH, GRADIENTS, Heights
from cogview_pl.memory.trace import LiveBytes
from cogview_pl.vqvae.config import Reconstruction
from cogview_pl.vqvae.losses import reconstruction_loss
from cogview_pl.vqvae.model import VQVAE


def training_heights(
    settings: Mapping[str, Any],
    *,
    batch: int,
    edge: int,
    reconstruction: Literal["l1", "l2"],
    arithmetic: torch.dtype,
    accumulates: bool,
) -> Heights:
    """Heights of a training step of stage 1 with its codebook, on top of the weights.

    Args:
        settings: constructor arguments of the VQ-VAE.
        batch, edge: images, and their pixels along an edge.
        reconstruction: distance between images.
        arithmetic: dtype of autocast; fp32 for none.
        accumulates: whether gradients of an earlier batch are there while this one runs backwards.
    """
    with FakeTensorMode():
        model = _build(settings).train()
        if accumulates:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        with LiveBytes(ACTIVATIONS) as live:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: live.claim(p.grad, GRADIENTS))
            with live.label(BATCH):
                images = torch.zeros(batch, 3, edge, edge, dtype=torch.uint8)
            with torch.autocast("cpu", arithmetic, enabled=arithmetic != torch.float32):
                loss = _loss(model, images, reconstruction)
            forward = live.restart()
            loss.backward()
            return Heights(forward, live.restart())


def _loss(model: VQVAE, uint8_images: Tensor, reconstruction: Literal["l1", "l2"]) -> Tensor:
    images = (uint8_images.float() / 255).contiguous(memory_format=torch.channels_last)
    output = model(images)
    return reconstruction_loss(Reconstruction(reconstruction), output.reconstruction, images) + output.quantized.loss


def encoding_height(settings: Mapping[str, Any], *, batch: int, edge: int) -> Counter[str]:
    """Bytes at the height of encoding images of `edge` pixels."""
    return _encoding(json.dumps(settings), batch, edge).copy()


def decoding_height(settings: Mapping[str, Any], *, batch: int, grid: tuple[int, int]) -> Counter[str]:
    """Bytes at the height of painting the codes `(batch, *grid)`."""
    return _decoding(json.dumps(settings), batch, grid).copy()


@cache
def _encoding(settings: str, batch: int, edge: int) -> Counter[str]:
    images = (batch, 3, edge, edge)
    return _height(settings, lambda model: model.encode(torch.zeros(images, dtype=torch.uint8) / 255))


@cache
def _decoding(settings: str, batch: int, grid: tuple[int, int]) -> Counter[str]:
    codes = (batch, *grid)
    return _height(settings, lambda model: _painted(model, torch.zeros(codes, dtype=torch.long)))


def _painted(model: VQVAE, codes: Tensor) -> Tensor:
    images = model.decode(codes).clamp(0, 1)
    return (images * 255).round().to(torch.uint8)


def _height(settings: str, work: Callable[[VQVAE], Tensor]) -> Counter[str]:
    with FakeTensorMode(), torch.inference_mode():
        model = _build(json.loads(settings)).eval()
        with LiveBytes(ACTIVATIONS) as live:
            work(model)
            return live.peak


def _build(settings: Mapping[str, Any]) -> VQVAE:
    """Without k-means, which runs once and before the decoder has allocated anything."""
    quantizer = dict(settings["quantizer"])
    if "kmeans_iters" in quantizer:
        quantizer["kmeans_iters"] = 0
    return build_vqvae({**settings, "quantizer": quantizer})
