"""Image files that the user names: `images=` names images, `pairs=` images with their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from cogview_pl.data.decode import SampleError, load_image
from cogview_pl.data.records import read_record, record_line
from cogview_pl.data.walk import find_images
from cogview_pl.durable.read import why_unusable
from cogview_pl.durable.write import replacing
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.run_folder import SAMPLES


class LoadedImages(NamedTuple):
    """Images that can be read, and the records of those that cannot."""

    records: list[dict[str, str]]
    """One per image: `file`, and `prompt` for pairs."""
    images: list[Tensor]
    """uint8 `(3, size, size)`."""
    skipped: list[dict[str, str]]
    """Records of unreadable images, with the `reason`."""


def load_pairs(given: str | Path, size: int) -> LoadedImages:
    """Prompts and images of a run folder of task=generate or a .jsonl file of `{"prompt": …, "file": …}`.

    Raises:
        UserError: there is no such file, a line is malformed, or none of the images can be read.
    """
    file = pairs_file(Path(given))
    return _load(f"pairs={file}", read_pairs(file), file.parent, size)


def load_images(given: object, size: int) -> LoadedImages:
    """The images that `images` names: an image, a folder or a list of images.

    Raises:
        UserError: there are none, or none can be read.
    """
    return _load(f"images={given}", [{"file": str(file)} for file in image_files(given)], Path(), size)


def _load(source: str, records: Sequence[dict[str, str]], folder: Path, size: int) -> LoadedImages:
    """Read the `file` of every record, relative to a folder."""
    found = LoadedImages([], [], [])
    for record in records:
        SIGNALS.check()
        try:
            found.images.append(load_image(folder / record["file"], size))
            found.records.append(record)
        except SampleError as error:
            found.skipped.append({**record, "reason": str(error)})
    if not found.records:
        first = found.skipped[0]
        raise UserError(
            f"{source}: none of the {len(records)} images can be read (first: {first['file']}: {first['reason']})"
        )
    return found


def image_files(given: object) -> list[Path]:
    """The files that `images` names, in a fixed order; raises UserError if there are none."""
    if isinstance(given, str):
        files = list(find_images(Path(given))) if Path(given).is_dir() else [Path(given)]
    else:
        files = [Path(str(file)) for file in given]  # type: ignore[attr-defined]
    if not files:
        raise UserError(f"images={given} holds no images; give an image, a folder or a list of images")
    return files


def write_records(file: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object per line, each with its checksum."""
    with replacing(file) as draft:
        draft.write_bytes(b"".join(map(record_line, records)))


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
