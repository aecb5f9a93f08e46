"""task=magnify: images → images of twice the edge, by super-resolution in sliding windows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_pil_image

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.image_data import is_toy_world, validation_samples
from cogview_pl.assembly.roles import UPSCALER, open_role
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.config import DataConfig
from cogview_pl.data.sharing import Team
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.upscaling import judge_upscaling
from cogview_pl.generation.codes import decode_codes, encode_images
from cogview_pl.generation.contact_sheet import contact_sheet, load_font
from cogview_pl.generation.super_resolution.upscale import Upscaler
from cogview_pl.generation.super_resolution.windows import owners
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import load_images, load_pairs, save_image, write_records
from cogview_pl.runs.run_folder import SAMPLES, RunFolder
from cogview_pl.toy_world.judge import score

_SHEET_ROWS = 12
_SHEET_COLUMNS = 2


@dataclass(frozen=True)
class Originals:
    """Images to upscale, all of the image tokenizer's size."""

    prompts: list[str]
    files: list[str]
    images: list[Tensor]
    """uint8 `(3, Y, X)`."""
    truth: list[Tensor] | None
    """The same images at twice the size; None for files of the user."""
    skipped: list[dict[str, str]]


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Write images of twice the edge, `samples.jsonl` and a contact sheet; compare them with true images if known."""
    model = open_role(UPSCALER, model_options(config), config.upscale_with, config.upscale_template)
    device, dtype = inference_device(config.trainer, config.precision)
    upscaler = Upscaler(model, device, dtype, config.quantization)
    tokenizer = model.image_tokenizer.model.to(device)
    load_font(config.font, 12)
    size = model.image_tokenizer.settings["image_size"]
    if config.pairs is not None or config.images is not None:
        originals = _files(config.pairs, config.images, size)
    else:
        originals = _validation_images(config.data, config.num_prompts, size)
    if originals.skipped and team.first:
        write_records(folder / "skipped.jsonl", originals.skipped)

    def double(batch: range) -> tuple[Tensor, Tensor]:
        """Images of a batch as decoded from their codes, and at twice the edge."""
        codes = encode_images([originals.images[number] for number in batch], tokenizer, len(batch))
        large = upscaler.double(
            [originals.prompts[number] for number in batch],
            codes,
            seeds=[config.seed] * len(codes),
            sampling=config.sampler.plain(),
            on_window=bar.update,
        )
        return decode_codes(codes, tokenizer, len(batch)), decode_codes(large, tokenizer, len(batch))

    batches = team.batches(len(originals.images), config.sampler.batch_size)
    steps = {batch: upscaler.num_steps(len(batch), len(batch)) for batch in batches}
    started = time.perf_counter()
    with Bar("magnify", sum(steps.values()), "windows") as bar:
        found = list(team.in_order(double, batches, on_other=lambda batch: bar.update(steps[batch])))
    if not team.first:
        return {}
    seconds = time.perf_counter() - started
    before, images = (torch.cat(parts) for parts in zip(*found, strict=True))
    _write(folder, originals, before, images, config.font)
    metrics = {"magnify/images": float(len(images)), "magnify/skipped": float(len(originals.skipped))}
    metrics |= {"perf/images_per_s": len(images) / seconds}
    if originals.truth is not None:
        metrics |= _compare(torch.stack(originals.truth) / 255, before, images, owners(upscaler.grid[-1]))
    if originals.truth is not None and is_toy_world(config.data):
        for name, judged in (("before", before), ("after", images)):
            metrics[f"magnify/all_right_{name}"] = score(_at(judged, before.shape[-1]), originals.prompts).all_right
    return metrics


def _files(pairs_path: str | None, images_given: object, size: int) -> Originals:
    """Images of `pairs`, with their prompts, or of `images`, without."""
    found = load_images(images_given, size) if pairs_path is None else load_pairs(pairs_path, size)
    prompts = [record.get("prompt", "") for record in found.records]
    return Originals(prompts, [record["file"] for record in found.records], found.images, None, found.skipped)


def _validation_images(data: DataConfig, count: int, size: int) -> Originals:
    """Images of the validation split in both sizes."""
    good, bad = validation_samples(data.at_twice_the_size(), count)
    small = [resize(sample.image, [size, size], InterpolationMode.BICUBIC, antialias=True) for sample in good]
    skipped = [{"file": sample.key, "reason": sample.reason} for sample in bad]
    return Originals([s.text for s in good], [s.key for s in good], small, [s.image for s in good], skipped)


def _compare(truth: Tensor, before: Tensor, after: Tensor, windows: Tensor) -> dict[str, float]:
    """Compare upscaled images, and decoded small images that were resized (bicubic), with the true ones."""
    judged = {"": after, "_bicubic": _at(before, truth.shape[-1])}
    found = {suffix: judge_upscaling(images, truth, windows) for suffix, images in judged.items()}
    return {f"magnify/{name}{suffix}": value for suffix, one in found.items() for name, value in asdict(one).items()}


def _at(images: Tensor, edge: int) -> Tensor:
    return resize(images, [edge, edge], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def _write(folder: RunFolder, originals: Originals, before: Tensor, after: Tensor, font: str | None) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    records: list[dict[str, object]] = []
    rows: list[tuple[str, Sequence[Image.Image]]] = []
    for number, (prompt, source) in enumerate(zip(originals.prompts, originals.files, strict=True)):
        SIGNALS.check()
        image = to_pil_image((after[number] * 255).round().to(torch.uint8))
        file = Path("samples") / f"{number:04d}.png"
        save_image(image, folder.path / file)
        size = {"width": image.width, "height": image.height}
        records.append({"prompt": prompt, "file": file.as_posix(), "source": source, **size})
        if number < _SHEET_ROWS:
            rows.append((prompt, [to_pil_image((before[number] * 255).round().to(torch.uint8)), image]))
    write_records(folder / SAMPLES, records)
    cell = max(images[-1].width for _, images in rows)
    sheet = contact_sheet(rows, columns=_SHEET_COLUMNS, cell=cell, font=font)
    save_image(sheet, folder / "samples" / "grid.png")
