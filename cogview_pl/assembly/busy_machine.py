"""Says when other programs keep the cores busy, because threads that wait for each other then slow training down."""

from __future__ import annotations

import logging
import os

import torch

_BUSY = 1.5  # programs that want to run, per core; a training of this project alone makes one

_log = logging.getLogger(__name__)


def warn_of_busy_cores() -> None:
    """Advise one thread where several would wait for cores. The choice stays the user's: numbers depend on it."""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads == 1 or not hasattr(os, "getloadavg"):
        return
    load = os.getloadavg()[0]
    if load >= _BUSY * cores:
        _log.warning(
            "Other programs keep this machine busy (load %.1f on %d cores): %d threads can be several times slower "
            "than one; threads=1 trains with one",
            load,
            cores,
            threads,
        )
