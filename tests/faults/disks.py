"""Runs find no space on the disk, at a random moment or when they write a certain file."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.fork_server import Ended
from tests.faults.injections import no_space_beyond, when_written
from tests.faults.outcomes import EARLY, SCALARS_OF, Wrong, matches, require_one_line, require_same
from tests.faults.subjects import Subject

_FILLER = "filler"
_LOG = 1 << 12  # bytes that a run may print; its output is a file with limited size too
_ROOM = 16 << 20  # bytes that a run can write before its disk is full
_EVENTS = re.compile(rf"{SCALARS_OF}/events\.out\..*")

_APPENDED = ("*store/*.bin", "*store/*.keys.txt", "*store/*.crc32", "samples.jsonl")
"""Files of resumed runs that start empty, and are written when they are opened a second time."""


def kinds() -> dict[str, Callable[[Bench], str]]:
    """Name of a fault → function that injects it once and returns the outcome."""
    return {
        "disk full": _disk_full,
        "disk full when a certain file is written": _full_at_file,
        "largest file exceeded": _file_too_large,
    }


def _disk_full(bench: Bench) -> str:
    """A small one."""
    subject = bench.pick()
    with small_disk(bench, bench.number(1, subject.total)) as mounted:
        if not mounted:
            return _file_too_large(bench)
        ended = bench.start(subject.config)
        subprocess.run(["mount", "-o", "remount,size=1g", str(bench.place)], check=True)
        return _after(bench, subject, ended)


def _full_at_file(bench: Bench) -> str:
    """Any file can be the first without space."""
    subject = bench.pick()
    name = bench.draw(subject.files)
    with small_disk(bench, subject.total + _ROOM) as mounted:
        full = (lambda: fill(bench.place)) if mounted else no_space_beyond(0)
        time = 2 if matches(name, _APPENDED) and not subject.recipe.begins_anew else 1
        ended = bench.start(subject.config, when_written(lambda path: _is(path, bench.run, name), time, full))
        (bench.place / _FILLER).unlink(missing_ok=True)
        return _after(bench, subject, ended, SCALARS_OF if name.startswith(f"{SCALARS_OF}/") else name)


def _is(path: Path, run: Path, name: str) -> bool:
    """Whether a path is a file of a run, or its draft. Names of event files contain times."""
    if run not in path.parents:
        return False
    found = path.relative_to(run).as_posix().replace(f".{Path(name).name}.cogview_pl-draft", Path(name).name)
    return found == name or bool(_EVENTS.match(found) and _EVENTS.match(name))


def _file_too_large(bench: Bench) -> str:
    subject = bench.pick(lambda subject: subject.largest > _LOG)
    ended = bench.start(subject.config, no_space_beyond(bench.number(_LOG, subject.largest - 1)))
    return _after(bench, subject, ended)


def _after(bench: Bench, subject: Subject, ended: Ended, name: str = "") -> str:
    """One line names the file without space, or any file if None; then the disk has space again."""
    if ended.code == 0:
        require_same(bench.left(), subject.reference)
        return EARLY
    if f"{bench.place}/" not in (line := require_one_line(ended)) or f"{name}: no space left on the disk" not in line:
        raise Wrong(f"does not say where the disk is full: {ended.output[-600:]}")
    return bench.finish(subject, whole_log=False)


@contextmanager
def small_disk(bench: Bench, size: int) -> Iterator[bool]:
    """A file system with a number of bytes (at least two pages); yields False if mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={max(size, 1 << 13)}", "tmpfs", str(bench.place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield False
        return
    bench.mounted = True
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", str(bench.place)], check=True)


def fill(disk: Path) -> None:
    """Fill a disk."""
    with suppress(OSError), open(disk / _FILLER, "wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while stream.write(bytes(size)):
                    pass
