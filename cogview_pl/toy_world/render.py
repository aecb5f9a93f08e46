"""Renders toy scenes: shapes as signed distances, anti-aliased, at any resolution.

Shapes: Y X pixels of the image, or of the window around one object. `rows` `(Y, 1)` and `columns` `(1, X)` are the
centres of the pixels as fractions of the image's edge; `pixel` is the edge of one pixel. Colours are RGB in 0 … 1. A
signed distance is negative inside the shape. All textures depend on the place in the image, so a scene looks the same
at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogview_pl.toy_world.captions import check_styles
from cogview_pl.toy_world.scene import Object, Scene, random_stream

Array = NDArray[np.floating[Any]]
Background = Callable[[Array, Array, np.random.Generator], Array]  # (rows, columns, rng) -> (Y, X, 3)
# (image so far (Y, X, 3), object, rows, columns, pixel, rng) -> (Y, X, 3)
Brush = Callable[[Array, Object, Array, Array, float, np.random.Generator], Array]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (219, 40, 40),
    "orange": (247, 138, 26),
    "yellow": (244, 214, 44),
    "green": (46, 158, 72),
    "blue": (42, 96, 214),
    "purple": (146, 62, 186),
    "pink": (242, 124, 176),
    "black": (32, 32, 36),
}
BACKGROUND = (250, 248, 242)

_REACH = 1.12  # largest extent of a shape, in radii …
_MARGIN = 0.05  # … and of an outline or bleeding edge beyond it, as a fraction of the image's edge
_DARK = (30, 26, 34)
_LATTICE = 64  # random values along an edge of the lattice of noise, a power of two
_WRAP = _LATTICE - 1  # bits of an index that repeats at the edge of the lattice


def render(scene: Scene, resolution: int, style: str = "flat") -> NDArray[np.uint8]:
    """Render a scene as uint8 `(Y, X, 3)` with Y = X = `resolution`; equal arguments give equal pixels.

    Raises UserError for an unknown style.
    """
    check_styles((style,))
    background, brush = _STYLES[style]
    rng = random_stream(scene.texture_seed)
    centres = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    rows, columns = centres[:, None], centres[None, :]
    image = background(rows, columns, rng)
    for thing in scene.objects:
        y, x = (_window(middle, thing.radius, resolution) for middle in (thing.y, thing.x))
        image[y, x] = brush(image[y, x], thing, rows[y], columns[:, x], 1 / resolution, rng)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _window(middle: float, radius: float, resolution: int) -> slice:
    """The pixels that an object may touch, along one axis."""
    reach = _REACH * radius + _MARGIN
    return slice(max(0, int((middle - reach) * resolution)), int((middle + reach) * resolution) + 1)


# --- flat: plain colours --------------------------------------------------------------------------


def _flat_background(rows: Array, columns: Array, rng: np.random.Generator) -> Array:
    return _plain(rows, columns, _rgb(BACKGROUND))


def _flat_brush(
    below: Array, thing: Object, rows: Array, columns: Array, pixel: float, rng: np.random.Generator
) -> Array:
    return _mix(below, _rgb(PALETTE[thing.colour]), _soft(_distance(thing, rows, columns), pixel))


# --- oil: impasto strokes on canvas ---------------------------------------------------------------


def _oil_background(rows: Array, columns: Array, rng: np.random.Generator) -> Array:
    bend = 0.5 * _noise(rng, columns * 2, rows * 2)
    paint = _plain(rows, columns, _rgb((178, 194, 196)))
    return _strokes(paint, rows, columns, rng, angle=0.5 + bend, relief=0.17) * _weave(rows, columns)


def _oil_brush(
    below: Array, thing: Object, rows: Array, columns: Array, pixel: float, rng: np.random.Generator
) -> Array:
    angle = math.pi * rng.random() + 0.5 * _noise(rng, columns * 4, rows * 4)
    paint = _plain(rows, columns, _rgb(PALETTE[thing.colour]))
    paint = _strokes(paint, rows, columns, rng, angle, relief=0.5) * _weave(rows, columns)
    ragged = 0.016 * _noise(rng, columns * 24, rows * 24)
    return _mix(below, paint, _soft(_distance(thing, rows, columns) + ragged, pixel))


def _strokes(paint: Array, rows: Array, columns: Array, rng: np.random.Generator, angle: Array, relief: float) -> Array:
    """Bristle marks along `angle`: lighter and darker paint, lit from the upper left."""
    across = (rows * np.cos(angle) - columns * np.sin(angle)) * 24
    along = (rows * np.sin(angle) + columns * np.cos(angle)) * 7
    height = _noise(rng, along, across)
    warmth = _noise(rng, along * 0.7, across * 0.4)[..., None] * np.asarray((0.12, 0.05, -0.12), np.float32)
    lit = height + 0.35 * _noise(rng, along * 2, across * 2)
    return paint + relief * (lit[..., None] * (0.25 + 0.75 * paint) + warmth)


def _weave(rows: Array, columns: Array) -> Array:
    threads = np.sin(columns * (2 * np.pi * 24)) * np.sin(rows * (2 * np.pi * 24))
    return 1 + 0.035 * threads[..., None]


# --- sketch: pencil outline and hatching in the object's colour -----------------------------------


def _sketch_background(rows: Array, columns: Array, rng: np.random.Generator) -> Array:
    grain = _noise(rng, columns * 30, rows * 30) + _noise(rng, columns * 61, rows * 61)
    return _plain(rows, columns, _rgb((246, 245, 241))) + 0.035 * grain[..., None]


def _sketch_brush(
    below: Array, thing: Object, rows: Array, columns: Array, pixel: float, rng: np.random.Generator
) -> Array:
    colour = _rgb(PALETTE[thing.colour])
    distance = _distance(thing, rows, columns) + 0.012 * _noise(rng, columns * 14, rows * 14)
    angle = 0.6 + 0.5 * rng.random()
    across = columns * math.sin(angle) + rows * math.cos(angle)
    across = across + 0.008 * _noise(rng, columns * 9, rows * 9)
    spacing = 0.042
    from_line = np.abs((across / spacing) % 1 - 0.5) * spacing
    pressure = 0.85 + 0.5 * _noise(rng, columns * 12, rows * 12)
    hatching = _soft(distance, pixel) * (0.22 + 0.75 * pressure * _soft(from_line - 0.0125, pixel))
    image = _mix(below, colour, hatching.clip(0, 1))
    # Two strokes of the pencil that do not quite meet.
    for shift in (-0.06, 0.0):
        wander = distance - shift * thing.radius + 0.01 * _noise(rng, columns * 7, rows * 7)
        image = _mix(image, 0.45 * colour + 0.1, 0.65 * _soft(np.abs(wander) - 0.004, pixel))
    return image


# --- cartoon: thick outline, cel shading, highlight -----------------------------------------------


def _cartoon_background(rows: Array, columns: Array, rng: np.random.Generator) -> Array:
    # Halftone dots that fade out downwards.
    diagonal, other = (columns + rows) * 11, (columns - rows) * 11
    from_dot = np.hypot(diagonal % 1 - 0.5, other % 1 - 0.5)
    dots = np.clip((0.40 * (1 - rows) - from_dot) * 4, 0, 1)
    return _mix(_plain(rows, columns, _rgb((228, 243, 252))), _rgb((190, 224, 246)), dots)


def _cartoon_brush(
    below: Array, thing: Object, rows: Array, columns: Array, pixel: float, rng: np.random.Generator
) -> Array:
    colour = _rgb(PALETTE[thing.colour])
    distance = _distance(thing, rows, columns)
    shade = _distance(thing, rows + 0.3 * thing.radius, columns + 0.2 * thing.radius)
    fill = _mix(_plain(rows, columns, colour), 0.82 * colour, _soft(-shade, pixel))
    x, y = (columns - thing.x) / thing.radius + 0.2, (rows - thing.y) / thing.radius + 0.3
    gleam = (np.hypot(x * 0.8 + y * 0.6, (y * 0.8 - x * 0.6) * 2) - 0.22) * thing.radius
    fill = _mix(fill, _rgb((255, 255, 255)), 0.9 * _soft(gleam, pixel))
    outlined = _mix(below, _rgb(_DARK), _soft(distance - 0.05 * thing.radius, pixel))
    return _mix(outlined, fill, _soft(distance + 0.08 * thing.radius, pixel))


# --- ink: washes that bleed into rice paper, before distant mountains -----------------------------


def _ink_background(rows: Array, columns: Array, rng: np.random.Generator) -> Array:
    fibres = _noise(rng, columns * 40, rows * 12) + _noise(rng, columns * 12, rows * 40)
    image: Array = _plain(rows, columns, _rgb((240, 232, 212))) + 0.02 * fibres[..., None]
    for foot in (0.55, 0.8):
        ridge = foot + 0.3 * _noise(rng, columns * 3, rows * 0) + 0.08 * _noise(rng, columns * 9, rows * 0)
        below_ridge = rows - ridge
        mist = _soft(-below_ridge, 0.03) * np.exp(-np.maximum(below_ridge, 0) / 0.12)
        image = _mix(image, _rgb((96, 104, 110)), 0.15 * mist)
    return image


def _ink_brush(
    below: Array, thing: Object, rows: Array, columns: Array, pixel: float, rng: np.random.Generator
) -> Array:
    pigment = 0.9 * _rgb(PALETTE[thing.colour])
    ragged = 0.03 * _noise(rng, columns * 9, rows * 9) + 0.014 * _noise(rng, columns * 28, rows * 28)
    distance = _distance(thing, rows, columns) + ragged
    direction = 2 * math.pi * rng.random()
    side = (columns - thing.x) * math.cos(direction) + (rows - thing.y) * math.sin(direction)
    wash = 0.72 + 0.25 * side / thing.radius + 0.35 * _noise(rng, columns * 7, rows * 7)
    pool = 0.3 * np.exp(-(((distance + 0.008) / 0.012) ** 2))
    halo = 0.16 * _soft(distance - 0.02, 0.05)
    density = np.maximum(_soft(distance, 0.022) * (wash + pool).clip(0.5, 0.97), halo)
    return _mix(below, pigment, density)


_STYLES: dict[str, tuple[Background, Brush]] = {
    "flat": (_flat_background, _flat_brush),
    "oil": (_oil_background, _oil_brush),
    "sketch": (_sketch_background, _sketch_brush),
    "cartoon": (_cartoon_background, _cartoon_brush),
    "ink": (_ink_background, _ink_brush),
}


# --- tools ----------------------------------------------------------------------------------------


def _rgb(colour: tuple[int, int, int]) -> Array:
    return np.asarray(colour, np.float32) / 255


def _plain(rows: Array, columns: Array, colour: Array) -> Array:
    """Images of one colour, `(Y, X, 3)`."""
    return np.broadcast_to(colour, (rows.shape[0], columns.shape[1], 3)).copy()


def _mix(below: Array, colour: Array, share: Array) -> Array:
    return below + share[..., None] * (colour - below)


def _soft(distance: Array, width: float) -> Array:
    """1 inside, 0 outside, with an edge of the given width."""
    return np.clip(0.5 - distance / width, 0, 1)


def _distance(thing: Object, rows: Array, columns: Array) -> Array:
    """Signed distance to the object's outline, as a fraction of the image's edge."""
    x, y = (columns - thing.x) / thing.radius, (rows - thing.y) / thing.radius
    return SHAPE_DISTANCES[thing.shape](x, y) * thing.radius


def _noise(rng: np.random.Generator, u: Array, v: Array) -> Array:
    """Smooth noise in -0.5 … 0.5 with one random value per unit of `(u, v)`, from a fresh lattice."""
    lattice = rng.random((_LATTICE, _LATTICE)).astype(np.float32).ravel() - 0.5
    u, v = np.broadcast_arrays(u, v)
    left, top = np.floor(u), np.floor(v)
    s, t = u - left, v - top
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    # Bits instead of remainders and one flat index instead of two: this is most of the time of the textured styles.
    i, j = left.astype(np.int32), top.astype(np.int32)
    i, i_next = i & _WRAP, (i + 1) & _WRAP
    j, j_next = (j & _WRAP) * _LATTICE, ((j + 1) & _WRAP) * _LATTICE
    upper = lattice.take(j + i) * (1 - s) + lattice.take(j + i_next) * s
    lower = lattice.take(j_next + i) * (1 - s) + lattice.take(j_next + i_next) * s
    return upper * (1 - t) + lower * t


# --- shapes: signed distances in units of the radius, x to the right, y down, origin at the centre


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.94


def _box(x: Array, y: Array, half_x: float, half_y: float) -> Array:
    out_x, out_y = np.abs(x) - half_x, np.abs(y) - half_y
    return np.hypot(np.maximum(out_x, 0), np.maximum(out_y, 0)) + np.minimum(np.maximum(out_x, out_y), 0)


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.82, 0.82)


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.98, 0.35), _box(x, y, 0.35, 0.98))


def _heart(x: Array, y: Array) -> Array:
    """A square on its corner with a half disc on each of its two upper sides."""
    half = 0.6  # half of the square's edge
    turn = math.sqrt(0.5)
    lower = y - 0.14
    along, across = (x + lower) * turn, (lower - x) * turn
    square = _box(along, across, half, half)
    right, left = np.hypot(along, across + half), np.hypot(along + half, across)
    return np.minimum(square, np.minimum(left, right) - half)


def _polygon(vertices: Array) -> Callable[[Array, Array], Array]:
    """The signed distance of a simple polygon with vertices `(n, 2)`."""
    start = vertices[:, :, None, None]
    edge = np.roll(vertices, -1, axis=0)[:, :, None, None] - start
    length_squared = (edge**2).sum(1)

    def distance(x: Array, y: Array) -> Array:
        x, y = x[None] - start[:, 0], y[None] - start[:, 1]
        fraction = np.clip((x * edge[:, 0] + y * edge[:, 1]) / length_squared, 0, 1)
        nearest = ((x - fraction * edge[:, 0]) ** 2 + (y - fraction * edge[:, 1]) ** 2).min(0)
        # A ray to the right crosses the outline an odd number of times from inside.
        straddles = (y >= 0) != (y >= edge[:, 1])
        right_of_us = (edge[:, 0] * y / np.where(edge[:, 1] == 0, 1, edge[:, 1])) > x
        inside = (straddles & right_of_us).sum(0) % 2 == 1
        return np.sqrt(nearest) * np.where(inside, np.float32(-1), np.float32(1))

    return distance


def _on_circle(radii: tuple[float, ...], down: float) -> Array:
    """Vertices at equal angles, the first on top, at the given radii; `down` shifts all of them."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    points = np.stack([np.sin(angles) * radii, -np.cos(angles) * radii + down], axis=1)
    return points.astype(np.float32)


SHAPE_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon(_on_circle((1.1, 1.1, 1.1), down=0.2)),
    "star": _polygon(_on_circle((1.08, 0.47) * 5, down=0.06)),
    "cross": _cross,
    "heart": _heart,
}
