"""How many threads make a decoding step, found out while decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

_FIRST = 16  # steps of which every second is a trial
_EVERY = 32  # steps from one trial to the next after them
_KEPT = 0.7  # of the older trials in the mean
_LARGEST = math.log(4.0)  # |log| of the ratio of a trial counts no more than this: a thread may have had to wait once
_FASTER = math.log(0.9)  # a mean below this changes the number


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Context in which torch uses this number of threads; None: as many as before."""
    before = torch.get_num_threads()
    if number in (None, before):
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Threads:
    """All threads that torch may use, or one, whichever takes less time.

    The threads of a step wait for each other after every part of it. Where other programs keep a core busy, all of them
    wait for the one that shares it, and one thread alone is several times as fast. Now and then a step is a trial with
    the other number. The steps must give the same result with any number of threads, so that time is all that depends
    on this.
    """

    def __init__(self) -> None:
        self._alone = False
        self._steps = 0
        self._before = math.inf  # seconds of the last step that was no trial
        self._mean = 0.0  # of log(seconds of a trial / seconds of the step before it)

    @property
    def number(self) -> int:
        """Threads of a step that is no trial."""
        return 1 if self._alone else torch.get_num_threads()

    def run(self, step: Callable[[int], _Result]) -> _Result:
        """The result of a step, which gets the number of its threads."""
        trial = torch.get_num_threads() > 1 and self._steps % (2 if self._steps < _FIRST else _EVERY) == 1
        self._steps += 1
        other = torch.get_num_threads() if self._alone else 1
        start = perf_counter()
        result = step(other if trial else self.number)
        seconds = perf_counter() - start
        if trial:
            self._learn(math.log(seconds / self._before))
        else:
            self._before = seconds
        return result

    def _learn(self, ratio: float) -> None:
        self._mean = _KEPT * self._mean + (1 - _KEPT) * min(max(ratio, -_LARGEST), _LARGEST)
        if self._mean < _FASTER:
            self._alone = not self._alone
            self._mean = -self._mean
