"""The loop of `task=generate`: it generates a group of prompts at a time, and writes the images of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from PIL import Image

from cogview_pl.assembly.completion import Completion
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.assembly.pipelines import GenerationPipeline
from cogview_pl.assembly.roles import GENERATOR, hash_of_role, inference_settings
from cogview_pl.checkpoints.model_hash import model_hash
from cogview_pl.data.sharing import Team, batches_of
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.contact_sheet import contact_sheet
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import save_image
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.runs.samples_writer import GeneratedImage, SampleFiles, SamplesWriter, WrittenImage

_SHEET_ROWS = 24
_SHEET_WIDTH = 8  # images across the contact sheet


def write_samples(
    options: GenerationOptions,
    folder: RunFolder,
    pipeline: GenerationPipeline,
    prompts: Sequence[str],
    team: Team,
    completion: Completion | None = None,
) -> tuple[list[WrittenImage], SampleFiles]:
    """Generate and save images in order, then write the contact sheet; in the first process returns all images.

    With `resume`, images of finished groups are kept and not generated again. With `completion`, whose prompts these
    are, codes of its images are given.
    """
    groups = team.batches(len(prompts), max(1, options.sampler.batch_size // options.num_images_per_prompt))
    settings = inference_settings(
        options.precision,
        options.quantization,
        sampler=options.sampler,
        **pipeline.engines(),
        seed=options.seed,
        num_images_per_prompt=options.num_images_per_prompt,
        top_n=options.top_n,
    )
    writer = SamplesWriter(
        folder,
        options.kept,
        settings=settings,
        inputs=_inputs(options) | ({} if completion is None else completion.inputs()),
        verify=options.models.verify,
    )
    images: list[WrittenImage] = []
    if team.first and options.resume:
        images = writer.go_on(prompts, len(groups[0]))
    elif team.first:
        writer.start()
    finished = team.tell(len(images) // options.kept)
    y, x = pipeline.generator.grid
    codes_of_image = y * x if completion is None else completion.num_generated
    codes_of_prompt = codes_of_image * options.num_images_per_prompt

    def generate(group: range) -> list[GeneratedImage]:
        SIGNALS.check()
        found = pipeline.generate(
            [prompts[number] for number in group],
            num_images_per_prompt=options.num_images_per_prompt,
            top_n=options.top_n,
            seed=options.seed,
            known=None if completion is None else completion.known(group),
            on_codes=bar.update,
        )
        if completion is None:
            return list(found)
        sources = [completion.source(place) for place in group for _ in range(options.kept)]
        return [replace(image, source=source) for image, source in zip(found, sources, strict=True)]

    def count(group: range) -> None:
        bar.update(len(group) * codes_of_prompt)

    with Bar("generate", len(prompts) * codes_of_prompt, "codes", done=finished * codes_of_prompt) as bar:
        left = [group for group in groups if group.start >= finished]
        for image in chain.from_iterable(team.in_order(generate, left, on_other=count)):
            images.append(writer.add(image))
    if folder.writes:
        numbers = range(min(len(images), _SHEET_ROWS * options.kept))
        rows = [[writer.files.read(number) for number in row] for row in batches_of(numbers, options.kept)]
        if completion is not None:
            rows = [[completion.shown(place), *row] for place, row in enumerate(rows)]
        save_sheet(folder.path, prompts[: len(rows)], rows, options.font)
    return images, writer.files


def save_sheet(folder: Path, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], font: str | None) -> None:
    """Write `samples/grid.png` of the first prompts and their images."""
    cell = max(96, min(images[0][-1].width, 256))
    rows = list(zip(prompts, images, strict=True))[:_SHEET_ROWS]
    sheet = contact_sheet(rows, columns=max(1, _SHEET_WIDTH // len(images[0])), cell=cell, font=font)
    save_image(sheet, folder / "samples" / "grid.png")


def _inputs(options: GenerationOptions) -> dict[str, str]:
    """Hashes of the models that images depend on."""
    others = {"rerank_with": options.rerank_with, "upscale_with": options.upscale_with}
    return {
        "init_from": hash_of_role(GENERATOR, options.models.outputs, options.init_from),
        **{key: "" if path is None else model_hash(path) for key, path in others.items()},
    }
