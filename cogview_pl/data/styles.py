"""Styles in captions: each sample uses one of several patterns, such as `{text}的{style}图像`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import Formatter

from cogview_pl.data.samples import fraction_of
from cogview_pl.errors import UserError

_HOLES = ("text", "style")
_STYLES_NAMED = 20  # in a message; a field that is no style can have thousands of values


class StylePatterns:
    """Names styles in captions.

    Args:
        patterns: texts with the fields `{text}` and `{style}`; without patterns the object is false.
        holes: the fields; instructions have `{style}` alone.

    Raises:
        UserError: a pattern lacks one of the fields, or has others.
    """

    def __init__(self, patterns: Sequence[str], holes: Sequence[str] = _HOLES) -> None:
        for pattern in patterns:
            _check(pattern, holes)
        self.patterns = tuple(patterns)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def apply(self, text: str, style: str, key: str) -> str:
        """The caption in a pattern that a hash of the key chooses; the split uses another hash."""
        pattern = self.patterns[int(fraction_of(f"pattern:{key}") * len(self.patterns))]
        return pattern.format(text=text, style=style)


def check_present(wanted: Iterable[str], found: Iterable[str], field: str) -> None:
    """Raises UserError if the data lack a style; the message names it, and the styles found."""
    known = sorted(set(found) - {""})
    missing = next((style for style in wanted if style not in known), None)
    if missing is not None:
        more = " …" if len(known) > _STYLES_NAMED else ""
        raise UserError(
            f"data.styles: no sample has the style {missing!r}; data.style_field={field} has: "
            f"{', '.join(known[:_STYLES_NAMED]) or 'none'}{more}"
        )


def _check(pattern: str, needed: Sequence[str]) -> None:
    try:
        holes = [part[1:] for part in Formatter().parse(pattern) if part[1] is not None]
    except ValueError:  # unbalanced braces
        holes = []
    if {name for name, _, _ in holes} != set(needed) or any(form or conversion for _, form, conversion in holes):
        named = "the holes {text} and {style}" if len(needed) > 1 else "the hole {style}"
        example = "{text}的{style}图像" if len(needed) > 1 else "{style}风格"
        raise UserError(f"data.style_patterns: {pattern!r} must have {named} and no others, as in {example}")
