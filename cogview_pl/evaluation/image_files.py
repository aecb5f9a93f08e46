"""Image files as a data set, and the blur of FID-k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cogview_pl.data.decoding.decode import SampleError, load_image
from cogview_pl.data.samples import ImageSample, Skipped


class ImageFiles(Dataset["ImageSample | Skipped"]):
    """Image files and their prompts (or empty texts), read at one size.

    The key of a sample is its file. A file that cannot be read becomes a `Skipped`.
    """

    def __init__(self, files: Sequence[Path], prompts: Sequence[str], size: int) -> None:
        self.files = list(files)
        self.prompts = list(prompts)
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        file = self.files[index]
        try:
            return ImageSample(str(file), load_image(file, self.size), self.prompts[index])
        except SampleError as error:
            return Skipped(str(file), str(error))

    def text(self, index: int) -> str:
        """The prompt of an image, without reading the image."""
        return self.prompts[index]


def blur(images: Tensor, radius: float) -> Tensor:
    """Gaussian blur of float images `(B, 3, Y, X)`; the radius is the standard deviation in pixels, 0 for no blur.

    Near the border the weights of pixels inside the image are normalised.
    """
    if radius == 0:
        return images
    rows, columns = (_weights(edge, radius, images) for edge in images.shape[-2:])
    return rows @ images @ columns.T


def _weights(edge: int, radius: float, like: Tensor) -> Tensor:
    steps = torch.arange(edge, dtype=like.dtype, device=like.device)
    weights = torch.exp(-((steps[:, None] - steps) ** 2) / (2 * radius**2))
    return weights / weights.sum(1, keepdim=True)
