"""plan=true: what a run would cost; trains and writes nothing. The same estimate stops a run that cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from cogview_pl.checkpoints.model_folder import build_transformer, build_vqvae
from cogview_pl.config.choices import Verb
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.memory.bench import steps_per_second
from cogview_pl.memory.bridge import (
    ImageSizes,
    SequenceSizes,
    configured_images,
    images_of_run,
    num_devices,
    predicted_ids,
    tensor_parts,
    trained_sizes,
)
from cogview_pl.memory.cards import CARDS, card_bytes, free_bytes
from cogview_pl.memory.estimates import estimate
from cogview_pl.memory.inference import used_sizes
from cogview_pl.memory.model import counted
from cogview_pl.memory.phases import Moments
from cogview_pl.memory.suggestions import TRAINS, changed, cheapest
from cogview_pl.memory.table import Plan, print_plan
from cogview_pl.memory.training import (
    count_image_tokenizer,
    held_bytes,
    longest_batch,
    precision,
    trained_model,
)
from cogview_pl.transformer.config import ActivationCheckpointing
from cogview_pl.transformer.flops import TRAINING, forward_flops

_GIB = 2**30

Figures = dict[str, "float | str"]


class _Here(NamedTuple):
    """The device of this machine that the run would use."""

    on_gpu: bool
    name: str
    free: int


def run(
    config: Config, run_stage: Callable[[list[str]], tuple[Path, dict[str, float | str]]]
) -> dict[str, float | str]:
    """Print what a run would need and what fits; returns the figures. A chain plans its stages one by one."""
    if config.verb == Verb.chain:
        found: Figures = {}
        for name, overrides in config.stages.items():
            print(f"\n[{name}]")
            figures = run_stage([*config.common, *overrides])[1]
            found |= {f"{name}/{key}": value for key, value in figures.items()}
        return found
    plan = make_plan(config)
    print_plan(plan)
    return {**plan.figures}


def require_fit(config: Config) -> None:
    """Raises UserError if a run needs more memory than is free, unless `plan.strict=false`."""
    if not config.plan.strict:
        return
    here = _here(config)
    moments = estimate(config, here.on_gpu)
    if moments.total <= here.free:
        return
    remedy = _remedy(config, here.on_gpu, here.free)
    advice = f"it fits with {remedy}" if remedy else "no override that was tried makes it fit"
    raise UserError(
        f"this run needs {moments.total / _GIB:.1f} GiB ({moments.worst}) and {here.name} has {here.free / _GIB:.1f} "
        f"GiB to give; {advice}; plan=true shows the parts, plan.strict=false starts it all the same"
    )


def make_plan(config: Config) -> Plan:
    """Figures of both stages, memory here and on a GPU, what fits, and what to change where it does not."""
    here = _here(config)
    moments = estimate(config, here.on_gpu)
    on_card = moments if here.on_gpu else estimate(config, True)
    figures = {**_models(config), **_memory("memory", moments)}
    if not here.on_gpu:
        figures |= _memory("memory_of_gpu", on_card)
    if config.verb == Verb.fit_sequence_model:
        figures |= _each_checkpointing(config, here.on_gpu)
    if config.verb in TRAINS and (speed := _speed(config, here, figures)) is not None:
        figures["perf/expected_steps_per_s"] = speed
    figures["fits/here"] = float(moments.total <= here.free)
    advice: dict[str, str] = {}
    if not figures["fits/here"]:
        advice[here.name] = _remedy(config, here.on_gpu, here.free) or ""
    for card in CARDS:
        fits = on_card.total <= card_bytes(card)
        figures[f"fits/{card}_GB"] = float(fits)
        if not fits:
            advice[f"{card} GB"] = _remedy(config, True, card_bytes(card)) or ""
    return Plan(figures, here.name, here.on_gpu, here.free, moments, on_card, num_devices(config), advice)


def _here(config: Config) -> _Here:
    trained_on_cpu = config.verb in TRAINS and config.trainer["accelerator"] == "cpu"
    on_gpu = torch.cuda.is_available() and not trained_on_cpu and config.verb != Verb.convert
    return _Here(on_gpu, torch.cuda.get_device_name() if on_gpu else "this machine", free_bytes(on_gpu))


def _remedy(config: Config, on_gpu: bool, available: int) -> str | None:
    def fits(other: Config) -> bool:
        if other.verb in TRAINS and held_bytes(other, on_gpu) > available:
            return False  # what takes a moment to know first
        return estimate(other, on_gpu).total <= available

    return cheapest(config, fits, on_gpu=on_gpu)


def _models(config: Config) -> dict[str, float]:
    if config.verb in (Verb.fit_image_tokenizer, Verb.tokenize):
        images = configured_images(config) if config.verb in TRAINS else images_of_run(config)
        return _image_tokenizer(config, images)
    sizes = trained_sizes(config) if config.verb == Verb.fit_sequence_model else used_sizes(config)
    return {**_image_tokenizer(config, sizes.images), **_sequence_model(config, sizes)}


def _image_tokenizer(config: Config, images: ImageSizes) -> dict[str, float]:
    settings = images.settings
    with torch.device("meta"):
        model = build_vqvae(settings)
        blank = torch.empty(1, 3, images.edge, images.edge)
        with FlopCounterMode(display=False) as counter:
            model.reconstruct_continuous(blank)
    codes = images.grid[0] * images.grid[1]
    forward = counter.get_total_flops() + 2 * codes * settings["codebook_size"] * settings["codebook_dim"]
    figures = {
        "image_tokenizer/parameters": count_image_tokenizer(settings).parameters,
        "image_tokenizer/flops_per_image": forward,
    }
    if config.verb == Verb.fit_image_tokenizer:
        figures["image_tokenizer/flops_per_step"] = TRAINING * forward * _samples(config)
    return figures


def _sequence_model(config: Config, sizes: SequenceSizes) -> dict[str, float]:
    template = sizes.template
    with torch.device("meta"):
        model = build_transformer(sizes.settings)
    batch = longest_batch(template, 1)
    forward = int(forward_flops(model, batch.weights, batch.slots, predicted_ids(config, template)))
    figures = {
        "sequence_model/parameters": sum(p.numel() for p in model.parameters()),
        "sequence_model/vocabulary": sizes.settings["vocab_size"],
        "sequence_model/longest_sequence": template.length,
        "sequence_model/flops_per_sequence": forward,
    }
    if config.verb == Verb.fit_sequence_model:
        figures |= {
            "sequence_model/trained_parameters": _trained_parameters(config, sizes),
            "sequence_model/tokens_per_step": _samples(config) * (template.length - 1),
            "sequence_model/flops_per_step": TRAINING * forward * _samples(config),
        }
    return figures


def _trained_parameters(config: Config, sizes: SequenceSizes) -> int:
    """Of the whole model, whatever part of it a device has."""
    return counted(replace(trained_model(config, sizes), parts=1)).trained_parameters


def _samples(config: Config) -> int:
    """Of a step, on all devices; with tensor parallelism these share a batch."""
    batches = config.trainer["accumulate_grad_batches"] * num_devices(config) // tensor_parts(config)
    return int(config.data.batch_size * batches)


def _memory(name: str, moments: Moments) -> dict[str, float]:
    """The most that each part takes at any moment, and the sum at the worst one."""
    parts = {part for found in moments.parts.values() for part in found}
    most = {part: max(found[part] for found in moments.parts.values()) for part in sorted(parts)}
    return {f"{name}/{part}_bytes": float(size) for part, size in most.items() if size} | {
        f"{name}/total_bytes": float(moments.total)
    }


def _each_checkpointing(config: Config, on_gpu: bool) -> dict[str, float]:
    """Activations at their height under each choice."""
    found = {}
    for choice in ActivationCheckpointing:
        moments = estimate(changed(config, {"activation_checkpointing": choice}), on_gpu)
        steps = [moments.parts[name] for name in ("forward pass", "backward pass")]
        found[f"memory/activations_{choice.value}_bytes"] = float(max(step["activations"] for step in steps))
    return found


def _speed(config: Config, here: _Here, figures: dict[str, float]) -> float | None:
    flops = figures.get("sequence_model/flops_per_step")
    if flops is None:
        return None
    arithmetic = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(precision(config)[1], "fp32")
    return steps_per_second(
        Path(config.plan.bench),
        device=here.name if here.on_gpu else "cpu",
        precision=arithmetic,
        recompute=config.activation_checkpointing.value,
        parameters=int(figures["sequence_model/parameters"]),
        flops=flops / num_devices(config),
    )
