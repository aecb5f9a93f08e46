"""plan=true: print what a run needs and run nothing. The same estimate stops runs that do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from cogview_pl.assembly.checks import ADAMW_OFFLOAD, check_training
from cogview_pl.assembly.instantiate import instantiate
from cogview_pl.assembly.model_specs import (
    ImageTokenizerSpec,
    SequenceModelSpec,
    configured_images,
    existing_images,
    predicted_ids,
    role_spec,
    training_spec,
)
from cogview_pl.assembly.models import weights_dtype
from cogview_pl.assembly.roles import CAPTION_WRITER, CAPTIONER, GENERATOR, UPSCALER
from cogview_pl.assembly.strategy import num_devices, tensor_parts
from cogview_pl.assembly.trainer import optimizer_node
from cogview_pl.checkpoints.model_folder import build_transformer, build_vqvae
from cogview_pl.config.choices import Verb
from cogview_pl.config.parts import model_options, training_options
from cogview_pl.config.schema import Config
from cogview_pl.data.config import TokenSource
from cogview_pl.errors import UserError
from cogview_pl.generation.config import Algorithm
from cogview_pl.memory.cards import CARDS, WORKSPACE, Device, card_bytes, this_device
from cogview_pl.memory.figures import image_tokenizer_figures, sequence_model_figures
from cogview_pl.memory.inference import InferenceModel, decode_images, encode_images, image_tokenizer_bytes
from cogview_pl.memory.phases import BACKWARD, FORWARD, Estimate
from cogview_pl.memory.sharding import Sharding, narrow, shard
from cogview_pl.memory.suggestions import first_that_fits, for_inference, for_training
from cogview_pl.memory.table import Plan, print_plan, verdict
from cogview_pl.memory.trace import default_dtype
from cogview_pl.memory.training import BatchSize, StepOptions, image_tokenizer_step, predicted_tokens, sequence_step
from cogview_pl.transformer.config import ActivationCheckpointing, Norm, NormScope
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import TextSlot, TextTokenizer, is_text_to_image
from cogview_pl.vqvae.model import VQVAE

Phases = dict[str, Counter[str]]
Recompose = Callable[[str], Config]
"""Overrides, separated by spaces -> the configuration of the run with these on top."""

_TRAINS = (Verb.fit_image_tokenizer, Verb.fit_sequence_model)
_PRECISIONS = {  # dtype of the weights, dtype of autocast
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
}
_RGB, _FP32 = 3, torch.float32.itemsize


def run(
    config: Config, run_stage: Callable[[list[str]], tuple[Path, dict[str, float | str]]], recompose: Recompose
) -> dict[str, float | str]:
    """Print what a run would need and what fits; returns the figures. A chain plans its stages one by one."""
    if config.verb == Verb.chain:
        all_figures: dict[str, float | str] = {}
        for name, overrides in config.stages.items():
            print(f"\n[{name}]")
            _, figures = run_stage([*config.common, *overrides])
            all_figures |= {f"{name}/{key}": value for key, value in figures.items()}
        return all_figures
    plan = make_plan(config, recompose)
    print_plan(plan)
    return {**plan.figures}


def require_fit(config: Config, recompose: Recompose) -> None:
    """Raises UserError if a run needs more memory than is free, unless `plan.strict=false`."""
    if not config.plan.strict:
        return
    device = _device(config)
    found = estimate(config, device.on_gpu)
    if found.total > device.free:
        advice = advise(config, recompose, on_gpu=device.on_gpu, available={device.name: device.free})
        sentence = verdict(found, device, advice.get(device.name))
        raise UserError(f"{sentence}; plan=true shows the parts, plan.strict=false starts it anyway")


def make_plan(config: Config, recompose: Recompose) -> Plan:
    """Figures of the models, memory here and on a GPU, and overrides with which the run fits."""
    device = _device(config)
    here = estimate(config, device.on_gpu)
    gpu = here if device.on_gpu else estimate(config, True)
    figures = {**_models(config), **here.figures("memory")}
    if not device.on_gpu:
        figures |= gpu.figures("memory_of_gpu")
    if config.verb == Verb.fit_sequence_model:
        figures |= _each_checkpointing(config, recompose, device.on_gpu)
    cards = {f"{card} GB": card_bytes(card) for card in CARDS}
    figures["fits/here"] = float(here.total <= device.free)
    figures |= {f"fits/{name.replace(' ', '_')}": float(gpu.total <= size) for name, size in cards.items()}
    too_small = {name: size for name, size in cards.items() if gpu.total > size}
    own = {device.name: device.free} if here.total > device.free else {}
    if device.on_gpu:
        own, too_small = {}, own | too_small
    advice = advise(config, recompose, on_gpu=False, available=own)
    advice |= advise(config, recompose, on_gpu=True, available=too_small)
    return Plan(figures, device, here, gpu, num_devices(config.trainer), advice)


def estimate(config: Config, on_gpu: bool) -> Estimate:
    """Bytes of the tensors of a run in each phase, on its GPU or in main memory.

    Raises:
        UserError: sizes of the configuration do not fit together.
    """
    workspace = Counter(workspace=WORKSPACE if on_gpu else 0)
    return Estimate({name: parts + workspace for name, parts in _PHASES[config.verb](config, on_gpu).items()})


def _device(config: Config) -> Device:
    trains_on_cpu = config.verb in _TRAINS and config.trainer["accelerator"] == "cpu"
    return this_device(torch.cuda.is_available() and not trains_on_cpu and config.verb != Verb.convert)


def advise(config: Config, recompose: Recompose, *, on_gpu: bool, available: dict[str, int]) -> dict[str, str]:
    """For each place that has `available` bytes, the first suggestion with which the run fits there."""

    def total(overrides: str) -> int | None:
        try:
            changed = recompose(overrides)
            if changed.verb in _TRAINS:
                check_training(training_options(changed), shardable=changed.verb == Verb.fit_sequence_model)
            return estimate(changed, on_gpu).total
        except UserError:  # these overrides do not go together, or need a package that is not installed
            return None

    return first_that_fits(suggestions(config, on_gpu), total, available)


def suggestions(config: Config, on_gpu: bool) -> list[str]:
    """Sets of overrides that make a run need less memory, in the order in which they are tried."""
    fp32 = config.precision["precision"] == "32-true"
    if config.verb in _TRAINS:
        return for_training(
            batch=config.data.batch_size,
            batches=config.trainer["accumulate_grad_batches"],
            fp32=fp32,
            sequences=config.verb == Verb.fit_sequence_model,
            checkpoints=config.activation_checkpointing == ActivationCheckpointing.none,
            adapts=not config.lora.rank and training_options(config).starts_from_weights,
            on_gpu=on_gpu,
        )
    if config.verb == Verb.tokenize:
        return for_inference("data.batch_size", config.data.batch_size, fp32=False, quantizes=False, on_gpu=on_gpu)
    if config.verb in (Verb.generate, Verb.rerank, Verb.magnify, Verb.evaluate):
        quantizes = config.quantization is None and not config.strategy.kind.sharded
        batch = config.sampler.batch_size
        return for_inference("sampler.batch_size", batch, fp32=fp32, quantizes=quantizes, on_gpu=on_gpu)
    return []


def _fit_image_tokenizer(config: Config, on_gpu: bool) -> Phases:
    build = partial(_build_vqvae, configured_images(model_options(config)))
    loss = config.image_tokenizer.reconstruction
    options = _step_options(config, on_gpu)
    phases = image_tokenizer_step(build, config.data.batch_size, config.data.image_size, loss, options)
    return shard(phases, _sharding(config))


def _fit_sequence_model(config: Config, on_gpu: bool) -> Phases:
    sizes = _trained_sizes(config)
    template, layers = sizes.template, sizes.settings["num_layers"]
    weights, _ = _PRECISIONS[config.precision["precision"]]
    predicted = predicted_tokens(template, predicted_ids(config.compat, template))
    batch = BatchSize(config.data.batch_size, template.length - 1, predicted)
    options = _step_options(config, on_gpu)
    phases, block = sequence_step(partial(_build_transformer, config, sizes), layers, batch, options)
    phases = shard(phases, _sharding(config), layers=layers, block=block)
    tokenizer = image_tokenizer_bytes(sizes.images.settings)
    host = Counter(image_tokenizer=0 if on_gpu else tokenizer)
    if not on_gpu and config.lora.rank:  # the model of `init_from` and its tokenizer; the two models share fp32 weights
        with torch.device("meta"):
            parameters = _build_transformer(config, sizes, layers).parameters()
        base = sum(parameter.numel() * _FP32 for parameter in parameters if parameter.dtype != torch.float32)
        host += Counter(image_tokenizer=tokenizer, base_in_fp32=base)
    phases = {name: parts + host for name, parts in phases.items()}
    between = Counter({part: phases[FORWARD][part] for part in ("weights", "optimizer")}) + host
    if "samples" in config.callbacks and is_text_to_image(template) and not config.strategy.kind.sharded:
        model = replace(_model(config, sizes, on_gpu), dtype=weights, quantization=None)
        rows = config.callbacks["samples"]["num_prompts"]
        phases["generation of sample images"] = between + model.decode(rows)
        if not on_gpu:  # else the image tokenizer stays on the host
            images = decode_images(sizes.images.settings, batch=rows, edge=sizes.images.edge)
            phases["decoding of sample images"] = between + images
    if (
        not on_gpu and training_options(config).starts_from_weights
    ):  # fresh weights and those that are read exist together
        read = _model(config, sizes, on_gpu).parameters * _FP32
        phases["loading of weights"] = Counter(weights=2 * read, image_tokenizer=2 * tokenizer)
    if config.data.token_store is None and config.sequences.source == TokenSource.images:
        encoding = encode_images(sizes.images.settings, batch=config.data.batch_size, edge=2 * sizes.images.edge)
        phases["encoding of images"] = Counter(weights=phases[FORWARD]["weights"]) + host + encoding
    return phases


def _build_vqvae(images: ImageTokenizerSpec) -> VQVAE:
    """Without k-means, which runs once and before the decoder allocates anything."""
    quantizer = dict(images.settings["quantizer"])
    if "kmeans_iters" in quantizer:
        quantizer["kmeans_iters"] = 0
    return build_vqvae({**images.settings, "quantizer": quantizer})


def _build_transformer(config: Config, sizes: SequenceModelSpec, layers: int) -> Transformer:
    """The model as one device trains it, with some of its blocks."""
    with default_dtype(_PRECISIONS[config.precision["precision"]][0]):
        model = build_transformer({**sizes.settings, "num_layers": layers})
        if tensor_parts(config.strategy, config.trainer) > 1:
            narrow(model, tensor_parts(config.strategy, config.trainer))
    if config.lora.rank:
        add_lora(model, config.lora, held=weights_dtype(config.precision))
    model.set_activation_checkpointing(config.activation_checkpointing)
    return model


def _step_options(config: Config, on_gpu: bool) -> StepOptions:
    node = optimizer_node(training_options(config))
    offloads = node["_target_"] == ADAMW_OFFLOAD
    if on_gpu and node["_target_"].startswith("torch.optim.") and not node.get("fused"):
        node = {**node, "foreach": True}  # as torch chooses on a GPU
    return StepOptions(
        optimizer=None if offloads else instantiate(node, "optimizer.optimizer"),
        autocast=_PRECISIONS[config.precision["precision"]][1],
        accumulates=config.trainer["accumulate_grad_batches"] > 1,
        frees_gradients=offloads and bool(node["offload_gradients"]),
        compiled=config.compile
        and config.activation_checkpointing == ActivationCheckpointing.none
        and (config.model.norm, config.model.norm_scope) == (Norm.sandwich, NormScope.token),
        on_gpu=on_gpu,
    )


def _sharding(config: Config) -> Sharding:
    weights, autocast = _PRECISIONS[config.precision["precision"]]
    options = config.strategy.strategy if isinstance(config.strategy.strategy, dict) else {}
    return Sharding(config.strategy.kind, num_devices(config.trainer), autocast or weights, options)


def _generate(config: Config, on_gpu: bool) -> Phases:
    """Generator, captioner and upscaler are loaded at once; one of them works."""
    sizes = _sizes(config, Verb.generate)
    model = _model(config, sizes, on_gpu)
    options, sorts = config.sampler, config.sampler.top_p < 1
    if isinstance(model.template.target, TextSlot):  # a captioner: images are encoded, then texts are written
        encoding = encode_images(model.vqvae, batch=options.batch_size, edge=model.edge)
        decoding = model.decode(options.batch_size, sorts=sorts)
        return {"encoding of images": model.held + encoding, "decoding loop": model.held + decoding}
    captioner = None if config.rerank_with is None else _model(config, _sizes(config, Verb.rerank), on_gpu)
    upscaler = None if config.upscale_with is None else _model(config, _sizes(config, Verb.magnify), on_gpu)
    models = [role for role in (model, captioner, upscaler) if role is not None]
    named, each = _prompts(config), config.num_images_per_prompt
    prompts = len(named) if named else config.num_prompts if config.prompts is None else options.batch_size
    encode = TextTokenizer.load(sizes.text_model).encode if named and sizes.text_model else None
    longest = max(len(encode(prompt)) for prompt in named) if named and encode else None
    batch = min(options.batch_size, each * min(max(1, options.batch_size // each), prompts))
    edge = model.edge * (1 if upscaler is None else 2)
    held = model.held
    held["sequence_models"] = sum(role.bytes for role in models)
    held["images"] = 0 if on_gpu else prompts * (config.top_n or each) * _RGB * edge**2
    rows = batch if options.guidance == 1 else 2 * batch
    drafts = options.drafts if options.algorithm == Algorithm.jacobi else 0
    phases = {
        "decoding loop": held + model.decode(rows, text_tokens=longest, drafts=drafts, sorts=sorts),
        "decoding of images": held + decode_images(model.vqvae, batch=batch, edge=edge),
    }
    if not on_gpu:  # weights are read in fp32, one model after the other
        read = (one.parameters * _FP32 + sum(done.bytes for done in models[:n]) for n, one in enumerate(models))
        phases["loading of weights"] = Counter(sequence_models=max(read))
    if captioner is not None:
        phases["reranking"] = held + captioner.score(batch)
    if upscaler is not None:
        phases["super-resolution"] = held + upscaler.double(batch, sorts=sorts)
    return phases


def _rerank(config: Config, on_gpu: bool) -> Phases:
    model, batch = _model(config, _sizes(config, Verb.rerank), on_gpu), config.sampler.batch_size
    encoding = encode_images(model.vqvae, batch=batch, edge=model.edge)
    return {"encoding of images": model.held + encoding, "reranking": model.held + model.score(batch)}


def _magnify(config: Config, on_gpu: bool) -> Phases:
    """All images stay in main memory: as they are in uint8, doubled in fp32."""
    model, count = _model(config, _sizes(config, Verb.magnify), on_gpu), config.num_prompts
    batch = min(config.sampler.batch_size, count)
    images = 0 if on_gpu else count * _RGB * model.edge**2 * (1 + 4 * _FP32)
    held = model.held + Counter(images=images)
    return {
        "encoding of images": held + encode_images(model.vqvae, batch=batch, edge=model.edge),
        "super-resolution": held + model.double(batch, sorts=config.sampler.top_p < 1),
        "decoding of images": held + decode_images(model.vqvae, batch=batch, edge=2 * model.edge),
    }


def _tokenize(config: Config, on_gpu: bool) -> Phases:
    images = existing_images(model_options(config))
    edge = images.edge * (2 if config.token_store.large else 1)
    encoding = encode_images(images.settings, batch=config.data.batch_size, edge=edge)
    return {"encoding of images": Counter(image_tokenizer=image_tokenizer_bytes(images.settings)) + encoding}


def _fit_features(config: Config, on_gpu: bool) -> Phases:
    """All training images exist twice: one by one, and stacked."""
    size = getattr(config.data, "train_size", 0) * _RGB * config.data.image_size**2
    return {"rendering of images": Counter(images=0 if on_gpu else 2 * size)}


def _convert(config: Config, on_gpu: bool) -> Phases:
    """Two copies of the files' tensors, under the old names and the new ones; the GPU is not used."""
    source = Path(config.convert.source)  # type: ignore[union-attr]
    size = sum(file.stat().st_size for file in (source, *source.rglob("*")) if file.is_file())
    return {"conversion": Counter(weights=0 if on_gpu else 2 * size)}


_PHASES: dict[Verb, Callable[[Config, bool], Phases]] = {
    Verb.fit_image_tokenizer: _fit_image_tokenizer,
    Verb.fit_sequence_model: _fit_sequence_model,
    Verb.tokenize: _tokenize,
    Verb.generate: _generate,
    Verb.rerank: _rerank,
    Verb.magnify: _magnify,
    Verb.fit_features: _fit_features,
    Verb.evaluate: _generate,  # the feature network is not counted
    Verb.convert: _convert,
}
"""Every verb but `chain`, whose stages are verbs."""


def _trained_sizes(config: Config) -> SequenceModelSpec:
    """The model that stage 2 trains."""
    start = None
    if training_options(config).starts_from_weights:
        start = config.starts_from or "pretrain", config.init_from
    return training_spec(
        model_options(config),
        config.template,
        source=config.sequences.source,
        token_store=config.data.token_store,
        start=start,
    )


def _sizes(config: Config, verb: Verb) -> SequenceModelSpec:
    """The upscaler of `magnify`, the captioner of `rerank`, or the generator."""
    options = model_options(config)
    if verb == Verb.magnify:
        return role_spec(UPSCALER, options, config.upscale_with, config.upscale_template)
    if verb == Verb.rerank:
        return role_spec(CAPTIONER, options, config.rerank_with, config.rerank_template)
    if config.images is None:
        return role_spec(GENERATOR, options, config.init_from, config.template)
    return role_spec(CAPTION_WRITER, options, config.init_from, config.rerank_template)


def _model(config: Config, sizes: SequenceModelSpec, on_gpu: bool) -> InferenceModel:
    """A sequence model on one device; adapters are merged."""
    return InferenceModel(
        settings=sizes.settings,
        template=sizes.template,
        vqvae=sizes.images.settings,
        edge=sizes.images.edge,
        dtype=weights_dtype(config.precision),
        parts=tensor_parts(config.strategy, config.trainer),
        quantization=config.quantization,
        on_gpu=on_gpu,
    )


def _prompts(config: Config) -> list[str] | None:
    """Prompts that the configuration names; None for captions of the data and for standard input."""
    if isinstance(config.prompts, str) and Path(config.prompts).is_file():
        return Path(config.prompts).read_text(encoding="utf-8", errors="replace").splitlines()
    return list(map(str, config.prompts)) if isinstance(config.prompts, list) else None


def _models(config: Config) -> dict[str, float]:
    """Parameters and operations of the image tokenizer and of the sequence model, if the task has one."""
    samples = _samples(config)
    if config.verb in (Verb.fit_image_tokenizer, Verb.tokenize):
        images = configured_images(model_options(config)) if samples else existing_images(model_options(config))
        return image_tokenizer_figures(images.settings, images.edge, samples)
    sizes = _trained_sizes(config) if samples else _sizes(config, config.verb)
    with torch.device("meta"):
        model = build_transformer(sizes.settings)
    figures = image_tokenizer_figures(sizes.images.settings, sizes.images.edge)
    figures |= sequence_model_figures(model, sizes.template, predicted_ids(config.compat, sizes.template), samples)
    if samples:
        if config.lora.rank:
            add_lora(model, config.lora, held=weights_dtype(config.precision))
        figures["sequence_model/trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return figures


def _samples(config: Config) -> int:
    """Samples of a training step on all devices, which share a batch with tensor parallelism; 0: no training."""
    if config.verb not in _TRAINS:
        return 0
    batches = (
        config.trainer["accumulate_grad_batches"]
        * num_devices(config.trainer)
        // tensor_parts(config.strategy, config.trainer)
    )
    return int(config.data.batch_size * batches)


def _each_checkpointing(config: Config, recompose: Recompose, on_gpu: bool) -> dict[str, float]:
    """Activations at the peak under each choice of activation checkpointing."""
    names = [choice.value for choice in ActivationCheckpointing]
    all_phases = [estimate(recompose(f"activation_checkpointing={name}"), on_gpu).phases for name in names]
    most = [max(phases[name]["activations"] for name in (FORWARD, BACKWARD)) for phases in all_phases]
    return {f"memory/activations_{name}_bytes": float(size) for name, size in zip(names, most, strict=True)}
