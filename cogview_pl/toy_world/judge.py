"""Detects toy objects and their attributes in images, and scores images against their prompts.

The judge finds blobs that differ from the background, fits rendered templates to each (shape, radius, sub-pixel offset,
sharpness) and names the colour of the core of the fitted shape. It works at 64 pixels; other images are resampled.

Shapes: B images, N objects in them, K objects of one image, Y X pixels, P pixels of a patch, T templates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.toy_world.captions import parse_caption
from cogview_pl.toy_world.render import PALETTE, SHAPE_DISTANCES
from cogview_pl.toy_world.scene import COLOURS, PLACES, SHAPES, ObjectSpec, cell_centre

_EDGE = 64  # edge of the images that the judge works on: all numbers of pixels below refer to it
_HALF = 13  # a patch is 27 pixels wide, room for the largest object
_PATCH = 2 * _HALF + 1
_CHUNK = 128

# Distance from the colour of the background (RGB in 0 … 1, Euclidean): background below, an object above.
_FOREGROUND = (0.14, 0.30)
_BLOB_SIGMA = 3.5  # blobs are the maxima of the foreground smoothed this much …
_BLOB_REACH = 9  # … that no pixel within this distance exceeds …
_BLOB_MASS = 0.13  # … and that exceed this value: about a quarter of the smallest object
_BLOB_RADIUS = 17
_MOST_BLOBS = 12

_RADII = np.linspace(0.085, 0.165, 9)
_OFFSETS = (-0.75, -0.25, 0.25, 0.75)
_BLURS = (0.5, 1.1, 1.8)
_HIGHEST_LEVEL = 1.7  # relative to the object's median contrast: dark outlines would outweigh the fill
# Share of a colour of the palette when blur or hatching mixes it with the background; it may exceed 1.
_MIXTURE = (0.45, 1.15)
_DARKENING = (0.0, 0.15, 0.3)  # share of an outline or a shadow that may be mixed in
_COLOURLESS = 0.01  # the squared chroma at which pixels begin to count as coloured
_SIZE_BORDER = 0.13  # of the fitted radius; outlines make small objects look a little larger


class Detected(NamedTuple):
    """An object found in an image; `(x, y)` its centroid as fractions of the edge, `confidence` in -1 … 1.

    `confidence` is the correlation with the best fitting template; rendered scenes reach 0.9.
    """

    colour: str
    shape: str
    size: str
    place: str
    x: float
    y: float
    confidence: float

    @property
    def spec(self) -> ObjectSpec:
        """The four attributes alone."""
        return ObjectSpec(self.colour, self.shape, self.size, self.place)


@dataclass(frozen=True)
class ToyScore:
    """Agreement of images with their prompts; see `score_detected` for the definitions."""

    colour_accuracy: float
    shape_accuracy: float
    place_accuracy: float
    size_accuracy: float
    all_right: float
    count: int


class Judge:
    """Finds the objects of square images with an edge of `resolution` pixels."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self._templates = _Templates()
        dark = torch.tensor(PALETTE["black"]) / 255
        pure_C3 = torch.tensor([PALETTE[colour] for colour in COLOURS]) / 255
        self._palette_C3 = torch.cat([pure_C3 + share * (dark - pure_C3) for share in _DARKENING])

    def __call__(self, images: Tensor | NDArray[Any]) -> list[list[Detected]]:
        """The objects of each image of `(B, 3, Y, X)`, uint8 or float in 0 … 1 (clipped), any device.

        Raises ValueError for another shape.
        """
        images = torch.as_tensor(images)
        edge = self.resolution
        if images.shape[1:] != (3, edge, edge):
            raise ValueError(f"images: found shape {tuple(images.shape)}, expected (B, 3, {edge}, {edge})")
        if len(images) == 0:
            return []
        return [found for chunk in images.split(_CHUNK) for found in self._judge(_prepared(chunk))]

    def _judge(self, images_B3YX: Tensor) -> list[list[Detected]]:
        background_B3 = images_B3YX.flatten(2).median(dim=2).values
        difference_B3YX = _smooth(images_B3YX - background_B3[:, :, None, None], 0.6)
        contrast_BYX = (difference_B3YX**2).sum(1).sqrt()
        low, high = _FOREGROUND
        foreground_BYX = ((contrast_BYX - low) / (high - low)).clamp(0, 1)
        found: list[list[Detected]] = [[] for _ in images_B3YX]
        image_N, owned_NYX = _blobs(foreground_BYX)
        if len(image_N) == 0:
            return found

        foreground_NYX = foreground_BYX[image_N] * owned_NYX
        centroid_N2 = _centroids(foreground_NYX)
        middle_N2 = centroid_N2.round().long()
        contrast_NP = _patches((contrast_BYX[image_N] * owned_NYX)[:, None], middle_N2)[:, 0]
        foreground_NP = _patches(foreground_NYX[:, None], middle_N2)[:, 0]
        template_N, confidence_N = self._templates.fit(_levelled(contrast_NP, foreground_NP))
        pixels_N3P = _patches(images_B3YX[image_N], middle_N2)
        colour_N = self._colours(pixels_N3P, self._templates.core_TP[template_N], background_B3[image_N])

        centre_N2 = (centroid_N2 + 0.5) / _EDGE
        for n, b in enumerate(image_N.tolist()):
            shape, radius = self._templates.names[template_N[n]]
            size = "big" if radius > _SIZE_BORDER else "small"
            y, x = centre_N2[n].tolist()
            confidence = confidence_N[n].item()
            found[b].append(Detected(COLOURS[colour_N[n]], shape, size, _cell(x, y), x, y, confidence))
        return found

    def _colours(self, pixels_N3P: Tensor, core_NP: Tensor, background_N3: Tensor) -> Tensor:
        """The palette entry whose mixture with the background, darkened or not, is nearest to the core."""
        # Saturated pixels count most: outlines and highlights have little colour.
        chroma_NP = pixels_N3P.amax(1) - pixels_N3P.amin(1)
        weight_NP = core_NP * (chroma_NP**2 + _COLOURLESS)
        colour_N3 = (pixels_N3P * weight_NP[:, None]).sum(2) / weight_NP.sum(1, keepdim=True)
        seen_N13 = (colour_N3 - background_N3)[:, None]
        pure_NC3 = self._palette_C3 - background_N3[:, None]
        share_NC1 = (seen_N13 * pure_NC3).sum(2, keepdim=True) / (pure_NC3**2).sum(2, keepdim=True)
        return (seen_N13 - share_NC1.clamp(*_MIXTURE) * pure_NC3).norm(dim=2).argmin(1) % len(COLOURS)


class _Templates:
    """Rendered shapes, centred on their centroids, in all radii, offsets and blurs of the search."""

    def __init__(self) -> None:
        variants = list(itertools.product(SHAPES, _RADII, itertools.product(_OFFSETS, _OFFSETS)))
        distance_TP = np.stack([_distance_patch(*variant).ravel() for variant in variants])
        distances = torch.from_numpy(distance_TP).float()
        sharp = (0.5 - distances).clamp(0, 1).view(-1, _PATCH, _PATCH)
        # Blurred coverage; the first blur is that of the smoothed image itself.
        blurred = torch.cat([_smooth(sharp, sigma).flatten(1) for sigma in _BLURS])
        self._normal_TP = F.normalize(blurred - blurred.mean(1, keepdim=True), dim=1)
        self.core_TP = (-distances - 0.3).clamp(0, 1).repeat(len(_BLURS), 1)
        self.names = [(shape, float(radius)) for shape, radius, _ in variants] * len(_BLURS)

    def fit(self, alpha_NP: Tensor) -> tuple[Tensor, Tensor]:
        """The best template for each patch, and its correlation."""
        centred_NP = F.normalize(alpha_NP - alpha_NP.mean(1, keepdim=True), dim=1)
        confidence_N, template_N = (centred_NP @ self._normal_TP.T).max(dim=1)
        return template_N, confidence_N


def _distance_patch(shape: str, radius: float, offset: tuple[float, float]) -> NDArray[np.floating[Any]]:
    """Signed distance in pixels of a shape whose centroid lies `offset` from the patch's middle."""
    grid = np.arange(-_HALF, _HALF + 1) / (radius * _EDGE)
    offset_y, offset_x = (value / (radius * _EDGE) for value in offset)
    columns, rows = grid[None, :] - offset_x, grid[:, None] - offset_y + _centroid_y(shape)
    return SHAPE_DISTANCES[shape](columns, rows) * radius * _EDGE


@cache
def _centroid_y(shape: str) -> float:
    """Distance from the origin of a shape down to its centroid, in radii; in x, all shapes are symmetric."""
    fine = np.linspace(-1.2, 1.2, 121)
    inside = SHAPE_DISTANCES[shape](fine[None, :], fine[:, None]) < 0
    return float((inside.sum(1) * fine).sum() / inside.sum())


def _prepared(images: Tensor) -> Tensor:
    """Float in 0 … 1 on the CPU, at the judge's resolution."""
    floats = images.cpu().float() / 255 if images.dtype == torch.uint8 else images.detach().cpu().float()
    if images.shape[-1] != _EDGE:
        floats = F.interpolate(floats, (_EDGE, _EDGE), mode="bilinear", antialias=True)
    return floats.clamp(0, 1)


def _smooth(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `(…, E, E)`; near the border, the mean of what lies inside."""
    steps = torch.arange(images.shape[-1], dtype=images.dtype)
    weights = torch.exp(-((steps[:, None] - steps) ** 2) / (2 * sigma**2))
    weights = weights / weights.sum(1, keepdim=True)
    return weights @ images @ weights.T


def _highest_around(images_BYX: Tensor, reach: int) -> Tensor:
    """The maximum over a square with `reach` pixels on each side; one axis at a time is much faster."""
    columns = F.max_pool2d(images_BYX, (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    return F.max_pool2d(columns, (1, 2 * reach + 1), stride=1, padding=(0, reach))


def _blobs(foreground_BYX: Tensor) -> tuple[Tensor, Tensor]:
    """The image of each blob `(N,)`, and the pixels that are nearest to it `(N, Y, X)`."""
    density_BYX = _smooth(foreground_BYX, _BLOB_SIGMA)
    # A symmetric blob has several equal maxima; a slope below the resolution of float32 selects one.
    tilted_BYX = density_BYX.double() + torch.arange(_EDGE**2).view(_EDGE, _EDGE) * 1e-9
    peak_BYX = (tilted_BYX == _highest_around(tilted_BYX, _BLOB_REACH)) & (density_BYX > _BLOB_MASS)
    rank_BK, place_BK = torch.where(peak_BYX, density_BYX, 0).flatten(1).topk(_MOST_BLOBS)
    most = max(1, int((rank_BK > 0).sum(1).max()))
    rank_BK, place_BK = rank_BK[:, :most], place_BK[:, :most]
    rows = torch.arange(_EDGE).view(1, 1, -1, 1)
    columns = torch.arange(_EDGE).view(1, 1, 1, -1)
    peak_y, peak_x = (place_BK // _EDGE)[..., None, None], (place_BK % _EDGE)[..., None, None]
    distance_BKYX = (rows - peak_y) ** 2 + (columns - peak_x) ** 2
    distance_BKYX = torch.where(rank_BK[..., None, None] > 0, distance_BKYX, 4 * _EDGE**2)
    image_N, blob_N = torch.nonzero(rank_BK > 0, as_tuple=True)
    nearest_BYX, owner_BYX = distance_BKYX.min(dim=1)
    owner_BYX = torch.where(nearest_BYX <= _BLOB_RADIUS**2, owner_BYX, -1)
    return image_N, owner_BYX[image_N] == blob_N[:, None, None]


def _centroids(weight_NYX: Tensor) -> Tensor:
    """`(N, 2)` centroids (y, x) in pixels."""
    axis = torch.arange(_EDGE, dtype=weight_NYX.dtype)
    moments_N2 = torch.stack([weight_NYX.sum(2) @ axis, weight_NYX.sum(1) @ axis], dim=1)
    return moments_N2 / weight_NYX.sum((1, 2)).unsqueeze(1)


def _patches(images_NCYX: Tensor, middle_N2: Tensor) -> Tensor:
    """`(N, C, P)`: the patches around given pixels, zero outside the image."""
    padded = F.pad(images_NCYX, (_HALF,) * 4)
    steps = torch.arange(_PATCH)
    rows_NP1 = (middle_N2[:, :1] + steps)[:, :, None]
    columns_N1P = (middle_N2[:, 1:] + steps)[:, None, :]
    index_NP = (rows_NP1 * padded.shape[-1] + columns_N1P).flatten(1)
    return padded.flatten(2).gather(2, index_NP[:, None].expand(-1, padded.shape[1], -1))


def _levelled(contrast_NP: Tensor, foreground_NP: Tensor) -> Tensor:
    """Contrast relative to the median contrast of the more solid half of the object."""
    solid_NP = foreground_NP > 0.5 * foreground_NP.amax(1, keepdim=True)
    level_N1 = torch.where(solid_NP, contrast_NP, torch.nan).nanmedian(dim=1, keepdim=True).values
    return (contrast_NP / level_N1).clamp(max=_HIGHEST_LEVEL)


def _cell(x: float, y: float) -> str:
    column, row = int(3 * x), int(3 * y)  # centroids of pixels: below 1
    return PLACES[3 * row + column]


def score_detected(found: Sequence[Sequence[Detected]], prompts: Sequence[str]) -> ToyScore:
    """Compare the detected objects of images with the objects that their prompts name.

    Each named object is compared with the detected object of highest confidence in its cell. If the cell is empty, the
    place is wrong, and colour, shape and size are compared with the nearest object that is in no named cell and was not
    compared before; without such an object they are wrong too. The accuracies are shares of all named objects
    (`count`); `all_right` is the share of images that show every named object with all four attributes, and no others.

    Raises UserError if a prompt names no object, ValueError if there are not as many images as prompts.
    """
    right = np.zeros(len(ObjectSpec._fields))
    count = perfect = 0
    for detected, prompt in zip(found, prompts, strict=True):
        named = parse_caption(prompt)
        agreeing = agreement(named, detected)
        right += agreeing.sum(0)
        count += len(named)
        perfect += bool(agreeing.all()) and len(detected) == len(named)
    if count == 0:
        raise UserError("score: found no images; give at least one image and its prompt")
    colour, shape, size, place = (right / count).tolist()
    return ToyScore(colour, shape, place, size, perfect / len(prompts), count)


def agreement(named: Sequence[ObjectSpec], detected: Sequence[Detected]) -> NDArray[np.bool_]:
    """Whether each attribute of each named object is right, bool `(K, 4)`, by the rules of `score_detected`."""
    return np.array([_agreement(spec, judged) for spec, judged in _matched(named, detected)])


def score(images: Tensor | NDArray[Any], prompts: Sequence[str]) -> ToyScore:
    """Judge images `(B, 3, Y, X)`, uint8 or float in 0 … 1, against prompts; see `score_detected`."""
    return score_detected(Judge(images.shape[-1])(images), prompts)


def score_captions(found: Sequence[str], truth: Sequence[str]) -> ToyScore:
    """Compare the objects in captions with those in the true captions, by the rules of `score_detected`."""
    named = [
        [Detected(*spec, *cell_centre(spec.place), confidence=1.0) for spec in _parse_leniently(caption)]
        for caption in found
    ]
    return score_detected(named, truth)


def _parse_leniently(text: str) -> tuple[ObjectSpec, ...]:
    """The objects of a caption; none if it cannot be parsed, so that all of it counts as wrong."""
    try:
        return parse_caption(text)
    except UserError:
        return ()


def _agreement(spec: ObjectSpec, judged: Detected | None) -> list[bool]:
    if judged is None:
        return [False] * len(spec)
    return [named == seen for named, seen in zip(spec, judged.spec, strict=True)]


def _matched(named: Sequence[ObjectSpec], detected: Sequence[Detected]) -> Iterator[tuple[ObjectSpec, Detected | None]]:
    """Each named object with the detected object to compare it with."""
    claimed = {spec.place for spec in named}
    free = [candidate for candidate in detected if candidate.place not in claimed]
    for spec in named:
        inside = [candidate for candidate in detected if candidate.place == spec.place]
        if inside:
            yield spec, max(inside, key=lambda candidate: candidate.confidence)
            continue
        x, y = cell_centre(spec.place)
        nearest = min(free, key=lambda one: math.hypot(one.x - x, one.y - y), default=None)
        if nearest is not None:
            free.remove(nearest)
        yield spec, nearest
