"""Loss curves of a training run: read from TensorBoard events, drawn as SVG for a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

_WIDTH, _HEIGHT = 320, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 24, 36  # margins: numbers and labels of the axes, the legend
_TICKS = 4  # largest number of intervals on an axis
_MOST_POINTS = 200  # largest number of points of a line; more are not visible at this width
_MARKED = 12  # a line with at most this many points shows them, so that a single validation is visible


class Point(NamedTuple):
    """A logged value."""

    step: int
    value: float


Curve = dict[str, list[Point]]
"""The lines of one drawing: "train", "val" or both."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Curves of `train/loss…` and `val/…`, by the name after the slash: loss first, then alphabetically.

    Args:
        folder: `tensorboard/` of the run; a missing folder has no curves.
    """
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, IMAGES: 1})  # 0: keep all
    events.Reload()
    curves: dict[str, Curve] = {}
    for tag in events.Tags()["scalars"]:
        split, _, name = tag.partition("/")
        if split == "val" or (split == "train" and name.startswith("loss")):
            points = [Point(event.step, event.value) for event in events.Scalars(tag) if math.isfinite(event.value)]
            if points:
                curves.setdefault(name, {})[split] = points
    return dict(sorted(curves.items(), key=lambda item: (item[0] != "loss", item[0])))


def draw_curve(name: str, curve: Curve) -> str:
    """One drawing as an `<svg>` element: values over steps, with ticks, labels and a legend."""
    points = [point for line in curve.values() for point in line]
    last = max(point.step for point in points) or 1
    low, high = min(point.value for point in points), max(point.value for point in points)
    if high == low:
        low, high = low - 0.5, high + 0.5
    label = escape(name)

    def x(step: float) -> float:
        return round(_LEFT + step / last * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label} over steps">']
    for value in _ticks(low, high):
        parts.append(f'<path class="axis" d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y(value) + 4}" text-anchor="end">{value:.4g}</text>')
    for step in _ticks(0, last):
        parts.append(f'<text x="{x(step)}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{step:g}</text>')
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    parts.append(f'<text transform="translate(10 {middle}) rotate(-90)" text-anchor="middle">{label}</text>')
    for number, (split, line) in enumerate(sorted(curve.items())):
        places = [(x(point.step), y(point.value)) for point in _thinned(line)]
        parts.append(f'<polyline class="line {split}" points="{" ".join(f"{a},{b}" for a, b in places)}"/>')
        if len(places) <= _MARKED:
            parts += [f'<circle class="{split}" cx="{a}" cy="{b}" r="2.5"/>' for a, b in places]
        parts.append(f'<text class="{split}" x="{_LEFT + 40 * number}" y="14">{split}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    apart = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(apart))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= apart)
    return (number * distance for number in range(math.ceil(low / distance), math.floor(high / distance) + 1))


def _thinned(line: list[Point]) -> list[Point]:
    """Evenly chosen points of a line, the first and the last among them."""
    if len(line) <= _MOST_POINTS:
        return line
    return [line[round(number * (len(line) - 1) / (_MOST_POINTS - 1))] for number in range(_MOST_POINTS)]
