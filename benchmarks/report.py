"""Rows of the benchmark: their selection, and the text and JSON of their results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.contest import Timing
from benchmarks.settings import DEVICE

PACKAGES = ("torch", "transformers", "ctranslate2", "vector-quantize-pytorch")


class Curve(NamedTuple):
    """One value over another, for a plot."""

    x_label: str
    x: list[float]
    y_label: str
    y: list[float]


class Result(NamedTuple):
    """Result of a row."""

    unit: str
    """Unit of the values."""
    values: dict[str, float]
    """Contender → median; the first contender is this project."""
    spreads: dict[str, float]
    """Contender → interquartile range / median."""
    facts: dict[str, float | int | str]
    """Derived or counted values."""
    curve: Curve | None = None


class Row(NamedTuple):
    """A row that can be measured by itself."""

    title: str
    """`SUBJECT:WHAT`."""
    measure: Callable[[], Result]


def result(unit: str, timings: Mapping[str, Timing], units: Mapping[str, float], **facts: float | int | str) -> Result:
    """Milliseconds per unit of work; a call of contender `name` does `units[name]` units (1 by default)."""
    values = {name: timing.median / units.get(name, 1) * 1e3 for name, timing in timings.items()}
    return Result(unit, values, {name: timing.spread for name, timing in timings.items()}, dict(facts))


def select(subjects: Mapping[str, Callable[[], Sequence[Row]]], words: Sequence[str], only: str = "") -> list[Row]:
    """The selected rows, in the order of the words.

    Args:
        subjects: the rows of every subject.
        words: `SUBJECT` for all of its rows, `SUBJECT:TEXT` for those with the text in their title.
        only: text that must be in the title of all rows.

    Raises:
        ValueError: there is no such subject, or nothing is left.
    """
    found: list[Row] = []
    for word in words:
        subject, _, text = word.partition(":")
        if subject not in subjects:
            raise ValueError(f"no subject {subject}; there are {', '.join(subjects)}")
        found += [row for row in subjects[subject]() if text in row.title.partition(":")[2] and only in row.title]
    if not found:
        raise ValueError(f"no row of {' '.join(words)} has {only!r} in its title" if only else f"no row {word}")
    return found


def text(title: str, found: Result) -> str:
    """Text of a row: values, their ratios to the first, spreads and facts."""
    first = next(iter(found.values.values()))
    lines = [title]
    for name, value in found.values.items():
        lines.append(
            f"    {name:32} {value:11.3f} {found.unit}   {value / first:6.2f} x the first{_spread(found, name)}"
        )
    lines += [
        f"    {name}: {value:.4g}" if isinstance(value, float) else f"    {name}: {value}"
        for name, value in found.facts.items()
    ]
    return "\n".join(lines)


def append_json(file: Path, title: str, found: Result) -> None:
    """Append a line of JSON to a file."""
    line = {"row": title, **environment(), **found._asdict()}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def environment() -> dict[str, object]:
    """Machine, versions, and the load before the run, because load makes times unreliable."""
    machine = {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    return {"machine": machine, "versions": {"python": platform.python_version()} | _versions()}


def _spread(found: Result, name: str) -> str:
    return f", spread {found.spreads[name]:.0%}" if name in found.spreads else ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    installed = {str(found.metadata["Name"]).lower() for found in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}
