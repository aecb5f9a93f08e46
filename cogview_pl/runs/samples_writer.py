"""Writes the generated images of a run and their list, `samples.jsonl`, so that a stopped run can be resumed.

An image is written before its line, so the list never names a missing image. A resumed run starts after the last group
of prompts with all its images, because the images of a group are sampled together.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cogview_pl.data.records import read_record, record_line
from cogview_pl.durable.write import append, write_bytes
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.image_files import save_image
from cogview_pl.runs.result_list import FILE_CRC32
from cogview_pl.runs.run_folder import SAMPLES, RunFolder


class WrittenImage(NamedTuple):
    """A generated image on the disk."""

    prompt: str
    seed: int
    caption_loss: float | None
    given_loss: float | None


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image with its prompt, seed and caption loss."""

    prompt: str
    seed: int
    image: Image.Image
    caption_loss: float | None
    """Nats per text token, lower is better; None without a captioner."""
    given_loss: float | None = None
    """See `CompletedCodes.given_losses`."""
    source: str = ""
    """File of the image that was completed."""


class SampleFiles:
    """Images of a folder, and their list.

    Args:
        folder: the folder.
        kept: number of images kept per prompt.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self.folder = folder
        self._kept = kept

    def name(self, number: int) -> Path:
        """Image file with a number, relative to the folder."""
        return Path("samples", f"{number // self._kept:04d}", f"{number % self._kept:02d}.png")

    def read(self, number: int) -> Image.Image:
        """The image with a number, RGB."""
        with Image.open(self.folder / self.name(number), formats=["PNG"]) as stored:
            return stored.convert("RGB")

    def write(self, number: int, generated: GeneratedImage) -> None:
        """Write an image, then its line."""
        file = self.folder / self.name(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(generated.image, file)
        record: dict[str, object] = {
            "prompt": generated.prompt,
            "file": str(self.name(number)),
            "seed": generated.seed,
            "width": generated.image.width,
            "height": generated.image.height,
        }
        if generated.source:
            record["source"] = generated.source
        for name in ("caption_loss", "given_loss"):
            if getattr(generated, name) is not None:
                record[name] = getattr(generated, name)
        append(self.folder / SAMPLES, record_line({**record, FILE_CRC32: zlib.crc32(file.read_bytes())}))


class SamplesWriter:
    """Writes images, numbered in the order of their generation.

    If several processes generate the same images together, only the first one writes.

    Args:
        folder: folder of the run.
        kept: number of images kept per prompt.
        settings: values that the images depend on; a resumed run must have the same.
        inputs: hashes of the models; a resumed run must have the same.
        verify: whether `inputs` are compared.

    Raises:
        UserError: a resumed run was begun with other models or settings.
    """

    def __init__(
        self,
        folder: RunFolder,
        kept: int,
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        verify: bool,
    ) -> None:
        self._run, self._folder = folder, folder.path
        self._kept = kept
        self.files = SampleFiles(folder.path, kept)
        self._count = 0
        if folder.writes:
            folder.require_same(settings, inputs, verify)

    def start(self) -> None:
        """Begin an empty list."""
        if self._run.writes:
            self._run.begin()
            write_bytes(self._folder / SAMPLES, b"")

    def go_on(self, prompts: Sequence[str], group: int) -> list[WrittenImage]:
        """Check the images of finished groups, and remove later lines from the list.

        Args:
            prompts: all prompts.
            group: number of prompts that are generated at once.

        Raises:
            UserError: the list has other prompts.
        """
        lines = (self._folder / SAMPLES).read_bytes().split(b"\n")[:-1]  # a kill may have cut off the last line
        found: list[WrittenImage] = []
        for number, line in enumerate(lines):
            SIGNALS.check()
            try:
                record = read_record(line, ours=True)
                prompt = prompts[number // self._kept]
                if record["prompt"] != prompt:
                    raise UserError(
                        f"resume: {self._folder / SAMPLES} goes on with prompt {record['prompt']!r} where this run has "
                        f"{prompt!r}; give the same prompts, or start anew without resume"
                    )
                self._require_intact(number, record)
                found.append(WrittenImage(prompt, record["seed"], record.get("caption_loss"), record.get("given_loss")))
            except (ValueError, KeyError, IndexError, TypeError, OSError):
                break  # generate this image and all later ones again
        if len(found) < len(prompts) * self._kept:
            found = found[: len(found) // (group * self._kept) * group * self._kept]
        if self._run.writes:
            self._run.begin()
            write_bytes(self._folder / SAMPLES, b"".join(line + b"\n" for line in lines[: len(found)]))
        self._count = len(found)
        return found

    def add(self, generated: GeneratedImage) -> WrittenImage:
        """Write the next image, then its line."""
        number, self._count = self._count, self._count + 1
        if self._run.writes:
            self.files.write(number, generated)
        return WrittenImage(generated.prompt, generated.seed, generated.caption_loss, generated.given_loss)

    def _require_intact(self, number: int, record: dict[str, Any]) -> None:
        if FILE_CRC32 not in record or record["file"] != self.files.name(number).as_posix():
            raise ValueError("the line is of another image")
        file = self._folder / self.files.name(number)
        if not file.is_file() or zlib.crc32(file.read_bytes()) != record[FILE_CRC32]:
            raise ValueError("the image is damaged")
