"""Plots of measured curves; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Curve


def draw(file: Path, curve: Curve) -> None:
    """Write a small PNG of a curve; both axes start at 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 2.6), layout="constrained")
    axes.plot(curve.x, curve.y, "o-", markersize=3)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.1 * max(curve.y))
    axes.set_xlabel(curve.x_label)
    axes.set_ylabel(curve.y_label)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
