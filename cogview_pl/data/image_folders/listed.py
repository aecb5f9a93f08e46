"""An image of a folder with its texts, and which fields of a record they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cogview_pl.data.captions import CaptionError, field_texts
from cogview_pl.vocab.roles import CAPTION

FILE_FIELDS = ("file_name", "image", "path")
CAPTION_FIELDS = ("text", "caption")


class Span(NamedTuple):
    """Place of an image in base64 in a file."""

    archive: str
    offset: int
    size: int


class Listed(NamedTuple):
    """An image of a folder, with all captions that it has."""

    file: str
    """Relative to the folder; the name of an image that has no file of its own."""
    captions: tuple[str, ...] = ()
    others: Mapping[str, str] = {}
    """The text of each other field."""
    style: str = ""
    problem: str = ""
    """Why it cannot be used, in one line; may be empty."""
    span: Span | None = None
    """Place of an image that has no file of its own."""

    def texts(self, fields: Sequence[str], caption: str) -> tuple[str, ...]:
        """The texts in the order of the fields, with one of the captions."""
        return tuple(caption if field == CAPTION else self.others.get(field, "") for field in fields)


@dataclass(frozen=True)
class Fields:
    """Which fields of a record count.

    Args:
        texts: names of the texts that samples need; `text` is the caption.
        image: field with the file of an image; None takes the first of `FILE_FIELDS`.
        caption: field with the caption; None takes the first of `CAPTION_FIELDS`.
        style: field with the style; None: there are no styles.
    """

    texts: tuple[str, ...] = (CAPTION,)
    image: str | None = None
    caption: str | None = None
    style: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the field with the file, the first that a record has counts."""
        return FILE_FIELDS if self.image is None else (self.image,)

    @property
    def captions(self) -> tuple[str, ...]:
        """Names of the field with the caption, the first that a record has counts."""
        return CAPTION_FIELDS if self.caption is None else (self.caption,)

    def known(self) -> list[str]:
        """All names, in lower case."""
        return [name.lower() for name in (*self.files, *self.captions)]

    def read(self, record: Mapping[str, object], where: str, problem: str = "") -> Listed:
        """File and texts of a record; one that lacks something has a `problem`, which begins with `where`.

        Args:
            record: fields of a row or line.
            where: file and line.
            problem: that of the row, which counts where texts are needed.
        """
        file = record.get(name_in(record, self.files) or "")
        if not isinstance(file, str) or not file.strip():
            known = ", ".join(filter(None, record)) or "none"
            names = " or ".join(self.files)
            return Listed(where, problem=problem or f"{where} names no image; use {names} (fields here: {known})")
        try:
            if problem and self.texts:
                raise CaptionError(problem)
            return self._texts(file, record, where)
        except CaptionError as error:
            return Listed(file, problem=str(error))

    def _texts(self, file: str, record: Mapping[str, object], where: str) -> Listed:
        captions: tuple[str, ...] = ()
        others = {}
        for field in self.texts:
            if field == CAPTION:
                captions = tuple(_found(record, where, self.captions, "caption", "data.caption_field"))
            else:
                texts = _found(record, where, (field,), field, "the slot in template.layout or data.pair_field")
                others[field] = next(iter(texts), "")
        styles = [] if self.style is None else _found(record, where, (self.style,), "style", "data.style_field")
        return Listed(file, captions, others, next(iter(styles), ""))


def name_in(record: Mapping[str, object], names: Sequence[str]) -> str | None:
    """The first of the names that a record has, else the first that it has in other letter case."""
    exact = next((name for name in names if name in record), None)
    if exact is not None:
        return exact
    folded = {key.strip().lower(): key for key in record}
    return next((folded[name.lower()] for name in names if name.lower() in folded), None)


def _found(record: Mapping[str, object], where: str, names: tuple[str, ...], what: str, key: str) -> list[str]:
    """The texts in the first of the named fields that a record has; `key` is where the configuration names it."""
    name = name_in(record, names)
    if name is None:
        known = ", ".join(filter(None, record))
        raise CaptionError(f"{where} has no field {' or '.join(names)}; set {key} to one of: {known}")
    try:
        return field_texts(record[name], what)
    except CaptionError as error:
        raise CaptionError(f"{where}, {name}: {error}; mend the line or set {key}") from None
