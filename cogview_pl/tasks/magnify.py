"""task=magnify: images → images of twice the edge, by super-resolution in sliding windows."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_pil_image

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.engines import engine_settings
from cogview_pl.assembly.image_data import is_toy_world, validation_images
from cogview_pl.assembly.roles import UPSCALER, hash_of_role, inference_settings, open_role
from cogview_pl.config.parts import model_options
from cogview_pl.config.schema import Config
from cogview_pl.data.input_images import FirstImages, InputImages
from cogview_pl.data.sharing import Team
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.evaluation.upscaling import UpscaledImage, compare_upscaled, judge_upscaling
from cogview_pl.generation.codes import decode_codes, encode_images
from cogview_pl.generation.contact_sheet import contact_sheet, load_font
from cogview_pl.generation.pipeline import pil_images
from cogview_pl.generation.super_resolution.consistency import consistent, resized
from cogview_pl.generation.super_resolution.upscale import Upscaler
from cogview_pl.generation.super_resolution.windows import owners
from cogview_pl.lit.bars import Bar
from cogview_pl.runs.image_files import images_of, pairs_of, save_image
from cogview_pl.runs.result_list import FILE_CRC32, ResultList
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.toy_world.judge import Judge, score_detected
from cogview_pl.vqvae.external import AnyTokenizer

_SHEET_ROWS = 12
_SHEET_COLUMNS = 2
_BICUBIC = "_bicubic"
_BICUBIC_UNDECODED = "_bicubic_undecoded"


class Originals(NamedTuple):
    """Images to upscale, of the image tokenizer's size."""

    images: InputImages
    """If the truth is known, images of twice that size."""
    size: int
    known: bool
    """Whether the true images of twice the size are known."""
    toy_world: bool

    def small(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images of the size that the model takes."""
        if not self.known:
            return list(images)
        edges = [self.size, self.size]
        return [resize(image, edges, InterpolationMode.BICUBIC, antialias=True) for image in images]

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        """Prompts of images; empty for images without."""
        return [self.images.record(number).get("prompt", "") for number in numbers]


class Magnified(NamedTuple):
    """A batch."""

    records: list[dict[str, Any]]
    images: list[Tensor]
    """uint8 `(3, Y, X)`."""
    skipped: list[dict[str, str]]


def run(config: Config, folder: RunFolder, team: Team) -> dict[str, float]:
    """Write images of twice the edge, `samples.jsonl` and a contact sheet; compare them with true images if known."""
    model = open_role(UPSCALER, model_options(config), config.upscale_with, config.upscale_template)
    device, dtype = inference_device(config.trainer, config.precision)
    upscaler = Upscaler(model, device, dtype, config.quantization)
    tokenizer = model.image_tokenizer.model.to(device)
    load_font(config.font, 12)
    originals = _originals(config, model.image_tokenizer.settings["image_size"])
    images = originals.images
    images.require_readable()
    results = ResultList(
        folder,
        images,
        source="source",
        settings=inference_settings(
            config.precision,
            config.quantization,
            seed=config.seed,
            sampler=config.sampler,
            **engine_settings({UPSCALER: upscaler.model}, config.sampler),
        ),
        inputs={"upscale_with": hash_of_role(UPSCALER, config.outputs, config.upscale_with)},
        verify=config.verify,
    )
    judge = Judge(originals.size) if originals.toy_world else None

    def double(batch: range) -> Magnified:
        numbers, read, skipped = images.read_some(batch)
        if not numbers:
            return Magnified([], [], skipped)
        prompts = originals.prompts(numbers)
        small = originals.small(read)
        codes = encode_images(small, tokenizer, len(batch))
        large = upscaler.double(
            prompts,
            codes,
            seeds=[config.seed] * len(codes),
            sampling=config.sampler.plain(),
            on_window=bar.update,
        )
        given = torch.stack(small) / 255
        before = _rounded(decode_codes(codes, tokenizer, len(batch)))
        after = _rounded(consistent(decode_codes(large, tokenizer, len(batch)), given, config.sampler.consistency))
        records: list[dict[str, Any]] = [
            {"prompt": p, "source": images.record(n)["file"]} for p, n in zip(prompts, numbers, strict=True)
        ]
        if originals.known:
            windows = owners(upscaler.grid[-1])
            for number, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
                one = slice(number, number + 1)
                record |= _compare(read[number][None] / 255, given[one], before[one], after[one], windows)
                record |= {} if judge is None else _judge(judge, before[one], after[one], prompt)
        return Magnified(records, [(image * 255).round().to(torch.uint8) for image in after], skipped)

    batches = team.batches(len(images), config.sampler.batch_size)
    resume = bool(config.resume)
    done = team.tell(results.begin(resume=resume, batch_size=len(batches[0])) if team.first else 0)
    steps = {batch: upscaler.num_steps(len(batch), len(batch)) for batch in batches}
    left = [batch for batch in batches if batch.start >= done]
    before, started = results.count, time.perf_counter()
    with Bar("magnify", sum(steps[batch] for batch in left), "windows") as bar:
        for magnified in team.in_order(double, left, on_other=lambda batch: bar.update(steps[batch])):
            _write(folder, results, magnified)
    if not team.first:
        return {}
    seconds = time.perf_counter() - started
    results.say_skipped()
    _save_sheet(folder, results, originals, tokenizer, batches, config.font)
    metrics = {"magnify/images": float(results.count), "magnify/skipped": float(results.num_skipped)}
    metrics |= {"perf/images_per_s": (results.count - before) / seconds}
    return metrics | (_judged(results, toy_world=originals.toy_world) if originals.known else {})


def _originals(config: Config, size: int) -> Originals:
    """Images of `pairs`, with their prompts; of `images`, without; or of the validation split, in both sizes."""
    if config.pairs is not None:
        return Originals(pairs_of(config.pairs, size), size, known=False, toy_world=False)
    if config.images is not None:
        return Originals(images_of(config.images, size), size, known=False, toy_world=False)
    images = FirstImages(validation_images(config.data.at_twice_the_size()), config.num_prompts, prompts=True)
    return Originals(images, size, known=True, toy_world=is_toy_world(config.data))


def _compare(truth: Tensor, given: Tensor, before: Tensor, after: Tensor, windows: Tensor) -> dict[str, Any]:
    """Compare an upscaled image, and the small image resized (bicubic), with the true one, each `(1, 3, Y, X)`.

    The small image is resized as decoded, which is what the model has, and as given. One at a time, because sums over a
    batch depend on its size.
    """
    found: dict[str, Any] = {}
    edge = truth.shape[-1]
    for suffix, image in (
        ("", after), (_BICUBIC, resized(before, edge)), (_BICUBIC_UNDECODED, resized(given, edge))
    ):  # fmt: skip
        (upscaled,) = compare_upscaled(image, truth, windows)
        found[f"judged{suffix}"] = list(upscaled)
    return found


def _judge(judge: Judge, before: Tensor, after: Tensor, prompt: str) -> dict[str, Any]:
    """Whether the judge of the toy world finds all objects of the prompt in the small image and in the upscaled one."""
    images = {"before": before, "after": resized(after, before.shape[-1])}
    return {f"all_right_{name}": score_detected(judge(image), [prompt]).all_right for name, image in images.items()}


def _rounded(images: Tensor) -> Tensor:
    """Images as files hold them, so that figures do not depend on the rounding of a batch."""
    return (images * 255).round() / 255


def _judged(results: ResultList, *, toy_world: bool) -> dict[str, float]:
    """Metrics of all images, from what the records say of each."""
    metrics: dict[str, float] = {}
    for suffix in ("", _BICUBIC, _BICUBIC_UNDECODED):
        every = (UpscaledImage(*record[f"judged{suffix}"]) for record in results.records())
        metrics |= {f"magnify/{name}{suffix}": value for name, value in asdict(judge_upscaling(every)).items()}
    for name in ("before", "after") if toy_world else ():
        metrics[f"magnify/all_right_{name}"] = fmean(record[f"all_right_{name}"] for record in results.records())
    return metrics


def _write(folder: RunFolder, results: ResultList, magnified: Magnified) -> None:
    """Write the images of a batch, then its records."""
    (folder / "samples").mkdir(exist_ok=True)
    records = []
    for number, (record, pixels) in enumerate(zip(magnified.records, magnified.images, strict=True), results.count):
        SIGNALS.check()
        image = to_pil_image(pixels)
        file = Path("samples") / f"{number:04d}.png"
        save_image(image, folder.path / file)
        size = {"width": image.width, "height": image.height}
        named = {"prompt": record["prompt"], "file": file.as_posix(), **record, **size}
        records.append({**named, FILE_CRC32: zlib.crc32((folder.path / file).read_bytes())})
    results.add(records, magnified.skipped)


def _save_sheet(
    folder: RunFolder,
    results: ResultList,
    originals: Originals,
    tokenizer: AnyTokenizer,
    batches: Sequence[range],
    font: str | None,
) -> None:
    """Write `samples/grid.png` of the first images, as decoded from their codes, and at twice the edge."""
    chosen = list(results.first(_SHEET_ROWS))
    rows: list[tuple[str, Sequence[Image.Image]]] = []
    for (_, record), before in zip(chosen, _decoded(originals, tokenizer, batches), strict=False):
        with Image.open(folder / record["file"], formats=["PNG"]) as stored:
            rows.append((record["prompt"], [before, stored.convert("RGB")]))
    cell = max(images[-1].width for _, images in rows)
    sheet = contact_sheet(rows, columns=_SHEET_COLUMNS, cell=cell, font=font)
    save_image(sheet, folder / "samples" / "grid.png")


def _decoded(originals: Originals, tokenizer: AnyTokenizer, batches: Sequence[range]) -> Iterator[Image.Image]:
    """The readable images as decoded from their codes, in the batches that were doubled."""
    for batch in batches:
        _, read, _ = originals.images.read_some(batch)
        if read:
            codes = encode_images(originals.small(read), tokenizer, len(batch))
            yield from pil_images(decode_codes(codes, tokenizer, len(batch)))
