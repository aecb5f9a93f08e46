"""Captions of images by a captioner: `samples.jsonl` and a contact sheet."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.assembly.image_data import validation_samples
from cogview_pl.checkpoints.model_folder import ImageTokenizer
from cogview_pl.data.config import DataConfig
from cogview_pl.data.sharing import Team
from cogview_pl.generation.codes import encode_images
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.contact_sheet import contact_sheet
from cogview_pl.generation.rerank import Captioner
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import load_images, save_image, write_records
from cogview_pl.runs.run_folder import SAMPLES, RunFolder
from cogview_pl.toy_world.judge import score_captions

_log = logging.getLogger(__name__)

_SHEET_IMAGES = 24
_SHEET_COLUMNS = 8


@dataclass(frozen=True)
class NamedImage:
    """An image to describe."""

    name: str
    image: Tensor
    """uint8 `(3, Y, X)`."""
    caption: str
    """Caption in the toy world; empty for other images."""


def images_to_describe(
    given: object, data: DataConfig, count: int, size: int
) -> tuple[list[NamedImage], list[dict[str, str]]]:
    """The images that `images=` names, or validation images; and records of unreadable images, with the reason."""
    if given is None:
        samples, bad = validation_samples(data, count, text_fields=())
        return [NamedImage(sample.key, sample.image, sample.text) for sample in samples], [
            {"file": sample.key, "reason": sample.reason} for sample in bad
        ]
    records, images, skipped = load_images(given, size)
    return [NamedImage(record["file"], image, "") for record, image in zip(records, images, strict=True)], skipped


def write_captions(
    folder: RunFolder,
    captioner: Captioner,
    tokenizer: ImageTokenizer,
    images: Sequence[NamedImage],
    skipped: Sequence[dict[str, str]],
    *,
    team: Team,
    sampling: Sampling,
    seed: int,
    font: str | None,
) -> tuple[list[str], dict[str, float]]:
    """Write a caption for every image; returns captions and metrics, none in all processes but the first."""
    if skipped and team.first:
        write_records(folder / "skipped.jsonl", skipped)
        _log.warning("left out: %d images that cannot be read, listed in %s", len(skipped), folder / "skipped.jsonl")
    started = time.perf_counter()

    def describe(batch: range) -> list[str]:
        codes = encode_images([images[number].image for number in batch], tokenizer.model, len(batch))
        return list(captioner.captions(codes, seeds=[seed] * len(codes), sampling=sampling.plain()))

    captions: list[str] = []
    with Bar("describe", len(images), "images") as bar:
        for found in team.in_order(describe, team.batches(len(images), sampling.batch_size)):
            captions += found
            bar.update(len(found))
    if not team.first:
        return [], {}
    records = [{"file": image.name, "caption": caption} for image, caption in zip(images, captions, strict=True)]
    write_records(folder / SAMPLES, records)
    seconds = time.perf_counter() - started
    (folder / "samples").mkdir(exist_ok=True)
    rows = [(c, [to_pil_image(i.image)]) for c, i in zip(captions, images[:_SHEET_IMAGES], strict=False)]
    sheet = contact_sheet(rows, columns=_SHEET_COLUMNS, cell=96, font=font)
    save_image(sheet, folder / "samples" / "grid.png")
    return captions, {
        "generate/captions": float(len(captions)),
        "generate/skipped": float(len(skipped)),
        "perf/images_per_s": len(captions) / seconds,
    }


def judge_captions(captions: Sequence[str], images: Sequence[NamedImage]) -> dict[str, float]:
    """Captions of the toy world against the true ones."""
    truth = [image.caption for image in images]
    return {f"toy/caption_{name}": value for name, value in asdict(score_captions(captions, truth)).items()}
