"""A subject of the table of growth, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTE = 1e6
_KIB = 1024  # kB of /proc


class Subject(NamedTuple):
    """Something that grows."""

    name: str
    unit: str
    """What is counted by a size, such as `rows`."""
    sizes: Sequence[int]
    prepare: Callable[[Path, int], None]
    """Makes the data of a size in an empty folder."""
    work: Callable[[Path, int], float | None]
    """What is measured; it may return the seconds of the part that counts."""
    warm_up: Callable[[], None] = lambda: None
    """Imports what the work needs, so that imports are not counted."""


class Cost(NamedTuple):
    """What a subject costs at one size."""

    wall_s: float
    cpu_s: float
    """User and system time of the process and of its children that have ended."""
    peak_mb: float
    """Growth of the largest resident memory of the process."""


def measured(subject: Subject, folder: Path, size: int) -> Cost:
    """The cost of a subject's work on prepared data, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, subject.warm_up, subject.work, folder, size))
    process.start()
    sender.close()
    try:
        return Cost(*receiver.recv())
    except EOFError:
        raise RuntimeError(f"{subject.name} failed at {size:,} {subject.unit}") from None
    finally:
        process.join()


def _measure(
    sender: Any, warm_up: Callable[[], None], work: Callable[[Path, int], float | None], path: Path, size: int
) -> None:
    warm_up()
    before, wall, cpu = _peak_mb(), time.perf_counter(), _cpu_s()
    part = work(path, size)
    sender.send((time.perf_counter() - wall if part is None else part, _cpu_s() - cpu, _peak_mb() - before))


def _peak_mb() -> float:
    """From the memory of this program alone; `getrusage` counts that of the process that started it, too."""
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(peak) * _KIB / MEGABYTE


def _cpu_s() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)
