"""Completion: codes of an image that are given, and codes that are generated.

Shapes: P images, y x grid, Y X pixels. A mask of a grid is True where codes are generated.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cogview_pl.data.decoding.decode import SampleError, load_image
from cogview_pl.errors import UserError
from cogview_pl.generation.config import Algorithm, CompletionConfig, Sampling
from cogview_pl.generation.decode import TO_SAMPLE

_KEEP = re.compile(r"(top|bottom|left|right|border):(\d+|\d*\.\d+)")
_WHITE = 128  # grey values from here on are white
_GREY = 160  # stands for what is not given in shown images


def mask_of(options: CompletionConfig, grid: tuple[int, int], edge: int) -> Tensor:
    """The mask `(y, x)` that the options describe, for images of `edge` pixels.

    Raises:
        UserError: neither or both keys are set, they cannot be read, or all codes or none are generated.
    """
    if options.keep is not None and options.mask is not None:
        raise UserError(
            f"complete.keep={options.keep} and complete.mask={options.mask} are both given; drop one of them"
        )
    if options.keep is not None:
        return _outside(options.keep, grid)
    if options.mask is None:
        raise UserError("complete: nothing is kept; set complete.keep=top:0.5 or complete.mask=FILE")
    return _painted(options.mask, grid, edge)


def known_codes(codes: Tensor, mask: Tensor) -> Tensor:
    """Codes int64 `(P, y, x)` with `TO_SAMPLE` where the mask is True."""
    return codes.masked_fill(mask, TO_SAMPLE)


def num_given_first(mask: Tensor) -> int:
    """Number of codes before the first one that is generated, in raster order."""
    return int(mask.flatten().int().argmax())


def is_prefix(mask: Tensor) -> bool:
    """Whether all given codes come before all generated ones in raster order."""
    return bool(mask.flatten()[num_given_first(mask) :].all())


def check_algorithm(mask: Tensor, sampling: Sampling) -> None:
    """Raises UserError for jacobi where given codes follow generated ones."""
    if sampling.algorithm == Algorithm.jacobi and not is_prefix(mask):
        raise UserError(
            "sampler.algorithm=jacobi drafts codes in raster order, and here given codes follow generated ones; set "
            "sampler.algorithm=sequential, or keep the top"
        )


def without_the_rest(image: Tensor, mask: Tensor) -> Tensor:
    """An image uint8 `(3, Y, X)` with grey where the mask is True."""
    y, x = (pixels // codes for pixels, codes in zip(image.shape[1:], mask.shape, strict=True))
    return image.masked_fill(mask.repeat_interleave(y, 0).repeat_interleave(x, 1), _GREY)


def _outside(keep: str, grid: tuple[int, int]) -> Tensor:
    """The mask of all codes but those at a side, such as `top:0.5`."""
    found = _KEEP.fullmatch(keep)
    if found is None:
        raise UserError(
            f"complete.keep={keep} must be top, bottom, left, right or border, and its share of the edge, such as "
            "top:0.5"
        )
    side, share = found[1], float(found[2])
    mask = torch.ones(grid, dtype=torch.bool)
    for of, axis, at_start in (("top", 0, True), ("bottom", 0, False), ("left", 1, True), ("right", 1, False)):
        if side not in (of, "border"):
            continue
        count = round(share * grid[axis])
        most = (grid[axis] - 1) // (2 if side == "border" else 1)
        if not 0 < count <= most:
            raise UserError(
                f"complete.keep={keep} keeps {count} of {grid[axis]} codes along an edge; give a share that keeps from "
                f"1 to {most}"
            )
        mask.narrow(axis, 0 if at_start else grid[axis] - count, count).fill_(False)
    return mask


def _painted(file: str, grid: tuple[int, int], edge: int) -> Tensor:
    """The mask of all codes with a white pixel in an image file of the images' size, or with one pixel per code."""
    try:
        load_image(file, edge)  # here, because it refuses what is no image, or too large to decode
        with Image.open(Path(file)) as image:
            width, height = image.size
        if (height, width) not in ((edge, edge), grid):
            raise UserError(
                f"complete.mask={file} has {width}x{height} pixels; make it {edge}x{edge}, as the images of the model "
                f"are, or {grid[1]}x{grid[0]}, a pixel for each code"
            )
        white = load_image(file, width).float().mean(0) >= _WHITE
    except (SampleError, OSError) as error:
        raise UserError(
            f"complete.mask={file}: {error}; give an image, white where pixels are to be generated"
        ) from None
    y, x = (pixels // codes for pixels, codes in zip(white.shape, grid, strict=True))
    mask = white.view(grid[0], y, grid[1], x).any(3).any(1)
    if not mask.any():
        raise UserError(f"complete.mask={file} has no white pixels; paint white what is to be generated")
    if mask.all():
        raise UserError(
            f"complete.mask={file} leaves no code as it is; paint black what is to be kept, or leave complete.mask out"
        )
    return mask
