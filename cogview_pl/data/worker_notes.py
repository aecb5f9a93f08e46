"""What loader workers are at, and what is said when one of them dies."""

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

from cogview_pl.data.mixing import sample_key
from cogview_pl.errors import UserError

_HUNG = 0.25  # seconds at a sample after which a worker writes nothing to the others, so that it can be killed
_NAMING = 5.0  # seconds that finding a key may take
_DYING = 2.0  # seconds until the death of a worker is known
_IN_A_WORKER = "Caught "  # how torch begins what a data set has raised
_SHORTAGES = {  # by what torch says; the second is a file in /dev/shm
    "Too many open files": "too many files are open; use fewer workers, or raise `ulimit -n`",
    "file </torch_": "/dev/shm is full; use fewer workers or smaller batches, or give it more room (docker run "
    "--shm-size=8g)",
}
_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? (\d+)")


class Note(NamedTuple):
    """What a worker is at."""

    pid: int
    """0 before its first sample."""
    sample: int
    """The number of the one that it reads, or has read last."""
    reading: bool
    seconds: float
    """Since it has begun, or has been done."""


class Notes:
    """What the workers of a pass are at, in memory that they share with the main process.

    Three numbers for each: process, sample, and when it took that up, or minus the time when it was done (nanoseconds
    of a clock that all processes share).
    """

    def __init__(self, dataset: Dataset[Any], num_workers: int) -> None:
        self._dataset = dataset
        self._numbers = RawArray(ctypes.c_int64, 3 * num_workers)
        self.workers: list[BaseProcess] | None = None
        """Their processes, those that died at once left out; None while they are started."""
        self.waiting = False
        """Whether the main process waits for them."""

    def begin(self, worker: int, index: int) -> None:
        """Called in a worker."""
        self._numbers[3 * worker : 3 * worker + 3] = [os.getpid(), index, time.monotonic_ns()]

    def end(self, worker: int) -> None:
        """Called in a worker."""
        self._numbers[3 * worker + 2] = -time.monotonic_ns()

    def copy(self) -> bytes:
        """Equal to the one before if nothing has happened."""
        return bytes(self._numbers)

    def all(self) -> list[Note]:
        """One per worker."""
        now, numbers = time.monotonic_ns(), list(self._numbers)
        return [
            Note(pid, sample, since > 0, (now - abs(since)) / 1e9)
            for pid, sample, since in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
        ]

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """While torch is asked for something: what comes of failed, dead or starved workers is raised as UserError."""
        self._refuse_deaths()
        self.waiting = True
        try:
            yield
        except UserError as error:
            raise UserError(_as_it_was(str(error))) from _alone(error)
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
            # Batches lie with their worker until they are fetched. What comes of fetching them after its death is an
            # error of connections, maybe before the process has ended.
            end = time.monotonic() + _DYING
            while time.monotonic() < end:
                self._refuse_deaths()
                time.sleep(_DYING / 100)

    @property
    def reading(self) -> bool:
        """Whether the main process reads what they send.

        Not while it starts them: forking calls hooks, out of which an exception gets no further than onto the screen.
        """
        return self.waiting and self.workers is not None

    def has(self, pid: int) -> bool:
        """Whether a process is a worker, or may be one."""
        return self.workers is None or any(worker.pid == pid for worker in self.workers)

    def _death(self, pid: int) -> UserError:
        how = ""
        for worker in self.workers or ():
            if worker.pid == pid and worker.exitcode:
                code = worker.exitcode
                how = f" ({signal.strsignal(-code)})" if code < 0 else f" (exit code {code})"
        notes = self.all()
        note = next((note for note in notes if note.pid == pid), None)
        where = "before it read anything"
        if note is not None:
            where = f"{'while it read' if note.reading else 'after it had read'} {self.name(note.sample)}"
        return UserError(
            f"data.num_workers={len(notes)}: a worker has died{how} {where}; the memory may be full (RAM or /dev/shm): "
            "use fewer workers or smaller batches; if it was at the same sample twice, take that out of the data"
        )

    def name(self, index: int) -> str:
        """What names a sample in a message."""
        found: list[str] = []

        def find() -> None:
            with suppress(Exception):  # no keys, or a damaged file of keys
                found.append(sample_key(self._dataset, index))

        thread = threading.Thread(target=find, daemon=True)  # keys may lie on the disk that does not answer
        thread.start()
        thread.join(_NAMING)
        return found[0] if found else f"sample {index}"

    def kill_hung(self) -> None:
        """Kill the workers that are at one sample, so that nobody waits for them; a dead disk lets SIGTERM wait."""
        hung = {note.pid for note in self.all() if note.reading and note.seconds > _HUNG}
        for child in multiprocessing.active_children():
            if child.pid in hung:
                _KILLED.add(child.pid)
                child.kill()


class DeathsInTime:
    """In front of torch's handler of SIGCHLD, which raises a RuntimeError wherever the main thread is.

    That may be in a finaliser, which loses it. For our workers it is done when a batch is awaited, at once if it is
    then: the main process may be reading what the dead one has written half.
    """

    def __init__(self, theirs: Callable[[int, FrameType | None], Any]) -> None:
        self._theirs = theirs

    @classmethod
    def install(cls) -> None:
        """Called before workers start. Has torch install its own first, which it does once, and after they have."""
        signal_handling._set_SIGCHLD_handler()
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
            ours = next((notes for notes in list(NOTES) if notes.has(pid)), None)
            if pid not in _KILLED and (ours is None or ours.reading):
                raise


_KILLED: set[int] = set()
"""Workers that were killed from here, so that their death is no news."""
NOTES: WeakSet[Notes] = WeakSet()
"""Of all workers that may be alive."""


def _as_it_was(message: str) -> str:
    """The message of a UserError that torch has wrapped in the traceback of a worker."""
    name = f"{UserError.__module__}.{UserError.__qualname__}: "
    return message.rpartition(f"\n{name}")[2].strip()


def _alone(error: Exception) -> Exception:
    """Without the frames it went through, one of which holds it in torch: they would keep the workers alive."""
    return error.with_traceback(None)


def _kill_hung() -> None:
    for notes in list(NOTES):
        notes.kill_hung()


# Before multiprocessing waits for its children to end, without a limit: what is registered last is called first.
atexit.register(_kill_hung)
