"""Ranges of the numbers in a configuration. Each field of a dataclass states its range next to its name and type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import field, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

from omegaconf import MISSING as MISSING

_KEY = "limit"


class Limit(NamedTuple):
    """A range of numbers; NaN is in none of them."""

    words: str
    """Completes the sentence `KEY=VALUE must be …`."""
    holds: Callable[[float], bool]


def limited(limit: Limit, default: Any = MISSING) -> Any:
    """A field whose number, or numbers in a list or mapping, must lie in a range; `None` passes if allowed."""
    return field(default=default, metadata={_KEY: limit})


# Numbers at the far ends of floats overflow in fp32, or vanish there; no key has a use for them.
_SMALL, _LARGE = 1e-9, 1e9

COUNT = Limit("a whole number from 1 to 2147483647", lambda value: 1 <= value < 2**31 and value % 1 == 0)
UP_TO_256 = Limit("a whole number from 1 to 256", lambda value: 1 <= value <= 256 and value % 1 == 0)
WHOLE = Limit("a whole number, at least 0", lambda value: value >= 0 and value % 1 == 0)
SEED = Limit("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32 and value % 1 == 0)
AT_LEAST_0 = Limit("0, or from 1e-9 to 1e9", lambda value: value == 0 or _SMALL <= value <= _LARGE)
ABOVE_0 = Limit("from 1e-9 to 1e9", lambda value: _SMALL <= value <= _LARGE)
SHARE = Limit("between 0 and 1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Limit("at least 0, below 1", lambda value: 0 <= value < 1)
SHARE_ABOVE_0 = Limit("from 1e-9 to 1", lambda value: _SMALL <= value <= 1)
ZOOM = Limit("from 1 to 16", lambda value: 1 <= value <= 16)
FINITE = Limit("a finite number", lambda value: -math.inf < value < math.inf)

# Sampling; logits in fp32 differ by about 100 at most.
TEMPERATURE = Limit("0, or from 1e-6 to 1e6", lambda value: value == 0 or 1e-6 <= value <= 1e6)
TOP_P = Limit("from 1e-6 to 1", lambda value: 1e-6 <= value <= 1)
GUIDANCE = Limit("from 0 to 100", lambda value: 0 <= value <= 100)

# Fields with these limits; the argument is the default.
count = partial(limited, COUNT)
up_to_256 = partial(limited, UP_TO_256)
whole = partial(limited, WHOLE)
seed_number = partial(limited, SEED)
at_least_0 = partial(limited, AT_LEAST_0)
above_0 = partial(limited, ABOVE_0)
share = partial(limited, SHARE)
share_below_1 = partial(limited, SHARE_BELOW_1)
share_above_0 = partial(limited, SHARE_ABOVE_0)


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
        for place, number in _numbers(value, named=_KEY in item.metadata):
            if isinstance(number, (int, float)) and not limit.holds(number):
                yield f"{key}{place}", number, limit.words


def _numbers(value: Any, *, named: bool) -> list[tuple[str, Any]]:
    """A value, or those in a list and, if `named`, in a mapping, with their places."""
    if isinstance(value, list):
        return [(f"[{place}]", number) for place, number in enumerate(value)]
    if isinstance(value, dict) and named:
        return [(f".{name}", number) for name, number in value.items()]
    return [("", value)]
