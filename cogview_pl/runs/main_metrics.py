"""The metrics of a run that its reader wants first, and how numbers and times are written."""

from __future__ import annotations

from collections.abc import Mapping

_MINOR = (
    "perf/",
    "lr-",
    "activations/",
    "train/",
    "data/",
    "protocol/",
    "codebook/batch_",
    "codebook/dead",
    "codebook/revived",
)
"""Prefixes of metrics about speed, settings or single batches."""
_MOST = 1e15  # from here on digits mean nothing


def main_metrics(metrics: Mapping[str, float | str]) -> dict[str, float | str]:
    """Metrics about the result: losses of the validation first, then by name."""
    names = [name for name in metrics if not name.startswith(_MINOR)]
    return {name: metrics[name] for name in sorted(names, key=lambda name: (not name.startswith("val/loss"), name))}


def rounded(value: float | str) -> str:
    """A number with four significant digits; above a thousand, and for whole numbers, all digits before the point."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() or 1000 <= abs(value) < _MOST else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Such as `2 min 11 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
