"""What is done to a run while it writes, from inside its process: it dies, or its disk is full, at a given place."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

_CALLS = ("fsync", "replace")


def count_calls(result: Path) -> Callable[[], None]:
    """Count the calls that bring files to the disk, and write the number to a file as they are made."""
    return _at_calls(before=lambda made: result.write_text(str(made)))


def die_at_call(number: int, before: bool) -> Callable[[], None]:
    """kill -9 right before or after the call with this number, counted from 1."""

    def die(made: int) -> None:
        if made == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return _at_calls(before=die) if before else _at_calls(after=die)


def _at_calls(
    before: Callable[[int], object] = lambda made: None, after: Callable[[int], object] = lambda made: None
) -> Callable[[], None]:
    """Do something right before and after each call that brings files to the disk; both are told its number."""

    def prepare() -> None:
        made = 0

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal made
                made += 1
                number = made
                before(number)
                result = function(*arguments, **options)
                after(number)
                return result

            return call

        for name in _CALLS:
            setattr(os, name, watched(getattr(os, name)))

    return prepare


def die_inside_a_write(size: int) -> Callable[[], None]:
    """The kernel ends the process in the middle of the write that makes a file larger than `size` bytes."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


def no_space_beyond(size: int) -> Callable[[], None]:
    """A write that would make a file larger than `size` bytes fails, and has written up to there."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


def flip(file: Path, random: Random, allowed: Callable[[int], bool] = lambda place: True) -> int:
    """Change one bit of a file at a random byte that is allowed; returns the byte's place."""
    data = bytearray(file.read_bytes())
    place = random.choice([place for place in range(len(data)) if allowed(place)])
    data[place] ^= 1 << random.randrange(8)
    file.write_bytes(data)
    return place
