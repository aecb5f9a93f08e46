"""What loader workers have in common."""

from __future__ import annotations

import signal


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes of a command, to the main process.

    Nothing is drawn at random in a worker, so none of them is seeded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
