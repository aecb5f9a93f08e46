"""Scenes of the toy world: the objects of an image, and the combinations that are held out from training.

A scene has one to three objects in different cells of a 3x3 grid. Each object has four named attributes (colour, shape,
size, place) and three continuous ones (centre and radius, slightly jittered). Lengths are fractions of the image's
edge; the origin is the upper left corner, y points down.

Each of the 48 (colour, shape) pairs is held out from one pseudo-random place, and four pairs from a second one:
`HELD_OUT` has 52 of the 432 (colour, shape, place) triples, 12 %. They never occur in split "train"; in split "val"
every object is one of them. A model that generates them has learnt to combine attributes. Each pair of two attributes
occurs in training. For a validation set of *seen* combinations use split "train" with another seed.

Finetuning on styles holds out other combinations (`styles_held_out`): each (colour, shape) pair is held out from one
style. That style does not depend on the places, and each colour and each shape is trained in every style.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cogview_pl.errors import UserError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("big", "small")
PLACES = (
    "top_left", "top", "top_right",
    "left", "middle", "right",
    "bottom_left", "bottom", "bottom_right",
)  # fmt: skip
SPLITS = ("train", "val")

RADIUS = {"big": 0.15, "small": 0.105}
OBJECT_PROBABILITIES = (0.5, 0.35, 0.15)

_RADIUS_JITTER = 0.02  # relative
_PLACE_JITTER = 0.012  # at most; less where the object would leave its cell
_HELD_OUT_SECOND_PLACES = 4
# Never change these: with other values, old and new results are not comparable.
_HELD_OUT_SEED = 2105_13290
_HELD_OUT_STYLE_SEED = 2105_13291
# The fourth number of the entropy separates the stream of scenes that are sampled again from the first stream.
_REDRAW_STREAM = 3


class ObjectSpec(NamedTuple):
    """The four attributes that a caption names."""

    colour: str
    shape: str
    size: str
    place: str


@dataclass(frozen=True)
class Object:
    """One coloured shape: named attributes, centre `(x, y)` and radius as fractions of the image's edge."""

    colour: str
    shape: str
    size: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def spec(self) -> ObjectSpec:
        """The four named attributes."""
        return ObjectSpec(self.colour, self.shape, self.size, self.place)


@dataclass(frozen=True)
class Scene:
    """Objects in different cells; `texture_seed` fixes the noise of the textured styles."""

    objects: tuple[Object, ...]
    texture_seed: int

    def to_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers, for JSON."""
        fields = asdict(self)
        fields["objects"] = list(fields["objects"])
        return fields


def cell_centre(place: str) -> tuple[float, float]:
    """Centre `(x, y)` of a cell of the grid, as fractions of the image's edge."""
    row, column = divmod(PLACES.index(place), 3)
    return (column + 0.5) / 3, (row + 0.5) / 3


def random_stream(*entropy: int) -> np.random.Generator:
    """Counter-based random numbers that depend on the given integers only.

    Callers use `Generator.random`, whose stream is the same on every platform.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def check_stream(seed: int, split: str) -> None:
    """Raises UserError for a negative seed or an unknown split."""
    if split not in SPLITS:
        raise UserError(f"split: unknown split {split!r}; use one of {', '.join(SPLITS)}")
    if seed < 0:
        raise UserError(f"data.seed: found {seed}; use zero or a positive integer")


def sample_scene(
    seed: int, split: str, index: int, object_probabilities: Sequence[float] = OBJECT_PROBABILITIES, redraw: int = 0
) -> Scene:
    """The scene with number `index` of a split: a pure function of its arguments.

    `object_probabilities` are weights of scenes with one, two and three objects (any positive scale). `redraw` numbers
    further scenes with the same index.

    Raises UserError for an unknown split, a negative seed or unusable probabilities.
    """
    check_stream(seed, split)
    thresholds = _cumulative(tuple(object_probabilities))
    rng = random_stream(seed, SPLITS.index(split), index, *((_REDRAW_STREAM, redraw) if redraw else ()))
    number = 1 + int(np.searchsorted(thresholds, rng.random(), side="right"))
    places = list(PLACES)
    objects = []
    for _ in range(number):
        place = places.pop(_below(rng, len(places)))
        pairs = _PAIRS[split][place]
        colour, shape = pairs[_below(rng, len(pairs))]
        objects.append(_placed(rng, ObjectSpec(colour, shape, SIZES[_below(rng, 2)], place)))
    return Scene(tuple(objects), texture_seed=_below(rng, 2**31))


def styles_held_out(styles: Iterable[str]) -> dict[tuple[str, str], str]:
    """The style that each (colour, shape) pair is held out from in training; needs at least two styles.

    The styles are on the diagonals of a table of colours and shapes in pseudo-random order. So their numbers of pairs
    differ by one at most, and each style misses some shapes of every colour but never all. Their order does not matter.
    """
    names = sorted(set(styles))
    rng = random_stream(_HELD_OUT_STYLE_SEED)
    colours, shapes = np.argsort(rng.random(len(COLOURS))), np.argsort(rng.random(len(SHAPES)))
    return {
        (COLOURS[colour], SHAPES[shape]): names[(row + column) % len(names)]
        for row, colour in enumerate(colours)
        for column, shape in enumerate(shapes)
    }


@lru_cache
def _cumulative(object_probabilities: tuple[float, ...]) -> np.ndarray:
    weights = np.asarray(object_probabilities, dtype=np.float64)
    usable = weights.ndim == 1 and 1 <= len(weights) <= 3 and (weights >= 0).all()
    if not usable or not 0 < weights.sum() < math.inf:
        raise UserError(
            f"data.object_probabilities: found {list(object_probabilities)}; "
            "give one to three weights, none negative, not all zero"
        )
    # Without the last threshold, which rounding could put below 1.
    return np.cumsum(weights / weights.sum())[:-1]


def _placed(rng: np.random.Generator, spec: ObjectSpec) -> Object:
    radius = RADIUS[spec.size] * (1 + _RADIUS_JITTER * _signed(rng))
    reach = min(_PLACE_JITTER, 1 / 6 - radius)
    x, y = cell_centre(spec.place)
    return Object(*spec, x=x + reach * _signed(rng), y=y + reach * _signed(rng), radius=radius)


def _below(rng: np.random.Generator, limit: int) -> int:
    return int(rng.random() * limit)


def _signed(rng: np.random.Generator) -> float:
    return 2 * float(rng.random()) - 1


def _choose_held_out() -> frozenset[tuple[str, str, str]]:
    rng = random_stream(_HELD_OUT_SEED)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    order = np.argsort(rng.random(len(pairs)))
    held_out = set()
    for rank, pair in enumerate(order):
        ranked = np.argsort(rng.random(len(PLACES)))
        for place in ranked[: 2 if rank < _HELD_OUT_SECOND_PLACES else 1]:
            held_out.add((*pairs[pair], PLACES[place]))
    return frozenset(held_out)


def _pairs_by_place(split: str) -> dict[str, list[tuple[str, str]]]:
    """The (colour, shape) pairs that may occur in each cell, in a split."""
    held_out = split == "val"
    return {
        place: [
            (colour, shape)
            for colour in COLOURS
            for shape in SHAPES
            if ((colour, shape, place) in HELD_OUT) == held_out
        ]
        for place in PLACES
    }


HELD_OUT = _choose_held_out()
_PAIRS = {split: _pairs_by_place(split) for split in SPLITS}
