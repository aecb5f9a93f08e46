"""Peak memory of one piece of work, measured in a process of its own: `python -m benchmarks.memory …`.

The peak is the process's high-water mark of resident memory. It is read as VmHWM, not as `ru_maxrss`, because Linux
lets a child start with the `ru_maxrss` of the process that starts it. Elsewhere nothing is measured.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

from benchmarks.contest import Work

MEASURABLE = Path("/proc/self/clear_refs").exists()
CALLS = 2
"""The first warms up (an optimizer allocates its moments there), the second is as all that follow."""


def growth_apart(factory: str, *arguments: str, with_inputs: bool) -> int:
    """Bytes by which resident memory grows at most, in a fresh process.

    Args:
        factory: `module:function`, which takes the arguments (text) and returns the work.
        arguments: for the factory.
        with_inputs: count what the factory allocates as well (a model), or only what the work does on top of it.
    """
    command = [sys.executable, "-m", "benchmarks.memory", factory, str(int(with_inputs)), *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def growth(factory: str, with_inputs: bool, *arguments: str) -> int:
    """The same in this process."""
    module, _, name = factory.partition(":")
    build = getattr(importlib.import_module(module), name)
    before = start()
    work: Work = build(*arguments)
    if not with_inputs:
        before = start()
    for _ in range(CALLS):
        work()
    return status("VmHWM") - before


def start() -> int:
    """Bytes resident now, from which the high-water mark starts again."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def status(key: str) -> int:
    """Bytes of one entry of the process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(growth(sys.argv[1], sys.argv[2] == "1", *sys.argv[3:]))
