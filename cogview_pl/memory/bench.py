"""How fast a step will be, from lines that the benchmark has written on the same machine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogview_pl.errors import UserError

RATE, SIZE = "TFLOP/s", "parameters"
"""Facts of a row of training that are read: rate of the work that the task needs, size of the model."""


def steps_per_second(
    file: Path, *, device: str, precision: str, recompute: str, parameters: int, flops: float
) -> float | None:
    """Expected steps per second on one device; None where the file has no row of such a device and precision.

    The row of the model nearest in size counts, one with the same activation checkpointing before others.

    Args:
        file: `nox -s bench -- --json FILE`; need not exist.
        device: as `torch.cuda.get_device_name` gives it, or `cpu`.
        precision: as rows name it: `fp32`, `bf16`, `fp16`.
        recompute: activation checkpointing.
        parameters: of the model.
        flops: operations of a step.

    Raises:
        UserError: the file is not one of the benchmark.
    """
    found: list[tuple[bool, float, float]] = []
    for line in _lines(file):
        facts, title = line.get("facts", {}), str(line.get("row", ""))
        if {RATE, SIZE} <= facts.keys() and f"-{precision}" in title and line["machine"]["device"] == device:
            other = not title.endswith(f"-{recompute}") and not (recompute == "none" and title.endswith(precision))
            found.append((other, abs(math.log(facts[SIZE] / parameters)), facts[RATE]))
    return min(found)[2] * 1e12 / flops if found else None


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "row" not in found:
            raise UserError(f"plan.bench={file}: line {number} is not one of `nox -s bench -- --json`; give its file")
        yield found
