"""The activity of loader workers: which sample each one reads, and the message when one of them dies."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet

from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling

from cogview_pl.errors import UserError

_HUNG = 0.25  # seconds at one sample after which a worker writes to no queue, so that it can be killed
_NAMING = 5.0  # seconds that finding a key may take
_DYING = 2.0  # seconds until the death of a worker is known

# Names and messages that torch does not promise, checked against torch 2.15. Without the first, the death of a worker
# raises at any place of the main thread; without the others, users get tracebacks instead of our messages.
_install_handler_of_torch = signal_handling._set_SIGCHLD_handler
_IN_A_WORKER = "Caught "  # begins the message of an error that a data set has raised
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? (\d+)")
TIMED_OUT = "DataLoader timed out after"
_SHORTAGES = {  # the second is a file in /dev/shm
    "Too many open files": "too many files are open; use fewer workers, or raise `ulimit -n`",
    "file </torch_": "/dev/shm is full; use fewer workers or smaller batches, or give it more room (docker run "
    "--shm-size=8g)",
}


class Reading(NamedTuple):
    """The activity of one worker."""

    pid: int
    """0 before the first sample."""
    sample: int
    """Number of the sample that it reads, or has read last."""
    reading: bool
    seconds: float
    """Time since it has begun, or finished, that sample."""


class WorkerActivity:
    """The activity of the workers of a loader, in memory that they share with the main process.

    Three numbers per worker: process, sample, and the time when it began the sample, or minus the time when it finished
    it (nanoseconds of a clock that all processes share).
    """

    def __init__(self, dataset: Dataset[Any], num_workers: int) -> None:
        self._dataset = dataset
        self._numbers = RawArray(ctypes.c_int64, 3 * num_workers)
        self.workers: list[BaseProcess] | None = None
        """Their processes, without those that died at once; None while they are started."""
        self.waiting = False
        """Whether the main process waits for a batch."""

    def begin(self, worker: int, index: int) -> None:
        """Called in a worker."""
        self._numbers[3 * worker : 3 * worker + 3] = [os.getpid(), index, time.monotonic_ns()]

    def end(self, worker: int) -> None:
        """Called in a worker."""
        self._numbers[3 * worker + 2] = -time.monotonic_ns()

    def copy(self) -> bytes:
        """A copy of all numbers, which stays equal while no worker begins or finishes a sample."""
        return bytes(self._numbers)

    def all(self) -> list[Reading]:
        """One per worker."""
        now, numbers = time.monotonic_ns(), list(self._numbers)
        return [
            Reading(pid, sample, since > 0, (now - abs(since)) / 1e9)
            for pid, sample, since in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
        ]

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """While torch is called: raises UserError for failed or dead workers, or for a shortage of files or memory."""
        self._refuse_deaths()
        self.waiting = True
        try:
            yield
        except UserError as error:
            raise UserError(_without_traceback(str(error))) from _alone(error)
        except (RuntimeError, OSError, EOFError) as error:
            self.waiting = False
            self._explain(error)
            raise
        finally:
            self.waiting = False

    def _refuse_deaths(self) -> None:
        for worker in self.workers or ():
            if worker.exitcode and worker.pid is not None and worker.pid not in _KILLED:
                raise self._death(worker.pid)

    def _explain(self, error: Exception) -> None:
        for sign, line in _SHORTAGES.items():
            if sign in str(error):
                raise UserError(f"data.num_workers={len(self.all())}: {line}") from _alone(error)
        if death := _DEATH.match(str(error)):
            raise self._death(int(death[1])) from error
        if not isinstance(error, RuntimeError) and not str(error).startswith(_IN_A_WORKER):
            # A batch stays with its worker until it is fetched. If the worker dies before, fetching raises an error of
            # the connection, maybe before the process has ended.
            end = time.monotonic() + _DYING
            while time.monotonic() < end:
                self._refuse_deaths()
                time.sleep(_DYING / 100)

    @property
    def reading(self) -> bool:
        """Whether the main process waits for a batch and all workers are started.

        An exception in a hook of a fork is only printed, so none may be raised while workers are started.
        """
        return self.waiting and self.workers is not None

    def has(self, pid: int) -> bool:
        """Whether a process is a worker; True while workers are started."""
        return self.workers is None or any(worker.pid == pid for worker in self.workers)

    def _death(self, pid: int) -> UserError:
        how = ""
        for worker in self.workers or ():
            if worker.pid == pid and worker.exitcode:
                code = worker.exitcode
                how = f" ({signal.strsignal(-code)})" if code < 0 else f" (exit code {code})"
        readings = self.all()
        reading = next((reading for reading in readings if reading.pid == pid), None)
        where = "before it read anything"
        if reading is not None:
            where = f"{'while it read' if reading.reading else 'after it had read'} {self.name(reading.sample)}"
        return UserError(
            f"data.num_workers={len(readings)}: a worker has died{how} {where}; the memory may be full (RAM or "
            "/dev/shm): use fewer workers or smaller batches; if it was at the same sample twice, take that out of the "
            "data"
        )

    def name(self, index: int) -> str:
        """The name of a sample in a message."""
        found: list[str] = []

        def find() -> None:
            with suppress(Exception):  # no keys, or a damaged file of keys
                found.append(str(self._dataset.key(index)))  # type: ignore[attr-defined]

        thread = threading.Thread(target=find, daemon=True)  # the keys may be on the disk that does not answer
        thread.start()
        thread.join(_NAMING)
        return found[0] if found else f"sample {index}"

    def kill_hung(self) -> None:
        """Kill the workers that hang at a sample: SIGTERM would wait for a dead disk."""
        hung = {one.pid for one in self.all() if one.reading and one.seconds > _HUNG}
        for child in multiprocessing.active_children():
            if child.pid in hung:
                _KILLED.add(child.pid)
                child.kill()


class DeathsInTime:
    """Wraps torch's handler of SIGCHLD, which raises a RuntimeError at any place of the main thread.

    In a finaliser that error would be lost. For our workers it is raised while the main process waits for a batch:
    it may be reading a message that the dead worker has written in part. At other times the next wait finds the death.
    """

    def __init__(self, theirs: Callable[[int, FrameType | None], Any]) -> None:
        self._theirs = theirs

    @classmethod
    def install(cls) -> None:
        """Called before workers start; torch, which installs its handler once, must do so first."""
        if not hasattr(signal, "SIGCHLD"):  # Windows
            return
        _install_handler_of_torch()
        theirs = signal.getsignal(signal.SIGCHLD)
        if threading.current_thread() is threading.main_thread() and callable(theirs) and not isinstance(theirs, cls):
            signal.signal(signal.SIGCHLD, cls(theirs))

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._theirs(number, frame)
        except RuntimeError as error:
            death = _DEATH.match(str(error))
            if death is None:
                raise
            pid = int(death[1])
            ours = next((one for one in list(ACTIVITIES) if one.has(pid)), None)
            if pid not in _KILLED and (ours is None or ours.reading):
                raise


_KILLED: set[int] = set()
"""Workers that this file has killed; their deaths raise nothing."""
ACTIVITIES: WeakSet[WorkerActivity] = WeakSet()
"""The activities of all workers that may be alive."""


def _without_traceback(message: str) -> str:
    """The message of a UserError, which torch has put into a traceback of the worker."""
    name = f"{UserError.__module__}.{UserError.__qualname__}: "
    return message.rpartition(f"\n{name}")[2].strip()


def _alone(error: Exception) -> Exception:
    """The error without its frames, which refer to the workers and would keep them alive."""
    return error.with_traceback(None)


def _kill_hung() -> None:
    for activity in list(ACTIVITIES):
        activity.kill_hung()


# Functions of atexit run in reverse order: this one before multiprocessing waits for its children without a limit.
atexit.register(_kill_hung)
