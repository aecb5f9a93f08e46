"""Being told to stop: SIGTERM, Ctrl-C, and SLURM's warning that the time is up.

Between steps of training, and anywhere else, all three end the run in the same way: what is done is saved, the exit
code is 128 + the number of the signal (143, 130), and `resume=RUN_FOLDER` goes on. A second Ctrl-C ends it at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from types import FrameType, TracebackType
from typing import Any

from cogview_pl.errors import UserError

_JOB = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


class Stopped(SystemExit):
    """The run was told to stop and what it had done is saved; the exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + (signal.SIGTERM if number == signal.SIGUSR1 else number))
        self.signal = signal.Signals(number)
        self.advice = ""
        """How to go on."""


class StopSignals:
    """While this context is open, signals that ask for an end raise `Stopped`, or are noted while `deferred`.

    In a thread other than the main one there are no handlers, and nothing changes.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received: int | None = None
        self._process = 0
        self._depth = 0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has been noted."""
        return self.received is not None

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth > 1:  # a stage of a chain
            return self
        self.received, self.deferred = None, False
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if slurm_job() else [])]
            self._before = {number: signal.getsignal(number) for number in wanted}
            self.listen()
        return self

    def listen(self) -> None:
        """Install the handlers, again where somebody else has replaced them."""
        for number in self._before:
            signal.signal(number, self._handle)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if error is None or self.received is None:
            return
        if self.received == signal.SIGUSR1:
            requeue()
        if not isinstance(error, SystemExit):  # what the interrupted code made of it while it was cleaning up
            raise Stopped(self.received) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker; the main process ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process at once
        self.received = self.received or number
        if not self.deferred:
            raise Stopped(self.received)


STOP = StopSignals()
"""The signals of this process."""


def slurm_job() -> str | None:
    """Number of the SLURM job that this process is a task of, None outside of one."""
    array, task = (os.environ.get(name) for name in _JOB)
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Ask SLURM to start this job again; by the first of its processes only.

    Raises:
        UserError: SLURM refuses.
    """
    job = slurm_job()
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", "") or str(error)).split())
        raise UserError(
            f"scontrol requeue {job} failed ({reason}); the checkpoint is saved, submit the job again with resume=auto"
        ) from error
