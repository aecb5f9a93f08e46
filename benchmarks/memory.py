"""Peak memory of a function, measured in a process of its own: `python -m benchmarks.memory …`.

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
"""Two calls: the first warms up (an optimizer allocates its moments there), the second is a usual call."""


def growth_apart(factory: str, *arguments: str, with_inputs: bool) -> int:
    """Largest growth of resident memory in a fresh process, in bytes.

    Args:
        factory: `module:function`; the function takes the arguments (text) and returns the work.
        arguments: arguments of the factory.
        with_inputs: whether allocations of the factory (a model) count too, besides those of the work.
    """
    command = [sys.executable, "-m", "benchmarks.memory", factory, str(int(with_inputs)), *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def growth(factory: str, with_inputs: bool, *arguments: str) -> int:
    """Largest growth of resident memory in this process, in bytes."""
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
    """Reset the high-water mark; returns the resident bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def status(key: str) -> int:
    """Bytes of an entry in the status of the process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(growth(sys.argv[1], sys.argv[2] == "1", *sys.argv[3:]))
