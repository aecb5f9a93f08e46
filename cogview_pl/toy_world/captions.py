"""Captions of the toy world in Chinese and English, and the parser that inverts them.

Every phrasing names the four attributes of one object before those of the next, each by one fixed word. So the parser
collects the attribute words in order and splits them into groups of four.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from cogview_pl.errors import UserError
from cogview_pl.toy_world.scene import COLOURS, PLACES, SHAPES, SIZES, Object, ObjectSpec, Scene

T = TypeVar("T")

STYLES = {"flat": "平面", "oil": "油画", "sketch": "素描", "cartoon": "卡通", "ink": "中国画"}
LANGUAGES = ("zh", "en")

_STYLES_EN = {
    "flat": "flat graphic", "oil": "oil painting", "sketch": "sketch", "cartoon": "cartoon",
    "ink": "Chinese painting",
}  # fmt: skip

_WORDS = {
    "zh": {
        "colour": dict(
            zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "黑色"), strict=True)
        ),
        "shape": dict(zip(SHAPES, ("圆形", "正方形", "三角形", "五角星", "十字形", "心形"), strict=True)),
        "size": dict(zip(SIZES, ("大", "小"), strict=True)),
        "place": dict(
            zip(
                PLACES,
                ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角"),
                strict=True,
            )
        ),
    },
    "en": {
        "colour": {colour: colour for colour in COLOURS},
        "shape": {shape: shape for shape in SHAPES},
        "size": {size: size for size in SIZES},
        "place": {
            "top_left": "in the top left corner", "top": "at the top", "top_right": "in the top right corner",
            "left": "on the left", "middle": "in the middle", "right": "on the right",
            "bottom_left": "in the bottom left corner", "bottom": "at the bottom",
            "bottom_right": "in the bottom right corner",
        },
    },
}  # fmt: skip

# A phrasing: a lead-in, the clause of one object, the separator of clauses, and that before the last clause.
_PHRASINGS = {
    "zh": (
        ("", "{place}有一个{size}的{colour}{shape}", "，", "，"),
        ("", "{place}有一个{colour}的{size}{shape}", "，", "，"),
        ("", "一个{size}的{colour}{shape}在{place}", "，", "，"),
        ("", "一个{colour}的{size}{shape}位于{place}", "，", "，"),
        ("", "{place}是一个{size}的{colour}{shape}", "，", "，"),
        ("", "{place}画着一个{colour}{size}{shape}", "，", "，"),
        ("图片", "{place}有{size}的{colour}{shape}", "，", "，"),
        ("", "{place}的{colour}{size}{shape}", "、", "和"),
    ),
    "en": (
        ("", "a {size} {colour} {shape} {place}", ", ", " and "),
        ("", "there is a {size} {colour} {shape} {place}", ", ", " and "),
        ("", "{place} there is a {size} {colour} {shape}", ", ", " and "),
        ("", "{place} is a {size} {colour} {shape}", ", ", " and "),
        ("an image of ", "a {size} {colour} {shape} {place}", ", ", " and "),
        ("", "the {size} {shape} {place} is {colour}", ", ", " and "),
    ),
}


_REFERENCES = {  # the object of an instruction: without its place, and with it
    "zh": ("{colour}{shape}", "{place}的{colour}{shape}"),
    "en": ("the {colour} {shape}", "the {colour} {shape} {place}"),
}
_INSTRUCTIONS = {
    "zh": {"colour": "把{}改成{}", "shape": "把{}改成{}", "size": "把{}变{}", "place": "把{}移到{}"},
    "en": {"colour": "make {} {}", "shape": "turn {} into a {}", "size": "make {} {}", "place": "put {} {}"},
}


def caption(scene: Scene, language: str, rng: np.random.Generator) -> str:
    """A caption of a scene in "zh" or "en", with a random phrasing and order of the objects.

    Raises UserError for an unknown language.
    """
    check_language(language)
    lead, clause, comma, last = _pick(rng, _PHRASINGS[language])
    words = _WORDS[language]
    order = np.argsort(rng.random(len(scene.objects)))
    clauses = [_clause(clause, words, scene.objects[i]) for i in order]
    return lead + comma.join(clauses[:-1]) + (last if clauses[1:] else "") + clauses[-1]


def instruction(thing: ObjectSpec, attribute: str, value: str, language: str, *, by_place: bool) -> str:
    """The text that asks to change an attribute of an object: 把红色圆形改成蓝色.

    Args:
        thing: the object as it is.
        attribute: the field of `thing` to change.
        value: the value that it is to have.
        language: "zh" or "en".
        by_place: whether the object is named by its place too, because another one has its colour and shape.
    """
    words = _WORDS[language]
    named = {kind: words[kind][name] for kind, name in thing._asdict().items()}
    reference = _REFERENCES[language][by_place].format_map(named)
    return _INSTRUCTIONS[language][attribute].format(reference, words[attribute][value])


def style_name(style: str, language: str) -> str:
    """The name of a style in captions: "oil" is 油画 or oil painting."""
    return {"zh": STYLES, "en": _STYLES_EN}[language][style]


def parse_caption(text: str) -> tuple[ObjectSpec, ...]:
    """The objects that a caption names, in its order: the inverse of `caption` in both languages.

    Raises UserError if the text names no object, or one without all of its four attributes.
    """
    found = [(match.lastgroup or "", match.group()) for match in _ATTRIBUTE.finditer(text.lower())]
    groups = [dict(found[start : start + 4]) for start in range(0, len(found), 4)]
    if not groups:
        raise UserError(f"prompt {text!r} names no object of the toy world; try “左上角有一个大的红色圆形”")
    if any(group.keys() != _VALUES.keys() for group in groups):
        raise UserError(f"prompt {text!r}: name the colour, shape, size and place of each object")
    return tuple(ObjectSpec(*(_VALUES[kind][group[kind]] for kind in ObjectSpec._fields)) for group in groups)


def check_language(language: str) -> None:
    """Raises UserError for an unknown language."""
    if language not in LANGUAGES:
        raise UserError(f"data.language: found {language!r}; use one of {', '.join(LANGUAGES)}")


def check_styles(styles: Sequence[str]) -> None:
    """Raises UserError for an unknown style."""
    for style in styles:
        if style not in STYLES:
            raise UserError(f"data.styles: unknown style {style!r}; use some of {', '.join(STYLES)}")


def _clause(clause: str, words: dict[str, dict[str, str]], thing: Object) -> str:
    return clause.format_map({kind: words[kind][name] for kind, name in thing.spec._asdict().items()})


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _attribute_pattern() -> re.Pattern[str]:
    """One named group per kind of attribute; English words match whole words only ("across" holds no "cross")."""
    groups = []
    for kind, values in _VALUES.items():
        words = [rf"\b{word}\b" if word.isascii() else word for word in values]
        groups.append(f"(?P<{kind}>{'|'.join(words)})")
    return re.compile("|".join(groups))


_VALUES = {
    kind: {word: name for words in _WORDS.values() for name, word in words[kind].items()} for kind in ObjectSpec._fields
}
_ATTRIBUTE = _attribute_pattern()
