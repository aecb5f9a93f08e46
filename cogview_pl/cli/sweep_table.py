"""The table at the end of a sweep: one line per job, with its overrides and its metrics."""

from __future__ import annotations

from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback

_COLUMNS = 6
_PREFERRED = ("val/", "eval/", "toy/", "codebook/usage", "perf/tokens_per_s")


class SweepTable(Callback):
    """Collects the metrics of the jobs and prints them when the sweep ends."""

    def __init__(self) -> None:
        self._jobs: list[tuple[str, dict[str, Any]]] = []

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        """Keep the metrics of a job that has finished."""
        if job_return.status == JobStatus.COMPLETED and isinstance(job_return.return_value, dict):
            self._jobs.append((" ".join(job_return.overrides or []), job_return.return_value))

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Print the table."""
        names = sorted({name for _, metrics in self._jobs for name in metrics if name.startswith(_PREFERRED)})
        names = names[:_COLUMNS]
        width = max((len(overrides) for overrides, _ in self._jobs), default=0)
        print("\n" + " " * width, *(f"{name:>18}" for name in names))
        for overrides, metrics in self._jobs:
            cells = (f"{metrics[name]:18.4g}" if name in metrics else " " * 18 for name in names)
            print(f"{overrides:{width}}", *cells)
