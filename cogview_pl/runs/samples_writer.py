"""What `task=generate` has painted so far: images and `samples.jsonl`, so that a stopped run can go on.

A image is on disk before its line in the list is, so a list never names one that is not there. A run goes on behind
the last group of prompts whose images are all there: groups are painted as in a run that was never stopped.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from cogview_pl.assembly.models import model_hash
from cogview_pl.assembly.pipelines import GeneratedImage
from cogview_pl.config.schema import Config
from cogview_pl.data.records import read_record, record_line
from cogview_pl.durable.write import append, write_bytes
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.image_files import save_image
from cogview_pl.runs.run_folder import SAMPLES, RunFolder, predecessor

_SAMPLES_FOLDER = "samples"


class PaintedImages:
    """The images of a run, numbered in the order in which they are painted.

    Of several processes that paint the same images together the first one writes them.

    Args:
        config: of the run.
        folder: its folder.
        each: images kept of a prompt.

    Raises:
        UserError: the run goes on, and was begun with other models or settings.
    """

    def __init__(self, config: Config, folder: RunFolder, each: int) -> None:
        self._run = folder
        self._folder = folder.path
        self._writes = folder.writes
        self._each = each
        if self._writes:
            folder.require_same(_settings(config), _models(config), config.verify)

    def start(self) -> None:
        """Begin an empty list."""
        if self._writes:
            self._run.begin()
            write_bytes(self._folder / SAMPLES, b"")

    def go_on(self, prompts: Sequence[str], group: int) -> list[GeneratedImage]:
        """The paintings of the finished groups; lines behind them are taken out of the list.

        Args:
            prompts: all prompts.
            group: so many are painted at once.

        Raises:
            UserError: the list was painted from other prompts.
        """
        lines = (self._folder / SAMPLES).read_bytes().split(b"\n")[:-1]  # a kill may have cut the last one
        found: list[GeneratedImage] = []
        for number, line in enumerate(lines):
            SIGNALS.check()
            try:
                record = read_record(line, ours=True)
                prompt = prompts[number // self._each]
                if record["prompt"] != prompt:
                    raise UserError(
                        f"resume: {self._folder / SAMPLES} goes on with prompt {record['prompt']!r} where this run has "
                        f"{prompt!r}; give the same prompts, or start anew without resume"
                    )
                found.append(self._painting(number, record))
            except (ValueError, KeyError, IndexError, TypeError, OSError, SyntaxError, Image.DecompressionBombError):
                break  # from here on everything is painted again
        if len(found) < len(prompts) * self._each:
            found = found[: len(found) // (group * self._each) * group * self._each]
        if self._writes:
            self._run.begin()
            write_bytes(self._folder / SAMPLES, b"".join(line + b"\n" for line in lines[: len(found)]))
        return found

    def add(self, number: int, painting: GeneratedImage) -> None:
        """Write a image, then its line."""
        if not self._writes:
            return
        file = self._file(number)
        (self._folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_image(painting.image, self._folder / file)
        record = _record(painting, file) | {"file_crc32": zlib.crc32((self._folder / file).read_bytes())}
        append(self._folder / SAMPLES, record_line(record))

    def _file(self, number: int) -> Path:
        return Path(_SAMPLES_FOLDER) / f"{number // self._each:04d}" / f"{number % self._each:02d}.png"

    def _painting(self, number: int, record: dict[str, Any]) -> GeneratedImage:
        if "file_crc32" not in record or record["file"] != str(self._file(number)):
            raise ValueError("another image's line")
        file = self._folder / self._file(number)
        if not file.is_file() or zlib.crc32(file.read_bytes()) != record["file_crc32"]:
            raise ValueError("the image is damaged")
        with Image.open(file, formats=["PNG"]) as stored:
            image = stored.convert("RGB")
        return GeneratedImage(record["prompt"], record["seed"], image, record.get("caption_loss"), self._each)


def _settings(config: Config) -> dict[str, Any]:
    """What images depend on besides their prompts and the models, as plain values."""
    return {
        "seed": config.seed,
        "num_images_per_prompt": config.num_images_per_prompt,
        "top_n": config.top_n,
        "quantization": config.quantization and config.quantization.value,
        "precision": config.precision.get("precision"),
        **{f"sampler.{key}": getattr(value, "value", value) for key, value in asdict(config.sampler).items()},
    }


def _models(config: Config) -> dict[str, str]:
    """Hashes of the models that images depend on."""
    others = {key: getattr(config, key) for key in ("rerank_with", "upscale_with")}
    painter = predecessor(config.outputs, "pretrain", "init_from", config.init_from)
    return {
        "init_from": model_hash(painter),
        **{key: "" if path is None else model_hash(path) for key, path in others.items()},
    }


def _record(painting: GeneratedImage, file: Path) -> dict[str, object]:
    record: dict[str, object] = {
        "prompt": painting.prompt,
        "file": str(file),
        "seed": painting.seed,
        "width": painting.image.width,
        "height": painting.image.height,
    }
    if painting.caption_loss is not None:
        record["caption_loss"] = painting.caption_loss
    return record
