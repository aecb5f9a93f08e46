"""What `task=generate` does with a captioner: images → captions in `samples.jsonl` and on a contact sheet."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from cogview_pl.assembly.image_data import validation_samples
from cogview_pl.assembly.models import inference_device, quantization
from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel
from cogview_pl.config.schema import Config
from cogview_pl.data.records import record_line
from cogview_pl.durable.write import replacing
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.contact_sheet import contact_sheet, load_font
from cogview_pl.generation.rerank import Captioner
from cogview_pl.runs.image_files import load_images, save_image, write_records
from cogview_pl.runs.run_folder import SAMPLES, RunFolder
from cogview_pl.toy_world.config import ToyDataConfig
from cogview_pl.toy_world.judge import score_captions

_log = logging.getLogger(__name__)

_SHEET_IMAGES = 24
_SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Image:
    """A image to describe."""

    name: str
    image: Tensor
    """uint8 `(3, Y, X)`."""
    caption: str | None
    """What the data set says of it."""


def describe(config: Config, folder: RunFolder, loaded: SequenceModel) -> dict[str, float]:
    """Write a caption for every image; those of the toy world are compared with the true ones."""
    if config.prompts is not None:
        raise UserError("prompts: this model writes captions of images; set images, or init_from to a pretrain run")
    load_font(config.font, 12)
    device, dtype = inference_device(config)
    captioner = Captioner(loaded, device, dtype, quantization(config))
    images, skipped = _images(config, loaded.image_tokenizer.settings["image_size"])
    if skipped:
        write_records(folder / "skipped.jsonl", skipped)
        _log.warning("left out: %d images that cannot be read, listed in %s", len(skipped), folder / "skipped.jsonl")
    started = time.perf_counter()
    codes = encode([image.image for image in images], loaded.image_tokenizer, device, config.sampler.batch_size)
    captions: list[str] = []
    with replacing(folder / SAMPLES) as draft, draft.open("wb") as records:
        made = captioner.captions(
            codes,
            seeds=[config.seed] * len(codes),
            sampling=config.sampler.plain(),
        )
        for image, caption in zip(images, tqdm(made, total=len(codes), unit="pic", disable=None), strict=True):
            records.write(record_line({"file": image.name, "caption": caption}))
            captions.append(caption)
    seconds = time.perf_counter() - started
    (folder / "samples").mkdir(exist_ok=True)
    rows = [(c, [to_pil_image(p.image)]) for c, p in zip(captions, images[:_SHEET_IMAGES], strict=False)]
    sheet = contact_sheet(rows, columns=_SHEET_COLUMNS, cell=96, font=config.font)
    save_image(sheet, folder / "samples" / "grid.png")
    metrics = {"generate/captions": float(len(captions)), "generate/skipped": float(len(skipped))}
    metrics |= {"perf/images_per_s": len(captions) / seconds}
    if config.images is None and isinstance(config.data, ToyDataConfig):
        truth = [image.caption or "" for image in images]
        metrics |= {f"toy/caption_{name}": value for name, value in asdict(score_captions(captions, truth)).items()}
    return metrics


def encode(images: Sequence[Tensor], tokenizer: ImageTokenizer, device: str, batch_size: int) -> Tensor:
    """Codes `(B, y, x)` on the CPU of uint8 images of the tokenizer's size."""
    model = tokenizer.model.to(device)
    stacked = torch.stack(list(images))
    parts = []
    for part in stacked.split(batch_size):
        SIGNALS.check()
        parts.append(model.encode(part.to(device).float() / 255).cpu())
    return torch.cat(parts)


def _images(config: Config, size: int) -> tuple[list[Image], list[dict[str, str]]]:
    """The images to describe, and those that cannot be read, with the reason."""
    if config.images is None:
        samples, left_out = validation_samples(config.data, config.num_prompts)
        skipped = [{"file": sample.key, "reason": sample.reason} for sample in left_out]
        return [Image(sample.key, sample.image, sample.text) for sample in samples], skipped
    files, images, skipped = load_images(config.images, size)
    return [Image(file, image, None) for file, image in zip(files, images, strict=True)], skipped
