"""Pairs of the toy world: a scene in two styles, or two scenes that differ in what the instruction says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from cogview_pl.errors import UserError
from cogview_pl.toy_world.accuracy import score_pairs
from cogview_pl.toy_world.captions import STYLES, instruction
from cogview_pl.toy_world.edits import Shown, edit_to
from cogview_pl.toy_world.judge import Judge
from cogview_pl.toy_world.render import render
from cogview_pl.toy_world.scene import ObjectSpec, cell_centre, random_stream, sample_scene

from .toy_images import toy_images

SOURCE = ("source",)


def test_a_scene_in_two_styles() -> None:
    styles = ("flat", "oil", "ink")
    data = toy_images("train", 12, image_size=32, styles=styles, style_patterns=("{style}风格",), image_fields=SOURCE)
    names: Counter[str] = Counter()
    for index in range(len(data)):
        sample = data[index]
        scene, style = data.scene(index), data.style(index)
        assert sample.text == data.text(index) == f"{STYLES[style]}风格"
        drawn = {name: torch.from_numpy(render(scene, 32, name)).permute(2, 0, 1) for name in styles}
        assert torch.equal(sample.image, drawn[style])
        (source,) = (name for name in styles if torch.equal(sample.images["source"], drawn[name]))
        assert source != style
        names[source] += 1
        assert data.shown(index) == Shown(tuple(thing.spec for thing in scene.objects), None)
    assert len(names) > 1


def test_targets_are_the_images_without_a_source() -> None:
    options = {"styles": ("flat", "oil"), "image_size": 32}
    alone = toy_images("val", 4, style_patterns=("{style}风格的{text}",), **options)
    paired = toy_images("val", 4, style_patterns=("{style}风格",), image_fields=SOURCE, **options)
    edits = toy_images("val", 4, pairs="edits", image_fields=SOURCE, image_size=32)
    plain = toy_images("val", 4, image_size=32)
    for index in range(4):
        assert torch.equal(alone[index].image, paired[index].image)
        assert torch.equal(plain[index].image, edits[index].image)
    assert len({data.fingerprint() for data in (alone, paired, edits, plain)}) == 4


@pytest.mark.parametrize("language", ["zh", "en"])
def test_an_edit_changes_one_attribute_of_one_object(language: str) -> None:
    kinds: Counter[str] = Counter()
    for index in range(300):
        scene = sample_scene(0, "train", index)
        edit = edit_to(scene, language, random_stream(5, index))
        number, attribute = edit.changed
        differing = [
            (n, a)
            for n, (one, other) in enumerate(zip(edit.source.objects, scene.objects, strict=True))
            for a in range(4)
            if one.spec[a] != other.spec[a]
        ]
        assert differing == [(number, attribute)]
        before, after = edit.source.objects[number], scene.objects[number]
        assert len({thing.place for thing in edit.source.objects}) == len(scene.objects)
        for thing in (before, after):
            x, y = cell_centre(thing.place)
            assert max(abs(thing.x - x), abs(thing.y - y)) + thing.radius <= 1 / 6 + 1e-9
        kind = ObjectSpec._fields[attribute]
        kinds[kind] += 1
        alike = sum((o.colour, o.shape) == (before.colour, before.shape) for o in edit.source.objects)
        new = getattr(after, kind)
        assert edit.text == instruction(before.spec, kind, new, language, by_place=alike > 1)
    assert min(kinds[kind] for kind in ObjectSpec._fields) > 40


def test_instructions() -> None:
    spec = ObjectSpec("red", "circle", "big", "top_left")
    given = [("colour", "blue"), ("shape", "heart"), ("size", "small"), ("place", "right")]
    chinese = [instruction(spec, kind, value, "zh", by_place=False) for kind, value in given]
    assert chinese == ["把红色圆形改成蓝色", "把红色圆形改成心形", "把红色圆形变小", "把红色圆形移到右边"]
    english = [instruction(spec, kind, value, "en", by_place=True) for kind, value in given]
    circle = "the red circle in the top left corner"
    assert english == [
        f"make {circle} blue",
        f"turn {circle} into a heart",
        f"make {circle} small",
        f"put {circle} on the right",
    ]


def test_rendered_edits_are_judged_right_and_their_sources_wrong() -> None:
    data = toy_images("val", 48, pairs="edits", image_fields=SOURCE)
    judge, samples = Judge(64), [data[index] for index in range(len(data))]
    shown = [data.shown(index) for index in range(len(data))]
    right = score_pairs(judge(torch.stack([sample.image for sample in samples])), shown)
    assert min(right.values()) > 0.97 and len(right) == 3
    wrong = score_pairs(judge(torch.stack([sample.images["source"] for sample in samples])), shown)
    assert wrong["toy/changed_accuracy"] < 0.05 < 0.85 < wrong["toy/kept_accuracy"] and wrong["toy/all_right"] < 0.05


def test_what_is_compared() -> None:
    spec = ObjectSpec("red", "circle", "big", "middle")
    image = torch.from_numpy(render(sample_scene(0, "val", 0), 64, "flat")).permute(2, 0, 1)[None]
    found = Judge(64)(image)
    nothing = score_pairs([[]], [Shown((spec,), (0, 1))])
    assert nothing == {"toy/kept_accuracy": 0.0, "toy/changed_accuracy": 0.0, "toy/all_right": 0.0}
    true = tuple(thing.spec for thing in sample_scene(0, "val", 0).objects)
    assert score_pairs(found, [Shown(true, None)]) == {"toy/kept_accuracy": 1.0, "toy/all_right": 1.0}
    other = (*true[:-1], true[-1]._replace(colour="pink" if true[-1].colour != "pink" else "red"))
    scores = score_pairs(found, [Shown(other, (len(true) - 1, 0))])
    assert scores == {"toy/kept_accuracy": 1.0, "toy/changed_accuracy": 0.0, "toy/all_right": 0.0}
    assert np.isfinite(list(scores.values())).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"styles": ("oil",), "style_patterns": ("{style}风格",)},
            r"^data\.styles=\['oil'\]: a pair shows a scene in two",
        ),
        ({"styles": ("oil", "flat")}, r"^data\.style_patterns is empty, and captions of pairs name the style to make"),
        (
            {"pairs": "edits", "style_patterns": ("{style}风格",)},
            r"^data\.style_patterns: the instructions of data\.pairs",
        ),
        (
            {"styles": ("oil", "flat"), "style_patterns": ("{style}的{text}",)},
            r"must have the hole \{style\} and no others",
        ),
    ],
)
def test_what_makes_no_pairs(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_images("train", 4, image_fields=SOURCE, **options)
