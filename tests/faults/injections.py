"""What is done to a run from inside its process: it dies, gets a signal or finds no space at a given place."""

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
_BETWEEN = 0.6  # seconds between two signals that count as two


class Counts:
    """What a run does, counted in its process, to be read in this one."""

    def __init__(self) -> None:
        self._numbers = RawArray(ctypes.c_int64, 3)

    @property
    def calls(self) -> int:
        """Calls that bring files to the disk."""
        return self._numbers[0]

    @property
    def moments(self) -> int:
        """Moments at which it looks whether it is to stop."""
        return self._numbers[1]

    @property
    def before_checkpoint(self) -> int:
        """Those of them before the first checkpoint; all of them where there is none."""
        return self._numbers[2] or self.moments

    def prepare(self) -> None:
        """Count from here on."""
        _watch_calls(before=self._note_call)
        _watch_moments(lambda made: self._numbers.__setitem__(1, made))

    def _note_call(self, made: int, arguments: tuple[Any, ...]) -> None:
        self._numbers[0] = made
        if str(arguments[-1]).endswith(".ckpt") and not self._numbers[2]:
            self._numbers[2] = self.moments


def die_at_call(number: int, before: bool) -> Prepare:
    """kill -9 right before or after the call with this number, counted from 1."""

    def die(made: int, arguments: tuple[Any, ...]) -> None:
        if made == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: _watch_calls(before=die) if before else _watch_calls(after=die)


def signal_at_moment(moment: int, number: int, times: int = 1) -> Prepare:
    """A signal at the moment with this number, counted from 1, once or several times in a row."""

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
    """Do something right before and after each call that brings files to the disk; both are told its number."""
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
    """Do something each time the run looks whether it is to stop."""
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
    """The kernel ends the process in the middle of the write that makes a file larger than `size` bytes."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        no_space_beyond(size)()

    return prepare


def no_space_beyond(size: int) -> Prepare:
    """A write that would make a file larger than `size` bytes fails, and has written up to there."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def when_written(wanted: Callable[[Path], bool], time: int, act: Callable[[], object]) -> Prepare:
    """Do something right before a file of the run is opened to be written for the first, second … time."""

    def prepare() -> None:
        opened = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal opened
            if event != "open" or opened == time:
                return
            path, mode, flags = arguments
            if mode is None or not isinstance(path, (str, bytes, Path)):  # a descriptor, maybe to become a stream
                return
            if flags & (os.O_WRONLY | os.O_RDWR) and wanted(Path(os.fsdecode(path))):
                opened += 1
                if opened == time:
                    act()

        sys.addaudithook(watch)

    return prepare


def flip(file: Path, random: Random, allowed: Callable[[int], bool] = lambda place: True) -> int:
    """Change one bit of a file at a random byte that is allowed; returns the byte's place."""
    data = bytearray(file.read_bytes())
    place = random.choice([place for place in range(len(data)) if allowed(place)])
    data[place] ^= 1 << random.randrange(8)
    file.write_bytes(data)
    return place
