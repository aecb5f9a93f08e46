"""task=generate: prompts → images, `samples.jsonl` and a contact sheet; with a captioner images → captions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torchvision.transforms.v2.functional import pil_to_tensor

from cogview_pl.assembly.captions import images_to_describe, judge_captions, save_caption_sheet, write_captions
from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.engines import engine_settings
from cogview_pl.assembly.image_data import is_toy_world
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.assembly.pipelines import open_generator, open_pipeline
from cogview_pl.assembly.prompts import prompts_or_captions
from cogview_pl.assembly.roles import CAPTION_WRITER, GENERATOR, hash_of_role, inference_settings
from cogview_pl.assembly.samples import write_samples
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.config.parts import generation_options
from cogview_pl.config.schema import Config
from cogview_pl.data.input_images import FirstImages
from cogview_pl.data.sharing import Team, batches_of
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.retrieval import Ranked, best_of
from cogview_pl.generation.contact_sheet import load_font
from cogview_pl.generation.rerank import Captioner
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.result_list import ResultList
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.runs.samples_writer import SampleFiles, WrittenImage
from cogview_pl.toy_world.judge import Judge, score_detected
from cogview_pl.vocab import TextSlot

_JUDGED = 128  # images that are judged at once


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Generate images of every prompt, and rank and upscale them if asked; with a captioner, describe images instead.

    Images of held-out captions of the toy world are judged.
    """
    options = generation_options(config)
    model = open_generator(options, GENERATOR if config.images is None else CAPTION_WRITER)
    load_font(config.font, 12)
    if isinstance(model.template.target, TextSlot):
        return _describe(config, folder, model, team)
    if config.images is not None:
        raise UserError("images: this model generates from text; set prompts, or init_from to a run of task=caption")
    pipeline = open_pipeline(options, model)
    prompts = team.tell(prompts_or_captions(config.prompts, config.data, config.num_prompts) if team.first else [])
    pipeline.generator.tokenise(prompts)  # refuse long prompts now, not after an hour
    started = time.perf_counter()
    images, files = write_samples(options, folder, pipeline, prompts, team)
    if not folder.writes:
        return {}
    seconds = time.perf_counter() - started
    length = model.template.target.length
    metrics = {
        "generate/images": len(images),
        "perf/images_per_s": len(images) / seconds,
        "perf/tokens_per_s": len(prompts) * config.num_images_per_prompt * length / seconds,
    }
    if config.rerank_with is not None:
        metrics["generate/caption_loss"] = statistics.fmean(i.caption_loss for i in images if i.caption_loss)
    if config.prompts is None and is_toy_world(config.data) and config.upscale_with is None:
        metrics |= _judge(images, files, options)
    return metrics


def _describe(config: Config, folder: RunFolder, model: SequenceModel, team: Team) -> dict[str, float]:
    """Write captions of images; captions of the toy world are compared with the true ones."""
    if config.strategy.kind == StrategyKind.tp:
        raise UserError("strategy=tp: captions are written on one device; set strategy=single")
    if config.prompts is not None:
        raise UserError("prompts: this model writes captions of images; set images, or init_from to a pretrain run")
    device, dtype = inference_device(config.trainer, config.precision)
    captioner = Captioner(model, device, dtype, config.quantization)
    tokenizer = model.image_tokenizer
    tokenizer.model.to(device)
    images = images_to_describe(config.images, config.data, config.num_prompts, tokenizer.settings["image_size"])
    images.require_readable()
    results = ResultList(
        folder,
        images,
        settings=inference_settings(
            config.precision,
            config.quantization,
            seed=config.seed,
            sampler=config.sampler,
            **engine_settings({CAPTION_WRITER: captioner.model}, config.sampler),
        ),
        inputs={"init_from": hash_of_role(CAPTION_WRITER, config.outputs, config.init_from)},
        verify=config.verify,
    )
    metrics = write_captions(
        results,
        captioner,
        tokenizer,
        images,
        resume=bool(config.resume),
        team=team,
        sampling=config.sampler,
        seed=config.seed,
    )
    if not team.first:
        return {}
    save_caption_sheet(folder, results, images, config.font)
    if isinstance(images, FirstImages) and is_toy_world(config.data):
        metrics |= judge_captions(results, images)
    return metrics


def _judge(images: Sequence[WrittenImage], files: SampleFiles, options: GenerationOptions) -> dict[str, float]:
    """Accuracy of the objects in images by the judge of the toy world, and the gain by ranking."""
    prompts = [generated.prompt for generated in images]
    judge = Judge(files.read(0).width)
    detected = []
    for part in batches_of(range(len(images)), _JUDGED):
        SIGNALS.check()
        detected += judge(torch.stack([pil_to_tensor(files.read(number)) for number in part]))
    metrics = {f"toy/{name}": float(value) for name, value in asdict(score_detected(detected, prompts)).items()}
    if images[0].caption_loss is not None:
        right = [score_detected([d], [p]).all_right == 1 for d, p in zip(detected, prompts, strict=True)]
        ranked = [Ranked(i.seed, i.caption_loss or 0.0, r) for i, r in zip(images, right, strict=True)]
        groups = [ranked[i : i + options.kept] for i in range(0, len(ranked), options.kept)]
        for number, (chosen, oracle) in best_of(groups).items():
            metrics |= {f"toy/all_right_best_of_{number}": chosen, f"toy/all_right_oracle_of_{number}": oracle}
    return metrics
