"""Speed of this project and of references: they are timed in turns, warm, and the median counts.

    python -m benchmarks.bench [SUBJECT | SUBJECT:TEXT …] [--only TEXT] [--json FILE] [--plots DIR] [--list]

A subject alone selects all of its rows; `SUBJECT:TEXT` selects rows with the text in their title, such as
`decode:S1-fp32`. Compare ratios of one run only, because seconds of two runs on a shared machine differ.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import (
    cuda,
    decoding,
    growth,
    image_tokenizer,
    magnify_rerank,
    plots,
    report,
    startup,
    training,
)
from benchmarks.settings import DEVICE

SUBJECTS: dict[str, Callable[[], list[report.Row]]] = {
    "decode": decoding.rows,
    "train": training.rows,
    "vq": image_tokenizer.rows,
    "magnify": magnify_rerank.magnify_rows,
    "rerank": magnify_rerank.rerank_rows,
    "growth": growth.rows,
    "startup": startup.rows,
    "cuda": cuda.rows,
}
_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the selected rows, by default all rows that need no GPU; returns the exit code."""
    options = _parser().parse_args(arguments)
    words = options.rows or [subject for subject in SUBJECTS if subject != "cuda"]
    try:
        rows = report.select(SUBJECTS, words, options.only)
        _check(words, options.plots)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return _REFUSED
    if options.list:
        print("\n".join(row.title for row in rows))
        return 0
    print(json.dumps(report.environment()))
    for row in rows:
        _run(row, options.json, options.plots)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Speed of this project and of references.")
    parser.add_argument("rows", nargs="*", metavar="SUBJECT[:TEXT]", help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows with this text in their title")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one line of JSON per row")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the curves of growth as PNG; needs matplotlib")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    return parser


def _check(words: Sequence[str], plots_folder: Path | None) -> None:
    """Raises ValueError if this machine cannot run the rows, before anything is measured."""
    if any(word.partition(":")[0] == "cuda" for word in words) and DEVICE.type != "cuda":
        raise ValueError("cuda: this machine has no CUDA device that torch can use")
    if plots_folder is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plots needs matplotlib")


def _run(row: report.Row, json_file: Path | None, plots_folder: Path | None) -> None:
    found = row.measure()
    print(report.text(row.title, found), flush=True)
    if json_file is not None:
        report.append_json(json_file, row.title, found)
    if plots_folder is not None and found.curve is not None:
        plots.draw(plots_folder / f"{row.title.replace(':', '-')}.png", found.curve)
    gc.collect()  # free the models of this row before the next one
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
