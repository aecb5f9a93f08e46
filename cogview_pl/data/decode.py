"""Decoding: an image file becomes uint8 pixels of a given size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cogview_pl.durable.read import MAX_IMAGE, UnreadableError, cannot_be_read, require_file

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

# Raster formats only: Pillow's EPS reader, for example, would start another program on a file from a stranger.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

LONGEST_SHAPE = 32
"""Largest ratio of the edges of an image: it limits the size of the resized image before the crop."""


class SampleError(ValueError):
    """A sample cannot be used; the text is the reason, in one line."""


class ImageError(SampleError):
    """An image cannot be decoded."""


def load_image(file: str | Path | BinaryIO, size: int, min_size: int = 0) -> torch.Tensor:
    """Decode an image to uint8 `(3, size, size)`, 0 black … 255 white.

    The orientation in the EXIF data is applied, transparent pixels are put on white, and grey, 16-bit, palette and
    CMYK images become RGB. Of an animation the first frame is read. The shorter edge is resized to `size` (bicubic,
    antialiased), then the centre is cropped.

    Raises:
        ImageError: the file is missing, unreadable, no regular file, larger than `MAX_IMAGE`, damaged or no image; it
            has more pixels than Pillow considers safe, or its shorter edge has fewer than `min_size`.
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
        raise ImageError("not an image in a known format, or cut off") from None
    except Exception as error:  # damaged bytes make Pillow's readers raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(cannot_be_read(error)) from error
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error
    pixels = tv.resize(pixels, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return tv.center_crop(pixels, [size, size]).contiguous()


def _verify_png(file: str | Path | BinaryIO) -> None:
    """Compare the checksums of a PNG; decoding stops at the last pixel, before the last checksum."""
    place = None if isinstance(file, (str, Path)) else file.tell()
    if place is not None:
        file.seek(0)  # type: ignore[union-attr]
    with Image.open(file, formats=["PNG"]) as image:
        image.verify()
    if place is not None:
        file.seek(place)  # type: ignore[union-attr]


def _decode_smaller(image: Image.Image, shorter: int) -> None:
    """Decode a JPEG at 1/8, 1/4 or 1/2, several times faster, if the shorter edge keeps `shorter` pixels.

    The scale must divide both edges: otherwise the reduced image covers a slightly different area.
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
