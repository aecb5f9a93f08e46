"""Images that a Python user gives: paths, or images in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from cogview_pl.assembly.checks_in_python import home
from cogview_pl.data.decoding.decode import SampleError, load_image
from cogview_pl.errors import UserError

AnyImage = str | Path | Image.Image
"""The path of an image file, or an image."""


def several(images: AnyImage | Sequence[AnyImage]) -> bool:
    """Whether it is a sequence of images."""
    return not isinstance(images, (str, Path, Image.Image))


def pixels_of(images: AnyImage | Sequence[AnyImage], size: int) -> list[Tensor]:
    """Images, resized and cropped, uint8 `(3, size, size)`; raises UserError for an unreadable one, or none."""
    given: list[AnyImage] = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    if not given:
        raise UserError("images: there are none; give one at least")
    return [_pixels(image, size) for image in given]


def _pixels(image: AnyImage, size: int) -> Tensor:
    """uint8 `(3, size, size)`; an image in memory is read as its PNG file would be."""
    try:
        if isinstance(image, Image.Image):
            stream = io.BytesIO()
            image.save(stream, "PNG")
            stream.seek(0)
            return load_image(stream, size)
        return load_image(home(image), size)
    except SampleError as error:
        name = "an image in memory" if isinstance(image, Image.Image) else str(image)
        raise UserError(f"images: {name}: {error}; give images that can be read") from None
