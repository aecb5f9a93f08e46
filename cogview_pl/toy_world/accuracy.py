"""Accuracy of images of the toy world: do they show the objects and the style that the prompt names?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict

import numpy as np
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.toy_world.captions import LANGUAGES, STYLES, parse_caption, style_name
from cogview_pl.toy_world.edits import Shown
from cogview_pl.toy_world.judge import Detected, Judge, agreement, score_detected

_STYLE_OF_NAME = {style_name(style, language).lower(): style for language in LANGUAGES for style in STYLES}


def names_objects(prompt: str) -> bool:
    """Whether a prompt names objects of the toy world, each with all four attributes."""
    try:
        return bool(parse_caption(prompt))
    except UserError:
        return False


def meaning(caption: str) -> Hashable:
    """The meaning of a caption: its objects, in any order, and its style; for other captions its words."""
    if not names_objects(caption):
        return caption
    return frozenset(parse_caption(caption)), asked_style(caption, base_style="")


def asked_style(prompt: str, base_style: str) -> str | None:
    """The style that a prompt asks for: the first one named, else `base_style` for objects of the toy world.

    None if the prompt names neither a style nor such objects.
    """
    text = prompt.lower()
    named = [(text.index(name), style) for name, style in _STYLE_OF_NAME.items() if name in text]
    if named:
        return min(named)[1]
    return base_style if names_objects(prompt) else None


class AttributeAccuracy:
    """Share of the named objects that the judge finds, over images given batch by batch.

    Prompts that name no objects are skipped.
    """

    def __init__(self, image_size: int) -> None:
        self._judge = Judge(image_size)
        self._found: list[Sequence[Detected]] = []
        self._prompts: list[str] = []

    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add images, uint8 `(B, 3, Y, X)`, and their prompts."""
        asked = [number for number, prompt in enumerate(prompts) if names_objects(prompt)]
        if asked:
            self._found += self._judge(images[asked])
            self._prompts += [prompts[number] for number in asked]

    def compute(self) -> dict[str, float]:
        """`toy/colour_accuracy` and the other metrics of `score_detected`; empty if no prompt named objects."""
        if not self._prompts:
            return {}
        return {
            f"toy/{name}": float(value) for name, value in asdict(score_detected(self._found, self._prompts)).items()
        }


def score_pairs(found: Sequence[Sequence[Detected]], shown: Sequence[Shown]) -> dict[str, float]:
    """Accuracy of the objects that images of pairs are to show.

    Args:
        found: the detected objects of each image.
        shown: what each image is to show.

    Returns:
        `toy/kept_accuracy`, the share of the attributes that source and target have in common, `toy/changed_accuracy`,
        that of the changed ones, if there are any, and `toy/all_right`, the share of images with all objects and no
        others.
    """
    kept: list[bool] = []
    changed: list[bool] = []
    right: list[bool] = []
    for detected, (objects, place) in zip(found, shown, strict=True):
        agreeing = agreement(objects, detected)
        right.append(bool(agreeing.all()) and len(detected) == len(objects))
        others = np.ones(agreeing.shape, np.bool_)
        if place is not None:
            changed.append(bool(agreeing[place]))
            others[place] = False
        kept += agreeing[others].tolist()
    scores = {"kept_accuracy": kept, "changed_accuracy": changed, "all_right": right}
    return {f"toy/{name}": sum(values) / len(values) for name, values in scores.items() if values}


class StyleAccuracy:
    """Share of the images that a feature network classifies as the style of their prompt, batch by batch.

    Args:
        classes: names of the network's logits.
        base_style: style of prompts that name none.
    """

    def __init__(self, classes: Sequence[str], base_style: str) -> None:
        self._classes = classes
        self._base_style = base_style
        self._right: list[bool] = []

    def add(self, logits: Tensor, prompts: Sequence[str]) -> None:
        """Add logits `(B, K)` of images and their prompts."""
        for number, prompt in zip(logits.argmax(1).tolist(), prompts, strict=True):
            style = asked_style(prompt, self._base_style)
            if style is not None:
                self._right.append(self._classes[number] == style)

    def compute(self) -> dict[str, float]:
        """`toy/style_accuracy`; empty if no prompt asked for a style."""
        return {"toy/style_accuracy": sum(self._right) / len(self._right)} if self._right else {}
