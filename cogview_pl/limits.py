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
    """A field whose number, or whose numbers in a list, must lie in a range; `None` passes if the type allows it."""
    return field(default=default, metadata={_KEY: limit})


COUNT = Limit("a whole number, at least 1", lambda value: value >= 1 and value % 1 == 0)
WHOLE = Limit("a whole number, at least 0", lambda value: value >= 0 and value % 1 == 0)
SEED = Limit("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32 and value % 1 == 0)
AT_LEAST_0 = Limit("at least 0", lambda value: 0 <= value < math.inf)
ABOVE_0 = Limit("above 0", lambda value: 0 < value < math.inf)
SHARE = Limit("between 0 and 1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Limit("at least 0, below 1", lambda value: 0 <= value < 1)
SHARE_ABOVE_0 = Limit("above 0, at most 1", lambda value: 0 < value <= 1)
FINITE = Limit("a finite number", lambda value: -math.inf < value < math.inf)

# Fields with these limits; the argument is the default.
count = partial(limited, COUNT)
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
        numbers = enumerate(value) if isinstance(value, list) else [(None, value)]
        for place, number in numbers:
            if isinstance(number, (int, float)) and not limit.holds(number):
                yield key if place is None else f"{key}[{place}]", number, limit.words
