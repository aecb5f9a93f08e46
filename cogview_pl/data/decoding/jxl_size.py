"""The size of a JPEG XL image, read before its package decodes it: the package decodes when it opens a file."""

from __future__ import annotations

from fractions import Fraction
from typing import BinaryIO

_CODESTREAM = b"\xff\x0a"
_SIZE_HEADER = 16  # bytes that hold it
_MOST_BOXES = 64  # before the image; files have a few
_EDGE_BITS = (9, 13, 18, 30)
_RATIOS = (Fraction(1), Fraction(6, 5), Fraction(4, 3), Fraction(3, 2), Fraction(16, 9), Fraction(5, 4), Fraction(2))


def jxl_size(stream: BinaryIO) -> tuple[int, int]:
    """Width and height in pixels; the position in the stream changes.

    Raises:
        ValueError: the file has no header of an image.
    """
    stream.seek(0)
    head = stream.read(_SIZE_HEADER)
    return _size(head if head.startswith(_CODESTREAM) else _codestream_in_boxes(stream))


def _codestream_in_boxes(stream: BinaryIO) -> bytes:
    """The beginning of the image in a file of boxes (ISO/IEC 18181-2)."""
    place = 0
    for _ in range(_MOST_BOXES):
        stream.seek(place)
        head = stream.read(16)
        size, kind, content = int.from_bytes(head[:4], "big"), head[4:8], place + 8
        if size == 1:
            size, content = int.from_bytes(head[8:], "big"), place + 16
        if kind in (b"jxlc", b"jxlp"):
            stream.seek(content + (4 if kind == b"jxlp" else 0))  # the number of the part
            return stream.read(_SIZE_HEADER)
        if size < 8:  # the last box, or no box
            break
        place += size
    raise ValueError("no JPEG XL image in the file")


def _size(codestream: bytes) -> tuple[int, int]:
    if not codestream.startswith(_CODESTREAM):
        raise ValueError("no JPEG XL image in the file")
    bits = _Bits(int.from_bytes(codestream[2:], "little"))
    is_small = bits.take(1)
    height = _edge(bits, is_small)
    ratio = bits.take(3)
    width = int(height * _RATIOS[ratio - 1]) if ratio else _edge(bits, is_small)
    return width, height


def _edge(bits: _Bits, is_small: int) -> int:
    """An edge in pixels; small ones are multiples of 8."""
    return 8 * (1 + bits.take(5)) if is_small else 1 + bits.take(_EDGE_BITS[bits.take(2)])


class _Bits:
    """Bits of a number, the lowest first."""

    def __init__(self, value: int) -> None:
        self._value = value

    def take(self, count: int) -> int:
        taken = self._value & ((1 << count) - 1)
        self._value >>= count
        return taken
