"""Faults that are injected inside the process of a run: a kill, a signal, or a full disk at a given point."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from random import Random
from typing import Any

from cogview_pl.errors.signals import StopSignals
from tests.faults.fork_server import Prepare

_CALLS = ("fsync", "replace")
_BETWEEN = 0.6  # seconds between two signals that count as different


class Counts:
    """Counters of events in the process of a run, readable in this process."""

    def __init__(self) -> None:
        self._numbers = RawArray(ctypes.c_int64, 3)

    @property
    def calls(self) -> int:
        """Number of calls that sync or rename files."""
        return self._numbers[0]

    @property
    def moments(self) -> int:
        """Number of moments at which the run checks for signals."""
        return self._numbers[1]

    @property
    def before_checkpoint(self) -> int:
        """Number of these moments before the first checkpoint; all of them without a checkpoint."""
        return self._numbers[2] or self.moments

    def prepare(self) -> None:
        """Set all counters to zero."""
        _watch_calls(before=self._note_call)
        _watch_moments(lambda made: self._numbers.__setitem__(1, made))

    def _note_call(self, made: int, arguments: tuple[Any, ...]) -> None:
        self._numbers[0] = made
        if str(arguments[-1]).endswith(".ckpt") and not self._numbers[2]:
            self._numbers[2] = self.moments


def die_at_call(number: int, before: bool) -> Prepare:
    """kill -9 right before or after a call with the given number, counted from 1."""

    def die(made: int, arguments: tuple[Any, ...]) -> None:
        if made == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _watch_calls(before=die) if before else _watch_calls(after=die)


def signal_at_moment(moment: int, number: int, times: int = 1) -> Prepare:
    """A signal at the moment with the given number, counted from 1, once or several times in a row."""

    def act(made: int) -> None:
        if made == moment:
            os.kill(os.getpid(), number)
            for _ in range(times - 1):
                time.sleep(_BETWEEN)
                os.kill(os.getpid(), number)

    return lambda: _watch_moments(act)


def _watch_calls(
    before: Callable[[int, tuple[Any, ...]], object] = lambda made, arguments: None,
    after: Callable[[int, tuple[Any, ...]], object] = lambda made, arguments: None,
) -> None:
    """Call functions right before and after each call that syncs or renames files; both get its number."""
    made = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            number = made
            before(number, arguments)
            result = function(*arguments, **options)
            after(number, arguments)
            return result

        return call

    for name in _CALLS:
        setattr(os, name, watched(getattr(os, name)))


def _watch_moments(act: Callable[[int], object]) -> None:
    """Call a function each time the run checks for signals."""
    made = 0

    def count() -> None:
        nonlocal made
        made += 1
        act(made)

    def look(self: StopSignals) -> None:
        count()
        looked(self)

    def asked(self: StopSignals) -> bool:
        count()
        return self.received is not None

    looked = StopSignals.check
    StopSignals.check = look  # type: ignore[method-assign]
    StopSignals.asked = property(asked)  # type: ignore[assignment, method-assign]


def die_inside_a_write(size: int) -> Prepare:
    """The kernel kills the process inside the write that makes a file larger than `size` bytes."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        no_space_beyond(size)()

    return prepare


def no_space_beyond(size: int) -> Prepare:
    """A write that makes a file larger than `size` bytes fails after it has filled these bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def when_written(wanted: Callable[[Path], bool], time: int, act: Callable[[], object]) -> Prepare:
    """Call a function right before a file of the run is opened for writing for the first, second … time."""

    def prepare() -> None:
        opened = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal opened
            if event != "open" or opened == time:
                return
            path, mode, flags = arguments
            if mode is None or not isinstance(path, (str, bytes, Path)):  # a descriptor, which may become a stream
                return
            if flags & (os.O_WRONLY | os.O_RDWR) and wanted(Path(os.fsdecode(path))):
                opened += 1
                if opened == time:
                    act()

        sys.addaudithook(watch)

    return prepare


def flip(file: Path, random: Random, allowed: Callable[[int], bool] = lambda place: True) -> int:
    """Flip one bit of a file at a random allowed byte; returns the position of the byte."""
    data = bytearray(file.read_bytes())
    place = random.choice([place for place in range(len(data)) if allowed(place)])
    data[place] ^= 1 << random.randrange(8)
    file.write_bytes(data)
    return place
