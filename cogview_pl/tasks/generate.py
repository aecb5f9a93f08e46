"""task=generate: prompts → images, `samples.jsonl` and a contact sheet.

With a captioner: images → captions. With a model of image pairs: images and prompts → images. With `complete`: parts of
images and prompts → images.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torchvision.transforms.v2.functional import pil_to_tensor

from cogview_pl.assembly.captions import images_to_describe, judge_captions, save_caption_sheet, write_captions
from cogview_pl.assembly.completion import Completion, completion_mask, images_to_complete, readable_images
from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.edits import (
    check_edits,
    edit_results,
    images_to_edit,
    judge_edits,
    save_edit_sheet,
    write_edits,
)
from cogview_pl.assembly.engines import engine_settings
from cogview_pl.assembly.image_data import is_toy_world
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.assembly.pipelines import open_generator, open_pipeline
from cogview_pl.assembly.prompts import prompts_or_captions, read_prompts
from cogview_pl.assembly.roles import CAPTION_WRITER, Role, generating_role, hash_of_role, inference_settings
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
from cogview_pl.vocab import TextSlot, source_slots

_JUDGED = 128  # images that are judged at once


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Generate or complete an image of every prompt, and rank and upscale them if asked; or describe images.

    A model that makes images from images does with each image what each prompt asks. Images of held-out captions or
    pairs of the toy world are judged.
    """
    options = generation_options(config)
    completes = config.complete.wanted
    role = generating_role(config.prompts, config.images, completes=completes)
    model = open_generator(options, role)
    load_font(config.font, 12)
    if isinstance(model.template.target, TextSlot) and not completes:
        return _describe(config, folder, model, team)
    if source_slots(model.template) is not None and not completes:
        return _edit(config, folder, options, model, role, team)
    if config.images is not None and not completes:
        raise UserError(
            "images: this model generates from text; leave images out, set complete.keep to complete the images, or "
            "init_from to a run of task=caption or task=style_transfer"
        )
    pipeline = open_pipeline(options, model)
    completion = _completion(config, model, team) if completes else None
    if completion is not None:
        prompts = completion.prompts
    else:
        prompts = team.tell(prompts_or_captions(config.prompts, config.data, config.num_prompts) if team.first else [])
    pipeline.generator.tokenise(prompts)  # refuse long prompts now, not after an hour
    started = time.perf_counter()
    images, files = write_samples(options, folder, pipeline, prompts, team, completion)
    if not folder.writes:
        return {}
    seconds = time.perf_counter() - started
    length = model.template.target.length if completion is None else completion.num_generated
    metrics = {
        "generate/images": len(images),
        "perf/images_per_s": len(images) / seconds,
        "perf/tokens_per_s": len(prompts) * config.num_images_per_prompt * length / seconds,
    }
    if config.rerank_with is not None:
        metrics["generate/caption_loss"] = statistics.fmean(i.caption_loss for i in images if i.caption_loss)
    of_data = config.prompts is None and config.images is None
    if of_data and is_toy_world(config.data) and config.upscale_with is None:
        metrics |= _judge(images, files, options)
    return metrics


def _completion(config: Config, model: SequenceModel, team: Team) -> Completion:
    """The images to complete; all that can be wrong with them ends the run here."""
    mask = completion_mask(model, generation_options(config))
    size = model.image_tokenizer.settings["image_size"]
    prompts = None
    if config.prompts is not None:  # standard input is read once
        prompts = team.tell(prompts_or_captions(config.prompts, config.data, 0) if team.first else [])
    images = images_to_complete(config.images, prompts, config.data, config.num_prompts, size)
    numbers = team.tell(readable_images(images) if team.first else [])
    return Completion(images, numbers, mask, model.image_tokenizer, config.sampler.batch_size)


def _edit(
    config: Config, folder: RunFolder, options: GenerationOptions, model: SequenceModel, role: Role, team: Team
) -> dict[str, float]:
    """Make images from images; those of the toy world are compared with the true ones."""
    check_edits(options)
    prompts = None
    if config.prompts is not None:
        prompts = team.tell(read_prompts(config.prompts) if team.first else [])
    pipeline = open_pipeline(options, model)
    generator = pipeline.generator
    names = source_slots(model.template)
    assert names is not None
    images = images_to_edit(
        config.images,
        prompts,
        config.data,
        config.num_prompts,
        size=model.image_tokenizer.settings["image_size"],
        field=names[1],
        times=config.num_images_per_prompt,
    )
    images.require_readable()
    given = prompts or [images.record(number)["prompt"] for number in range(len(images))]
    generator.tokenise(given, torch.zeros(len(given), *generator.grid, dtype=torch.long))  # refuse long prompts now
    results = edit_results(folder, options, pipeline, images, role, prompts)
    metrics = write_edits(folder, results, options, pipeline, images, team)
    if not team.first:
        return {}
    save_edit_sheet(folder, results, images, config.num_images_per_prompt, config.font)
    if prompts is None and is_toy_world(config.data) and config.upscale_with is None:
        metrics |= judge_edits(folder, results, images)
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
    losses = [i.given_loss if i.caption_loss is None else i.caption_loss for i in images]  # by which they are ranked
    if losses[0] is not None:
        right = [score_detected([d], [p]).all_right == 1 for d, p in zip(detected, prompts, strict=True)]
        ranked = [Ranked(i.seed, loss or 0.0, r) for i, loss, r in zip(images, losses, right, strict=True)]
        groups = [ranked[i : i + options.kept] for i in range(0, len(ranked), options.kept)]
        for number, (chosen, oracle) in best_of(groups).items():
            metrics |= {f"toy/all_right_best_of_{number}": chosen, f"toy/all_right_oracle_of_{number}": oracle}
    return metrics
