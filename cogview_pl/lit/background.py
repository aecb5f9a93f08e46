"""Jobs that a thread runs while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs jobs one after the other. When one has failed, those after it are dropped, since they rest on it."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return any(not job.done() for job in self._jobs)

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job after those that wait already."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._jobs.append(self._thread.submit(self._run, job))

    def wait(self) -> None:
        """Return when no job is left; raises the error of a job that has failed, once."""
        wait(self._jobs)
        self._jobs = []
        error, self._error = self._error, None
        if error is not None:
            raise error

    def raise_error(self) -> None:
        """Raise the error of a job that has failed, once; does not wait for jobs."""
        if self._error is not None:
            self.wait()  # the dropped jobs take no time

    def close(self) -> None:
        """End the thread, after `wait`."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _run(self, job: Callable[[], None]) -> None:
        if self._error is None:
            try:
                job()
            except BaseException as error:
                self._error = error
