"""Signals that stop a run: SIGTERM, Ctrl-C, a lost terminal (SIGHUP), and SLURM's warning before its time limit.

Handlers only record a signal, because Python drops an exception that a handler raises inside a finaliser. Every long
loop calls `SIGNALS.check()`; training ends after its step. All of them end a run in the same way: it saves its work and
exits with 128 + the number of the signal (143, 130, 129), and `resume=RUN_FOLDER` continues it. A second signal ends
the process at once, as a kill does. Windows has no SIGHUP and no SLURM.
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
_WARNING = getattr(signal, "SIGUSR1", None)
_HANG_UP = getattr(signal, "SIGHUP", None)
_ECHO = 0.5  # seconds; within them a second signal counts as the first, sent by both launcher and terminal or scheduler


class Stopped(SystemExit):
    """The run was told to stop and has saved its work; the exit code is 128 + the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + (signal.SIGTERM if number == _WARNING else number))
        self.signal = signal.Signals(number)
        self.advice = ""
        """Advice for the user on how to go on."""


class StopSignals:
    """A context that records stop signals; after one, `check` raises `Stopped`.

    Only the main thread can have signal handlers; in another thread the context does nothing.
    """

    def __init__(self) -> None:
        self.deferred = False
        """Whether training steps are running; then only a training callback checks signals, between steps."""
        self.received: int | None = None
        """Number of the first signal; None before one arrives."""
        self._asked_at: float | None = None
        self._process = 0
        self._depth = 0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived."""
        return self.received is not None

    def check(self) -> None:
        """Raises Stopped if a signal has arrived, except inside a training step."""
        if not self.deferred:
            self.check_while_waiting()

    def check_while_waiting(self) -> None:
        """Raises Stopped if a signal has arrived, also inside a training step; for waits that may never end."""
        if self.received is not None:
            raise Stopped(self.received)

    def __enter__(self) -> StopSignals:
        self._depth += 1
        if self._depth > 1:  # a stage of a chain
            return self
        self.received, self._asked_at, self.deferred = None, None, False
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGTERM, signal.SIGINT, _HANG_UP, _WARNING if slurm_job() else None]
            before = {number: signal.getsignal(number) for number in wanted if number is not None}
            if before.get(_HANG_UP) == signal.SIG_IGN:  # nohup
                del before[_HANG_UP]
            self._before = before
            self.listen()
        return self

    def listen(self) -> None:
        """Install the handlers. Call it again after a library has replaced them."""
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
        if self.received == _WARNING:
            requeue()
        if not isinstance(error, SystemExit):  # a library has caught Stopped and raised another error
            raise Stopped(self.received) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker; the main process ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.received = self.received or number
        if number == _WARNING:  # SLURM's warning; SIGTERM follows at the time limit
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > _ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


SIGNALS = StopSignals()
"""Stop signals of this process."""


def slurm_job() -> str | None:
    """Number of the SLURM job of this process; None outside SLURM."""
    array, task = (os.environ.get(name) for name in _JOB)
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Ask SLURM to start this job again; only the first process of the job does so.

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
