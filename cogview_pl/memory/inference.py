"""Memory of tasks that use trained models: painting, ranking, enlarging."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from cogview_pl.assembly.model_specs import ImageSizes, SequenceSizes, written_sizes
from cogview_pl.assembly.models import quantization, weights_dtype
from cogview_pl.assembly.strategy import tensor_parts
from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.config.choices import Verb
from cogview_pl.config.schema import Config
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.generation.engine.packed_cpu import packed_bytes
from cogview_pl.generation.quantization import matrix_bytes
from cogview_pl.generation.super_resolution.parallel_windows import timetable
from cogview_pl.memory.decoding import Decoding, decoding_height, scoring_height
from cogview_pl.memory.image_tokenizer import decoding_height as image_height
from cogview_pl.memory.image_tokenizer import encoding_height
from cogview_pl.memory.model import Model, counted
from cogview_pl.memory.phases import Moments
from cogview_pl.tasks.generate import read_prompts
from cogview_pl.vocab import CodeSlot, TextSlot, TextTokenizer
from cogview_pl.vocab.config import TemplateConfig

_RGB = 3


def image_tokenizer_bytes(images: ImageSizes) -> int:
    """Weights and codebook of an image tokenizer, which stay in fp32."""
    with torch.device("meta"):
        model = build_vqvae(images.settings)
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def sequence_model_bytes(model: Model, weights: Quantization | None) -> int:
    """Weights of a sequence model for inference, its blocks' matrices as `weights` says."""
    size = counted(model).bytes
    if weights is not None:
        of_a_block = 12 * model.hidden_size**2 * model.weights.itemsize
        size -= int(model.layers * (of_a_block - matrix_bytes(weights, model.hidden_size)))
    return size


def cache_and_packed(work: Decoding, weights: Quantization | None) -> Counter[str]:
    """The KV cache, and on a CPU the packed copy of the weights that decoding makes for each batch of prompts."""
    packed = packed_bytes(
        layers=work.model.layers,
        hidden_size=work.model.hidden_size,
        ids=work.ids,
        dtype=work.model.weights,
        quantized=weights is not None or work.model.parts > 1,
    )
    return Counter(kv_cache=work.cache_bytes, packed_weights=0 if work.on_gpu else packed)


def _named_prompts(config: Config) -> list[str] | None:
    """The prompts that a configuration names; None for captions and for standard input, which can be read once."""
    return None if config.prompts in (None, "-") else read_prompts(config)


def _longest(prompts: list[str] | None, text_model: Path | None) -> int | None:
    """Text tokens of the longest prompt; None where prompts or their tokenizer are not known."""
    if not prompts or text_model is None:
        return None
    text = TextTokenizer.load(text_model)
    return max(len(text.encode(prompt)) for prompt in prompts)


def generate(config: Config, on_gpu: bool) -> Moments:
    """Painter, captioner and upscaler are loaded at once; one of them works."""
    painter = _painter(config)
    if isinstance(painter.template.target, TextSlot):
        return _describe(config, painter, on_gpu)
    quantized, options = quantization(config), config.sampler
    named = _named_prompts(config)
    prompts = len(named) if named else config.num_prompts if config.prompts is None else config.sampler.batch_size
    at_once = max(1, config.sampler.batch_size // config.num_images_per_prompt)
    images = min(config.sampler.batch_size, config.num_images_per_prompt * min(at_once, prompts))
    captioner = _companion(config, "caption", "rerank_with", config.rerank_with, config.rerank_template)
    upscaler = _companion(config, "super_resolution", "upscale_with", config.upscale_with, config.upscale_template)
    models = [painter, *(found for found in (captioner, upscaler) if found is not None)]
    edge = painter.images.edge * (1 if upscaler is None else 2)
    held = Counter(
        sequence_models=sum(sequence_model_bytes(_model(config, sizes), quantized) for sizes in models),
        image_tokenizer=image_tokenizer_bytes(painter.images),
        images=0 if on_gpu else prompts * (config.top_n or config.num_images_per_prompt) * _RGB * edge**2,
    )
    longest = _longest(named, painter.text_model)
    work = Decoding.of(_model(config, painter), painter.template, images, on_gpu, options, longest)
    moments = {"painting": held + cache_and_packed(work, quantized) + decoding_height(work)}
    if not on_gpu:
        moments["loading"] = _loading(config, models)
    grid = painter.images.grid
    if captioner is not None:
        moments["ranking"] = held + _scoring(config, captioner, images)
    if upscaler is not None:
        moments["enlarging"] = held + _enlarging(config, upscaler, images, on_gpu, options)
        grid = (2 * grid[0], 2 * grid[1])
    moments["decoding of images"] = held + image_height(painter.images.settings, batch=images, grid=grid)
    return Moments(moments)


def rerank(config: Config, on_gpu: bool) -> Moments:
    """A captioner and the image tokenizer."""
    captioner, batch = used_sizes(config), config.sampler.batch_size
    held = _held(config, captioner)
    return Moments(
        {
            "encoding": held + encoding_height(captioner.images.settings, batch=batch, edge=captioner.images.edge),
            "ranking": held + _scoring(config, captioner, batch),
        }
    )


def magnify(config: Config, on_gpu: bool) -> Moments:
    """An upscaler and the image tokenizer; images are kept as numbers until all are done."""
    upscaler = used_sizes(config)
    count = config.num_prompts
    batch = min(config.sampler.batch_size, count)
    images = upscaler.images
    held = _held(config, upscaler)
    if not on_gpu:
        held["images"] = count * _RGB * images.edge**2 * (1 + 4 * torch.float32.itemsize)
    grid = (2 * images.grid[0], 2 * images.grid[1])
    enlarging = _enlarging(config, upscaler, batch, on_gpu, config.sampler)
    return Moments(
        {
            "encoding": held + encoding_height(images.settings, batch=batch, edge=images.edge),
            "enlarging": held + enlarging,
            "decoding of images": held + image_height(images.settings, batch=batch, grid=grid),
        }
    )


def used_sizes(config: Config) -> SequenceSizes:
    """The model that a task is about: the upscaler of `magnify`, the captioner of `rerank`, else the painter."""
    if config.verb == Verb.magnify:
        return written_sizes(config, "super_resolution", "upscale_with", config.upscale_with, config.upscale_template)
    if config.verb == Verb.rerank:
        return written_sizes(config, "caption", "rerank_with", config.rerank_with, config.rerank_template)
    return _painter(config)


def _painter(config: Config) -> SequenceSizes:
    if config.images is None:
        return written_sizes(config, "pretrain", "init_from", config.init_from, config.template)
    return written_sizes(config, "caption", "init_from", config.init_from, config.rerank_template)


def _companion(config: Config, task: str, key: str, given: str | None, layout: TemplateConfig) -> SequenceSizes | None:
    return None if given is None else written_sizes(config, task, key, given, layout)


def _describe(config: Config, captioner: SequenceSizes, on_gpu: bool) -> Moments:
    """A captioner that writes: images are encoded, then texts filled."""
    batch = config.sampler.batch_size
    held = _held(config, captioner)
    work = Decoding.of(_model(config, captioner), captioner.template, batch, on_gpu, config.sampler.plain())
    return Moments(
        {
            "encoding": held + encoding_height(captioner.images.settings, batch=batch, edge=captioner.images.edge),
            "writing": held + cache_and_packed(work, quantization(config)) + decoding_height(work),
        }
    )


def _model(config: Config, sizes: SequenceSizes) -> Model:
    """As one device paints with it; an adapter has been merged into it."""
    return Model.of(sizes.settings, weights_dtype(config), parts=tensor_parts(config))


def _held(config: Config, sizes: SequenceSizes) -> Counter[str]:
    return Counter(
        sequence_models=sequence_model_bytes(_model(config, sizes), quantization(config)),
        image_tokenizer=image_tokenizer_bytes(sizes.images),
    )


def _loading(config: Config, models: list[SequenceSizes]) -> Counter[str]:
    """Weights are read in fp32, one model after the other."""
    done, worst = 0, 0
    for sizes in models:
        worst = max(worst, done + counted(Model.of(sizes.settings, torch.float32)).bytes)
        done += sequence_model_bytes(_model(config, sizes), quantization(config))
    return Counter(sequence_models=worst)


def _scoring(config: Config, captioner: SequenceSizes, rows: int) -> Counter[str]:
    template = captioner.template
    return scoring_height(
        _model(config, captioner),
        rows=rows,
        tokens=template.length - 1,
        scored=template.target.length + 1,
        ids=len(template.predicted(template.target)),
    )


def _enlarging(config: Config, upscaler: SequenceSizes, images: int, on_gpu: bool, options: Sampling) -> Counter[str]:
    """Windows side by side, each in its lane of the cache."""
    template = upscaler.template
    assert isinstance(template.target, CodeSlot)
    grid = template.target.grid[0]
    lanes = 1 + max(turn.lane for step in timetable(grid) for turn in step)
    work = Decoding.of(_model(config, upscaler), template, images * lanes, on_gpu, options.plain())
    work = replace(work, positions=work.positions + grid)
    return cache_and_packed(work, quantization(config)) + decoding_height(work)
