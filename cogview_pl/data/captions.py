"""Texts of a sample: which values are text, which texts are empty, and which of several captions count."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

from cogview_pl.data.config import Captions
from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.samples import fraction_of

_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
"""Unicode categories of characters that are not seen: controls, marks of zero width, and spaces."""


class CaptionError(SampleError):
    """A caption is missing or is not text."""


def visible(text: str) -> str:
    """A text without the white space around it; empty where it has no visible character."""
    text = text.strip()
    return "" if all(unicodedata.category(sign) in _INVISIBLE for sign in text) else text


def field_texts(value: object, name: str = "caption") -> list[str]:
    """The texts in a metadata field, one or a list, without white space around them and without empty ones.

    Args:
        value: of the field, as JSON has it.
        name: of the field, for messages.

    Raises:
        CaptionError: a value is not text, and no other value of the list can be used.
    """
    values = value if isinstance(value, list) else [value]
    problem: CaptionError | None = None
    found = []
    for one in values:
        try:
            text = _text(one, name)
        except CaptionError as error:
            problem = problem or error
        else:
            found += [text] if text else []
    if problem is not None and not found:
        raise problem
    return found


def field_text(value: object, name: str = "caption") -> str:
    """The first text in a metadata field (`field_texts`); empty where there is none."""
    return next(iter(field_texts(value, name)), "")


def _text(value: object, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CaptionError(f"the {name} is not text but {json.dumps(value, ensure_ascii=False)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CaptionError(f"the {name} is not valid Unicode") from None
    return visible(value)


def caption_lines(text: str) -> list[str]:
    """The captions of a text file: its lines, without those that are empty."""
    return [line for line in map(visible, text.replace("\r\n", "\n").replace("\r", "\n").split("\n")) if line]


class CaptionChoice:
    """Chooses among the captions of an image.

    Args:
        captions: the first, one that a hash of seed and key chooses, or all, each as a sample of its own.
        seed: of the random choice.
    """

    def __init__(self, captions: Captions | str, seed: int) -> None:
        self.captions = Captions(captions)
        self.seed = seed

    def settings(self) -> tuple[object, ...]:
        """The arguments that change a sample; none for the first caption."""
        random = self.captions == Captions.random
        return () if self.captions == Captions.first else (self.captions.value, self.seed if random else None)

    def of(self, texts: Sequence[str], key: str) -> list[str]:
        """The captions that become samples; an image without captions is one sample without text.

        Args:
            texts: captions of an image.
            key: of the image.
        """
        return [texts[number] for number in self.numbers(len(texts), key)] if texts else [""]

    def numbers(self, count: int, key: str) -> Sequence[int]:
        """Which captions of an image become samples; the only number of an image without captions is 0.

        Args:
            count: number of captions of the image.
            key: of the image.
        """
        if self.captions == Captions.all:
            return range(max(1, count))
        return [int(fraction_of(f"caption:{self.seed}:{key}") * count) if self.captions == Captions.random else 0]
