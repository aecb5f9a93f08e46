"""Images and captions: decoding, the split, and what the folder and the shards have in common as data sets.

Nothing here raises for one bad image: a data set hands on a `Skipped` with the reason, and `skips.py`
decides when there are too many of them.
"""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cogview_pl.data.samples import ImageSample, Skipped, fraction_of
from cogview_pl.data.styles import StylePatterns
from cogview_pl.durable.read import MAX_IMAGE, UnreadableError, cannot_be_read, require_file
from cogview_pl.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)

# Raster formats only: Pillow's EPS reader, for one, would start another program on a file from a stranger.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_OF_THE_SYSTEM = "lost+found"  # at the top of a disk, readable by root alone

# Resizing the shorter edge makes the longer one `LONGEST_SHAPE * size` pixels at most.
LONGEST_SHAPE = 32


class SampleError(ValueError):
    """A sample cannot be used; the text is the reason, in one line."""


class ImageError(SampleError):
    """A image cannot be decoded."""


class CaptionError(SampleError):
    """A caption is missing or is not text."""


def load_image(file: str | Path | BinaryIO, size: int, min_size: int = 0) -> torch.Tensor:
    """Decode a image to uint8 `(3, size, size)`, 0 black … 255 white.

    The orientation noted by the camera (EXIF) is applied, transparency is put on white, grey, 16-bit, palette
    and CMYK images become RGB; of an animation the first frame is taken. The shorter edge is resized to
    `size` (bicubic, antialiased), then the centre is cropped.

    Raises:
        ImageError: the file is missing, cannot be read, is no regular file or larger than `MAX_IMAGE`, damaged, no
            image, has more pixels than Pillow takes for safe, or its shorter edge has less than `min_size`.
    """
    try:
        if isinstance(file, (str, Path)):
            require_file(file, MAX_IMAGE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on odd metadata of images that can be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if max(image.size) > LONGEST_SHAPE * min(image.size):
                    raise ImageError(f"{image.width}x{image.height} is too elongated for a square crop")
                if min(image.size) < min_size:
                    raise ImageError(f"{image.width}x{image.height} is smaller than data.min_size={min_size}")
                if image.format == "PNG":
                    _verify_png(file)
                _decode_smaller(image, 2 * size)
                ImageOps.exif_transpose(image, in_place=True)
                pixels = tv.pil_to_tensor(_to_rgb(image))
    except UnreadableError as error:
        raise ImageError("file not found" if error.missing else str(error)) from None
    except UnidentifiedImageError:
        raise ImageError("not a image in a known format, or cut off") from None
    except Exception as error:  # damaged bytes make Pillow's readers raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(cannot_be_read(error)) from error
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error
    pixels = tv.resize(pixels, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tv.center_crop(pixels, [size, size]).contiguous()


def _verify_png(file: str | Path | BinaryIO) -> None:
    """Compare the checksums of a PNG, which decoding does not: it stops at the last pixel, before it gets to them."""
    place = None if isinstance(file, (str, Path)) else file.tell()
    if place is not None:
        file.seek(0)  # type: ignore[union-attr]
    with Image.open(file, formats=["PNG"]) as image:
        image.verify()
    if place is not None:
        file.seek(place)  # type: ignore[union-attr]


def _decode_smaller(image: Image.Image, shorter: int) -> None:
    """Let a JPEG be decoded at 1/8, 1/4 or 1/2, several times faster, where `shorter` pixels are left.

    Only where the edges divide: elsewhere the reduced image would not cover quite the same area.
    """
    if image.format == "JPEG":
        for scale in (8, 4, 2):
            if min(image.size) >= scale * shorter and image.width % scale == image.height % scale == 0:
                image.draft(None, (image.width // scale, image.height // scale))
                break


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels are not supported")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow keeps the high byte of 16-bit colour, so do we
        levels = np.asarray(image).clip(0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        return ground.convert("RGB")
    return image.convert("RGB")


def field_text(value: object, name: str = "caption") -> str:
    """The caption (or what `name` says) in a metadata field, without the space around it.

    It is a text, or the first of a list of texts; null and an empty list give the empty text, which the data sets
    skip.

    Raises:
        CaptionError: the value is not text.
    """
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CaptionError(f"the {name} is not text but {json.dumps(value, ensure_ascii=False)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CaptionError(f"the {name} is not valid Unicode") from None
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
    places = np.array([fraction_of(key) for key in keys], dtype=np.float64)
    is_val = places < val_fraction
    if 0 < val_fraction < 1 and len(keys) > 0 and places.min() < places.max():
        is_val |= places == places.min()
        is_val &= places != places.max()
    return np.flatnonzero(is_val == (split == "val")).tolist()


class CaptionedImages(Dataset["ImageSample | Skipped"], ABC):
    """Images with captions, by index; what the folder and the shards have in common.

    `dataset[i]` is an `ImageSample` with a image uint8 `(3, image_size, image_size)`, or a `Skipped`.

    Args:
        image_size: edge of the square images.
        min_size: images whose shorter edge has fewer pixels are skipped.
        style_patterns: how captions name the style (`StylePatterns`); none leaves captions alone.

    Raises:
        UserError: a pattern is unusable.
    """

    def __init__(self, image_size: int, min_size: int, style_patterns: Sequence[str]) -> None:
        self.image_size = image_size
        self.min_size = min_size
        self._patterns = StylePatterns(style_patterns)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, index: int) -> str:
        """The sample's name within the data set."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the settings, and the names, sizes and times of the files: another one where samples changed.

        Reads no images. See `fingerprint.py`.
        """

    @abstractmethod
    def _caption(self, index: int) -> str:
        """The caption, maybe empty, or a SampleError."""

    @abstractmethod
    def _style(self, index: int) -> str:
        """The name of the style, maybe empty, or a SampleError."""

    @abstractmethod
    def _image(self, index: int) -> Path | BinaryIO:
        """Where to read the image, or a SampleError."""

    def _settings(self) -> tuple[object, ...]:
        """What changes a sample besides its files."""
        return self.image_size, self.min_size, self._patterns.patterns

    def text(self, index: int) -> str:
        """The caption, with its style if there are patterns; empty where the sample lacks one of them."""
        try:
            return self._text(index)
        except SampleError:
            return ""

    def texts(self) -> list[str]:
        """All captions, in the order of the samples."""
        return [self.text(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        index = range(len(self))[index]
        try:
            text = self._text(index)
            pixels = load_image(self._image(index), self.image_size, self.min_size)
            return ImageSample(self.key(index), pixels, text)
        except SampleError as error:
            return Skipped(self.key(index), str(error))

    def _text(self, index: int) -> str:
        """The whole caption, or a SampleError."""
        caption = self._caption(index)
        if not caption:
            raise CaptionError("the caption is empty")
        if not self._patterns:
            return caption
        style = self._style(index)
        if not style:
            raise CaptionError("the style is empty")
        return self._patterns.apply(caption, style, self.key(index))


def find_images(root: Path) -> Iterator[Path]:
    """All image files below a folder, hidden ones left out, in a fixed order.

    Links to folders are followed, but not to one that the link itself is in.

    Raises:
        UserError: a folder cannot be read.
    """
    above = {os.fspath(root): {_identity(root)}}  # a folder → itself and the folders on the way to it
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        way = above.pop(folder)
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if not name.startswith(".") and name != _OF_THE_SYSTEM and (place := _identity(path)) not in way:
                kept.append(name)
                above[path] = {*way, place}
        folders[:] = kept
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(_ENDINGS):
                yield Path(folder, name)


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """What tells a folder from all others, whatever link leads to it; None where it cannot be looked at."""
    try:
        found = os.stat(folder)
    except OSError:  # named when it is walked into
        return None
    return found.st_dev, found.st_ino


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} {cannot_be_read(error)}; make it readable, or move it away") from None
