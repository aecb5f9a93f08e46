"""The result of an estimate: bytes of each part of memory in each phase of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

FORWARD, BACKWARD, UPDATE = "forward pass", "backward pass", "optimizer step"
"""Phases of a training step."""

WEIGHTS, GRADIENTS, OPTIMIZER, OPTIMIZER_STEP = "weights", "gradients", "optimizer", "optimizer_step"
ACTIVATIONS, LOGITS, BATCH = "activations", "logits", "batch"
"""Parts of a training step."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, by phase and part."""

    phases: Mapping[str, Counter[str]]

    @cached_property
    def peak_phase(self) -> str:
        """Name of the phase with the most bytes."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> Counter[str]:
        """Parts of the phase with the most bytes."""
        return self.phases[self.peak_phase]

    @property
    def total(self) -> int:
        """Bytes of the phase with the most bytes."""
        return sum(self.peak.values())

    def figures(self, name: str) -> dict[str, float]:
        """`NAME/PART_bytes`: the most bytes of each part in any phase; `NAME/total_bytes`: all parts at the peak."""
        parts = sorted({part for phase in self.phases.values() for part in phase})
        most = {part: max(phase[part] for phase in self.phases.values()) for part in parts}
        sizes = {f"{name}/{part}_bytes": float(size) for part, size in most.items() if size}
        return {**sizes, f"{name}/total_bytes": float(self.total)}
