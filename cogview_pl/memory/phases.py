"""The result of an estimate: bytes of each part of memory in each phase of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

FORWARD, BACKWARD, UPDATE = "forward pass", "backward pass", "optimizer step"
"""Phases of a training step."""

WEIGHTS, GRADIENTS, OPTIMIZER, OPTIMIZER_STEP = "weights", "gradients", "optimizer", "optimizer_step"
ACTIVATIONS, LOGITS, BATCH, AVERAGES = "activations", "logits", "batch", "averages"
"""Parts of a training step."""

FP32, RGB = 4, 3
"""Bytes of a number in fp32, and channels of an image."""

Phases = dict[str, Counter[str]]
"""Bytes by phase and part."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, by phase and part."""

    phases: Mapping[str, Counter[str]]

    @cached_property
    def peak_phase(self) -> str:
        """Name of the phase with the most bytes."""
        return max(self.phases, key=lambda name: self.phases[name].total())

    @property
    def peak(self) -> Counter[str]:
        """Parts of the phase with the most bytes."""
        return self.phases[self.peak_phase]

    @property
    def total(self) -> int:
        """Bytes of the phase with the most bytes."""
        return self.peak.total()

    def figures(self, name: str) -> dict[str, float]:
        """`NAME/PART_bytes`: the most bytes of each part in any phase; `NAME/total_bytes`: all parts at the peak."""
        most: Counter[str] = Counter()
        for parts in self.phases.values():
            most |= parts
        sizes = {f"{name}/{part}_bytes": float(most[part]) for part in sorted(most)}
        return {**sizes, f"{name}/total_bytes": float(self.total)}
