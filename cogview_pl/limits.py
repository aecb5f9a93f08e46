"""Ranges of the numbers in a configuration. Each field of a dataclass states its range next to its name and type."""

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
    """A range of numbers; NaN is in none of them."""

    words: str
    """Completes the sentence `KEY=VALUE must be …`."""
    holds: Callable[[float], bool]


COUNT = Limit("a whole number, at least 1", lambda value: value >= 1 and value % 1 == 0)
SEED = Limit("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32 and value % 1 == 0)
AT_LEAST_0 = Limit("at least 0", lambda value: 0 <= value < math.inf)
ABOVE_0 = Limit("above 0", lambda value: 0 < value < math.inf)
SHARE = Limit("between 0 and 1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Limit("at least 0, below 1", lambda value: 0 <= value < 1)
SHARE_ABOVE_0 = Limit("above 0, at most 1", lambda value: 0 < value <= 1)
FINITE = Limit("a finite number", lambda value: -math.inf < value < math.inf)


def limited(limit: Limit, default: Any = MISSING) -> Any:
    """A field whose number, or whose numbers in a list, must lie in a range; `None` passes if the type allows it."""
    return field(default=default, metadata={_KEY: limit})


def count(default: Any = MISSING) -> Any:
    """A field for a whole number, at least 1."""
    return limited(COUNT, default)


def seed_number() -> Any:
    """A field for the seed of random generators."""
    return limited(SEED)


def at_least_0(default: Any = MISSING) -> Any:
    """A field for a finite number, at least 0."""
    return limited(AT_LEAST_0, default)


def above_0(default: Any = MISSING) -> Any:
    """A field for a finite number above 0."""
    return limited(ABOVE_0, default)


def share(default: Any = MISSING) -> Any:
    """A field for a number from 0 to 1."""
    return limited(SHARE, default)


def share_below_1(default: Any = MISSING) -> Any:
    """A field for a number from 0 on, below 1."""
    return limited(SHARE_BELOW_1, default)


def share_above_0(default: Any = MISSING) -> Any:
    """A field for a number above 0, at most 1."""
    return limited(SHARE_ABOVE_0, default)


def out_of_range(values: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Numbers out of range in a dataclass and in those inside it: dotted key, number, words of the limit.

    Numbers without a limit must be finite.
    """
    for item in fields(values):
        value, key = getattr(values, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from out_of_range(value, f"{key}.")
            continue
        limit = item.metadata.get(_KEY, FINITE)
        numbers = enumerate(value) if isinstance(value, list) else [(None, value)]
        for place, number in numbers:
            if isinstance(number, (int, float)) and not limit.holds(number):
                yield key if place is None else f"{key}[{place}]", number, limit.words
