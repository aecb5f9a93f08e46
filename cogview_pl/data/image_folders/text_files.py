"""Text files as people have them: UTF-8 with and without byte-order mark, UTF-16, and GB18030 (GBK, GB2312)."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

UTF_8 = "utf-8-sig"
GB18030 = "gb18030"
"""Chinese Excel writes it; GBK and GB2312 are parts of it."""
_UTF_16 = ("utf-16", "utf-16-le", "utf-16-be")

_BEGINNING = 2**16  # bytes at which UTF-16 is told
_PART = 2**20  # bytes that are decoded at once
_ZEROS = 0.05  # share of zero bytes in UTF-16: line feeds, separators, file names and digits have one each
_ONE_SIDED = 3  # times as many of the zero bytes are high bytes as low ones, which 一 (U+4E00) has
_SOME, _NEARLY_ALL = 0.5, 0.9
"""Share of usual Chinese characters in a text that is GB18030: few bytes of it may be UTF-8 by chance, and bytes of
UTF-8 are rarely usual characters of GB18030."""


def encoding_name(encoding: str) -> str:
    """Name of an encoding for messages; empty for UTF-8, which nobody needs to be told."""
    return "" if encoding == UTF_8 else "UTF-16" if encoding in _UTF_16 else "GB18030"


@contextmanager
def open_text(file: Path) -> Iterator[tuple[TextIO, str]]:
    """A text file, open for reading with the ends of its lines kept, and its encoding.

    Damaged bytes become lone surrogates, so that `field_texts` refuses the texts that hold them.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: while it is read, bytes of another encoding than UTF-8 are damaged.
    """
    with file.open("rb") as stream:
        encoding = _encoding_of(stream)
        stream.seek(0)
        errors = "surrogatepass" if encoding in _UTF_16 else "surrogateescape"
        with io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="") as text:
            yield text, encoding


def encoding_of(data: bytes) -> str:
    """Encoding of a text; UTF-8 also where it is none of those that are known."""
    return _encoding_of(io.BytesIO(data))


def _encoding_of(stream: BinaryIO) -> str:
    part = stream.read(_PART)
    if part.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    beginning = part[:_BEGINNING]
    low, high = beginning[0::2].count(0), beginning[1::2].count(0)
    if max(low, high) > _ZEROS * len(beginning) and max(low, high) > _ONE_SIDED * min(low, high):
        return "utf-16-be" if low > high else "utf-16-le"
    decoder = codecs.getincrementaldecoder("utf-8")()
    while part:
        try:
            decoder.decode(part)
        except UnicodeDecodeError:
            return _encoding_with_bad_bytes(part)
        if b"\n" not in part and b"\r" not in part:  # too long a line, which is refused when it is read
            break
        part = stream.read(_PART)
    return UTF_8


def _encoding_with_bad_bytes(part: bytes) -> str:
    """GB18030, where that is likelier than UTF-8 with damaged bytes."""
    lines = part[part.find(b"\n") + 1 : part.rfind(b"\n")] if len(part) == _PART else part  # whole characters
    try:
        chinese = [sign for sign in lines.decode(GB18030) if sign > "\x7f"]
    except UnicodeDecodeError:
        return UTF_8
    usual = sum(bool(sign.encode("gb2312", "ignore")) for sign in chinese)
    text = part.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    mostly_bad = bad > sum(sign > "\x7f" for sign in text) - bad
    return GB18030 if usual > len(chinese) * (_SOME if mostly_bad else _NEARLY_ALL) else UTF_8
