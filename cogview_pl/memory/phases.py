"""The moments of a run at which its memory may be at its height."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Moments:
    """Bytes on one device by part, at each moment that may be the worst."""

    parts: Mapping[str, Counter[str]]

    @cached_property
    def worst(self) -> str:
        """Name of the moment with the most bytes."""
        return max(self.parts, key=lambda name: sum(self.parts[name].values()))

    @property
    def peak(self) -> Counter[str]:
        """Parts of the worst moment."""
        return self.parts[self.worst]

    @property
    def total(self) -> int:
        """Bytes of the worst moment."""
        return sum(self.peak.values())
