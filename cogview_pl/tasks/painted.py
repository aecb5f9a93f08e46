"""What `task=generate` has painted so far: pictures and `samples.jsonl`, so that a stopped run can go on.

A picture is on disk before its line in the list is, so a list never names one that is not there. A run goes on behind
the last group of prompts whose pictures are all there: groups are painted as in a run that was never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from cogview_pl.config import Config
from cogview_pl.durable import append, write_bytes, write_text
from cogview_pl.errors import UserError
from cogview_pl.tasks.pictures import save_picture
from cogview_pl.tasks.run_folder import SAMPLES, RunFolder, predecessor
from cogview_pl.tasks.studio import Painting

_SETTINGS = "painting.json"
_SAMPLES_FOLDER = "samples"


class PaintedPictures:
    """The pictures of a run, numbered in the order in which they are painted.

    Of several processes that paint the same pictures together the first one writes them.

    Args:
        folder: the run's folder.
        each: pictures kept of a prompt.
    """

    def __init__(self, folder: RunFolder, each: int) -> None:
        self._folder = folder.path
        self._writes = folder.writes
        self._each = each
        if self._writes:
            (self._folder / _SAMPLES_FOLDER).mkdir(exist_ok=True)

    def start(self, config: Config) -> None:
        """Begin an empty list, and note what the pictures depend on."""
        if not self._writes:
            return
        write_text(self._folder / _SETTINGS, json.dumps(_settings(config), indent=1, ensure_ascii=False) + "\n")
        write_bytes(self._folder / SAMPLES, b"")

    def go_on(self, config: Config, prompts: Sequence[str], group: int) -> list[Painting]:
        """The paintings of the finished groups; lines behind them are taken out of the list.

        Args:
            config: of the run that goes on.
            prompts: all prompts.
            group: so many are painted at once.

        Raises:
            UserError: the list was painted from other prompts or with other settings.
        """
        self._require_same(config)
        lines = (self._folder / SAMPLES).read_bytes().split(b"\n")[:-1]  # a kill may have cut the last one
        found: list[Painting] = []
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                prompt = prompts[number // self._each]
                if record["prompt"] != prompt:
                    raise UserError(
                        f"resume: {self._folder / SAMPLES} goes on with prompt {record['prompt']!r} where this run has "
                        f"{prompt!r}; give the same prompts, or start anew without resume"
                    )
                found.append(self._painting(record))
            except (ValueError, KeyError, IndexError, TypeError, OSError, UnidentifiedImageError):
                break  # from here on everything is painted again
        if len(found) < len(prompts) * self._each:
            found = found[: len(found) // (group * self._each) * group * self._each]
        if self._writes:
            write_bytes(self._folder / SAMPLES, b"".join(line + b"\n" for line in lines[: len(found)]))
        return found

    def add(self, number: int, painting: Painting) -> None:
        """Write a picture, then its line."""
        if not self._writes:
            return
        file = Path(_SAMPLES_FOLDER) / f"{number // self._each:04d}" / f"{number % self._each:02d}.png"
        (self._folder / file).parent.mkdir(exist_ok=True)
        save_picture(painting.picture, self._folder / file)
        line = json.dumps(_record(painting, file), ensure_ascii=False) + "\n"
        append(self._folder / SAMPLES, line.encode("utf-8"))

    def _painting(self, record: dict[str, Any]) -> Painting:
        with Image.open(self._folder / record["file"], formats=["PNG"]) as stored:
            picture = stored.convert("RGB")
        return Painting(record["prompt"], record["seed"], picture, record.get("caption_loss"), self._each)

    def _require_same(self, config: Config) -> None:
        try:
            found = json.loads((self._folder / _SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"resume: {self._folder / _SETTINGS} cannot be read ({error}); start anew") from error
        for key, wanted in _settings(config).items():
            if found.get(key) != wanted:
                raise UserError(
                    f"resume: {self._folder} was painted with {key}={found.get(key)}, this run has {wanted}; go on "
                    "with the same settings, or start anew without resume"
                )


def _settings(config: Config) -> dict[str, Any]:
    """What pictures depend on besides their prompts, as plain values."""
    others = {key: getattr(config, key) for key in ("rerank_with", "upscale_with")}
    return {
        "init_from": str(predecessor(config.outputs, "pretrain", "init_from", config.init_from).resolve()),
        **{key: path and str(Path(path).resolve()) for key, path in others.items()},
        "seed": config.seed,
        "num_images": config.num_images,
        "keep": config.keep,
        "weights": config.weights and config.weights.value,
        "precision": config.precision.get("precision"),
        **{f"sampler.{key}": getattr(value, "value", value) for key, value in asdict(config.sampler).items()},
    }


def _record(painting: Painting, file: Path) -> dict[str, object]:
    record: dict[str, object] = {
        "prompt": painting.prompt,
        "file": str(file),
        "seed": painting.seed,
        "width": painting.picture.width,
        "height": painting.picture.height,
    }
    if painting.caption_loss is not None:
        record["caption_loss"] = painting.caption_loss
    return record
