"""Where the runs of a campaign take place, and how one that was stopped goes on."""

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
    """Subjects, each run once without faults, and a place where they run with them.

    Args:
        home: folder for everything.
        seed: decides which faults, and when.
    """

    def __init__(self, home: Path, seed: int) -> None:
        self.home = home
        self.random = Random(seed)
        self.log = home / "log.txt"
        self.place = home / "place"
        """The folder of an injection: the run, and what a chain makes beside it."""
        self.run = self.place / "run"
        self.mounted = False
        """Whether full disks are real ones."""
        self.notes: list[str] = []
        """What was drawn for the injection under way."""
        Judge(32)  # prepares what all runs have in common
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
        """Run a subject twice without faults: its reference, and that it is deterministic."""
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
        """An empty place for one injection; what it left behind is taken away."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        try:
            yield
        finally:
            fork_server.end_orphans()

    def pick(self, wanted: Callable[[Subject], bool] = lambda subject: True) -> Subject:
        """One of the subjects that are wanted."""
        return self.subjects[self.draw([subject.name for subject in self.subjects.values() if wanted(subject)])]

    def draw(self, things: Sequence[T]) -> T:
        """One of several things, which is noted."""
        thing = self.random.choice(things)
        self.notes.append(str(thing))
        return thing

    def number(self, least: int, most: int) -> int:
        """A number, which is noted."""
        return self.draw(range(least, most + 1))

    def some_time(self, subject: Subject) -> float:
        """Some seconds in the life of a run, which are noted."""
        seconds = self.random.uniform(0.05, 0.95) * subject.seconds
        self.notes.append(f"{seconds:.2f} s")
        return seconds

    def start(self, config: Any, prepare: Prepare = nothing, **keys: Any) -> Ended:
        """A run in its place."""
        return fork_server.run(config, self.log, prepare, run_dir=str(self.run), **keys)

    def start_and(
        self, act: Callable[[int], object], subject: Subject, after: float, **keys: Any
    ) -> tuple[Ended, bool]:
        """A run in its place, to which something is done after some seconds."""
        return fork_server.run_and(act, subject.config, self.log, after, run_dir=str(self.run), **keys)

    def left(self) -> dict[str, Any]:
        """All that the run has left, and the newest stages of a chain."""
        stages = {f"stages/{task.name}": (task / "latest").resolve() for task in (self.place / "outputs").glob("*")}
        found = left_by(self.run)
        for name, run in stages.items():
            if run.exists():
                found |= {f"{name}/{key}": value for key, value in left_by(run).items()}
        return found

    def advice(self, subject: Subject) -> list[str]:
        """What a run that was stopped says is to be done; a chain may say how to go on with its stage."""
        if subject.can_go_on(self.run):
            return [f"go on with resume={self.run}"]
        return ["start it again", f"go on with resume={self.place}/outputs/"]

    def finish(self, subject: Subject, *, killed: bool = False, whole_log: bool = True) -> str:
        """Have a stopped run go on, or begin anew, to its end; it must end like one that was not stopped.

        Args:
            subject: what was stopped.
            killed: it had no time to tidy up.
            whole_log: it could write all that it had logged.
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
            require_same(self.left(), subject.reference, but=drafts)  # a kill behind the last file
        self._require_whole_stages(subject)
        ended = self.start(subject.config)
        if ended.code == 0:
            require_same(self.left(), subject.reference)
            return STOPPED
        if "delete it" not in require_one_line(ended):
            raise Wrong(f"it cannot begin anew: {ended.output[-1500:]}")
        return STOPPED

    def _require_whole_stages(self, subject: Subject) -> None:
        """Stages of a chain that have finished are what they would be without the fault."""
        for run in (self.place / "outputs").glob("*/*"):
            if (run / METRICS).exists():
                stage = f"stages/{run.parent.name}/"
                wanted = {key: value for key, value in subject.reference.items() if key.startswith(stage)}
                require_same({f"{stage}{key}": value for key, value in left_by(run).items()}, wanted)
            elif run.name == "latest":
                raise Wrong(f"{run} points at a stage that has not finished")

    def same_or_refused(self, ended: Ended, subject: Subject, but: Collection[str] = ()) -> str:
        """A run on damaged files ends like one on whole ones (`but` for some of its own), or in one line."""
        if ended.code == 0:
            require_same(self.left(), subject.reference, but)
            return SAME
        require_one_line(ended)
        return REFUSED
