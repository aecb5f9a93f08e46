"""Being told to stop: SIGTERM, Ctrl-C, and SLURM's warning that the time is up.

A signal is only noted, because an exception out of a handler can come up inside a finaliser, which loses it. Every loop
that may take long calls `SIGNALS.check()`, and a training run ends after its step. All three signals end the run in
the same way: what is done is saved, the exit code is 128 + the number of the signal (143, 130), and `resume=RUN_FOLDER`
goes on. A second signal ends the process at once, as a kill does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from cogview_pl.errors import UserError

_JOB = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
_ECHO = 0.5  # seconds within which a launcher and a terminal, or a scheduler, send the same signal twice


class Stopped(SystemExit):
    """The run was told to stop and what it had done is saved; the exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + (signal.SIGTERM if number == signal.SIGUSR1 else number))
        self.signal = signal.Signals(number)
        self.advice = ""
        """How to go on."""


class StopSignals:
    """While this context is open, signals that ask for an end are noted, and `check` raises `Stopped` after one.

    In a thread other than the main one there are no handlers, and nothing changes.
    """

    def __init__(self) -> None:
        self.deferred = False
        """Whether steps of training are under way, between which only their own callback looks."""
        self.received: int | None = None
        """Number of the first signal, None before there is one."""
        self._asked_at: float | None = None
        self._process = 0
        self._depth = 0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has been noted."""
        return self.received is not None

    def check(self) -> None:
        """Raises Stopped if a signal has been noted, but for inside a step of training."""
        if not self.deferred:
            self.check_while_waiting()

    def check_while_waiting(self) -> None:
        """Raises Stopped if a signal has been noted; for waits that may never end, wherever they are."""
        if self.received is not None:
            raise Stopped(self.received)

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth > 1:  # a stage of a chain
            return self
        self.received, self._asked_at, self.deferred = None, None, False
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
        if not isinstance(error, SystemExit):  # what a library made of it on its way
            raise Stopped(self.received) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker; the main process ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.received = self.received or number
        if number == signal.SIGUSR1:  # a warning, which SIGTERM follows when the time is up
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > _ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)


SIGNALS = StopSignals()
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
