"""What a run reads is changed while it is stopped, or written again as it was."""

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
    """Name of a fault → what puts it in once and says how that ended."""
    return {"another input, then the right one again": _changed, "the same input, written again": _written_again}


def _changed(bench: Bench) -> str:
    """One line names it; with what was there before the run goes on."""
    subject, name, word = _stopped(bench)
    with _in_place_of(bench, name) as place:
        _write_other(bench, name, place)
        ended = bench.start(subject.config, resume="auto")
        if word not in require_one_line(ended):
            raise Wrong(f"another {name}: the line does not have {word!r}: {ended.output[-600:]}")
    bench.finish(subject, killed=True)
    return REFUSED


def _written_again(bench: Bench) -> str:
    """Of stores and models the content counts, of images and shards size and time."""
    subject, name, _ = _stopped(bench)
    with _in_place_of(bench, name) as place:
        copy = shutil.copy2 if name in _FILES else shutil.copyfile
        shutil.copytree(_aside(bench, name), place, copy_function=copy)
        return bench.finish(subject, killed=True)


def _stopped(bench: Bench) -> tuple[Subject, str, str]:
    """A run that has been killed and has left something, what it reads, and a word that names that."""
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
    """Where an input is, which is put aside for a while."""
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
    """One image or shard less or another, or the run of another seed."""
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
"""Inputs that are no runs, and their files."""
