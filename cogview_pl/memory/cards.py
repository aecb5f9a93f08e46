"""How much memory there is: free on this machine, and on cards by name."""

from __future__ import annotations

from pathlib import Path

import torch

CARDS = (24, 48, 80, 141)
"""Cards that plans name, in GiB: RTX 3090 and 4090; A6000 and L40S; A100 and H100; H200."""

WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS takes from torch's allocator for itself; on Hopper, where it is most."""

_GIB = 2**30
_OF_THE_DRIVER = 0.6 * _GIB  # CUDA context, kernels, work space of cuBLAS
_USABLE = 0.95  # the rest goes to gaps between parts of memory


def card_bytes(card: int) -> int:
    """What a run can use of a GPU of so many GiB."""
    return int((card * _GIB - _OF_THE_DRIVER) * _USABLE)


def free_bytes(on_gpu: bool) -> int:
    """What a run can use of this machine now: of its GPU, or of its main memory."""
    if on_gpu:
        return int(torch.cuda.mem_get_info()[0] * _USABLE)
    return int(min([_of_the_system(), *_of_the_container()]) * _USABLE)


def _of_the_system() -> int:
    file = Path("/proc/meminfo")
    if not file.exists():
        return 2**63 - 1  # elsewhere nothing is refused
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**63 - 1


def _of_the_container() -> list[int]:
    """What a control group leaves, where one sets a limit."""
    found = []
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return found
