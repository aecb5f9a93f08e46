"""Edits of the toy world: a scene that differs from another in one attribute, and the instruction between them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cogview_pl.toy_world.captions import instruction
from cogview_pl.toy_world.scene import COLOURS, PLACES, RADIUS, SHAPES, SIZES, Object, ObjectSpec, Scene, cell_centre

_VALUES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES}


class Edit(NamedTuple):
    """How a scene came about."""

    source: Scene
    """The scene before the edit."""
    changed: tuple[int, int]
    """Number of the changed object, and of its changed attribute in `ObjectSpec`."""
    text: str
    """The instruction, such as 把红色圆形改成蓝色."""


class Shown(NamedTuple):
    """What an image of a pair shows."""

    objects: tuple[ObjectSpec, ...]
    changed: tuple[int, int] | None
    """See `Edit.changed`; None where source and target show the same objects."""


def edit_to(scene: Scene, language: str, rng: np.random.Generator) -> Edit:
    """A random edit whose result is the scene; the language of its text is "zh" or "en".

    An object keeps its offset from the centre of its cell when it moves, and its radius relative to its size.
    """
    number, attribute = (int(rng.random() * count) for count in (len(scene.objects), len(ObjectSpec._fields)))
    kind, thing = ObjectSpec._fields[attribute], scene.objects[number]
    taken = {getattr(other, kind) for other in (scene.objects if kind == "place" else (thing,))}
    values = [value for value in _VALUES[kind] if value not in taken]
    before = _changed(thing, kind, values[int(rng.random() * len(values))])
    source = replace(scene, objects=(*scene.objects[:number], before, *scene.objects[number + 1 :]))
    alike = [other for other in source.objects if (other.colour, other.shape) == (before.colour, before.shape)]
    text = instruction(before.spec, kind, getattr(thing, kind), language, by_place=len(alike) > 1)
    return Edit(source, (number, attribute), text)


def _changed(thing: Object, kind: str, value: str) -> Object:
    """An object with another value of an attribute."""
    if kind == "size":
        return replace(thing, size=value, radius=thing.radius * RADIUS[value] / RADIUS[thing.size])
    if kind == "place":
        (old_x, old_y), (x, y) = cell_centre(thing.place), cell_centre(value)
        return replace(thing, place=value, x=thing.x + x - old_x, y=thing.y + y - old_y)
    return replace(thing, colour=value) if kind == "colour" else replace(thing, shape=value)
