"""Planned against measured peak memory of a task, in a process of its own.

    python -m benchmarks.peaks [live | resident] OVERRIDES …

`live` measures the bytes of all live tensors, the same quantity that a plan predicts. `resident` measures the growth of
resident memory, which includes work space of libraries and fragmentation. On a GPU both measure the peak of the
allocator. The result is one line of JSON. `resident` is useless for small models, because a process grows by tens of
megabytes anyway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

_RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings of glibc that return freed memory to the system, so that resident memory is the memory in use."""


class Peak(NamedTuple):
    """Planned and measured peak of a run."""

    planned: int
    """Bytes at the peak."""
    phase: str
    measured: int
    steps_per_s: float
    """Training steps per second at the end; 0 for other tasks."""

    @property
    def error(self) -> float:
        """Planned / measured - 1."""
        return self.planned / self.measured - 1


def measure_apart(overrides: Sequence[str], cwd: Path, how: str = "live") -> Peak:
    """Run a task in a fresh process, in the folder `cwd`."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if how == "resident":
        environment |= _RETURN_AT_ONCE
    command = [sys.executable, "-m", "benchmarks.peaks", how, *overrides]
    ended = subprocess.run(command, check=True, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    return Peak(**json.loads(ended.stdout.splitlines()[-1]))


def measure(overrides: Sequence[str], how: str) -> Peak:
    """Run a task in this process; `how` is `live` or `resident`."""
    import torch

    from benchmarks import memory
    from benchmarks.random_runs import composed
    from cogview_pl.data.sharing import Team
    from cogview_pl.memory.trace import LiveBytes
    from cogview_pl.runs.run_folder import RunFolder
    from cogview_pl.tasks.plan import estimate

    config = composed(["run_dir=measured", *overrides])
    on_gpu = torch.cuda.is_available()
    plan = estimate(config, on_gpu)
    verb = import_module(f"cogview_pl.tasks.{config.verb.value}")
    folder = RunFolder(Path("measured"), None)
    counting = LiveBytes(given=True) if how == "live" and not on_gpu else nullcontext()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = memory.start() if how == "resident" and not on_gpu else 0
    with counting as live:
        metrics = verb.run(config, folder, Team()) if config.verb.shares_batches else verb.run(config, folder)
    if on_gpu:
        found = torch.cuda.max_memory_allocated()
    else:
        found = live.highest if live is not None else memory.status("VmHWM") - before
    steps_per_s = metrics.get("perf/samples_per_s", 0.0) / config.data.batch_size
    return Peak(plan.total, plan.peak_phase, int(found), steps_per_s)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[2:], sys.argv[1])._asdict()))
