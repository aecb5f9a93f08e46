"""Files and results of a run, and the guarantees that must hold after a fault."""

from __future__ import annotations

import json
import signal
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from cogview_pl.checkpoints.manifest import MANIFEST, require_undamaged
from cogview_pl.data.records import read_record
from cogview_pl.durable.write import is_draft
from cogview_pl.runs.lock import LOCK
from cogview_pl.runs.record import RECORD, RunRecord
from cogview_pl.runs.run_folder import CHAIN, METRICS, require_metrics
from tests.faults.fork_server import Ended

EVERY = 3  # steps between checkpoints, some before a validation and some not

SAME = "same result"
REFUSED = "refused with a reason"
LISTED = "skipped, listed and counted"
STOPPED = "stopped, nothing half-written"
EARLY = "had ended before"
FAILED = "FAILED"

SCALARS_OF = "tensorboard"
NOT_COMPARED = {
    "config*.yaml": "names the place of the run",
    RECORD: "holds a hash of metrics.json, in which times are; compared by its other values",
    METRICS: "compared but for times",
    LOCK: "names a process",
    "report.html": "holds times and places",
    CHAIN: "holds times and places",
    "checkpoints/*.ckpt": "hold times; the tensors of the last one are compared",
    f"{SCALARS_OF}/*": "events have times, and a kill loses the last ones; what there is of each step is compared",
}
"""Patterns of files that may have other bytes → the reason."""


class Wrong(AssertionError):
    """A guarantee was broken."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def left_by(run: Path) -> dict[str, Any]:
    """Everything that must be equal: bytes of files, tensors of the last checkpoint, and metrics except times."""
    found: dict[str, Any] = {}
    for name, file in files_of(run):
        if not matches(name, NOT_COMPARED):
            found[name] = file.read_bytes()
    if (run / METRICS).exists():
        metrics = json.loads((run / METRICS).read_bytes())
        found[METRICS] = {key: value for key, value in metrics.items() if not key.startswith("perf/")}
        require_metrics(run)
    if (run / RECORD).exists():
        record = RunRecord.load(run)
        found[RECORD] = {"task": record.task, **record.settings, **record.inputs}
    last = run / "checkpoints" / "last.ckpt"
    if last.exists():
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            found |= {f"last.ckpt {path}": value for path, value in _leaves(checkpoint[part], part)}
    if (run / SCALARS_OF).exists():
        found[SCALARS_OF] = scalars(run / SCALARS_OF)
    return found


def files_of(run: Path) -> list[tuple[str, Path]]:
    """Name relative to the run → path, for all its files."""
    return [(file.relative_to(run).as_posix(), file) for file in sorted(run.rglob("*")) if file.is_file()]


def scalars(folder: Path) -> dict[str, float]:
    """Logged values by name and step; the last value of a repeated step."""
    found: dict[str, float] = {}
    for file in sorted(folder.iterdir()):  # ordered by the time in their names
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if not tag.startswith("watch-perf/"):
                found |= {f"{tag} of step {event.step}": event.value for event in events.Scalars(tag)}
    return found


def _leaves(tree: Any, path: str) -> list[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists, with tensors as bytes."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}/{key}")]
    if isinstance(tree, (list, tuple)):
        return [leaf for number, value in enumerate(tree) for leaf in _leaves(value, f"{path}/{number}")]
    return [(path, tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree)]


def require_same(
    found: dict[str, Any], wanted: dict[str, Any], but: Collection[str] = (), whole_log: bool = True
) -> None:
    """Raises Wrong naming the difference, except for the files `but`.

    With `whole_log=False` scalars may be missing, because a kill loses values that are not yet written.
    """
    wrong = [name for name in found | wanted if name not in but and found.get(name) != wanted.get(name)]
    logged, all_of_it = (left.get(SCALARS_OF, {}).items() for left in (found, wanted))
    if SCALARS_OF in wrong and not whole_log and logged <= all_of_it:
        wrong.remove(SCALARS_OF)
    if wrong:
        values = [(found.get(name), wanted.get(name)) for name in wrong[:1] if isinstance(found.get(name), dict)]
        raise Wrong(f"differs: {wrong[:8]} {values}")


def require_nothing_lost(run: Path, before: dict[str, bytes]) -> None:
    """Results that a stopped run had listed as finished still exist, complete, after it was resumed."""
    for name, data in before.items():
        file = run / name
        if not file.exists() or not file.read_bytes().startswith(data):
            raise Wrong(f"{name} lost what had been written")


def declared(run: Path) -> dict[str, bytes]:
    """Finished results of a stopped run: complete images of its list, rows of its header, checkpoints that open."""
    found: dict[str, bytes] = {}
    for checkpoint in run.glob("checkpoints/*.ckpt"):
        try:
            torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Wrong(f"{checkpoint.name} is no whole checkpoint: {error}") from error
    steps = [int(file.stem.split("_")[1]) for file in run.glob("checkpoints/step_*.ckpt")]
    if steps and max(steps) > EVERY and not (run / "checkpoints" / "last.ckpt").exists():
        raise Wrong("there is no last.ckpt any more")
    for header in run.rglob("token_store/header.json"):
        store = header.parent.relative_to(run).as_posix()
        for name, split in json.loads(header.read_bytes())["splits"].items():
            keys = run / store / f"{name}.keys.txt"
            found[f"{store}/{name}.keys.txt"] = keys.read_bytes()[: split["key_bytes"]] if keys.exists() else b""
            if len(found[f"{store}/{name}.keys.txt"]) != split["key_bytes"]:
                raise Wrong(f"{name}: the header counts keys that are not there")
    samples = run / "samples.jsonl"
    if samples.exists():
        for line in samples.read_bytes().split(b"\n")[:-1]:
            record = json.loads(line)
            if "file_crc32" in record:  # otherwise it names an image that the run has read
                Image.open(run / record["file"]).load()
                found[record["file"]] = (run / record["file"]).read_bytes()
    return found


def require_nothing_half_written(run: Path, killed: bool) -> None:
    """Raises Wrong if a file of a stopped run is incomplete.

    A killed run may leave drafts and an incomplete line, because it could not clean up.
    """
    for name, file in files_of(run):
        if is_draft(file.name):
            if not killed:
                raise Wrong(f"{name} is left")
            continue
        try:
            _read(file, killed)
        except Exception as error:
            raise Wrong(f"{name} is half-written: {error}") from error


def _read(file: Path, killed: bool) -> None:
    """Raises an exception of any kind if a file is incomplete."""
    if file.suffix == ".json":
        json.loads(file.read_bytes())
    elif file.suffix == ".jsonl":
        *lines, rest = file.read_bytes().split(b"\n")
        for line in lines:
            read_record(line)
        if rest and not killed:
            raise ValueError("the last line is cut off")
    elif file.suffix == ".png":
        Image.open(file).load()
    elif file.suffix == ".safetensors":
        load_file(file)
    elif file.suffix == ".html" and not file.read_text().endswith("</html>\n"):
        raise ValueError("its end is missing")
    if file.name == MANIFEST:
        require_undamaged(file.parent, json.loads(file.read_bytes()))


def require_one_line(ended: Ended) -> str:
    """The run must end with exit code 2 and the one line of an error; returns this line."""
    lines = [line for line in ended.output.splitlines() if line.strip()]
    if ended.code != 2 or "Traceback" in ended.output or not lines or not lines[-1].startswith("cogview_pl: "):
        raise Wrong(f"code {ended.code}: {ended.output[-1500:]}")
    return lines[-1]


def require_stopped(ended: Ended, number: int, advice: Collection[str]) -> None:
    """The exit code must be that of a signal, without a traceback; if the run recorded it, one line has an advice."""
    noted = ended.code == 128 + number
    if ended.code != -number and not noted:
        raise Wrong(f"signal {number}: code {ended.code}: {ended.output[-1500:]}")
    lines = [line for line in ended.output.splitlines() if line.startswith("cogview_pl: ")]
    wanted = [f"cogview_pl: stopped by {signal.Signals(number).name}; {words}" for words in advice]
    if "Traceback" in ended.output or (noted and (len(lines) != 1 or not lines[0].startswith(tuple(wanted)))):
        raise Wrong(f"signal {number}, wanted {wanted}: {ended.output[-1500:]}")
