"""Parts of a tokenisation: which samples each of them holds, and what must agree among them.

A part holds whole batches of the data set, in order. So its images are encoded in the same batches as by one process,
and the rows of all parts, one after the other, are the rows of a single store. `joining.py` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cogview_pl.data.token_store.rows import require_counts


@dataclass
class Part:
    """A part of the data set, as the header of its token store names it.

    Raises:
        ValueError: the values do not fit together.
    """

    number: int
    """1 … `count`."""
    count: int
    first: dict[str, int]
    """Index of the first sample by split."""
    samples: dict[str, int]
    """Number of samples of the whole data set by split."""
    inputs: dict[str, str]
    """Fingerprints of the data set; empty where they are not known."""

    def __post_init__(self) -> None:
        require_counts({"number": self.number, "count": self.count}, least=1)
        require_counts({**self.samples, **self.first}, least=0)
        named = all(isinstance(text, str) for text in dict(**self.inputs).values())
        if self.number > self.count or self.first.keys() != self.samples.keys() or not named:
            raise ValueError(f"part is {self}")

    def __str__(self) -> str:
        first = ", ".join(f"{name} from sample {place}" for name, place in self.first.items())
        return f"{self.number} of {self.count} ({first})"


def span_of(number: int, count: int, samples: int, batch_size: int) -> range:
    """The samples of a split in part `number` of `count`; a part may be empty."""
    batches = -(-samples // batch_size)
    start, stop = (min(batches * end // count * batch_size, samples) for end in (number - 1, number))
    return range(start, stop)


def part_of(
    number: int, count: int, samples: Mapping[str, int], batch_size: int, inputs: Mapping[str, str]
) -> tuple[Part, dict[str, range]]:
    """Part `number` of `count`, and its samples by split.

    Args:
        number: 1 … `count`.
        count: number of parts.
        samples: number of samples of the data set by split.
        batch_size: samples that are encoded at once.
        inputs: fingerprints of the data set.
    """
    spans = {name: span_of(number, count, total, batch_size) for name, total in samples.items()}
    first = {name: span.start for name, span in spans.items()}
    return Part(number, count, first, dict(samples), dict(inputs)), spans
