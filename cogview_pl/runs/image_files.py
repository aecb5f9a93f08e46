"""Image files that the user names: `images=` names images, `pairs=` images with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from cogview_pl.data.decoding.decode import load_image
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.image_folders.walk import find_images
from cogview_pl.data.input_images import InputImages
from cogview_pl.data.records import read_record
from cogview_pl.durable.read import why_unusable
from cogview_pl.durable.write import replacing
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.run_folder import SAMPLES


class GivenImages(InputImages):
    """Image files, resized and cropped to one size.

    Args:
        source: key and value of the configuration that name them.
        records: `file`, relative to `folder`, and `prompt` for pairs.
        folder: folder of the files.
        size: edge of the images in pixels.
    """

    def __init__(self, source: str, records: Sequence[dict[str, str]], folder: Path, size: int) -> None:
        super().__init__(source)
        self._records = records
        self._folder = folder
        self._size = size

    def __len__(self) -> int:
        return len(self._records)

    def record(self, number: int) -> dict[str, str]:
        return self._records[number]

    def read(self, number: int) -> Tensor:
        return load_image(self._folder / self._records[number]["file"], self._size)

    def fingerprint(self) -> str:
        """A digest of prompts and names, and of sizes and times of the files."""
        found = Fingerprint("image files")
        for record in self._records:
            SIGNALS.check()
            found.add_file(self._folder / record["file"], record)
        return found.hexdigest()


def pairs_of(given: str | Path, size: int) -> GivenImages:
    """Images with prompts, of a run folder of task=generate or a .jsonl file of `{"prompt": …, "file": …}`.

    Raises:
        UserError: there is no such file, or a line is malformed.
    """
    file = pairs_file(Path(given))
    return GivenImages(f"pairs={file}", read_pairs(file), file.parent, size)


def images_of(given: object, size: int) -> GivenImages:
    """The images that `images` names: an image, a folder or a list of images; raises UserError if there are none."""
    return GivenImages(f"images={given}", [{"file": str(file)} for file in image_files(given)], Path(), size)


def image_files(given: object) -> list[Path]:
    """The files that `images` names, in a fixed order; raises UserError if there are none."""
    if isinstance(given, str):
        files = list(find_images(Path(given))) if Path(given).is_dir() else [Path(given)]
    else:
        files = [Path(str(file)) for file in given]  # type: ignore[attr-defined]
    if not files:
        raise UserError(f"images={given} holds no images; give an image, a folder or a list of images")
    return files


def save_image(image: Image.Image, file: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(file) as draft:
        image.save(draft, "PNG")


def pairs_file(path: Path) -> Path:
    """The list in a run folder, or the list itself; raises UserError if it is missing."""
    file = path / SAMPLES if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"pairs={path}: {file} {why_unusable(file)}; give a run folder of task=generate or a .jsonl file"
        )
    return file


def read_pairs(file: Path) -> list[dict[str, str]]:
    """The records of a list: `prompt`, and `file` relative to the list; raises UserError for any other line."""
    pairs = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # texts may hold other separators of lines
    except UnicodeDecodeError:
        raise UserError(f"pairs={file} is not UTF-8 text; save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = read_record(line)
            pairs.append({"prompt": str(record["prompt"]), "file": str(record["file"])})
        except (ValueError, KeyError, RecursionError) as error:
            raise UserError(
                f'pairs={file}, line {number}: expected {{"prompt": …, "file": …}}, found {line[:60]!r} ({error})'
            ) from None
    if not pairs:
        raise UserError(f"pairs={file} holds no pairs")
    return pairs
