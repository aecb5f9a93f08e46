"""Processes that share batches: order, uneven shares, and what each of them learns of the end of another."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

import pytest

from cogview_pl.data.sharing import Team
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import Stopped


def together(size: int, task: Callable[[Team], Any]) -> list[Any]:
    """The results of a task, or its errors, in all processes of a team, each of which is a thread here."""
    pipes = {rank: Pipe() for rank in range(1, size)}
    links = [{rank: ours for rank, (ours, _) in pipes.items()}, *({0: theirs} for _, theirs in pipes.values())]
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            with Team(rank, size, lambda: links[rank]) as team:
                found[rank] = task(team)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_the_first_process_gets_all_results_in_order(size: int, count: int) -> None:
    def task(team: Team) -> tuple[list[int], list[int]]:
        mine: list[int] = []

        def work(number: int) -> int:
            mine.append(number)
            return 10 * number

        return list(team.in_order(work, range(count))), mine

    results, own = zip(*together(size, task), strict=True)
    assert list(results) == [[10 * number for number in range(count)], *([[]] * (size - 1))]
    assert list(own) == [list(range(rank, count, size)) for rank in range(size)]


def test_the_batches_of_one_process_and_smaller_ones_where_some_would_have_none() -> None:
    assert Team().batches(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert Team(0, 2).batches(10, 4) == Team().batches(10, 4)
    assert Team(0, 3).batches(3, 64) == [range(0, 1), range(1, 2), range(2, 3)]
    assert Team(0, 2).batches(3, 64) == [range(0, 2), range(2, 3)]
    assert Team(0, 2).batches(1, 64) == [range(0, 1)] and Team(0, 2).batches(0, 64) == []
    assert Team(1, 2).own(Team(1, 2).batches(10, 4)) == [range(4, 8)]


def test_all_learn_what_the_first_one_tells() -> None:
    assert together(3, lambda team: team.tell("now" if team.first else "")) == ["now", "now", "now"]


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "words"), [(UserError("no disk"), "no disk"), (KeyError("a"), "KeyError: 'a'"), (Stopped(15), None)]
)
def test_an_error_of_one_process_ends_all(rank: int, error: BaseException, words: str | None) -> None:
    """The first one says why; the others say nothing, so their reason need not be the same."""

    def task(team: Team) -> list[int]:
        def work(number: int) -> int:
            if team.rank == rank and number > 3:
                raise error
            return number

        found = list(team.in_order(work, range(12)))
        team.tell(None)
        return found

    found = together(3, task)
    assert all(isinstance(one, BaseException) for one in found)
    assert found[rank] is error
    if rank and words is not None:
        assert isinstance(found[0], UserError) and words in str(found[0])
    elif rank:
        assert isinstance(found[0], Stopped) and found[0].signal == signal.SIGTERM


@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_ends_the_other(rank: int) -> None:
    def task(team: Team) -> list[int]:
        def work(number: int) -> int:
            if team.rank == rank and number > 3:
                for link in team._links.values():
                    link.close()
                raise SystemExit
            return number

        found = list(team.in_order(work, range(200)))
        team.tell(None)
        return found

    found = together(2, task)
    assert isinstance(found[1 - rank], UserError) and f"process {rank} of the 2" in str(found[1 - rank])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_long_work_ends_when_another_process_fails(rank: int) -> None:
    def task(team: Team) -> None:
        if team.rank == rank:
            raise UserError("no disk")
        while True:
            team.look()

    assert [type(error) for error in together(3, task)] == [UserError] * 3
    assert all(str(error) == "no disk" for error in together(3, task))


def test_results_that_arrive_during_long_work_keep_their_order() -> None:
    sent = threading.Barrier(2)

    def task(team: Team) -> list[int]:
        def work(number: int) -> int:
            if number == 2:  # the first process works, and the other one has sent the results of 1 and 3
                sent.wait(10)
                for _ in range(5):
                    team.look()
            return 10 * number

        found = []
        for result in team.in_order(work, range(4)):
            found.append(result)
        if not team.first:
            sent.wait(10)
        team.tell(None)
        return found

    assert together(2, task) == [[0, 10, 20, 30], []]
