"""Memory of training: weights, gradients and optimizer state, and what a step allocates on top."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from cogview_pl.assembly.checks import ADAMW_OFFLOAD
from cogview_pl.assembly.lora import lora_options
from cogview_pl.assembly.model_specs import SequenceSizes, configured_images, predicted_ids, trained_sizes
from cogview_pl.assembly.models import starts_from_weights
from cogview_pl.assembly.strategy import num_devices, tensor_parts, without_fused_kernel
from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.config.choices import Verb
from cogview_pl.config.schema import Config, instantiate
from cogview_pl.data.config import TokenSource
from cogview_pl.data.sequence_dataset import SequenceBatch, SequenceCollator
from cogview_pl.generation.config import Sampling
from cogview_pl.memory.decoding import Decoding, decoding_height
from cogview_pl.memory.image_tokenizer import decoding_height as image_height
from cogview_pl.memory.image_tokenizer import encoding_height, training_heights
from cogview_pl.memory.inference import cache_and_packed, image_tokenizer_bytes
from cogview_pl.memory.model import Counted, Model, count, counted
from cogview_pl.memory.optimizer import OptimizerBytes, optimizer_bytes
from cogview_pl.memory.phases import Moments
from cogview_pl.memory.sequence_step import GRADIENTS, Heights, Predicted, SequenceStep, heights
from cogview_pl.memory.sharding import Holdings, holdings
from cogview_pl.vocab import Template, is_text_to_image

_PRECISIONS = {  # weights, arithmetic
    "32-true": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
}


def precision(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of weights and of arithmetic."""
    return _PRECISIONS[config.precision["precision"]]


def longest_batch(template: Template, count: int) -> SequenceBatch:
    """A batch of the longest training sequences; ids are of no account."""
    sequence = template.build({slot.name: [0] * slot.length for slot in template.slots})
    return SequenceCollator(template.vocabulary.pad)([sequence] * count)


def trained_model(config: Config, sizes: SequenceSizes) -> Model:
    """The sequence model as one device trains it."""
    weights, _ = precision(config)
    return Model.of(sizes.settings, weights, lora_options(config), tensor_parts(config))


def count_image_tokenizer(settings: dict[str, Any]) -> Counted:
    """Parameters of an image tokenizer."""
    with torch.device("meta"):
        parameters = list(build_vqvae(settings).parameters())
    return count([p for p in parameters if p.ndim == 4], [p for p in parameters if p.ndim != 4])


def fit_sequence_model(config: Config, on_gpu: bool) -> Moments:
    """Stage 2: the height of the forward pass, of the backward one, of the optimizer's step, and of painting."""
    sizes = trained_sizes(config)
    model = trained_model(config, sizes)
    _, arithmetic = precision(config)
    optimizer = _optimizer(config, counted(model), on_gpu)
    held = _holdings(config, counted(model), optimizer)
    step = SequenceStep(
        model=model,
        batch=config.data.batch_size,
        tokens=sizes.template.length - 1,
        predicted=_predicted(config, sizes.template),
        recompute=config.activation_checkpointing.value,
        arithmetic=arithmetic,
        on_gpu=on_gpu,
        accumulates=_accumulates(config),
    )
    host = Counter() if on_gpu else _on_the_host(config, sizes, model)
    moments = _of_a_step(config, held, host, heights(step), optimizer.step)
    if "samples" in config.callbacks and is_text_to_image(sizes.template) and not config.strategy.kind.spreads:
        work = Decoding.of(model, sizes.template, config.callbacks["samples"]["num_prompts"], on_gpu, Sampling(top_k=0))
        without = held.without_gradients + host  # Lightning drops them before it validates
        moments["painting"] = without + cache_and_packed(work, None) + decoding_height(work)
        if not on_gpu:  # else the image tokenizer stays on the host
            images = image_height(sizes.images.settings, batch=work.rows, grid=sizes.images.grid)
            moments["decoding of images"] = without + images
    if not on_gpu and starts_from_weights(config):  # random weights are replaced by those that were read
        read = counted(Model.of(sizes.settings, torch.float32)).bytes
        tokenizers = 2 * image_tokenizer_bytes(sizes.images)
        moments["loading"] = Counter(image_tokenizer=tokenizers, weights=2 * read)
    if config.data.token_store is None and config.sequences.source == TokenSource.images:
        encoding = encoding_height(sizes.images.settings, batch=config.data.batch_size, edge=2 * sizes.images.edge)
        moments["tokenising"] = host + encoding + Counter(weights=counted(model).bytes)
    return Moments(moments)


def fit_image_tokenizer(config: Config, on_gpu: bool) -> Moments:
    """Stage 1: the heights of a step with the codebook, which allocates more than one without."""
    images = configured_images(config)
    _, arithmetic = precision(config)
    model = count_image_tokenizer(images.settings)
    optimizer = _optimizer(config, model, on_gpu)
    with_codebook = model._replace(bytes=image_tokenizer_bytes(images))  # which no gradient moves
    found = training_heights(
        images.settings,
        batch=config.data.batch_size,
        edge=config.data.image_size,
        reconstruction=config.image_tokenizer.reconstruction.value,
        arithmetic=arithmetic,
        accumulates=_accumulates(config),
    )
    return Moments(_of_a_step(config, _holdings(config, with_codebook, optimizer), Counter(), found, optimizer.step))


def held_bytes(config: Config, on_gpu: bool) -> int:
    """Weights, gradients and optimizer state: the part of a training run's memory that is known at once."""
    if config.verb == Verb.fit_image_tokenizer:
        model = count_image_tokenizer(configured_images(config).settings)
    else:
        model = counted(trained_model(config, trained_sizes(config)))
    return sum(_holdings(config, model, _optimizer(config, model, on_gpu)).always.values())


def _on_the_host(config: Config, sizes: SequenceSizes, model: Model) -> Counter[str]:
    """What stays in main memory beside the model that trains.

    With LoRA that is the model that it started from: the two share what is frozen, unless the frozen maps are held in
    half precision.
    """
    found = Counter(image_tokenizer=image_tokenizer_bytes(sizes.images))
    if model.lora:
        found["image_tokenizer"] *= 2  # each of the two models came with its own
        fp32 = counted(Model.of(sizes.settings, torch.float32, {**dict(model.lora), "held": torch.float32}))
        if fp32.bytes > counted(model).bytes:
            found["base_in_fp32"] = 2 * (fp32.bytes - counted(model).bytes)
    return found


def _holdings(config: Config, model: Counted, optimizer: OptimizerBytes) -> Holdings:
    kind, (_, arithmetic) = config.strategy.kind.value, precision(config)
    found = holdings(model, optimizer.state, kind, num_devices(config), arithmetic)
    options = config.strategy.strategy
    if _frees_gradients(config):
        found.always[GRADIENTS] = 0
    if isinstance(options, dict) and options.get("offload_optimizer"):
        found.always["optimizer"] = 0
    if isinstance(options, dict) and options.get("offload_parameters"):
        found.always["weights"] = 0
    return found


def _optimizer(config: Config, model: Counted, on_gpu: bool) -> OptimizerBytes:
    node = without_fused_kernel(config)
    if node["_target_"] == ADAMW_OFFLOAD:  # needs a GPU here to be made; its state is on the host
        return OptimizerBytes(0, 0)
    key = repr(sorted(node.items())), model.trained, on_gpu
    if key not in _OPTIMIZERS:
        build = instantiate(node, "optimizer.optimizer")
        _OPTIMIZERS[key] = optimizer_bytes(build, model.trained, on_gpu=on_gpu)
    return _OPTIMIZERS[key]


_OPTIMIZERS: dict[Any, OptimizerBytes] = {}


def _of_a_step(
    config: Config, held: Holdings, host: Counter[str], found: Heights, optimizer_step: int
) -> dict[str, Counter[str]]:
    """The moments of a training step.

    Lightning drops the gradients of the step before only when the forward pass is done, so they are there in it.
    """
    forward = held.always + host + held.computing
    backward = forward if _accumulates(config) else held.without_gradients + host + held.computing
    gradients = held.gradients(found.backward)  # counted as they come
    if _frees_gradients(config):
        gradients[GRADIENTS] = 0
    return {
        "forward pass": forward + found.forward,
        "backward pass": backward + gradients,
        "optimizer step": held.always + host + Counter(optimizer_step=optimizer_step // held.divided),
    }


def _accumulates(config: Config) -> bool:
    return bool(config.trainer["accumulate_grad_batches"] > 1)


def _frees_gradients(config: Config) -> bool:
    """Whether gradients leave the device as soon as they are made."""
    node = config.optimizer.optimizer
    return node["_target_"] == ADAMW_OFFLOAD and bool(node["offload_gradients"])


def _predicted(config: Config, template: Template) -> tuple[Predicted, ...]:
    batch = longest_batch(template, 1)
    due, slots = batch.weights[0, 1:] > 0, batch.slots[0, 1:]
    by_slot = predicted_ids(config, template)
    if by_slot is None:
        return (Predicted(int(due.sum()), range(template.vocabulary.size)),)
    return tuple(Predicted(int((due & (slots == slot)).sum()), ids) for slot, ids in enumerate(by_slot))
