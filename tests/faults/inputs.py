"""Inputs of a stopped run are changed, or written again unchanged."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.injections import die_at_call
from tests.faults.outcomes import REFUSED, Wrong, require_one_line
from tests.faults.subjects import Subject, image, write_shard


def kinds() -> dict[str, Callable[[Bench], str]]:
    """Name of a fault → function that injects it once and returns the outcome."""
    return {"another input, then the right one again": _changed, "the same input, written again": _written_again}


def _changed(bench: Bench) -> str:
    """One line names the changed input; with the earlier input the run resumes."""
    subject, name, word = _stopped(bench)
    with _in_place_of(bench, name) as place:
        _write_other(bench, name, place)
        ended = bench.start(subject.config, resume="auto")
        if word not in require_one_line(ended):
            raise Wrong(f"another {name}: the line does not have {word!r}: {ended.output[-600:]}")
    bench.finish(subject, killed=True)
    return REFUSED


def _written_again(bench: Bench) -> str:
    """For token stores and models the content counts, for images and shards size and time."""
    subject, name, _ = _stopped(bench)
    with _in_place_of(bench, name) as place:
        copy = shutil.copy2 if name in _FILES else shutil.copyfile
        shutil.copytree(_aside(bench, name), place, copy_function=copy)
        return bench.finish(subject, killed=True)


def _stopped(bench: Bench) -> tuple[Subject, str, str]:
    """A killed run with progress, its input, and a word that names the input."""
    subject = bench.pick(lambda subject: bool(subject.recipe.reads))
    name = bench.draw(sorted(subject.recipe.reads))
    for call in (bench.number(subject.calls // 3, subject.calls), subject.calls):
        with bench.fresh_place():
            if bench.start(subject.config, die_at_call(call, before=False)).code != -signal.SIGKILL:
                raise Wrong(f"it did not make call {call}")
        if subject.can_go_on(bench.run):
            break
    return subject, name, subject.recipe.reads[name]


@contextmanager
def _in_place_of(bench: Bench, name: str) -> Iterator[Path]:
    """Path of an input; the input is restored after the block."""
    place, aside = bench.home / name, _aside(bench, name)
    os.replace(place, aside)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)


def _aside(bench: Bench, name: str) -> Path:
    return bench.home / f"aside {name}"


def _write_other(bench: Bench, name: str, place: Path) -> None:
    """Remove or replace an image or shard, or replace a run by one with another seed."""
    if name not in _FILES:
        shutil.copytree(bench.home / f"other {name}", place)
        return
    shutil.copytree(_aside(bench, name), place, copy_function=shutil.copy2)
    file = bench.draw(sorted(place.glob(_FILES[name])))
    if bench.random.random() < 0.3:
        file.unlink()
    elif file.suffix == ".tar":
        write_shard(file, 6 * int(file.stem), changed=50)
    elif file.suffix == ".png":
        file.write_bytes(image(99))
    else:
        file.write_text(f"{file.read_text()}，还有一个蓝色的点")


_FILES = {"images": "*", "tars": "*.tar"}
"""Inputs that are no runs → their files."""
