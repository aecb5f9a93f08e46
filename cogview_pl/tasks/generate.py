"""task=generate: prompts → images, `samples.jsonl` and a contact sheet."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from cogview_pl.assembly.image_data import open_images
from cogview_pl.assembly.models import inference_device, open_sequence_model, quantization
from cogview_pl.assembly.pipelines import (
    GeneratedImage,
    GenerationPipeline,
    Placement,
    build_generator,
    build_other,
)
from cogview_pl.assembly.strategy import inference_spread
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.config.schema import Config
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.retrieval import Ranked, best_of
from cogview_pl.generation.contact_sheet import contact_sheet, load_font
from cogview_pl.generation.rerank import Captioner
from cogview_pl.generation.super_resolution.upscale import Upscaler
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.image_files import save_image
from cogview_pl.runs.run_folder import RunFolder, predecessor
from cogview_pl.runs.samples_writer import PaintedImages
from cogview_pl.tasks.generate_captions import describe
from cogview_pl.toy_world.config import ToyDataConfig
from cogview_pl.toy_world.judge import Judge, score_detected
from cogview_pl.vocab import TextSlot

_SHEET_ROWS = 24
_SHEET_WIDTH = 8  # images across the contact sheet


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Paint every prompt, rank and enlarge the images if asked; held-out captions of the toy world are judged.

    A captioner describes images instead.
    """
    loaded = open_generator(config)
    if isinstance(loaded.template.target, TextSlot):
        if config.strategy.kind == StrategyKind.tp:
            raise UserError("strategy=tp: only images are painted on several devices; set strategy=single")
        if config.resume:
            raise UserError("resume: captions are written anew each time; start it without resume")
        return describe(config, folder, loaded)
    if config.images is not None:
        raise UserError("images: this model paints from text; set prompts, or init_from to a run of task=caption")
    pipeline, prompts = ready_to_paint(config, loaded)
    started = time.perf_counter()
    paintings = paint(config, folder, pipeline, prompts)
    seconds = time.perf_counter() - started
    if folder.writes:
        save_sheet(config, folder, prompts, paintings)
    painted = len(prompts) * config.num_images_per_prompt
    metrics = {
        "generate/images": len(paintings),
        "perf/images_per_s": len(paintings) / seconds,
        "perf/tokens_per_s": painted * pipeline.generator.template.target.length / seconds,
    }
    if config.rerank_with is not None:
        metrics["generate/caption_loss"] = statistics.fmean(p.caption_loss for p in paintings if p.caption_loss)
    if config.prompts is None and isinstance(config.data, ToyDataConfig) and config.upscale_with is None:
        metrics |= _judge(paintings)
    return metrics


def ready_to_paint(config: Config, loaded: SequenceModel) -> tuple[GenerationPipeline, list[str]]:
    """The models and the prompts; raises UserError for whatever must not surface after an hour of painting."""
    pipeline = open_pipeline(config, loaded)
    prompts = read_prompts(config)
    pipeline.generator.tokenise(prompts)
    load_font(config.font, 12)
    return pipeline, prompts


def open_generator(config: Config) -> SequenceModel:
    """The model in `init_from`; by default the newest run of task=pretrain, or of task=caption if `images` is set."""
    task = "pretrain" if config.images is None else "caption"
    path = predecessor(config.outputs, task, "init_from", config.init_from)
    return open_sequence_model(config, path, "init_from", config.template)


def open_pipeline(config: Config, loaded: SequenceModel) -> GenerationPipeline:
    """The generator `loaded`, and the other models that the configuration names; one is opened after the other.

    Raises:
        UserError: a model is missing, has another layout, or other codes than the generator; or the sampling or
            quantization is not available.
    """
    if config.top_n is not None and config.rerank_with is None:
        raise UserError(f"top_n={config.top_n} keeps the best images, and nothing ranks them; set rerank_with")
    placement = Placement(*inference_device(config), quantization(config), inference_spread(config))
    generator = build_generator(loaded, config.sampler, placement)
    captioner = upscaler = None
    if config.rerank_with is not None:
        found = open_sequence_model(config, config.rerank_with, "rerank_with", config.rerank_template)
        captioner = build_other(Captioner, found, "rerank_with", loaded.image_tokenizer, placement)
    if config.upscale_with is not None:
        found = open_sequence_model(config, config.upscale_with, "upscale_with", config.upscale_template)
        upscaler = build_other(Upscaler, found, "upscale_with", loaded.image_tokenizer, placement)
        if upscaler.grid != generator.grid:
            raise UserError(
                f"upscale_with: the model takes {upscaler.grid} codes, the generator makes {generator.grid}"
            )
    return GenerationPipeline(generator, captioner, upscaler, config.sampler)


def read_prompts(config: Config) -> list[str]:
    """The prompts of a run: `prompts`, or captions of the validation split.

    Raises:
        UserError: there are none, or the file is missing.
    """
    given = config.prompts
    if given is None:
        source = open_images(config.data, "val")
        return [source.text(index) for index in range(min(config.num_prompts, len(source)))]
    if given == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise UserError("prompts=-: standard input is closed; pipe one prompt per line into the command")
        lines: Sequence[str] = sys.stdin.read().splitlines()
    elif isinstance(given, str):
        if not Path(given).is_file():
            raise UserError(
                f"prompts={given} {why_unusable(given)}; give a text file, a list prompts='[一个红色的圆形]', "
                "or - for standard input"
            )
        try:
            lines = Path(given).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"prompts={given} is not UTF-8 text; save it as UTF-8") from None
    elif isinstance(given, Sequence):
        lines = [str(prompt) for prompt in given]
    else:
        raise UserError(f"prompts={given} is no text; give a list prompts='[一个红色的圆形]', a text file, or -")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={given} holds no text; give at least one prompt")
    for prompt in prompts:
        if any("\ud800" <= sign <= "\udfff" for sign in prompt):
            raise UserError(f"prompts: {prompt!r} is not valid Unicode; write it again")
    return prompts


def paint(config: Config, folder: RunFolder, pipeline: GenerationPipeline, prompts: list[str]) -> list[GeneratedImage]:
    """Paint and save in order; a image is on disk as soon as its batch of prompts is done.

    With `resume` set, those that the folder holds are not painted again.
    """
    prompts_at_once = max(1, config.sampler.batch_size // config.num_images_per_prompt)
    each = min(config.top_n or config.num_images_per_prompt, config.num_images_per_prompt)
    done = PaintedImages(config, folder, each)
    paintings: list[GeneratedImage] = []
    if config.resume:
        paintings = done.go_on(prompts, prompts_at_once)
    else:
        done.start()
    finished = len(paintings) // each
    with tqdm(
        total=len(prompts), initial=finished, unit="prompt", desc="paint", disable=None if folder.writes else True
    ) as progress:
        for first in range(finished, len(prompts), prompts_at_once):
            SIGNALS.check()
            group = prompts[first : first + prompts_at_once]
            for painting in pipeline.generate(
                group, num_images_per_prompt=config.num_images_per_prompt, top_n=config.top_n, seed=config.seed
            ):
                done.add(len(paintings), painting)
                paintings.append(painting)
            progress.update(len(group))
    return paintings


def save_sheet(config: Config, folder: RunFolder, prompts: list[str], paintings: list[GeneratedImage]) -> None:
    """Write the contact sheet of the first prompts."""
    each = len(paintings) // len(prompts)
    rows = [
        (prompt, [painting.image for painting in paintings[i * each : (i + 1) * each]])
        for i, prompt in enumerate(prompts[:_SHEET_ROWS])
    ]
    columns = max(1, _SHEET_WIDTH // each)
    cell = max(96, min(paintings[0].image.width, 256))
    sheet = contact_sheet(rows, columns=columns, cell=cell, font=config.font)
    save_image(sheet, folder / "samples" / "grid.png")


def _judge(paintings: list[GeneratedImage]) -> dict[str, float]:
    """What the judge of the toy world finds of the objects that prompts name, and what ranking is worth."""
    prompts = [painting.prompt for painting in paintings]
    images = torch.stack([pil_to_tensor(painting.image) for painting in paintings])
    detected = Judge(images.shape[-1])(images)
    metrics = {f"toy/{name}": float(value) for name, value in asdict(score_detected(detected, prompts)).items()}
    if paintings[0].caption_loss is not None:
        right = [score_detected([d], [p]).all_right == 1 for d, p in zip(detected, prompts, strict=True)]
        ranked = [Ranked(p.seed, p.caption_loss or 0.0, r) for p, r in zip(paintings, right, strict=True)]
        each = paintings[0].kept_per_prompt
        for number, (chosen, oracle) in best_of([ranked[i : i + each] for i in range(0, len(ranked), each)]).items():
            metrics |= {f"toy/all_right_best_of_{number}": chosen, f"toy/all_right_oracle_of_{number}": oracle}
    return metrics
