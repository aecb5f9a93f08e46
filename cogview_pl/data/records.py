"""Lists of samples in files: on each line a JSON object with its checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

_CHECKSUM = "crc32"
_SEPARATORS = {ord(sign): rf"\u{ord(sign):04x}" for sign in "\u0085\u2028\u2029"}
"""Signs that some programs take for the end of a line, as JSON escapes. JSON itself escapes those below U+0020."""


def record_line(record: Mapping[str, object]) -> bytes:
    """A line of a list; its last field is the CRC-32 of the others."""
    text = json.dumps({**record, _CHECKSUM: _checksum(record)}, ensure_ascii=False).translate(_SEPARATORS)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a file name that is no valid Unicode: a JSON escape


def read_record(line: bytes | str, *, ours: bool = False) -> dict[str, Any]:
    """The record of a line, without its checksum. Lines that users write have none.

    Args:
        line: JSON.
        ours: whether a run has written the line, so that it must have a checksum.

    Raises:
        ValueError: the line is no JSON object, or its checksum is wrong.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if (ours or _CHECKSUM in record) and record.pop(_CHECKSUM, None) != _checksum(record):
        raise ValueError("its checksum is wrong")
    return record


def _checksum(record: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
