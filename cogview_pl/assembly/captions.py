"""Captions of images by a captioner: `samples.jsonl` and a contact sheet."""

from __future__ import annotations

import time
from dataclasses import asdict

from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.assembly.image_data import validation_images
from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.data.config import DataConfig
from cogview_pl.data.input_images import FirstImages, InputImages
from cogview_pl.data.sharing import Team
from cogview_pl.generation.codes import encode_images
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.contact_sheet import contact_sheet
from cogview_pl.generation.rerank import Captioner
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import images_of, save_image
from cogview_pl.runs.result_list import ResultList
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.toy_world.judge import score_captions

_SHEET_IMAGES = 24
_SHEET_COLUMNS = 8
_CELL = 96  # edge of an image on the sheet in pixels


def images_to_describe(given: object, data: DataConfig, count: int, size: int) -> InputImages:
    """The images that `images=` names, or the first `count` validation images."""
    return images_of(given, size) if given is not None else FirstImages(validation_images(data, text_fields=()), count)


def write_captions(
    results: ResultList,
    captioner: Captioner,
    tokenizer: ImageTokenizer,
    images: InputImages,
    *,
    resume: bool,
    team: Team,
    sampling: Sampling,
    seed: int,
) -> dict[str, float]:
    """Add a caption of every image to `results`, batch by batch; returns metrics, of use in the first process only."""
    batches = team.batches(len(images), sampling.batch_size)
    done = team.tell(results.begin(resume=resume, batch_size=len(batches[0])) if team.first else 0)
    before, started = results.count, time.perf_counter()

    def describe(batch: range) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        numbers, pixels, skipped = images.read_some(batch)
        if not numbers:
            return [], skipped
        codes = encode_images(pixels, tokenizer.model, len(batch))
        captions = captioner.captions(codes, seeds=[seed] * len(codes), sampling=sampling.plain())
        return [{**images.record(n), "caption": text} for n, text in zip(numbers, captions, strict=True)], skipped

    with Bar("describe", len(images), "images", done=done) as bar:
        for described, skipped in team.in_order(describe, [batch for batch in batches if batch.start >= done]):
            results.add(described, skipped)
            bar.update(len(described) + len(skipped))
    if team.first:
        results.say_skipped()
    return {
        "generate/captions": float(results.count),
        "generate/skipped": float(results.num_skipped),
        "perf/images_per_s": (results.count - before) / (time.perf_counter() - started),
    }


def save_caption_sheet(folder: RunFolder, results: ResultList, images: InputImages, font: str | None) -> None:
    """Write `samples/grid.png` of the first captions and their images."""
    (folder / "samples").mkdir(exist_ok=True)
    rows = [(r["caption"], [to_pil_image(images.read(number))]) for number, r in results.first(_SHEET_IMAGES)]
    sheet = contact_sheet(rows, columns=_SHEET_COLUMNS, cell=_CELL, font=font)
    save_image(sheet, folder / "samples" / "grid.png")


def judge_captions(results: ResultList, images: FirstImages) -> dict[str, float]:
    """Captions of the toy world against the true ones."""
    found = [(record["caption"], images.text(number)) for number, record in results.first(results.count)]
    score = score_captions([caption for caption, _ in found], [truth for _, truth in found])
    return {f"toy/caption_{name}": value for name, value in asdict(score).items()}
