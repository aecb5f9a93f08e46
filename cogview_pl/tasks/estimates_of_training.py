"""Memory of training: weights, gradients and optimizer state, and what a step allocates on top."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from cogview_pl.checkpoints.store import build_vqvae
from cogview_pl.config import Config, TokenSource, Verb, instantiate
from cogview_pl.data.sequences import SequenceBatch, SequenceCollator
from cogview_pl.generation.filters import Sampling
from cogview_pl.planning.decoding import Decoding, decoding_height
from cogview_pl.planning.holdings import (
    KNOWN_STATES,
    Share,
    StateBytes,
    Trained,
    holdings,
    share,
    state_bytes,
    step_bytes,
)
from cogview_pl.planning.image_tokenizer import decoding_height as picture_height
from cogview_pl.planning.image_tokenizer import encoding_height, training_heights
from cogview_pl.planning.moments import Moments
from cogview_pl.planning.sequence_step import Heights, Predicted, SequenceStep, heights
from cogview_pl.tasks.estimates_of_painting import cache_and_packed, image_tokenizer_bytes
from cogview_pl.tasks.sizes import SequenceSizes, configured_images, predicted_ids, trained_sizes
from cogview_pl.transformer import Transformer
from cogview_pl.transformer.loss import rows_at_once
from cogview_pl.vocab import Template, is_text_to_picture

_PRECISIONS = {  # weights, arithmetic
    "32-true": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
}


class Counted(NamedTuple):
    """Parameters of a model."""

    parameters: int
    trained: Trained
    largest: int
    """Numbers of the largest trained tensor."""
    alike: int
    """Of the largest set of matrices or filters that have one shape."""
    block: int
    """Of one block, 0 for a model without."""


def precision(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of weights and of arithmetic."""
    return _PRECISIONS.get(str(config.precision.get("precision")), _PRECISIONS["32-true"])


def num_devices(config: Config) -> int:
    """Devices that one run trains on; `auto` and `-1` are those of this machine."""
    devices = config.trainer.get("devices", 1)
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        devices = max(1, torch.cuda.device_count())
    return devices * int(config.trainer.get("num_nodes", 1))


def longest_batch(template: Template, count: int) -> SequenceBatch:
    """A batch of the longest training sequences; ids are of no account."""
    sequence = template.build({slot.name: [0] * slot.length for slot in template.slots})
    return SequenceCollator(template.vocabulary.pad)([sequence] * count)


def count_sequence_model(sizes: SequenceSizes) -> Counted:
    """Parameters of the model that stage 2 trains."""
    return _count(tuple(sorted(sizes.settings.items())))


@cache
def _count(settings: tuple[tuple[str, Any], ...]) -> Counted:
    with torch.device("meta"):
        model = Transformer(**dict(settings))
    groups = model.parameter_groups()
    trained = [[p for p in group if p.requires_grad] for group in groups]
    return Counted(
        sum(p.numel() for p in model.parameters()),
        Trained(*(sum(p.numel() for p in group) for group in trained)),
        max(p.numel() for group in trained for p in group),
        _alike(trained[0]),
        sum(p.numel() for p in model.blocks[0].parameters()),
    )


def count_image_tokenizer(settings: dict[str, Any]) -> Counted:
    """Parameters of an image tokenizer."""
    with torch.device("meta"):
        model = build_vqvae(settings)
    parameters = list(model.parameters())
    filters = [p for p in parameters if p.ndim == 4]
    in_filters, total = sum(p.numel() for p in filters), sum(p.numel() for p in parameters)
    largest = max(p.numel() for p in parameters)
    return Counted(total, Trained(in_filters, 0, total - in_filters), largest, _alike(filters), 0)


def _alike(matrices: Sequence[nn.Parameter]) -> int:
    by_shape: Counter[torch.Size] = Counter()
    for matrix in matrices:
        by_shape[matrix.shape] += matrix.numel()
    return max(by_shape.values(), default=0)


def fit_sequence_model(config: Config, on_gpu: bool) -> Moments:
    """Stage 2: the height of the forward pass, of the backward one, of the optimizer's step, and of painting."""
    sizes = trained_sizes(config)
    weights, arithmetic = precision(config)
    counted = count_sequence_model(sizes)
    held = _held(config, counted, weights)
    step = SequenceStep(
        settings=tuple(sorted(sizes.settings.items())),
        batch=config.data.batch_size,
        tokens=sizes.template.length - 1,
        predicted=_predicted(config, sizes.template),
        recompute=config.activation_checkpointing.value,
        weights=weights,
        arithmetic=arithmetic,
        on_gpu=on_gpu,
        loss_rows=rows_at_once("cuda" if on_gpu else "cpu"),
        accumulates=config.trainer["accumulate_grad_batches"] > 1,
    )
    host = Counter(image_tokenizer=0 if on_gpu else image_tokenizer_bytes(sizes.images))
    moments = _of_a_step(config, held + host, _heights(step), _step_bytes(config, counted, weights, on_gpu))
    if "samples" in config.callbacks and is_text_to_picture(sizes.template):
        painting = _painting(sizes, config.callbacks["samples"]["num_prompts"], weights, on_gpu)
        without = _without_gradients(held)  # Lightning drops them before it validates
        moments |= {name: without + host + extra for name, extra in painting.items()}
    if not on_gpu and (config.init_from is not None or config.starts_from is not None):
        moments["loading"] = host + Counter(weights=held["weights"] + counted.parameters * torch.float32.itemsize)
    if config.data.store is None and config.sequences.source == TokenSource.pictures:
        encoding = encoding_height(sizes.images.settings, batch=config.data.batch_size, edge=2 * sizes.images.edge)
        moments["tokenising"] = host + encoding + Counter(weights=held["weights"])
    return Moments(moments)


def fit_image_tokenizer(config: Config, on_gpu: bool) -> Moments:
    """Stage 1: the heights of a step with the codebook, which allocates more than one without."""
    images = configured_images(config)
    _, arithmetic = precision(config)
    counted = count_image_tokenizer(images.settings)
    held = _held(config, counted, torch.float32)
    held["weights"] = image_tokenizer_bytes(images)  # with its codebook, which no gradient moves
    found = training_heights(
        images.settings,
        batch=config.data.batch_size,
        edge=config.data.image_size,
        reconstruction=config.image_tokenizer.reconstruction.value,
        arithmetic=arithmetic,
        accumulates=config.trainer["accumulate_grad_batches"] > 1,
    )
    return Moments(_of_a_step(config, held, found, _step_bytes(config, counted, torch.float32, on_gpu)))


def held_bytes(config: Config) -> int:
    """Weights, gradients and optimizer state: the part of a training run's memory that is known at once."""
    weights, _ = precision(config)
    if config.verb == Verb.fit_image_tokenizer:
        counted = count_image_tokenizer(configured_images(config).settings)
    else:
        counted = count_sequence_model(trained_sizes(config))
    return sum(_held(config, counted, weights).values())


def _held(config: Config, counted: Counted, weights: torch.dtype) -> Counter[str]:
    return holdings(
        parameters=counted.parameters,
        trained=counted.trained,
        weight_bytes=weights.itemsize,
        gradient_bytes=weights.itemsize,
        state_bytes=_state(config, weights),
        shared=_share(config),
        block_bytes=counted.block * weights.itemsize,
    )


def _step_bytes(config: Config, counted: Counted, weights: torch.dtype, on_gpu: bool) -> int:
    node = config.optimizer.optimizer
    return step_bytes(
        name=str(node["_target_"]).rpartition(".")[2],
        fused=bool(node.get("fused")),
        on_gpu=on_gpu,
        trained=counted.trained.total // _share(config).optimizer,
        largest=counted.largest,
        alike=counted.alike,
        size=weights.itemsize,
    )


def _share(config: Config) -> Share:
    return share(config.strategy.kind.value, num_devices(config))


def _state(config: Config, weights: torch.dtype) -> StateBytes:
    node = config.optimizer.optimizer
    if (known := KNOWN_STATES.get(str(node["_target_"]).rpartition(".")[2])) is not None:
        return known
    return _measured_state(repr(sorted(node.items())), lambda: instantiate(node, "optimizer.optimizer"), weights)


_states: dict[tuple[str, torch.dtype], StateBytes] = {}


def _measured_state(key: str, build: Callable[[], Any], weights: torch.dtype) -> StateBytes:
    if (key, weights) not in _states:
        _states[key, weights] = state_bytes(build(), weights)
    return _states[key, weights]


@cache
def _heights(step: SequenceStep) -> Heights:
    return heights(step)


def _of_a_step(config: Config, held: Counter[str], found: Heights, step: int) -> dict[str, Counter[str]]:
    """The moments of a training step.

    Lightning drops the gradients of the step before only when the forward pass is done, so they are there in it.
    """
    accumulates = config.trainer["accumulate_grad_batches"] > 1
    without = held if accumulates else _without_gradients(held)  # the backward pass counts them as they come
    return {
        "forward pass": held + found.forward,
        "backward pass": without + found.backward,
        "optimizer step": held + Counter(optimizer_step=step),
    }


def _without_gradients(held: Counter[str]) -> Counter[str]:
    return Counter({part: size for part, size in held.items() if part != "gradients"})


def _predicted(config: Config, template: Template) -> tuple[Predicted, ...]:
    batch = longest_batch(template, 1)
    due, slots = batch.weights[0, 1:] > 0, batch.slots[0, 1:]
    by_slot = predicted_ids(config, template)
    if by_slot is None:
        return (Predicted(int(due.sum()), range(template.vocabulary.size)),)
    return tuple(Predicted(int((due & (slots == slot)).sum()), ids) for slot, ids in enumerate(by_slot))


def _painting(sizes: SequenceSizes, count: int, weights: torch.dtype, on_gpu: bool) -> dict[str, Counter[str]]:
    """What the callback that paints captions allocates; its image tokenizer stays on the host."""
    work = Decoding.of(sizes.settings, sizes.template, count, weights, on_gpu, Sampling())
    found = {"painting": cache_and_packed(work, None) + decoding_height(work)}
    if not on_gpu:
        found["decoding of pictures"] = picture_height(sizes.images.settings, batch=count, grid=sizes.images.grid)
    return found
