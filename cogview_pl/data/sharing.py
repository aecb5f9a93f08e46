"""Sharing the batches of a task among processes: each computes some of them, the first one collects all results.

Random numbers belong to a sample (its seed and prompt), not to a process, and the first process takes results in order.
So the files of a task do not depend on the number of processes; only rounding may depend on the size of batches.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped

B = TypeVar("B")
R = TypeVar("R")

_GLANCE = 0.1  # seconds between two looks for signals while waiting


@dataclass(frozen=True)
class _End:
    """The last message of a process that an error ends."""

    reason: str
    """Message of a UserError; empty for a signal."""
    signal: int | None = None


def batches_of(samples: range, batch_size: int) -> list[range]:
    """Samples in batches of `batch_size`; the last one may be smaller."""
    return [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]


class Team:
    """The processes that share the batches of a task; a team of one does everything itself.

    Messages go between the first process and each of the others. A process that fails tells its reason, and a closed
    connection tells of a death, so nobody waits in vain.

    Args:
        rank: number of this process.
        size: number of processes.
        meet: makes the connections by rank: to all others in the first process, to process 0 in the others. It is
            called at the first message, so that all processes load their models at the same time.
    """

    def __init__(self, rank: int = 0, size: int = 1, meet: Callable[[], Mapping[int, Connection]] = dict) -> None:
        self.rank = rank
        self.size = size
        self._meet = meet
        self._arrived: dict[int, Any] = {}

    @cached_property
    def _links(self) -> Mapping[int, Connection]:
        return self._meet()

    @property
    def first(self) -> bool:
        """Whether this process collects the results."""
        return self.rank == 0

    def batches(self, count: int, batch_size: int) -> list[range]:
        """Samples 0 … `count` - 1 in batches: of `batch_size`, or smaller ones so that each process gets one."""
        step = min(batch_size, max(1, -(-count // self.size)))
        return batches_of(range(count), step)

    def own(self, batches: Sequence[B]) -> Sequence[B]:
        """The batches of this process."""
        return batches[self.rank :: self.size]

    def in_order(
        self, work: Callable[[B], R], batches: Sequence[B], on_other: Callable[[B], None] = lambda batch: None
    ) -> Iterator[R]:
        """In the first process the results of `work` for all batches, in order; nothing in the others.

        Args:
            work: is called for the own batches, in order; its result can be pickled.
            batches: the same in all processes.
            on_other: called in the first process when another one has done a batch, for progress bars.

        Raises:
            UserError, Stopped: of any process.
        """
        for number, batch in enumerate(batches):
            worker = number % self.size
            if worker == self.rank:
                result = work(batch)
                if self.first:
                    yield result
                else:
                    self._send(0, result)
            elif self.first:
                found = self._receive(worker)
                on_other(batch)
                yield found

    def tell(self, value: R) -> R:
        """The first process's value, in all processes; the others wait for it."""
        if not self.first:
            return self._receive(0)  # type: ignore[no-any-return]
        for other in self._links:
            self._send(other, value)
        return value

    def look(self) -> None:
        """Hear of errors in other processes, between steps of long work. All must then stay until the last `tell`.

        Raises:
            UserError, Stopped: of this process or of another one.
        """
        SIGNALS.check()
        for other, link in self._links.items():
            if other not in self._arrived and link.poll():
                self._arrived[other] = self._receive(other)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others why this process ends, if an error ends it."""
        try:
            links = self._links
        except (UserError, Stopped):  # they did not come
            if error is None:
                raise
            return
        for link in links.values():
            if error is not None:
                with suppress(OSError):  # it has ended
                    link.send_bytes(pickle.dumps(_end_of(error)))
            link.close()

    def _send(self, other: int, value: object) -> None:
        try:
            self._links[other].send_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        except OSError:
            self._receive(other)  # its reason, or its death
            raise UserError(self._dead(other)) from None

    def _receive(self, other: int) -> Any:
        if other in self._arrived:
            return self._arrived.pop(other)
        link = self._links[other]
        try:
            while not link.poll(_GLANCE):
                SIGNALS.check()
            found = pickle.loads(link.recv_bytes())
        except (EOFError, OSError):
            SIGNALS.check()
            raise UserError(self._dead(other)) from None
        if not isinstance(found, _End):
            return found
        SIGNALS.check()
        if found.signal is not None:
            raise Stopped(found.signal)
        raise UserError(found.reason)

    def _dead(self, other: int) -> str:
        return (
            f"process {other} of the {self.size} that share this task has died; the memory may be full: lower "
            "trainer.devices or sampler.batch_size"
        )


def _end_of(error: BaseException) -> _End:
    if isinstance(error, Stopped):
        return _End("", error.signal)
    if isinstance(error, UserError):
        return _End(str(error))
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _End(f"another process of this task has failed; its traceback is printed ({text[:200]})")
