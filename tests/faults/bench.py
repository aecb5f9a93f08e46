"""Folders of the runs of a campaign, and functions that resume a stopped run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from cogview_pl.durable.write import is_draft
from cogview_pl.runs.run_folder import METRICS
from cogview_pl.toy_world.judge import Judge
from tests.faults import fork_server
from tests.faults.fork_server import Ended, Prepare, compose, nothing
from tests.faults.injections import Counts
from tests.faults.outcomes import (
    REFUSED,
    SAME,
    STOPPED,
    Wrong,
    declared,
    files_of,
    left_by,
    require_nothing_half_written,
    require_nothing_lost,
    require_one_line,
    require_same,
)
from tests.faults.subjects import OTHERS, QUIET, RECIPES, SMALL, Subject, write_images, write_shards

T = TypeVar("T")


class Bench:
    """Subjects that have run without faults, and a folder where they run with faults.

    Args:
        home: folder of all runs.
        seed: seed of faults and moments.
    """

    def __init__(self, home: Path, seed: int) -> None:
        self.home = home
        self.random = Random(seed)
        self.log = home / "log.txt"
        self.place = home / "place"
        """The folder of an injection: the run, and outputs of a chain."""
        self.run = self.place / "run"
        self.mounted = False
        """Whether full disks are real file systems."""
        self.notes: list[str] = []
        """Random choices of the current injection."""
        Judge(32)  # prepares shared caches of all runs
        write_images(home / "images")
        write_shards(home / "tars")
        self.subjects: dict[str, Subject] = {}
        for name in RECIPES:
            self.subjects[name] = self._subject(name)
        for name, changes in OTHERS.items():
            self._require_done(fork_server.run(self._compose(name, *changes), self.log, run_dir=f"{home}/other {name}"))

    def _compose(self, name: str, *changes: str) -> Any:
        words = (*QUIET, *SMALL, "outputs={home}/outputs", *RECIPES[name].overrides, *changes)
        return compose(*(word.replace("{home}", str(self.home)).replace("{place}", str(self.place)) for word in words))

    def _subject(self, name: str) -> Subject:
        """Run a subject twice without faults, for a reference, and to check that it is deterministic."""
        config, counts, reference = self._compose(name), Counts(), self.home / name
        with self.fresh_place():
            ended = self.start(config, counts.prepare)
            self._require_done(ended)
            shutil.copytree(self.run, reference, symlinks=True)
            left = self.left()
        with self.fresh_place():
            again = self.start(config)
            self._require_done(again)
            require_same(self.left(), left)
        files = files_of(reference)
        return Subject(
            name=name,
            recipe=RECIPES[name],
            config=config,
            reference=left,
            files=tuple(name for name, _ in files),
            seconds=min(ended.seconds, again.seconds),
            calls=counts.calls,
            moments=counts.moments,
            before_checkpoint=counts.before_checkpoint,
            largest=max(file.stat().st_size for _, file in files),
            total=sum(file.stat().st_size for _, file in files),
        )

    def _require_done(self, ended: Ended) -> None:
        if ended.code:
            raise Wrong(f"a run without faults fails: {ended.output[-3000:]}")

    @contextmanager
    def fresh_place(self) -> Iterator[None]:
        """An empty folder for an injection; it is emptied afterwards."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        try:
            yield
        finally:
            fork_server.end_orphans()

    def pick(self, wanted: Callable[[Subject], bool] = lambda subject: True) -> Subject:
        """A random subject among those that fit."""
        return self.subjects[self.draw([subject.name for subject in self.subjects.values() if wanted(subject)])]

    def draw(self, things: Sequence[T]) -> T:
        """A random choice, recorded in the log of the injection."""
        thing = self.random.choice(things)
        self.notes.append(str(thing))
        return thing

    def number(self, least: int, most: int) -> int:
        """A random number, recorded in the log of the injection."""
        return self.draw(range(least, most + 1))

    def some_time(self, subject: Subject) -> float:
        """A random moment of a run in seconds, recorded in the log of the injection."""
        seconds = self.random.uniform(0.05, 0.95) * subject.seconds
        self.notes.append(f"{seconds:.2f} s")
        return seconds

    def start(self, config: Any, prepare: Prepare = nothing, **keys: Any) -> Ended:
        """Run a subject in the folder of the injection."""
        return fork_server.run(config, self.log, prepare, run_dir=str(self.run), **keys)

    def start_and(
        self, act: Callable[[int], object], subject: Subject, after: float, **keys: Any
    ) -> tuple[Ended, bool]:
        """Run a subject in the folder of the injection, and call a function after some seconds."""
        return fork_server.run_and(act, subject.config, self.log, after, run_dir=str(self.run), **keys)

    def left(self) -> dict[str, Any]:
        """The run folder, and the newest stages of a chain."""
        stages = {f"stages/{task.name}": (task / "latest").resolve() for task in (self.place / "outputs").glob("*")}
        found = left_by(self.run)
        for name, run in stages.items():
            if run.exists():
                found |= {f"{name}/{key}": value for key, value in left_by(run).items()}
        return found

    def advice(self, subject: Subject) -> list[str]:
        """Advice that a stopped run prints; a chain may print advice for its stage."""
        if subject.can_go_on(self.run):
            return [f"go on with: python -m cogview_pl.run resume={self.run}"]
        return ["start it again", f"go on with: python -m cogview_pl.run resume={self.place}/outputs/"]

    def finish(self, subject: Subject, *, killed: bool = False, whole_log: bool = True) -> str:
        """Resume a stopped run, or start it anew, to its end; its result must equal the reference.

        Args:
            subject: subject of the stopped run.
            killed: whether the run was killed and could not clean up.
            whole_log: whether the run could write all of its log.
        """
        if subject.recipe.begins_anew:
            return self._begin_anew(subject, killed)
        before = declared(self.run) if self.run.exists() else {}
        ended = self.start(subject.config, resume="auto")
        if ended.code:
            raise Wrong(f"it does not go on: code {ended.code}: {ended.output[-2500:]}")
        require_nothing_lost(self.run, before)
        require_same(self.left(), subject.reference, whole_log=whole_log and not killed)
        return SAME

    def _begin_anew(self, subject: Subject, killed: bool) -> str:
        if self.run.exists():
            require_nothing_half_written(self.run, killed)
        if (self.run / METRICS).exists():
            if not killed:
                raise Wrong(f"{METRICS} is there, as if the run had finished")
            drafts = [name for name, file in files_of(self.run) if is_draft(file.name)]
            require_same(self.left(), subject.reference, but=drafts)  # a kill after the last file
        self._require_whole_stages(subject)
        ended = self.start(subject.config)
        if ended.code == 0:
            require_same(self.left(), subject.reference)
            return STOPPED
        if "delete it" not in require_one_line(ended):
            raise Wrong(f"it cannot begin anew: {ended.output[-1500:]}")
        return STOPPED

    def _require_whole_stages(self, subject: Subject) -> None:
        """Check that finished stages of a chain equal those of the reference."""
        for run in (self.place / "outputs").glob("*/*"):
            if (run / METRICS).exists():
                stage = f"stages/{run.parent.name}/"
                wanted = {key: value for key, value in subject.reference.items() if key.startswith(stage)}
                require_same({f"{stage}{key}": value for key, value in left_by(run).items()}, wanted)
            elif run.name == "latest":
                raise Wrong(f"{run} points at a stage that has not finished")

    def same_or_refused(self, ended: Ended, subject: Subject, but: Collection[str] = ()) -> str:
        """Check that a run on damaged files ends in one line or like the reference, except for the files `but`."""
        if ended.code == 0:
            require_same(self.left(), subject.reference, but)
            return SAME
        require_one_line(ended)
        return REFUSED
