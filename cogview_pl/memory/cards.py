"""Available memory: on this machine now, and on common cards."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

CARDS = (8, 12, 16, 24, 48, 80, 141)
"""GiB of common cards: RTX 4060, 4070, 4080 and 4090; A6000 and L40S; A100 and H100; H200."""

WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS takes from torch's allocator on Hopper; other GPUs take less."""

_GIB = 2**30
_DRIVER = 0.6 * _GIB  # CUDA context and kernels
_USABLE = 0.95  # the allocator loses the rest to gaps
_UNKNOWN = 2**63 - 1  # where the system does not say what is free, no run is refused

_MEMINFO = Path("/proc/meminfo")
_CONTAINER_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files of a control group: its limit, and the bytes in use."""


def card_bytes(card: int) -> int:
    """Bytes that a run can use on a GPU of `card` GiB."""
    return int((card * _GIB - _DRIVER) * _USABLE)


class Device(NamedTuple):
    """The device of this machine that a run would use."""

    on_gpu: bool
    name: str
    free: int
    """Bytes that the run can use now."""


def this_device(on_gpu: bool) -> Device:
    """The GPU of this machine, or its main memory."""
    if on_gpu:
        return Device(True, torch.cuda.get_device_name(), int(torch.cuda.mem_get_info()[0] * _USABLE))
    free = [_UNKNOWN]
    if _MEMINFO.exists():
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # the file is missing or says "max"
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return Device(False, "this machine", int(min(free) * _USABLE))
