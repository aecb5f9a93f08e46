"""The end of a task: a table of its numbers, the images that it wrote, and what to type next."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from cogview_pl.cli.next_command import is_chain, next_command
from cogview_pl.lit.bars import terminal_width
from cogview_pl.runs.aims import Aim, outcomes
from cogview_pl.runs.main_metrics import duration, main_metrics, rounded
from cogview_pl.runs.run_folder import REPORT, Metrics, RunFolder

_log = logging.getLogger(__name__)

_SPEEDS = ("perf/samples_per_s", "perf/tokens_per_s", "perf/images_per_s")
_TO_OPEN = ("reconstructions.png", "samples/grid.png", "generate.png", REPORT)
_GAP = 3  # blanks between two columns of the table


def print_summary(
    folder: RunFolder, config: DictConfig, metrics: Metrics, words: Sequence[str], seconds: float
) -> None:
    """Print the end of a run.

    Args:
        folder: its folder.
        config: configuration of the run.
        metrics: its metrics.
        words: words of the command line that started it; none for a stage of a chain, after which comes the next one.
        seconds: time that it took.
    """
    if not folder.writes:
        return
    lines = [f"done: {folder.path} ({duration(seconds)})"]
    if not is_chain(folder.path):  # its stages have printed theirs
        lines += table(_shown(metrics), terminal_width())
    lines += [f"  ! {remark}" for remark in folder.remarks]
    lines += [f"  open  {folder / name}" for name in _TO_OPEN if (folder / name).exists()]
    following = next_command(folder.path, config, words) if words else None
    lines += [f"  next  {following}"] if following else []
    _log.info("%s", "\n".join(lines))


def print_aims(aims: Sequence[Aim], stages: Mapping[str, Metrics]) -> None:
    """Print the aims of a recipe next to what its stages have reached."""
    found = outcomes(aims, stages)
    if not found:
        return
    rows = [one.row for one in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["".join(f"  {cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    reached = sum(one.reached for one in found)
    _log.info("%s", "\n".join([f"{reached} of {len(found)} aims reached", *lines]))


def table(metrics: Mapping[str, float | str], width: int) -> list[str]:
    """Lines of names and values, in as many columns as fit into `width`, read downwards."""
    cells = [(name, rounded(value)) for name, value in metrics.items()]
    if not cells:
        return []
    longest = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = max(1, (width - 2 + _GAP) // (sum(longest) + 2 + _GAP))
    rows = -(-len(cells) // columns)
    texts = [f"{name:{longest[0]}}  {value:>{longest[1]}}" for name, value in cells]
    return ["  " + (" " * _GAP).join(texts[row::rows]) for row in range(rows)]


def _shown(metrics: Metrics) -> dict[str, float | str]:
    """The numbers of the table."""
    bad = {"train/bad_steps": metrics["train/bad_steps"]} if metrics.get("train/bad_steps") else {}
    return {**main_metrics(metrics), **bad, **{name: metrics[name] for name in _SPEEDS if name in metrics}}
