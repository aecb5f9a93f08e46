"""A DataLoader whose workers may hang, die or fail: each ends the run with one line that names the sample.

`torch.utils.data.DataLoader` waits for a hung worker without a limit, and does not handle signals meanwhile; a worker
that dies or raises gives a traceback. `Loader` waits one second at a time, by torch's `timeout`. After a timeout `next`
can be called again, because torch changes no queue and no count before a batch has arrived. Only the start of a further
pass over persistent workers cannot be repeated, so new workers then replace them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cogview_pl.data.worker_activity import ACTIVITIES, TIMED_OUT, DeathsInTime, WorkerActivity
from cogview_pl.errors import UserError

T = TypeVar("T")

_SLICE = 1.0  # seconds between two calls of `look`

# Private names of DataLoader, checked against torch 2.15: its iterator with persistent workers, and the thread of that
# iterator that pins memory. Without them hung persistent workers stay, and a dead thread is waited for.
_ITERATOR, _PINNING = "_iterator", "_pin_memory_thread"


_FEW_IMAGES = 1000  # loader processes take longer to start than they save
_MOST_WORKERS = 8


def suitable_workers(given: int | None, images: int, processes: int) -> int:
    """The number of loader processes of one process: the given one, else as many as suit the machine.

    Args:
        given: `data.num_workers`.
        images: number of images to decode; 0 for rows of a token store, which need no loader processes.
        processes: processes of the run on this machine, which share its cores.
    """
    if given is not None:
        return given
    if images < _FEW_IMAGES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // processes - 1))  # a core is left to the process itself


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C and the loss of a terminal, which all processes of a command are told of, to the main process.

    Workers use no random numbers, so they are not seeded.
    """
    for name in ("SIGINT", "SIGHUP"):  # Windows has no SIGHUP
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _unless_hung_up


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that ends a thread of a worker, except that the main process has ended."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _do_nothing() -> None:
    pass


class Loader(DataLoader[T]):
    """A DataLoader of a map-style data set, with the same batches in the same order.

    Args:
        dataset: messages name its samples by its method `key` if it has one, else by number.
        patience: seconds without a finished sample after which waiting for a batch ends; None: no limit.
        look: is called about once a second while waiting for a batch; it raises if the process was told to stop.
        options: of DataLoader, without `timeout`. `worker_init_fn` is `ignore_interrupts` unless it is given.

    Iterating raises UserError if workers finish nothing, die, or raise a UserError. Workers that hang are then killed,
    and also when the program ends.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        patience: float | None = None,
        look: Callable[[], None] = _do_nothing,
        **options: Any,
    ) -> None:
        self.patience = patience
        self.look = look
        if options.get("num_workers", 0):
            dataset = _Recorded(dataset.dataset if isinstance(dataset, _Recorded) else dataset)
            options = {"worker_init_fn": ignore_interrupts, **options}
            options["timeout"] = _SLICE if patience is None else min(_SLICE, patience)
            if options.get("collate_fn") is not None:  # the default one uses shared memory already
                options["collate_fn"] = _Sharing(options["collate_fn"])
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        if not isinstance(self.dataset, _Recorded):
            return super().__iter__()
        try:
            return self._begin(self.dataset)
        except RuntimeError as error:
            if not str(error).startswith(TIMED_OUT):
                raise
        # Persistent workers still read samples of an unfinished pass. The exception has lost the number of workers that
        # know of the new pass, so new workers replace them.
        self.dataset.activity.kill_hung()
        setattr(self, _ITERATOR, None)
        return self._begin(self.dataset)

    def _begin(self, dataset: _Recorded) -> _Watching[T]:
        starts = getattr(self, _ITERATOR) is None  # else the workers of the last pass continue
        others = multiprocessing.active_children()
        if starts:
            dataset.activity = WorkerActivity(dataset.dataset, self.num_workers)
            ACTIVITIES.add(dataset.activity)
        DeathsInTime.install()
        try:
            with dataset.activity.in_words():
                batches: Iterator[T] = super().__iter__()
        finally:
            if starts:
                dataset.activity.workers = [one for one in multiprocessing.active_children() if one not in others]
        return _Watching(batches, self, dataset.activity)


class _Watching(Iterator[T]):
    """The batches of one pass; waits for each in slices of time."""

    def __init__(self, batches: Iterator[T], loader: Loader[T], activity: WorkerActivity) -> None:
        self._batches = batches
        self._loader = loader
        self._activity = activity

    def __next__(self) -> T:
        quiet, before = 0.0, self._activity.copy()
        while True:
            try:
                with self._activity.in_words():
                    return next(self._batches)
            except RuntimeError as error:
                if not str(error).startswith(TIMED_OUT):
                    raise
            pinning = getattr(self._batches, _PINNING, None)  # torch checks it only without a timeout
            if pinning is not None and not pinning.is_alive():
                raise RuntimeError("Pin memory thread exited unexpectedly")
            now = self._activity.copy()
            quiet = quiet + self._loader.timeout if now == before else 0.0
            before = now
            try:
                self._loader.look()
                self._require_patience(quiet)
            except BaseException:
                self._activity.kill_hung()
                raise

    def _require_patience(self, quiet: float) -> None:
        """Raises UserError if no sample was finished for too long."""
        patience = self._loader.patience
        if patience is None or quiet < patience:
            return
        workers = f"data.num_workers={self._loader.num_workers}"
        reading = [one for one in self._activity.all() if one.reading]
        if not reading:
            raise UserError(
                f"{workers}: the workers have been silent for {quiet:.0f} s (data.worker_timeout={patience:g}) and are "
                "not reading; try fewer of them, or 0 to see what is wrong"
            )
        slowest = max(reading, key=lambda one: one.seconds)
        raise UserError(
            f"{workers}: a worker has been reading {self._activity.name(slowest.sample)} for {slowest.seconds:.0f} s "
            f"(data.worker_timeout={patience:g}); see to the disk that it is on, take it out of the data, or raise "
            "data.worker_timeout"
        )


class _Recorded(Dataset[Any]):
    """A data set whose workers record the sample that they read."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.activity = WorkerActivity(dataset, 0)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        info = get_worker_info()
        if info is None:
            return self.dataset[index]
        self.activity.begin(info.id, int(index))
        try:
            return self.dataset[index]
        finally:
            self.activity.end(info.id)


class _Sharing:
    """Makes batches and moves them to shared memory; torch would do that in a thread whose failure nobody sees."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self._collate(samples)
        if get_worker_info() is not None:
            _share(batch)
        return batch


def _share(batch: Any) -> None:
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            _share(part)
    elif isinstance(batch, dict):
        _share(list(batch.values()))
