"""One bit of a file is flipped; the next reader must refuse the file, or end with the same result.

A flipped file keeps its size and time, as on a failing disk.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cogview_pl.runs.record import RECORD
from cogview_pl.runs.run_folder import METRICS
from tests.faults.bench import Bench
from tests.faults.injections import die_at_call, flip
from tests.faults.outcomes import LISTED, SAME, Wrong, matches
from tests.faults.subjects import Subject

ITSELF = "it goes on"
SKIPPED = "skipped.jsonl"

MODEL = ("model/*",)
STORE = ("token_store/*", "text.model", "image_tokenizer/*")
IMAGES = ("samples.jsonl", "samples/0*.png")
GOES_ON = (RECORD, "config.yaml")


@dataclass(frozen=True)
class Use:
    """The next reader of files of a run."""

    of: str
    """Subject that has made the files."""
    files: tuple[str, ...]
    """Patterns of file names."""
    by: str
    """Subject that reads the files, or `ITSELF`."""


MODELS = (
    Use("vqvae", MODEL, "tokenize"),
    Use("vqvae", MODEL, "evaluate"),
    Use("pretrain", MODEL, "generate"),
    Use("pretrain", MODEL, "caption"),
    Use("pretrain", MODEL, "super_resolution"),
    Use("super_resolution", MODEL, "magnify"),
    Use("style", ("adapter/*",), "generate by an adapter"),
    Use("caption", ("adapter/*",), "generate, ranked"),
    Use("caption", ("adapter/*",), "rerank"),
    Use("features", MODEL, "evaluate"),
)
STORES = (
    Use("tokenize", STORE, "pretrain"),
    Use("tokenize", STORE, "pretrain with workers"),
    Use("tokenize", ("token_store/*",), "style"),
)
RESULTS = (
    Use("generate", IMAGES, "rerank"),
    Use("generate", IMAGES, "magnify"),
    Use("generate", IMAGES, "evaluate"),
    Use("evaluate", (METRICS, RECORD), "compare"),
)
TRAININGS = ("vqvae", "vqvae with a log", "pretrain", "pretrain with a log", "caption")
FINETUNES = ("style", "super_resolution")
GENERATIONS = ("generate", "generate by an adapter", "generate, ranked")
CHECKPOINTS = tuple(
    Use(name, ("checkpoints/*",), ITSELF)
    for name in (*TRAININGS, *FINETUNES, "vqvae with workers", "pretrain with workers")
)
UNFINISHED = (
    *(Use(name, GOES_ON, ITSELF) for name in TRAININGS),
    *(Use(name, (*GOES_ON, "tokens/*"), ITSELF) for name in FINETUNES),
    *(Use(name, (*GOES_ON, *IMAGES), ITSELF) for name in GENERATIONS),
    Use("vqvae with workers", (*GOES_ON, SKIPPED), ITSELF),
    Use("tokenize", (*GOES_ON, *STORE), ITSELF),
    Use(
        "tokenize with workers",
        (*GOES_ON, SKIPPED, "token_store/header.json", "text.model", "image_tokenizer/*"),
        ITSELF,
    ),
)

NOT_READ = {
    "reconstructions.png": "for people; a chain copies it right after the run",
    "samples/grid.png": "for people; a chain copies it right after the run",
    "tensorboard/*": "for TensorBoard, which checks it; a chain draws its curves right after the run",
    METRICS: "for people, but of evaluations: evaluate.compare reads them",
    "config.yaml": "of runs that nothing goes on with",
    RECORD: "of runs that nothing goes on with or compares",
    "report.html": "for people",
    "chain.json": "only a chain that was stopped reads it",
    "first.png": "for people, in the folder of a chain",
    SKIPPED: "for people, but where a run goes on",
}
"""Files that the program never reads after the run → the reason."""

COUNTED = {
    "shards": ("tokenize/skipped", 1),
    "rerank": ("rerank/skipped", 1),
    "magnify": ("magnify/skipped", 1),
    "evaluate": ("protocol/generated_images", -1),
}
"""Subject → metric that changes by an unreadable image, and the amount."""


def kinds() -> dict[str, Callable[[Bench], str]]:
    """Name of a fault → function that injects it once and returns the outcome."""
    return {
        "flipped bit in a token store": lambda bench: _flip(bench, STORES),
        "flipped bit in a shard": _flip_shard,
        "flipped bit in a model or an adapter": lambda bench: _flip(bench, MODELS),
        "flipped bit in images, lists or metrics": lambda bench: _flip(bench, RESULTS),
        "flipped bit in a checkpoint": lambda bench: _flip_stopped(bench, CHECKPOINTS),
        "flipped bit in another file of a run that goes on": lambda bench: _flip_stopped(bench, UNFINISHED),
    }


def require_all_read(bench: Bench) -> None:
    """Raises Wrong for a file that is neither damaged here nor listed as never read."""
    patterns = {
        pattern for use in (*MODELS, *STORES, *RESULTS, *CHECKPOINTS, *UNFINISHED) for pattern in use.files
    } | NOT_READ.keys()
    for subject in bench.subjects.values():
        for name in subject.files:
            if not matches(name, patterns):
                raise Wrong(f"{subject.name}: does anything read {name}?")


def _flip(bench: Bench, uses: tuple[Use, ...]) -> str:
    use = bench.draw(uses)
    of, reader = bench.subjects[use.of], bench.subjects[use.by]
    file = bench.home / use.of / bench.draw([name for name in of.files if matches(name, use.files)])
    with _flipped(bench, file):
        ended = bench.start(reader.config)
        if ended.code == 0 and file.suffix == ".png" and (bench.run / SKIPPED).exists():
            return _require_listed(bench, reader)
        return bench.same_or_refused(ended, reader, but=[RECORD])  # it records that its input has changed


def _flip_shard(bench: Bench) -> str:
    """Captions are not damaged, because a tar file has no checksum for them."""
    subject, file = bench.subjects["shards"], bench.draw(sorted((bench.home / "tars").iterdir()))
    with tarfile.open(file) as tar:
        captions = [range(m.offset_data, m.offset_data + m.size) for m in tar if m.name.endswith("txt")]
    with _flipped(bench, file, lambda place: not any(place in caption for caption in captions)):
        ended = bench.start(subject.config)
        if ended.code == 0 and (bench.run / SKIPPED).exists():
            return _require_listed(bench, subject)
        return bench.same_or_refused(ended, subject)


@contextmanager
def _flipped(bench: Bench, file: Path, allowed: Callable[[int], bool] = lambda place: True) -> Iterator[None]:
    """A file with one flipped bit inside the block."""
    status, whole = file.stat(), file.read_bytes()
    try:
        flip(file, bench.random, allowed)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        yield
    finally:
        file.write_bytes(whole)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _flip_stopped(bench: Bench, uses: tuple[Use, ...]) -> str:
    """Undetected damage must change nothing but the flipped bit; rows of a token store are then read by training."""
    use = bench.draw(uses)
    subject = bench.subjects[use.of]
    _stop(bench, subject)
    files = {name: bench.run / name for name in subject.files if matches(name, use.files)}
    name = bench.draw([name for name, file in files.items() if file.is_file() and file.stat().st_size])
    place = flip(files[name], bench.random)
    step = files[name].name.startswith("step_")
    ended = bench.start(subject.config, resume=str(files[name]) if step else "auto")
    stays = _differs_at(files[name], subject.reference.get(name), place)
    outcome = bench.same_or_refused(ended, subject, but=[name] if stays else [])
    if outcome == SAME and stays and subject.name == "tokenize" and matches(name, STORE):
        return _read_store(bench)
    return outcome


def _stop(bench: Bench, subject: Subject) -> None:
    """Restore the state after a kill; in training, after the last but one checkpoint."""
    if not subject.trains:
        call = bench.number(subject.calls // 2, subject.calls)
        if bench.start(subject.config, die_at_call(call, before=False)).code != -signal.SIGKILL:
            raise Wrong(f"it did not make call {call}")
        if not subject.can_go_on(bench.run):
            raise Wrong(f"it cannot go on after call {call}")
        return
    shutil.copytree(bench.home / subject.name, bench.run)
    (bench.run / METRICS).unlink()
    for made in ("model", "adapter"):
        shutil.rmtree(bench.run / made, ignore_errors=True)
    (earlier,) = (bench.run / "checkpoints").glob("step_*.ckpt")
    shutil.copy(earlier, bench.run / "checkpoints" / "last.ckpt")


def _differs_at(file: Path, wanted: object, place: int) -> bool:
    """Whether a file differs from the reference in one byte."""
    if not isinstance(wanted, bytes) or not file.is_file():
        return False
    found = file.read_bytes()
    return len(found) == len(wanted) and [n for n in range(len(found)) if found[n] != wanted[n]] == [place]


def _read_store(bench: Bench) -> str:
    store, reader = bench.place / "read", bench.subjects["pretrain"]
    os.replace(bench.run, store)
    return bench.same_or_refused(bench.start(reader.config, **{"data.token_store": str(store)}), reader, but=[RECORD])


def _require_listed(bench: Bench, reader: Subject) -> str:
    """One image is missing in the list and in the metrics."""
    listed = (bench.run / SKIPPED).read_text().splitlines()
    key, sign = COUNTED[reader.name]
    counted = sign * (json.loads((bench.run / METRICS).read_bytes())[key] - reader.reference[METRICS][key])
    if len(listed) != 1 or counted != 1:
        raise Wrong(f"{len(listed)} images are listed as skipped, {counted} counted")
    return LISTED
