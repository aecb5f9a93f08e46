"""Memory of a training run: its steps, the loading of weights, the encoding of images, and sample images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from cogview_pl.assembly.checks import ADAMW_OFFLOAD
from cogview_pl.assembly.devices import weights_dtype
from cogview_pl.assembly.instantiate import instantiate
from cogview_pl.assembly.kept_checkpoints import background_bytes, ema_decay
from cogview_pl.assembly.model_specs import SequenceModelSpec
from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.perceptual import empty_perceptual_loss
from cogview_pl.assembly.strategy import num_devices, tensor_parts
from cogview_pl.assembly.trainer import optimizer_node
from cogview_pl.checkpoints.model_folder import build_transformer, build_vqvae
from cogview_pl.memory.inference import InferenceModel, decode_images, encode_images, image_tokenizer_bytes
from cogview_pl.memory.phases import AVERAGES, FORWARD, FP32, GRADIENTS, OPTIMIZER, WEIGHTS, Phases
from cogview_pl.memory.sharding import narrow, shard
from cogview_pl.memory.trace import default_dtype
from cogview_pl.memory.training import (
    StepOptions,
    block_bytes,
    image_tokenizer_step,
    longest_sequences,
    sequence_step,
)
from cogview_pl.transformer.config import ActivationCheckpointing, Norm, NormScope
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import makes_images
from cogview_pl.vqvae.config import ImageTokenizerConfig
from cogview_pl.vqvae.model import VQVAE

_PRECISIONS = {  # dtype of the weights, dtype of autocast
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
}


def image_tokenizer_phases(
    settings: Mapping[str, Any],
    options: TrainingOptions,
    tokenizer: ImageTokenizerConfig,
    *,
    outputs: str,
    batch: int,
    edge: int,
    on_gpu: bool,
) -> Phases:
    """Training of a VQ-VAE with these constructor arguments; see `image_tokenizer_step`."""
    quantizer = dict(settings["quantizer"])
    if "kmeans_iters" in quantizer:  # k-means runs once, before the decoder allocates anything
        quantizer["kmeans_iters"] = 0

    def build() -> VQVAE:
        return build_vqvae({**settings, "quantizer": quantizer})

    perceptual = None
    if tokenizer.perceptual is not None:
        perceptual = empty_perceptual_loss(tokenizer.perceptual, outputs, verify=options.verify)
    phases = image_tokenizer_step(build, batch, edge, tokenizer, _step_options(options, on_gpu), perceptual)
    copy = _copy_of_checkpoint(phases, options, on_gpu=on_gpu)
    return {name: held + copy for name, held in _shard(phases, options).items()}


def sequence_model_phases(
    spec: SequenceModelSpec,
    options: TrainingOptions,
    slot_ids: list[range] | None,
    *,
    batch: int,
    checkpointing: ActivationCheckpointing,
    encodes: bool,
    on_gpu: bool,
) -> Phases:
    """Training of a sequence model.

    Args:
        spec: sizes and layout of the model.
        options: of the run.
        slot_ids: see `sequence_loss`.
        batch: sequences of a batch.
        checkpointing: `activation_checkpointing`.
        encodes: whether the run reads images, and encodes them.
        on_gpu: count what a GPU allocates.
    """
    layers, images = spec.settings["num_layers"], spec.images
    weights, _ = _PRECISIONS[options.precision["precision"]]
    parts = tensor_parts(options.strategy, options.trainer)

    def build(layers: int) -> Transformer:
        with default_dtype(weights):
            model = build_transformer({**spec.settings, "num_layers": layers})
            if parts > 1:
                narrow(model, parts)
        if options.lora.rank:
            add_lora(model, options.lora, held=weights_dtype(options.precision))
        model.set_activation_checkpointing(checkpointing)
        return model

    in_place = (spec.settings["norm"], spec.settings["norm_scope"]) == (Norm.sandwich.value, NormScope.token.value)
    compiled = options.compile and in_place and checkpointing == ActivationCheckpointing.none
    sizes = longest_sequences(spec.template, slot_ids, batch)
    phases = sequence_step(build, layers, sizes, replace(_step_options(options, on_gpu), compiled=compiled))
    tokenizer = image_tokenizer_bytes(images)
    copy = _copy_of_checkpoint(phases, options, on_gpu=on_gpu, parts=0 if options.lora.rank else tokenizer)
    phases = _shard(phases, options, layers, block_bytes(build))

    host = Counter(image_tokenizer=0 if on_gpu else tokenizer)
    if not on_gpu and options.lora.rank:  # the base and its tokenizer stay; adapted and base model share fp32 weights
        with torch.device("meta"):
            frozen = [parameter for parameter in build(layers).parameters() if parameter.dtype != torch.float32]
        host += Counter(image_tokenizer=tokenizer, base_in_fp32=sum(parameter.numel() * FP32 for parameter in frozen))
    host += copy
    phases = {name: held + host for name, held in phases.items()}
    between = Counter({part: phases[FORWARD][part] for part in (WEIGHTS, OPTIMIZER, AVERAGES)}) + host
    between += Counter({AVERAGES: phases[FORWARD][AVERAGES]})  # copies of the weights, whose place averages take
    model = InferenceModel(spec, weights, parts, on_gpu=on_gpu)
    if "samples" in options.callbacks and makes_images(spec.template) and not options.strategy.kind.sharded:
        rows = options.callbacks["samples"]["num_prompts"]
        phases["generation of sample images"] = between + model.decode(rows)
        if not on_gpu:  # else the image tokenizer stays on the host
            phases["decoding of sample images"] = between + decode_images(images, rows)
    if not on_gpu and options.starts_from_weights:  # fresh weights and those that are read exist together
        phases["loading of weights"] = Counter(weights=2 * model.parameters * FP32, image_tokenizer=2 * tokenizer)
    if encodes:
        held = Counter(weights=phases[FORWARD]["weights"]) + host
        phases["encoding of images"] = held + encode_images(images, batch, scale=2)
    return phases


def _copy_of_checkpoint(phases: Phases, options: TrainingOptions, *, on_gpu: bool, parts: int = 0) -> Counter[str]:
    """Bytes in main memory of the copy from which a checkpoint is written.

    Args:
        phases: of the full model.
        options: of the run.
        on_gpu: whether the estimate is for a GPU, which has no such copy.
        parts: bytes of other models in the checkpoint.
    """
    held = phases[FORWARD]
    size = held[GRADIENTS if options.lora.rank else WEIGHTS] + held[OPTIMIZER] + held[AVERAGES] + parts
    return Counter(checkpoint_copy=0 if on_gpu or size < background_bytes(options.callbacks) else size)


def _step_options(options: TrainingOptions, on_gpu: bool) -> StepOptions:
    node = optimizer_node(options)
    offloads = node["_target_"] == ADAMW_OFFLOAD
    if on_gpu and node["_target_"].startswith("torch.optim.") and not node.get("fused"):
        node = {**node, "foreach": True}  # as torch chooses on a GPU
    return StepOptions(
        optimizer=None if offloads else instantiate(node, "optimizer.optimizer"),
        autocast=_PRECISIONS[options.precision["precision"]][1],
        accumulates=options.trainer["accumulate_grad_batches"] > 1,
        frees_gradients=offloads and bool(node["offload_gradients"]),
        averaged=ema_decay(options.callbacks) is not None,
        on_gpu=on_gpu,
    )


def _shard(phases: Phases, options: TrainingOptions, layers: int = 0, block: int = 0) -> Phases:
    strategy, (weights, autocast) = options.strategy, _PRECISIONS[options.precision["precision"]]
    return shard(
        phases,
        strategy.kind,
        num_devices(options.trainer),
        arithmetic=autocast or weights,
        arguments=strategy.strategy if isinstance(strategy.strategy, dict) else None,
        layers=layers,
        block=block,
    )
