"""The table of a sweep: a row per job with its values of the swept keys and its metrics, or why it has none."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from cogview_pl.cli.sweep_jobs import Job, State
from cogview_pl.durable.write import write_text

FILE = "sweep.csv"

_MOST = 6  # columns of metrics, unless `sweep.metrics` names others
_PREFERRED = ("val/", "eval/", "toy/", "codebook/usage", "perf/tokens_per_s")
_DIGITS = 4
_GAP = "  "


def write_csv(sweep: Path, jobs: Sequence[Job], wanted: Sequence[str] | None) -> Path:
    """Write `sweep.csv`: swept keys, metrics, and the reason of jobs that have failed; returns its path."""
    keys, names = _swept(jobs), _metrics(jobs, wanted)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*keys, *names, "failed"])
    for job in jobs:
        values = (job.metrics.get(name, "") for name in names)
        rows.writerow(
            [*(job.varies.get(key, "") for key in keys), *values, _reason(job).removeprefix(f"{State.failed.value}: ")]
        )
    write_text(sweep / FILE, text.getvalue())
    return sweep / FILE


def print_table(jobs: Sequence[Job], wanted: Sequence[str] | None, objective: str | None) -> None:
    """Print the table, and which wanted metrics no job has."""
    keys, names = _swept(jobs), _metrics(jobs, wanted)
    names = [*([objective] if objective in names else []), *(name for name in names if name != objective)]
    cells = [[*keys, *names]]
    cells += [[*(job.varies.get(key, "") for key in keys), *(_number(job, name) for name in names)] for job in jobs]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for row, reason in zip(cells, ["", *map(_reason, jobs)], strict=True):
        swept = (cell.ljust(width) for cell, width in zip(row[: len(keys)], widths, strict=False))
        measured = (cell.rjust(width) for cell, width in zip(row[len(keys) :], widths[len(keys) :], strict=True))
        print(_GAP.join([*swept, *([reason] if reason else measured)]).rstrip())
    missing = [name for name in wanted or () if not any(name in job.metrics for job in jobs)]
    if missing:
        known = sorted({name for job in jobs for name in job.metrics})
        print(f"no job has {', '.join(missing)} of sweep.metrics; there are {', '.join(known) or 'none'}")


def print_best(jobs: Sequence[Job], objective: str, *, largest: bool) -> None:
    """Print the values of the swept keys with which the objective is smallest, or largest."""
    done = [job for job in jobs if job.state is State.done]
    if done:
        best = (max if largest else min)(done, key=lambda job: float(job.metrics[objective]))
        print(f"best {objective}: {_number(best, objective)} with {' '.join(map('='.join, best.varies.items()))}")


def _swept(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(key for job in jobs for key in job.varies))


def _metrics(jobs: Sequence[Job], wanted: Sequence[str] | None) -> list[str]:
    """Names of the columns: the wanted ones, else the first few of those that say how good a run is."""
    if wanted is not None:
        return list(wanted)
    return sorted({name for job in jobs for name in job.metrics if name.startswith(_PREFERRED)})[:_MOST]


def _number(job: Job, name: str) -> str:
    value = job.metrics.get(name, "")
    return value if isinstance(value, str) else f"{value:.{_DIGITS}g}"


def _reason(job: Job) -> str:
    if job.state is State.done:
        return ""
    if job.state is State.running:
        return "running: it has not ended, or was killed"
    return f"{job.state.value}: {job.reason}" if job.reason else job.state.value
