"""plan=true: print what a run needs and run nothing. The same estimate stops runs that do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from cogview_pl.assembly.checks import check_training, uses_gpu
from cogview_pl.assembly.model_specs import (
    SequenceModelSpec,
    configured_images,
    existing_images,
    predicted_ids,
    training_spec,
)
from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.prompts import read_prompts
from cogview_pl.assembly.roles import CAPTIONER, GENERATOR, UPSCALER, Role, generating_role
from cogview_pl.assembly.strategy import num_devices
from cogview_pl.config.choices import Verb
from cogview_pl.config.parts import generation_options, model_options, training_options
from cogview_pl.config.schema import Config
from cogview_pl.data.config import TokenSource
from cogview_pl.errors import UserError
from cogview_pl.lit.bars import status
from cogview_pl.memory.cards import CARDS, WORKSPACE, Device, card_bytes, this_device
from cogview_pl.memory.figures import batch_of_all_devices, image_tokenizer_figures, sequence_model_figures
from cogview_pl.memory.generation import (
    generation_phases,
    magnify_phases,
    model_of_role,
    rerank_phases,
    tokenize_phases,
)
from cogview_pl.memory.phases import BACKWARD, FORWARD, RGB, Estimate, Phases
from cogview_pl.memory.suggestions import Family, first_that_fits, for_inference, for_training, tensor_parallel
from cogview_pl.memory.table import Plan, print_plan, verdict
from cogview_pl.transformer.config import ActivationCheckpointing

_LARGE = 10**9  # weights from which on a GPU trains and generates in bf16 rather than in fp32

Recompose = Callable[[str], Config]
"""Overrides, separated by spaces -> the configuration of the run with these on top."""


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
    status("estimating the memory of the run …")
    device = _device(config.verb, config.trainer)
    found = estimate(config, device.on_gpu)
    if found.total > device.free:
        advice = advise(config, recompose, on_gpu=device.on_gpu, available={device.name: device.free})
        sentence = verdict(found, device, advice.get(device.name))
        raise UserError(f"{sentence}; plan=true shows the parts, plan.strict=false starts it anyway")


def make_plan(config: Config, recompose: Recompose) -> Plan:
    """Figures of the models, memory here and on a GPU, and overrides with which the run fits."""
    device = _device(config.verb, config.trainer)
    here = estimate(config, device.on_gpu)
    gpu = here if device.on_gpu else estimate(config, True)
    figures = {**_models(config), **here.figures("memory")}
    if not device.on_gpu:
        figures |= gpu.figures("memory_of_gpu")
    if config.verb == Verb.fit_sequence_model:  # activations at the peak under each choice
        for choice in ActivationCheckpointing:
            found = here
            if choice != config.activation_checkpointing:
                found = estimate(recompose(f"activation_checkpointing={choice.value}"), device.on_gpu)
            most = max(found.phases[phase]["activations"] for phase in (FORWARD, BACKWARD))
            figures[f"memory/activations_{choice.value}_bytes"] = float(most)
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
    if config.verb.trains_in_parallel:
        # here, because it imports Lightning, which other tasks start without
        from cogview_pl.memory.training_run import image_tokenizer_phases, sequence_model_phases

    if config.verb == Verb.fit_image_tokenizer:
        phases = image_tokenizer_phases(
            configured_images(model_options(config)).settings,
            training_options(config),
            config.image_tokenizer,
            outputs=config.outputs,
            batch=config.data.batch_size,
            edge=config.data.image_size,
            on_gpu=on_gpu,
        )
    elif config.verb == Verb.fit_sequence_model:
        spec = _sequence_model(config)
        phases = sequence_model_phases(
            spec,
            training_options(config),
            predicted_ids(config.compat, spec.template),
            batch=config.data.batch_size,
            checkpointing=config.activation_checkpointing,
            encodes=config.data.token_store is None and config.sequences.source == TokenSource.images,
            on_gpu=on_gpu,
        )
    else:
        phases = _inference(config, on_gpu)
    workspace = Counter(workspace=WORKSPACE if on_gpu else 0)
    return Estimate({name: parts + workspace for name, parts in phases.items()})


def _inference(config: Config, on_gpu: bool) -> Phases:
    """Phases of the verbs that train neither stage."""
    options = generation_options(config)
    if config.verb == Verb.tokenize:
        images = existing_images(options.models)
        return tokenize_phases(images, config.data.batch_size, large=config.token_store.large)
    if config.verb == Verb.rerank:
        return rerank_phases(options, on_gpu=on_gpu)
    if config.verb == Verb.magnify:
        return magnify_phases(options, config.num_prompts, on_gpu=on_gpu)
    if config.verb == Verb.fit_features:  # all training images exist twice: one by one, and stacked
        size = getattr(config.data, "train_size", 0) * RGB * config.data.image_size**2
        return {"rendering of images": Counter(images=0 if on_gpu else 2 * size)}
    if (
        config.verb == Verb.convert and config.convert is not None
    ):  # the tensors of the files exist twice, under the old names and the new ones
        source = Path(config.convert.source)
        size = sum(file.stat().st_size for file in (source, *source.rglob("*")) if file.is_file())
        return {"conversion": Counter(weights=0 if on_gpu else 2 * size)}
    count = config.num_prompts if config.prompts is None else options.sampler.batch_size
    return generation_phases(_role(config), options, _named_prompts(config.prompts) or count, on_gpu=on_gpu)


def _device(verb: Verb, trainer: Mapping[str, Any]) -> Device:
    return this_device(uses_gpu(trainer) and verb != Verb.convert)


def advise(config: Config, recompose: Recompose, *, on_gpu: bool, available: dict[str, int]) -> dict[str, str]:
    """For each place that has `available` bytes, the first suggestion with which the run fits there."""
    sequences, sets = config.verb == Verb.fit_sequence_model, list[Family]()
    if config.verb.trains_in_parallel:
        checkpoints = sequences and config.activation_checkpointing == ActivationCheckpointing.none
        train = partial(for_training, training_options(config), config.data.batch_size)
        copies = not on_gpu and estimate(config, on_gpu).peak["checkpoint_copy"] > 0
        large = sequences and _is_large(config)
        sets = train(sequences=sequences, checkpoints=checkpoints, copies=copies, on_gpu=on_gpu, large=large)
    elif config.verb == Verb.tokenize:
        sets = for_inference("data.batch_size", config.data.batch_size)
    elif config.verb in (Verb.generate, Verb.rerank, Verb.magnify, Verb.evaluate):
        halves = on_gpu and config.precision["precision"] == "32-true"
        quantizes = config.quantization is None and not config.strategy.kind.sharded
        divides = list[str]()
        if on_gpu and quantizes and _role(config) == GENERATOR:
            divides = tensor_parallel(config.trainer, _sequence_model(config).settings["num_heads"])
        batch = ("sampler.batch_size", config.sampler.batch_size)
        sets = for_inference(*batch, halves=halves, quantizes=quantizes, divides=divides, large=_is_large(config))

    @cache
    def total(overrides: str) -> int | None:
        try:
            changed = recompose(overrides)
            if changed.verb.trains_in_parallel:
                _check_training(training_options(changed), shardable=sequences)
            return estimate(changed, on_gpu).total
        except UserError:  # these overrides do not go together, or need a package that is not installed
            return None

    return first_that_fits(sets, total, available)


def _check_training(options: TrainingOptions, *, shardable: bool) -> None:
    """Raises UserError for a combination that a training run would refuse."""
    from cogview_pl.assembly.kept_checkpoints import check_averages  # here, because it imports Lightning

    check_training(options, shardable=shardable)
    check_averages(options)


def _sequence_model(config: Config) -> SequenceModelSpec:
    """The model that stage 2 trains, or that another task uses."""
    if config.verb != Verb.fit_sequence_model:
        return model_of_role(_role(config), generation_options(config))
    options = training_options(config)
    return training_spec(
        model_options(config),
        config.template,
        source=config.sequences.source,
        token_store=config.data.token_store,
        start=(config.starts_from or "pretrain", config.init_from) if options.starts_from_weights else None,
    )


def _is_large(config: Config) -> bool:
    """Whether the matrices of the blocks have a billion weights or more."""
    settings = _sequence_model(config).settings
    return bool(12 * settings["num_layers"] * settings["hidden_size"] ** 2 >= _LARGE)


def _role(config: Config) -> Role:
    """The role of the model that a task loads first."""
    generator = generating_role(config.prompts, config.images, completes=config.complete.wanted)
    return {Verb.magnify: UPSCALER, Verb.rerank: CAPTIONER}.get(config.verb, generator)


def _named_prompts(given: object) -> Sequence[str]:
    """Prompts that the user gives; none for captions of the data and for standard input, which is read once."""
    return [] if given in (None, "-") else read_prompts(given)


def _models(config: Config) -> dict[str, float]:
    """Parameters and operations of the image tokenizer and of the sequence model, if the task has one."""
    trains = config.verb.trains_in_parallel
    samples = batch_of_all_devices(config.data.batch_size, training_options(config)) if trains else 0
    if config.verb in (Verb.fit_image_tokenizer, Verb.tokenize):
        images = configured_images if trains else existing_images
        return image_tokenizer_figures(images(model_options(config)), samples)
    spec = _sequence_model(config)
    return sequence_model_figures(spec, predicted_ids(config.compat, spec.template), config.lora, samples)
