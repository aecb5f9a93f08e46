"""Loader processes that may hang, die or fail: each ends the run in one line that names the sample.

`torch.utils.data.DataLoader` waits for a hung worker without end, and signals to the run wait with it; a worker that
dies or raises ends in a traceback. `Loader` waits a second at a time, by torch's own `timeout`: after it `next` can be
called again, since nothing is taken out of a queue or counted before a batch has come. Only the start of a further pass
over persistent workers cannot be tried again, so they are then replaced by new ones.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cogview_pl.data.worker_notes import NOTES, DeathsInTime, Notes
from cogview_pl.errors import UserError

T = TypeVar("T")

_SLICE = 1.0  # seconds between two looks
_TIMED_OUT = "DataLoader timed out after"


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes of a command, to the main process.

    Nothing is drawn at random in a worker, so none of them is seeded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _unless_hung_up


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what a thread of a worker dies of, but for the main process that has ended while it was given files."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _do_nothing() -> None:
    pass


class Loader(DataLoader[T]):
    """A DataLoader of a map-style data set, with the same batches in the same order.

    Args:
        dataset: its samples are named by `mixing.sample_key` where it has keys, else by their number.
        patience: seconds without a finished sample after which waiting for a batch ends; None: no limit.
        look: called about once a second while a batch is awaited, to raise when the process was told to stop.
        options: of DataLoader, without `timeout`. `worker_init_fn` is `ignore_interrupts` unless another is given.

    Iterating raises UserError where workers finish nothing, die, or raise a UserError themselves. Those that hang are
    killed when the waiting ends so, and when the program ends.
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
            dataset = _Noting(dataset.dataset if isinstance(dataset, _Noting) else dataset)
            options = {"worker_init_fn": ignore_interrupts, **options}
            options["timeout"] = _SLICE if patience is None else min(_SLICE, patience)
            if options.get("collate_fn") is not None:  # torch's own puts what it makes into shared memory itself
                options["collate_fn"] = _Sharing(options["collate_fn"])
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        if not isinstance(self.dataset, _Noting):
            return super().__iter__()
        try:
            return self._begin(self.dataset)
        except RuntimeError as error:
            if not str(error).startswith(_TIMED_OUT):
                raise
        # Persistent workers are still at what an unfinished pass has left. How many of them have taken note of the new
        # one is lost with the exception, so others take their place.
        self.dataset.notes.kill_hung()
        self._iterator = None
        return self._begin(self.dataset)

    def _begin(self, dataset: _Noting) -> _Watching[T]:
        starts = self._iterator is None  # and does not go on with the workers of the last pass
        others = multiprocessing.active_children()
        if starts:
            dataset.notes = Notes(dataset.dataset, self.num_workers)
            NOTES.add(dataset.notes)
        DeathsInTime.install()
        try:
            with dataset.notes.in_words():
                batches: Iterator[T] = super().__iter__()
        finally:
            if starts:
                dataset.notes.workers = [one for one in multiprocessing.active_children() if one not in others]
        return _Watching(batches, self, dataset.notes)


class _Watching(Iterator[T]):
    """The batches of one pass, waited for a slice at a time."""

    def __init__(self, batches: Iterator[T], loader: Loader[T], notes: Notes) -> None:
        self._batches = batches
        self._loader = loader
        self._notes = notes

    def __next__(self) -> T:
        quiet, before = 0.0, self._notes.copy()
        while True:
            try:
                with self._notes.in_words():
                    return next(self._batches)
            except RuntimeError as error:
                if not str(error).startswith(_TIMED_OUT):
                    raise
            pinning = getattr(self._batches, "_pin_memory_thread", None)  # torch looks at it only without a timeout
            if pinning is not None and not pinning.is_alive():
                raise RuntimeError("Pin memory thread exited unexpectedly")
            now = self._notes.copy()
            quiet = quiet + self._loader.timeout if now == before else 0.0
            before = now
            try:
                self._loader.look()
                self._require_patience(quiet)
            except BaseException:
                self._notes.kill_hung()
                raise

    def _require_patience(self, quiet: float) -> None:
        """Raises UserError when nothing has come for too long."""
        patience = self._loader.patience
        if patience is None or quiet < patience:
            return
        workers = f"data.num_workers={self._loader.num_workers}"
        reading = [note for note in self._notes.all() if note.reading]
        if not reading:
            raise UserError(
                f"{workers}: the workers have been silent for {quiet:.0f} s (data.worker_timeout={patience:g}) and are "
                "not reading; try fewer of them, or 0 to see what is wrong"
            )
        slowest = max(reading, key=lambda note: note.seconds)
        raise UserError(
            f"{workers}: a worker has been reading {self._notes.name(slowest.sample)} for {slowest.seconds:.0f} s "
            f"(data.worker_timeout={patience:g}); see to the disk that it is on, take it out of the data, or raise "
            "data.worker_timeout"
        )


class _Noting(Dataset[Any]):
    """A data set whose workers note which sample they are reading."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.notes = Notes(dataset, 0)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        info = get_worker_info()
        if info is None:
            return self.dataset[index]
        self.notes.begin(info.id, int(index))
        try:
            return self.dataset[index]
        finally:
            self.notes.end(info.id)


class _Sharing:
    """Makes batches and puts them into shared memory, where torch would do so in a thread that may fail unnoticed."""

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
