"""Ranges of the numbers in a configuration: each stands with its name and type, in the dataclass of a room."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any, NamedTuple

from omegaconf import MISSING

__all__ = [
    "MISSING",
    "Limit",
    "above_0",
    "at_least_0",
    "count",
    "out_of_range",
    "seed_number",
    "share",
    "share_above_0",
    "share_below_1",
]

_KEY = "limit"


class Limit(NamedTuple):
    """A range of numbers."""

    words: str
    """Goes after `must be`."""
    holds: Callable[[float], bool]


def limited(words: str, holds: Callable[[float], bool], default: Any = MISSING) -> Any:
    """A field of a dataclass whose value must lie in a range; `None` passes where the type allows it."""
    return field(default=default, metadata={_KEY: Limit(words, holds)})


def count(default: Any = MISSING) -> Any:
    """A field that holds a whole number of things, at least one."""
    return limited("a whole number, at least 1", lambda value: value >= 1 and value % 1 == 0, default)


def seed_number() -> Any:
    """A field that holds what random generators take as a seed."""
    return limited("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def at_least_0(default: Any = MISSING) -> Any:
    """A field that holds a finite number from 0 on."""
    return limited("at least 0", lambda value: 0 <= value < math.inf, default)


def above_0(default: Any = MISSING) -> Any:
    """A field that holds a finite number above 0."""
    return limited("above 0", lambda value: 0 < value < math.inf, default)


def share(default: Any = MISSING) -> Any:
    """A field that holds a number from 0 to 1."""
    return limited("between 0 and 1", lambda value: 0 <= value <= 1, default)


def share_below_1(default: Any = MISSING) -> Any:
    """A field that holds a number from 0 on that is smaller than 1."""
    return limited("at least 0, below 1", lambda value: 0 <= value < 1, default)


def share_above_0(default: Any = MISSING) -> Any:
    """A field that holds a number above 0, up to 1."""
    return limited("above 0, at most 1", lambda value: 0 < value <= 1, default)


def out_of_range(values: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Fields of a dataclass, and of those inside it, that are out of range: dotted key, value, what it must be."""
    for item in fields(values):
        value, key = getattr(values, item.name), f"{prefix}{item.name}"
        limit = item.metadata.get(_KEY)
        if is_dataclass(value):
            yield from out_of_range(value, f"{key}.")
        elif limit is not None and value is not None and not limit.holds(value):
            yield key, value, limit.words
