"""The folder of a run: where it is made, what every run leaves in it, how later runs find it.

outputs/TASK/DATE_TIME/    .cogview_pl.json, config.yaml, metrics.json, and what the task makes
outputs/TASK/latest        link to the newest finished one
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cogview_pl.checkpoints.manifest import file_hash
from cogview_pl.durable.read import why_unusable
from cogview_pl.durable.write import clear_for_writing, is_draft, write_bytes, write_text
from cogview_pl.errors import UserError
from cogview_pl.runs.lock import LOCK, RunLock
from cogview_pl.runs.ranks import RANKS, Processes
from cogview_pl.runs.record import RECORD, RunRecord, is_run

Metrics = Mapping[str, "float | str"]
"""What a verb returns; texts only in the protocol of task=evaluate."""

CONFIG = "config.yaml"
METRICS = "metrics.json"
CHECKPOINT = "checkpoints/last.ckpt"
STORE_HEADER = "token_store/header.json"
SAMPLES = "samples.jsonl"

_LATEST = "latest"
_AUTO = "auto"
_PROOFS: dict[str, tuple[str, ...]] = {
    "fit_image_tokenizer": (CHECKPOINT,),
    "fit_sequence_model": (CHECKPOINT, f"tokens/{STORE_HEADER}"),
    "tokenize": (STORE_HEADER,),
    "generate": (SAMPLES,),
}
"""Verb → files of which one is there when `resume` has something to go on with."""

_WORK = (CHECKPOINT, STORE_HEADER, f"tokens/{STORE_HEADER}", SAMPLES, METRICS)
"""Files that show that a folder holds the work of a run."""


_NOT_OURS = (".out", ".err", ".log")
"""Ends of the names that schedulers give to what a job prints, which may lie in a folder before the run is there."""


class RunFolder:
    """One run's folder, the same for all its processes, of which the first writes.

    A run that goes on writes nothing into it before `begin`, so that one that is refused leaves it as it was.

    Args:
        path: the folder; made if it does not exist.
        link: the `latest` link to set when the run is finished, or None for a folder outside `outputs/TASK`.
        processes: those of the run.
        goes_on: whether it holds a run that goes on.
    """

    def __init__(self, path: Path, link: Path | None, processes: Processes = RANKS, *, goes_on: bool = False) -> None:
        self.path = path
        self.processes = processes
        self._link = link
        self._goes_on = goes_on
        self._lock: RunLock | None = None
        self._record = RunRecord("")
        self._config = ""
        self._config_before: bytes | None = None
        self._begun = False
        if not self.writes:
            return
        _require_link(link)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={path} cannot be made ({error}); choose another run_dir") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def writes(self) -> bool:
        """Whether this process writes what the run leaves; the methods below do nothing in the others."""
        return self.processes.first

    def lock(self) -> None:
        """Keep other runs out, and clear away what killed ones left; raises UserError if a live one is in there."""
        if not self.writes:
            return
        lock = RunLock(self.path)
        try:
            clear_for_writing(self.path)  # after the lock: drafts may be those of a run that is alive
        except BaseException:
            lock.release()
            raise
        self._lock = lock

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()

    def describe(self, config: DictConfig) -> None:
        """Take in the resolved configuration; a new run writes it, with its record, right away."""
        if not self.writes:
            return
        self._config = OmegaConf.to_yaml(config, resolve=True)
        if self._goes_on:
            self._record = RunRecord.load(self.path)
            if self._record.task != config.task:
                raise UserError(
                    f"resume: {self.path} is a run of task={self._record.task}, this is task={config.task}; give a run "
                    f"of this task, or start a new one with init_from={self.path}"
                )
        else:
            self._record = RunRecord(config.task)
            self.begin()

    def require_same(self, settings: Mapping[str, Any], inputs: Mapping[str, str], verify: bool) -> None:
        """Compare with what the run began with, if it goes on; `begin` notes what is new.

        Args:
            settings: plain values that results depend on.
            inputs: hashes of what is read.
            verify: False notes the inputs that there are now instead.

        Raises:
            UserError: something is not what it was.
        """
        if self._goes_on:
            self._record.require_same(self.path, settings, inputs if verify else {})
        self._record.settings |= settings
        self._record.inputs |= inputs

    def begin(self) -> None:
        """Every check has passed: write record and configuration."""
        if not self.writes:
            return
        self._record.save(self.path)
        file = self / CONFIG
        if not self._begun:
            self._config_before = file.read_bytes() if file.exists() else None
            self._begun = True
        write_text(file, self._config)

    def undo(self) -> None:
        """Take the configuration back, and the folder if it holds nothing else: a refused run leaves no trace."""
        if not self.writes:
            return
        if self._config_before is not None:
            with suppress(UserError):  # a full disk, which the run has ended by and which has been said
                write_bytes(self / CONFIG, self._config_before)
        elif not self._goes_on and {entry.name for entry in self.path.iterdir()} <= {CONFIG, LOCK, RECORD}:
            for name in (CONFIG, RECORD):
                (self / name).unlink(missing_ok=True)
            self.unlock()
            self.path.rmdir()

    def finish(self, metrics: Metrics) -> None:
        """Write `metrics.json` and point `latest` here."""
        if not self.writes:
            return
        text = json.dumps(dict(sorted(metrics.items())), indent=2, ensure_ascii=False) + "\n"
        write_text(self / METRICS, text)
        self._record.metrics = file_hash(self / METRICS)
        self.begin()
        if self._link is not None:
            temporary = self._link.with_name(f".{_LATEST}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(self.path.resolve(), self._link.parent.resolve()))
            os.replace(temporary, self._link)


def require_metrics(path: Path) -> None:
    """Raises UserError if `metrics.json` of a finished run is not what the run wrote; other files are not judged."""
    if path.is_dir() and is_run(path) and (path / METRICS).is_file():
        noted = RunRecord.load(path).metrics
        if noted is not None and noted != file_hash(path / METRICS):
            raise UserError(f"{path / METRICS} is damaged: it is not what the run wrote; copy the run again")


def new_run(outputs: str, task: str, run_dir: str | None, job: int | None) -> RunFolder:
    """The folder for a new run: `run_dir` if given, else `OUTPUTS/TASK/DATE_TIME`; `job` is its number in a sweep.

    Raises:
        UserError: `run_dir` holds an earlier run, or files of somebody else.
    """
    home = Path(outputs) / task
    if run_dir is not None:
        path = _numbered(run_dir, job)
        _require_free(path)
        return RunFolder(path, None)
    path = _numbered(str(home / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")), job)
    stamp, attempt = path, 1
    while not _made(path):
        path, attempt = Path(f"{stamp}.{attempt}"), attempt + 1
    return RunFolder(path, home / _LATEST)


def _require_free(path: Path) -> None:
    """Raises UserError if a new run in a folder would write over what is there."""
    if not path.is_dir():
        return
    if is_run(path):
        found = next((name for name in _WORK if (path / name).exists()), None)
        if found is not None:
            raise UserError(
                f"run_dir={path} holds an earlier run ({found}); go on with it by resume={path}, delete it, or choose "
                "another run_dir"
            )
        return
    entries = [entry for entry in path.iterdir() if entry.name != LOCK and not is_draft(entry.name)]
    strangers = sorted(entry.name for entry in entries if entry.suffix not in _NOT_OURS)
    if strangers:
        raise UserError(
            f"run_dir={path} holds files that no run has made ({', '.join(strangers[:3])}"
            f"{', …' if len(strangers) > 3 else ''}), which it might write over; choose a folder that is new or empty"
        )


def _require_link(link: Path | None) -> None:
    """Raises UserError if the place of the `latest` link is taken by something else."""
    if link is not None and link.exists() and not link.is_symlink():
        raise UserError(f"{link} must be a link to the newest run and is a file or folder; move it away")


def _made(path: Path) -> bool:
    """Make a folder; False if there is one, maybe that of a run started at the same moment."""
    try:
        path.mkdir(parents=True)
    except OSError:
        return not os.path.lexists(path)  # where no folder can be made, RunFolder says what is wrong
    return True


def _numbered(path: str, job: int | None) -> Path:
    """A folder for each job of a sweep."""
    return Path(path if job is None else f"{path}_{job}")


def open_run(composed: DictConfig, job: int | None) -> tuple[RunFolder, Any]:
    """The folder of a composed run, and what its `resume` has become: `auto` turns into a folder or None.

    The first process finds or makes the folder and locks it; the others are told.

    Args:
        composed: its configuration.
        job: its number in a sweep.

    Raises:
        UserError: there is nothing to go on with, a new run would write over an earlier one, or one is in there.
    """
    if RANKS.size == 1 and not RANKS.first:  # started by the first process, which named its folder
        return RunFolder(Path(composed.run_dir), None), composed.resume
    with RANKS.first_goes_ahead() as first:
        if first:
            folder, resume = _find_run(composed, job)
            folder.lock()
    if not RANKS.first:
        return RunFolder(Path(str(RANKS.agree(None))), None), RANKS.agree(None) or None
    RANKS.agree(str(folder.path))
    RANKS.agree(str(resume or ""))
    return folder, resume


def _find_run(composed: DictConfig, job: int | None) -> tuple[RunFolder, Any]:
    outputs, task, given, resume = (composed[key] for key in ("outputs", "task", "run_dir", "resume"))
    proofs = _PROOFS.get(composed.verb.value, ())
    if resume == _AUTO:
        if given is None:
            raise UserError("resume=auto: set run_dir, which is where it looks for a run to go on with")
        path = _numbered(given, job)
        resume = str(path) if _holds(path, proofs) else None
    if not resume:
        return new_run(outputs, task, given, job), resume
    if not proofs:
        raise UserError(f"resume={resume}: task={task} keeps nothing to go on with; start it without resume")
    return interrupted_run(outputs, task, resume, proofs), resume


def can_go_on(folder: Path, verb: str) -> bool:
    """Whether a run of a verb has left something for `resume`."""
    return _holds(folder, _PROOFS.get(verb, ()))


def _holds(folder: Path, proofs: Sequence[str]) -> bool:
    return any((folder / proof).exists() for proof in proofs)


def interrupted_run(outputs: str, task: str, resume: object, proofs: Sequence[str]) -> RunFolder:
    """The folder to go on with.

    Args:
        outputs, task: where runs of this task are.
        resume: True for the newest run that left one of `proofs`, or the path of a run folder or of a checkpoint in
            one.
        proofs: files that show that there is something to go on with, relative to the run folder.

    Raises:
        UserError: there is no such run.
    """
    home = Path(outputs) / task
    if resume is True:
        runs = [run for run in home.glob("*") if not run.is_symlink() and is_run(run) and _holds(run, proofs)]
        if not runs:
            raise UserError(
                f"resume=true: no interrupted run (with {proofs[0]}) under {home}; start one without resume"
            )
        path = max(runs, key=lambda run: run.name)
        return RunFolder(path, home / _LATEST, goes_on=True)
    path = Path(str(resume))
    if path.is_symlink() or path.suffix == ".ckpt":  # such as outputs/TASK/latest, which the run will move
        path = path.resolve()
    if path.suffix == ".ckpt":
        if not path.exists():
            raise UserError(
                f"resume={resume} {why_unusable(path)}; give a checkpoint, or the folder of an interrupted run"
            )
        if path.parent.name != Path(CHECKPOINT).parent.name or not is_run(path.parent.parent):
            raise UserError(
                f"resume={resume}: {path.parent.parent} is not the folder of a run, and a run goes on in its own; give "
                "RUN_FOLDER/checkpoints/NAME.ckpt"
            )
        path = path.parent.parent
    elif not _holds(path, proofs):
        proof = path / proofs[0]
        raise UserError(f"resume={resume}: {proof} {why_unusable(proof)}; give the folder of an interrupted run")
    RunRecord.load(path)  # raises where the folder is none of ours
    return RunFolder(path, home / _LATEST if path.resolve().parent == home.resolve() else None, goes_on=True)


def predecessor(outputs: str, task: str, key: str, given: str | None) -> Path:
    """The run folder that another task left: `given`, or the newest finished run of `task`.

    Raises:
        UserError: there is none; the message says which command makes it.
    """
    if given is not None:
        if not Path(given).exists():
            raise UserError(f"{key}={given} {why_unusable(given)}; give the folder of a run of task={task}")
        return Path(given)
    latest = Path(outputs) / task / _LATEST
    if not latest.exists():
        raise UserError(
            f"{key}: no finished run of task={task} under {Path(outputs) / task}; "
            f"run `python -m cogview_pl.run task={task}` first, or set {key}=RUN_FOLDER"
        )
    return latest.resolve()
