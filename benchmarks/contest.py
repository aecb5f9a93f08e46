"""Timing in turns: contenders alternate in one process, so that other load slows all of them equally."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

Work = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of one contender."""

    median: float
    spread: float
    """(third quartile - first quartile) / median."""


def contest(contenders: Mapping[str, Work], rounds: int) -> dict[str, Timing]:
    """Time every contender once per round, in alternating order; the first call of each contender is not counted."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name]()
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            seconds[name].append(elapsed(contenders[name]))
    return {name: _summary(values) for name, values in seconds.items()}


def elapsed(work: Work) -> float:
    """Seconds of one call, including the work of the device."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def repeated(work: Work, times: int) -> Work:
    """Work that repeats `work` `times` times, because one call may be too short for the clock."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use `number` threads; None leaves its choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process computes on one core until the end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        try:
            yield
        finally:
            neighbour.kill()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(values: list[float]) -> Timing:
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (median, median, median)
    return Timing(median, (high - low) / median)
