"""Pictures and captions: decoding, captions of an image folder, and the folder as a data set.

Nothing here raises for one bad picture: a data set hands on a `Skipped` with the reason, and `skips.py`
decides when there are too many of them. A folder that cannot be read at all is a `UserError`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

# Raster formats only: Pillow's EPS reader, for one, would start another program on a file from a stranger.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Resizing the shorter edge makes the longer one `LONGEST_SHAPE * size` pixels at most.
LONGEST_SHAPE = 32

CAPTION_FILES = (
    "metadata.jsonl",
    "captions.jsonl",
    "metadata.csv",
    "captions.csv",
    "metadata.tsv",
    "captions.tsv",
)
FILE_FIELDS = ("file_name", "image", "path")
CAPTION_FIELDS = ("text", "caption")


class SampleError(ValueError):
    """A sample cannot be used; the text is the reason, in one line."""


class PictureError(SampleError):
    """A picture cannot be decoded."""


class CaptionError(SampleError):
    """A caption is missing or is not text."""


def load_picture(file: str | Path | BinaryIO, size: int) -> torch.Tensor:
    """Decode a picture to uint8 `(3, size, size)`, 0 black … 255 white.

    The orientation noted by the camera (EXIF) is applied, transparency is put on white, grey, 16-bit, palette
    and CMYK pictures become RGB; of an animation the first frame is taken. The shorter edge is resized to
    `size` (bicubic, antialiased), then the centre is cropped.

    Raises:
        PictureError: the file is missing, damaged, no picture, or has more pixels than Pillow takes for safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on odd metadata of pictures that can be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if max(image.size) > LONGEST_SHAPE * min(image.size):
                    raise PictureError(f"{image.width}x{image.height} is too elongated for a square crop")
                _decode_smaller(image, 2 * size)
                ImageOps.exif_transpose(image, in_place=True)
                pixels = tv.pil_to_tensor(_to_rgb(image))
    except FileNotFoundError:
        raise PictureError("file not found") from None
    except UnidentifiedImageError:
        raise PictureError("not a picture in a known format, or cut off") from None
    except Exception as error:  # damaged bytes make Pillow's readers raise nearly anything
        raise PictureError(" ".join(str(error).split()) or type(error).__name__) from error
    pixels = tv.resize(pixels, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tv.center_crop(pixels, [size, size]).contiguous()


def _decode_smaller(image: Image.Image, shorter: int) -> None:
    """Let a JPEG be decoded at 1/8, 1/4 or 1/2, several times faster, where `shorter` pixels are left.

    Only where the edges divide: elsewhere the reduced picture would not cover quite the same area.
    """
    if image.format == "JPEG":
        for scale in (8, 4, 2):
            if min(image.size) >= scale * shorter and image.width % scale == image.height % scale == 0:
                image.draft(None, (image.width // scale, image.height // scale))
                break


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise PictureError("floating-point pixels are not supported")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow keeps the high byte of 16-bit colour, so do we
        levels = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        return ground.convert("RGB")
    return image.convert("RGB")


def caption_text(value: object) -> str:
    """The caption in a metadata field: a text, or the first of a list of texts, without the space around it.

    Null and an empty list give the empty caption, which the data sets skip.

    Raises:
        CaptionError: the value is not text.
    """
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CaptionError(f"the caption is not text but {json.dumps(value, ensure_ascii=False)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CaptionError("the caption is not valid Unicode") from None
    return value.strip()


def split_indices(keys: Sequence[str], split: str, val_fraction: float) -> list[int]:
    """Indices of the samples of one split, in order.

    A key's side depends on the key alone (SHA-1), so samples keep theirs when others come or go. With a
    fraction strictly between 0 and 1 and two different keys or more, neither split is empty.

    Args:
        keys: one per sample; equal keys share a side.
        split: `train` or `val`.
        val_fraction: expected share of `val`, 0 … 1.

    Raises:
        UserError: the fraction is out of range.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, not {split!r}")
    if not 0 <= val_fraction <= 1:
        raise UserError(f"data.val_fraction={val_fraction} must be between 0 and 1")
    places = np.array([_place(key) for key in keys], dtype=np.float64)
    is_val = places < val_fraction
    if 0 < val_fraction < 1 and len(keys) > 0 and places.min() < places.max():
        is_val |= places == places.min()
        is_val &= places != places.max()
    return np.flatnonzero(is_val == (split == "val")).tolist()


def _place(key: str) -> float:
    """A key's fixed place in [0, 1)."""
    digest = hashlib.sha1(key.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


class CaptionedPictures(Dataset["ImageSample | Skipped"], ABC):
    """Pictures with captions, by index; what the folder and the shards have in common.

    `dataset[i]` is an `ImageSample` with a picture uint8 `(3, image_size, image_size)`, or a `Skipped`.
    """

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The sample's name within the data set."""

    @abstractmethod
    def _caption(self, index: int) -> str:
        """The caption, maybe empty, or a SampleError."""

    @abstractmethod
    def _picture(self, index: int) -> Path | BinaryIO:
        """Where to read the picture, or a SampleError."""

    def text(self, index: int) -> str:
        """The caption, empty where the sample has none."""
        try:
            return self._caption(index)
        except SampleError:
            return ""

    def texts(self) -> list[str]:
        """All captions, in the order of the samples."""
        return [self.text(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        index = range(len(self))[index]
        try:
            text = self._caption(index)
            if not text:
                raise CaptionError("the caption is empty")
            return ImageSample(self.key(index), load_picture(self._picture(index), self.image_size), text)
        except SampleError as error:
            return Skipped(self.key(index), str(error))


class FolderDataset(CaptionedPictures):
    """An image folder with captions; the forms are those of `find_captions`.

    A sample's key is its file, relative to `root` as the captions name it.

    Args:
        root: the folder.
        split: `train` or `val`, by a hash of the key (`split_indices`).
        image_size: edge of the square pictures.
        val_fraction: share of `val`, 0 … 1.
        caption_field: field or column with the caption; None takes `text` or `caption`.

    Raises:
        UserError: see `find_captions` and `split_indices`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        image_size: int,
        val_fraction: float,
        caption_field: str | None = None,
    ) -> None:
        super().__init__(image_size)
        self.root = Path(root).expanduser()
        pairs = find_captions(self.root, caption_field)
        self._pairs = [pairs[i] for i in split_indices([key for key, _ in pairs], split, val_fraction)]

    def __len__(self) -> int:
        return len(self._pairs)

    def key(self, index: int) -> str:
        return self._pairs[index][0]

    def _caption(self, index: int) -> str:
        return self._pairs[index][1]

    def _picture(self, index: int) -> Path:
        return self.root / self._pairs[index][0]


def find_captions(root: str | Path, caption_field: str | None = None) -> list[tuple[str, str]]:
    """The pictures of a folder, each as (file relative to `root`, caption); a caption may be empty.

    The first of these that is there: `metadata.jsonl`, `captions.jsonl`, then the same names as `.csv` and
    `.tsv` with a header; the picture's file is in `file_name`, `image` or `path`, the caption in
    `caption_field`, or where that is None in `text` or `caption` (a list of captions counts as its first).
    Otherwise one `.txt` beside each picture, at any depth. All UTF-8, with or without byte-order mark.

    Raises:
        UserError: the folder is missing, has no captions, a line is malformed or lacks a field, or none of
            the listed pictures exists.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data.root={root} {found}; set it to a folder of pictures with captions")
    listing = next((root / name for name in CAPTION_FILES if (root / name).is_file()), None)
    if listing is None:
        return _captions_beside(root)
    try:
        with listing.open(encoding="utf-8-sig", newline="") as stream:
            read = _json_lines if listing.suffix == ".jsonl" else _table_rows
            pairs = [_pair(record, where, caption_field) for where, record in read(stream, listing)]
    except UnicodeDecodeError:
        raise UserError(f"{listing} is not UTF-8 text; save it as UTF-8") from None
    if not pairs:
        raise UserError(f"{listing} lists no pictures; give one per line, with the fields file_name and text")
    if not any((root / file).is_file() for file, _ in pairs):
        raise UserError(
            f"{listing}: none of the {len(pairs)} listed pictures exists, the first is {root / pairs[0][0]}; "
            "give files relative to data.root"
        )
    return pairs


def _captions_beside(root: Path) -> list[tuple[str, str]]:
    pairs = []
    num_captions = 0
    for picture in find_pictures(root):
        note = picture.with_suffix(".txt")
        caption = ""
        if note.is_file():
            num_captions += 1
            try:
                caption = note.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError:
                raise UserError(f"{note} is not UTF-8 text; save it as UTF-8") from None
        pairs.append((picture.relative_to(root).as_posix(), caption))
    if not num_captions:
        raise UserError(
            f"data.root={root} has no captions; add one of {', '.join(CAPTION_FILES)} with the fields "
            "file_name and text, or one .txt beside each picture"
        )
    return pairs


def find_pictures(root: Path) -> Iterator[Path]:
    """All picture files below a folder, hidden ones left out, in a fixed order."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                yield Path(folder, name)


def _json_lines(stream: TextIO, file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number} is not JSON ({error}); write one object per line") from None
        if not isinstance(record, dict):
            raise UserError(f"{file}:{number} is not a JSON object; write one object per line")
        yield f"{file}:{number}", record


def _table_rows(stream: TextIO, file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{file}:{reader.line_num} has {len(row)} columns, the header has {len(header)}; "
                    'put "…" around a caption that holds the separator'
                )
            yield f"{file}:{reader.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num} is malformed ({error}); mend its quotes") from None


def _pair(record: dict[str, object], where: str, caption_field: str | None) -> tuple[str, str]:
    known = ", ".join(record) or "none"
    file = next((record[name] for name in FILE_FIELDS if name in record), None)
    if not isinstance(file, str) or not file:
        raise UserError(f"{where} names no picture; use {' or '.join(FILE_FIELDS)} (fields here: {known})")
    wanted = CAPTION_FIELDS if caption_field is None else (caption_field,)
    name = next((name for name in wanted if name in record), None)
    if name is None:
        fields = " or ".join(wanted)
        raise UserError(f"{where} has no field {fields}; set data.caption_field to one of: {known}")
    try:
        return file, caption_text(record[name])
    except CaptionError as error:
        raise UserError(f"{where}, {name}: {error}; mend the line or set data.caption_field") from None
