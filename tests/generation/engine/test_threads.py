"""The number of threads of a decoding step follows what takes less time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cogview_pl.generation.engine.threads import Threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def step_that_takes(alone: float, together: float, used: list[int]) -> Callable[[int], int]:
    def step(threads: int) -> int:
        time.sleep(alone if threads == 1 else together)
        used.append(threads)
        return len(used)

    return step


def test_one_thread_where_two_wait_for_each_other() -> None:
    threads, used = Threads(), list[int]()
    step = step_that_takes(0.0005, 0.01, used)
    assert [threads.run(step) for _ in range(40)] == [*range(1, 41)]
    assert threads.number == 1
    assert used[16:].count(2) == 1  # a trial


def test_both_threads_where_they_are_faster_and_again_when_the_others_are_gone() -> None:
    threads, used = Threads(), list[int]()
    for _ in range(40):
        threads.run(step_that_takes(0.01, 0.0005, used))
    assert threads.number == 2
    assert used[16:].count(1) == 1
    for _ in range(200):
        threads.run(step_that_takes(0.0005, 0.005, used))
    assert threads.number == 1
    for _ in range(200):
        threads.run(step_that_takes(0.005, 0.0005, used))
    assert threads.number == 2


def test_a_single_thread_makes_no_trials() -> None:
    torch.set_num_threads(1)
    threads, used = Threads(), list[int]()
    for _ in range(40):
        threads.run(step_that_takes(0, 0, used))
    assert set(used) == {1}
