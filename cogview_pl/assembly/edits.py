"""Images from images by task=generate: image files, `samples.jsonl` and a contact sheet."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from cogview_pl.assembly.image_data import validation_images
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.assembly.pipelines import GenerationPipeline
from cogview_pl.assembly.roles import Role, hash_of_role, inference_settings
from cogview_pl.assembly.samples import save_sheet
from cogview_pl.checkpoints.model_hash import model_hash
from cogview_pl.data.config import DataConfig
from cogview_pl.data.input_images import EachPrompt, FirstSources
from cogview_pl.data.sharing import Team, batches_of
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.codes import encode_images
from cogview_pl.lit.bars import Bar
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.image_files import images_of, save_image
from cogview_pl.runs.result_list import FILE_CRC32, ResultList
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.runs.samples_writer import GeneratedImage
from cogview_pl.toy_world.accuracy import score_pairs
from cogview_pl.toy_world.dataset import ToyDataset
from cogview_pl.toy_world.judge import Judge

_SHEET_IMAGES = 24
_JUDGED = 128  # images that are judged at once

Edited = tuple[list[tuple[int, GeneratedImage]], list[dict[str, str]]]
"""Results of a batch with their numbers, and the records of unreadable source images."""


def check_edits(options: GenerationOptions) -> None:
    """Raises UserError for options that do not go with a model that makes images from images."""
    if options.strategy.kind == StrategyKind.tp:
        raise UserError("strategy=tp: images are made from images on one device; set strategy=single")
    if options.rerank_with is not None:
        raise UserError(
            "rerank_with: a captioner ranks images by their captions, and the prompts of this model are instructions; "
            "leave it out"
        )


def images_to_edit(
    given: object, prompts: Sequence[str] | None, data: DataConfig, count: int, *, size: int, field: str, times: int
) -> EachPrompt:
    """The images that `images=` names, or the source images of the first `count` validation pairs.

    Args:
        given: value of `images`.
        prompts: prompts of each image; None: the instructions of the validation pairs.
        data: data set of the validation pairs.
        count: number of pairs.
        size: edge of the images in pixels.
        field: name of the source image in a sample.
        times: results for each image and prompt.

    Raises:
        UserError: images are given without prompts, or there are no images.
    """
    if given is None:
        return EachPrompt(FirstSources(validation_images(data, image_fields=(field,)), count, field), prompts, times)
    if prompts is None:
        raise UserError("prompts has no value; set it to what this model is to do with the images: prompts=[油画风格]")
    return EachPrompt(images_of(given, size), prompts, times)


def edit_results(
    folder: RunFolder,
    options: GenerationOptions,
    pipeline: GenerationPipeline,
    images: EachPrompt,
    role: Role,
    prompts: Sequence[str] | None,
) -> ResultList:
    """The lists of a run that makes images from images."""
    upscaler = options.upscale_with
    return ResultList(
        folder,
        images,
        source="source",
        settings=inference_settings(
            options.precision,
            options.quantization,
            sampler=options.sampler,
            **pipeline.engines(),
            seed=options.seed,
            num_images_per_prompt=options.num_images_per_prompt,
            prompts=None if prompts is None else list(prompts),
        ),
        inputs={
            "init_from": hash_of_role(role, options.models.outputs, options.init_from),
            "upscale_with": "" if upscaler is None else model_hash(upscaler),
        },
        verify=options.models.verify,
    )


def write_edits(
    folder: RunFolder,
    results: ResultList,
    options: GenerationOptions,
    pipeline: GenerationPipeline,
    images: EachPrompt,
    team: Team,
) -> dict[str, float]:
    """Make an image from each source image and prompt, batch by batch; returns metrics, of use in the first process.

    The k-th result of an image and a prompt is sampled with `seed + k`.
    """
    times = options.num_images_per_prompt
    together = team.batches(len(images) // times, max(1, options.sampler.batch_size // times))
    batches = [range(batch.start * times, batch.stop * times) for batch in together]
    done = team.tell(results.begin(resume=options.resume, batch_size=len(batches[0])) if team.first else 0)
    before, started = results.count, time.perf_counter()
    tokenizer = pipeline.generator.image_tokenizer
    y, x = pipeline.generator.grid

    def edit(batch: range) -> Edited:
        SIGNALS.check()
        chosen, pixels, skipped = images.read_some(batch[::times])
        skipped = [record for record in skipped for _ in range(times)]
        if not chosen:
            return [], skipped
        made = pipeline.generate(
            [images.record(number)["prompt"] for number in chosen],
            sources=encode_images(pixels, tokenizer, len(pixels)),
            num_images_per_prompt=times,
            top_n=None,
            seed=options.seed,
            on_codes=bar.update,
        )
        numbers = [number + k for number in chosen for k in range(times)]
        return list(zip(numbers, made, strict=True)), skipped

    with Bar("generate", len(images) * y * x, "codes", done=done * y * x) as bar:
        left = [batch for batch in batches if batch.start >= done]
        for made, skipped in team.in_order(edit, left, on_other=lambda batch: bar.update(len(batch) * y * x)):
            results.add([_write(folder, images, number, times, image) for number, image in made], skipped)
    if team.first:
        results.say_skipped()
    seconds = time.perf_counter() - started
    return {
        "generate/images": float(results.count),
        "generate/skipped": float(results.num_skipped),
        "perf/images_per_s": (results.count - before) / seconds,
        "perf/tokens_per_s": (results.count - before) * y * x / seconds,
    }


def save_edit_sheet(folder: RunFolder, results: ResultList, images: EachPrompt, times: int, font: str | None) -> None:
    """Write `samples/grid.png` of the first results: the source image, what was made of it, and the truth if known."""
    rows, prompts = [], []
    written = list(results.first(_SHEET_IMAGES * times))
    for group in batches_of(range(len(written)), times):
        number, record = written[group.start]
        made = [read_result(folder, written[own][1]) for own in group]
        truth = images.truth(number)
        rows.append([to_pil_image(images.read(number)), *made, *([] if truth is None else [to_pil_image(truth)])])
        prompts.append(record["prompt"])
    if rows:
        (folder / "samples").mkdir(exist_ok=True)
        save_sheet(folder.path, prompts, rows, font)


def judge_edits(folder: RunFolder, results: ResultList, images: EachPrompt) -> dict[str, float]:
    """Accuracy of the objects of the toy world in images, by what the true images show."""
    assert isinstance(images.images, FirstSources) and isinstance(images.images.pairs, ToyDataset)
    toy, found, shown = images.images.pairs, [], []
    written = list(results.first(results.count))
    for batch in batches_of(range(len(written)), _JUDGED):
        SIGNALS.check()
        read = [pil_to_tensor(read_result(folder, written[number][1])) for number in batch]
        found += Judge(read[0].shape[-1])(torch.stack(read))
        shown += [toy.shown(images.place(written[number][0])) for number in batch]
    return score_pairs(found, shown)


def read_result(folder: RunFolder, record: dict[str, Any]) -> Image.Image:
    """The image of a record, RGB."""
    with Image.open(folder.path / record["file"], formats=["PNG"]) as stored:
        return stored.convert("RGB")


def _write(folder: RunFolder, images: EachPrompt, number: int, times: int, made: GeneratedImage) -> dict[str, Any]:
    """Write an image; returns its record."""
    file = Path("samples", f"{number // times:04d}", f"{number % times:02d}.png")
    (folder.path / file).parent.mkdir(parents=True, exist_ok=True)
    save_image(made.image, folder.path / file)
    return {
        "prompt": made.prompt,
        "file": file.as_posix(),
        "source": images.record(number)["file"],
        "seed": made.seed,
        "width": made.image.width,
        "height": made.image.height,
        FILE_CRC32: zlib.crc32((folder.path / file).read_bytes()),
    }
