"""Decoding: an image file becomes uint8 pixels of a given size."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cogview_pl.data.config import Crop, Decoding
from cogview_pl.data.decoding.colour import to_srgb
from cogview_pl.data.decoding.formats import HEAD, JXL, formats_of
from cogview_pl.data.decoding.jxl_size import jxl_size
from cogview_pl.data.decoding.missing_end import REMARK, with_end
from cogview_pl.data.samples import fraction_of
from cogview_pl.durable.read import MAX_IMAGE, UnreadableError, cannot_be_read, require_file

LONGEST_SHAPE = 32
"""Largest ratio of the edges of an image: it limits the size of the resized image before the crop."""

REDUCED_PIXELS = 4
"""A JPEG may have this many times `data.max_pixels`, because it is decoded at a fraction of its size."""

_SCALES = (8, 4, 2)  # at which the JPEG library decodes
_LEAST_DETAIL = 1.25  # pixels of a reduced JPEG per pixel of the result, along an edge

_WHITE = 255
_MIRRORED = 0.5  # share of the views with `flip`
_WHOLE = 0.5  # share of the views that show all of the image with `zoom`
_CODE = 16  # the most pixels along an edge that an image tokenizer has per code

_OPENING = threading.Lock()  # Pillow's own limit of pixels is a global variable


class SampleError(ValueError):
    """A sample cannot be used; the text is the reason, in one line."""


class ImageError(SampleError):
    """An image cannot be decoded."""


class _TooLargeError(ImageError):
    """An image has more pixels than may be decoded."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(f"{width}x{height} pixels")


class Decoded(NamedTuple):
    """A decoded image."""

    pixels: torch.Tensor
    """uint8 `(3, size, size)`, 0 black … 255 white."""
    remark: str
    """What was mended while the image was decoded; empty: nothing."""


class _Upright(NamedTuple):
    """An image before it becomes a square."""

    image: Image.Image
    """In sRGB, maybe decoded reduced."""
    remark: str
    edge: int
    """Edge in pixels to which it is to be resized: that of the square, or more if the view is a part of it."""
    crop: Crop
    """A part is cut out, never padded."""


def load_image(file: str | Path | BinaryIO, size: int, min_size: int = 0) -> torch.Tensor:
    """The pixels of `decode_image` with the usual options: uint8 `(3, size, size)`; raises its ImageError."""
    return decode_image(file, size, min_size).pixels


def decode_image(
    file: str | Path | BinaryIO, size: int, min_size: int = 0, options: Decoding | None = None, view: str = ""
) -> Decoded:
    """Decode an image to uint8 `(3, size, size)`, 0 black … 255 white.

    The orientation in the EXIF data is applied, colour profiles are converted to sRGB, transparent pixels are put on
    white, and grey, 16-bit, palette and CMYK images become RGB. Of an animation the first frame is read. The shorter
    edge is resized to `size` (bicubic, antialiased) and the longer one cropped; or, with `Crop.pad`, the longer edge is
    resized and the shorter one padded with white. With `Decoding.zoom` half of the views show a part, enlarged.

    Args:
        file: the image.
        size: edge of the result in pixels.
        min_size: smallest shorter edge of the image.
        options: limit of pixels, crop, zoom and flip; None: the defaults, which no key changes.
        view: names the image and its view; random crops, zooms and flips follow from it.

    Raises:
        ImageError: the file is missing, unreadable, no regular file, larger than `MAX_IMAGE`, damaged or no image; it
            has too many pixels to decode, its shorter edge has fewer than `min_size`, or its format needs a package
            that is not installed.
    """
    used = options or Decoding()
    try:
        if isinstance(file, (str, Path)):
            require_file(file, MAX_IMAGE)
            with open(file, "rb") as stream:
                return _decode(stream, size, min_size, used, view)
        return _decode(file, size, min_size, used, view)
    except _TooLargeError as error:
        limit = f"data.max_pixels={used.max_pixels} allows to decode; make the image smaller, or raise the limit"
        if options is None:
            limit = f"the {used.max_pixels:,} that are decoded; make the image smaller"
        raise ImageError(f"{error} are more than {limit}") from None
    except ImageError:
        raise
    except UnreadableError as error:
        raise ImageError("file not found" if error.missing else str(error)) from None
    except UnidentifiedImageError:
        raise ImageError("not an image in a known format, or cut off") from None
    except Exception as error:  # damaged bytes make Pillow's readers raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(cannot_be_read(error)) from error
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _decode(stream: BinaryIO, size: int, min_size: int, options: Decoding, view: str) -> Decoded:
    try:
        image, remark, edge, crop = _upright(stream, size, min_size, options, view)
    except ImageError:
        raise
    except Exception:  # damaged bytes make Pillow's readers raise nearly anything
        stream.seek(0)
        whole = with_end(stream.read(MAX_IMAGE))
        if whole is None:
            raise
        image, _, edge, crop = _upright(io.BytesIO(whole), size, min_size, options, view)
        remark = REMARK
    width, height = _fit(image.width, image.height, edge, crop)
    pixels = tv.resize(
        tv.pil_to_tensor(image), [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    pixels = _square(pixels, size, options, view) if edge == size else _part(pixels, size, options, view)
    if options.flip and fraction_of(f"flip {options.view_seed} {view}") < _MIRRORED:
        pixels = pixels.flip(-1)
    return Decoded(pixels.contiguous(), remark)


def _upright(stream: BinaryIO, size: int, min_size: int, options: Decoding, view: str) -> _Upright:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on odd metadata of images that can be read
        with _opened(stream, options.max_pixels) as image:
            if max(image.size) > LONGEST_SHAPE * min(image.size):
                raise ImageError(f"{image.width}x{image.height} is too elongated for a square crop")
            if min(image.size) < min_size:
                raise ImageError(f"{image.width}x{image.height} is smaller than data.min_size={min_size}")
            if image.format == "PNG":
                _verify_png(stream)
            edge = _edge(size, min(image.size), options, view)
            crop = options.crop if edge == size else Crop.random
            ready = _decode_smaller(image, _fit(image.width, image.height, edge, crop), options.max_pixels)
            ImageOps.exif_transpose(ready, in_place=True)
            return _Upright(*to_srgb(ready), edge, crop)


def _opened(stream: BinaryIO, max_pixels: int) -> Image.Image:
    """The image with its header read, without Pillow's limit of pixels: `_decode_smaller` has ours.

    Raises:
        ImageError: opening would decode more than `max_pixels`.
        FormatMissingError: see `formats_of`.
    """
    stream.seek(0)
    formats = formats_of(stream.read(HEAD))
    if formats == (JXL.name,):
        width, height = jxl_size(stream)
        if width * height > max_pixels:
            raise _TooLargeError(width, height)
    stream.seek(0)
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _verify_png(stream: BinaryIO) -> None:
    """Compare the checksums of a PNG; decoding stops at the last pixel, before the last checksum."""
    place = stream.tell()
    with _opened(stream, max_pixels=0) as image:  # checksums are compared without decoding
        image.verify()
    stream.seek(place)


def _decode_smaller(image: Image.Image, fit: tuple[int, int], max_pixels: int) -> Image.Image:
    """Decode a JPEG at 1/8, 1/4 or 1/2 where enough detail is left; other images stay as they are.

    Args:
        image: opened, not decoded.
        fit: width and height to which the image is resized later.
        max_pixels: largest number of pixels to decode.

    Raises:
        ImageError: there are more pixels.
    """
    width, height = image.size
    is_jpeg = image.format in ("JPEG", "MPO")
    if width * height > max_pixels * (REDUCED_PIXELS if is_jpeg else 1):
        raise _TooLargeError(width, height)
    scale = _scale(width, height, fit) if is_jpeg else 1
    if scale > 1:
        image.draft(None, (width // scale, height // scale))
    if image.width * image.height > max_pixels:
        raise _TooLargeError(image.width, image.height)
    if width % scale == height % scale == 0:
        return image
    # The library rounds edges up. Only the part that the whole image covers is resized.
    covered = (0, 0, width / scale, height / scale)
    return image.resize(fit, Image.Resampling.BICUBIC, covered)


def _scale(width: int, height: int, fit: tuple[int, int]) -> int:
    """The largest scale that leaves twice the pixels, best without rounding edges, else one that leaves enough."""
    scales = [scale for scale in _SCALES if min(width, height) >= scale * _LEAST_DETAIL * min(fit)]
    ample = [scale for scale in scales if min(width, height) >= scale * 2 * min(fit)]
    exact = [scale for scale in ample if width % scale == height % scale == 0]
    return next(iter(exact or ample or scales), 1)


def _fit(width: int, height: int, size: int, crop: Crop) -> tuple[int, int]:
    """Width and height of the resized image, before it is cropped or padded."""
    edge = max(width, height) if crop == Crop.pad else min(width, height)
    return max(1, int(size * width / edge)), max(1, int(size * height / edge))


def _edge(size: int, shorter: int, options: Decoding, view: str) -> int:
    """Pixels to which the shorter edge is resized: `size`, or more for half of the views with `options.zoom`."""
    if options.zoom == 1 or fraction_of(f"zoom {options.view_seed} {view}") < _WHOLE:
        return size
    return max(size, min(shorter, round(size * options.zoom)))


def _square(pixels: torch.Tensor, size: int, options: Decoding, view: str) -> torch.Tensor:
    """uint8 `(3, Y, X)`, one edge of which has `size` pixels, to `(3, size, size)`."""
    down, right = pixels.shape[-2] - size, pixels.shape[-1] - size
    if options.crop == Crop.pad:
        above, left = -down // 2, -right // 2
        return tv.pad(pixels, [left, above, -right - left, -down - above], fill=_WHITE)
    if options.crop == Crop.random:
        place = fraction_of(f"crop {options.view_seed} {view}")
        return tv.crop(pixels, int(place * (down + 1)), int(place * (right + 1)), size, size)
    return tv.center_crop(pixels, [size, size])


def _part(pixels: torch.Tensor, size: int, options: Decoding, view: str) -> torch.Tensor:
    """A random part `(3, size, size)` of uint8 `(3, Y, X)`, cut along the grid of codes of the whole."""
    names = (f"crop {way} {options.view_seed} {view}" for way in ("down", "right"))
    places = [
        _CODE * int(fraction_of(name) * ((edge - size) // _CODE + 1))
        for name, edge in zip(names, pixels.shape[-2:], strict=True)
    ]
    return tv.crop(pixels, places[0], places[1], size, size)
