"""The end of a task: a table of its numbers, the images that it wrote, and what to type next."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cogview_pl.durable.latest import LATEST, newest
from cogview_pl.lit.bars import terminal_width
from cogview_pl.runs.aims import Aim, outcomes
from cogview_pl.runs.command import command
from cogview_pl.runs.main_metrics import duration, main_metrics, rounded
from cogview_pl.runs.run_folder import REPORT, Metrics, RunFolder

_log = logging.getLogger(__name__)

_SPEEDS = ("perf/samples_per_s", "perf/tokens_per_s", "perf/images_per_s")
_TO_OPEN = ("reconstructions.png", "samples/grid.png", "generate.png", REPORT)
_PLAIN = re.compile(r"([\w.]+=)'([\w./-]+)'")  # quoted for Hydra, though it needs no quotes
_GAP = 3  # blanks between two columns of the table
_PROMPT = "prompts=[左上角有一个大的红色圆形]"
_STYLED_PROMPT = "prompts=[左上角有一个大的红色圆形的油画图像]"
_KEPT_GROUPS = ("data", "model", "image_tokenizer", "text", "outputs", "threads")
"""Keys of a run that the next task takes over."""
_OF_TRAINING = ("image_tokenizer", "text.model=", "data.token_store=")
"""Keys whose values a sequence model has in its folder."""
_BEFORE_TRAINING = ("vqvae", "tokenize")
"""Tasks after which a sequence model is trained."""


class _Next(NamedTuple):
    """The task that uses the result of a run."""

    words: tuple[str, ...]
    key: str
    """Key that names the run for it."""
    needs: tuple[str, ...] = ()
    """Tasks with runs that it also reads."""
    always: bool = False
    """Whether the key must be given for the newest run too."""


_NEXT = {
    "vqvae": _Next(("task=tokenize",), "image_tokenizer.path"),
    "tokenize": _Next(("task=pretrain",), "data.token_store"),
    "pretrain": _Next(("task=generate", _PROMPT), "init_from"),
    "super_resolution": _Next(("task=magnify",), "upscale_with"),
    "style": _Next(("task=generate", _STYLED_PROMPT), "init_from", always=True),
    "caption": _Next(("task=rerank",), "rerank_with"),
    "features": _Next(("task=evaluate", "evaluate.metrics=[fid,toy]"), "evaluate.features", ("pretrain",)),
    "generate": _Next(("task=rerank",), "pairs", ("caption",), always=True),
    "magnify": _Next(
        ("task=generate", "upscale_with={outputs}/super_resolution/latest"), "", ("pretrain", "super_resolution")
    ),
    "rerank": _Next(
        ("task=generate", "rerank_with={outputs}/caption/latest", "num_images_per_prompt=8", "top_n=1"),
        "",
        ("pretrain", "caption"),
    ),
}


def print_summary(
    folder: RunFolder, task: str, outputs: str, metrics: Metrics, words: Sequence[str], seconds: float
) -> None:
    """Print the end of a run.

    Args:
        folder: its folder.
        task, outputs: keys of the run.
        metrics: its metrics.
        words: words of the command line that started it; none for a stage of a chain, after which comes the next one.
        seconds: time that it took.
    """
    if not folder.writes:
        return
    lines = [f"done: {folder.path} ({duration(seconds)})"]
    if not _is_chain(folder.path):  # its stages have printed theirs
        lines += table(_shown(metrics), terminal_width())
    lines += [f"  ! {remark}" for remark in folder.remarks]
    lines += [f"  open  {folder / name}" for name in _TO_OPEN if (folder / name).exists()]
    describes = task == "generate" and "generate/captions" in metrics  # task=rerank does not take captions
    following = _next_command(folder.path, task, outputs, words) if words and not describes else None
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


def _next_command(folder: Path, task: str, outputs: str, words: Sequence[str]) -> str | None:
    """A whole command that uses the result of a run; None if there is no such task, or it would lack another run."""
    following = _NEXT.get(task) or (_Next(_NEXT["pretrain"].words, "", ("pretrain",)) if _is_chain(folder) else None)
    runs = Path(outputs)
    if following is None or any(newest(runs / needed / LATEST) is None for needed in following.needs):
        return None
    left_out = (f"{following.key}=", *(() if task in _BEFORE_TRAINING else _OF_TRAINING))
    kept = [
        word
        for word in words
        if word.lstrip("+~").partition("=")[0].split(".")[0] in _KEPT_GROUPS and not word.startswith(left_out)
    ]
    given = [word.format(outputs=outputs) for word in following.words]
    is_newest = newest(runs / task / LATEST) == folder.resolve()
    if following.key and (following.always or not is_newest):
        given.append(f"{following.key}={folder}")
    return command([*given[:1], *(_PLAIN.sub(r"\1\2", word) for word in kept), *given[1:]])


def _is_chain(folder: Path) -> bool:
    return (folder / REPORT).exists()
