"""The folder of a run: where it is made, what every run leaves in it, how later runs find it.

outputs/TASK/DATE_TIME/    config.yaml, metrics.json, and what the task makes
outputs/TASK/latest        link to the newest finished one
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cogview_pl.config import Verb
from cogview_pl.durable import remove_drafts, write_text
from cogview_pl.errors import UserError
from cogview_pl.tasks.processes import THESE, Processes
from cogview_pl.tasks.run_lock import LOCK, RunLock

Metrics = Mapping[str, "float | str"]
"""What a verb returns; texts only in the protocol of task=evaluate."""

METRICS = "metrics.json"
CHECKPOINT = "checkpoints/last.ckpt"
STORE_HEADER = "store/header.json"
SAMPLES = "samples.jsonl"

_LATEST = "latest"
_AUTO = "auto"
_PROOFS: dict[Verb, tuple[str, ...]] = {
    Verb.fit_image_tokenizer: (CHECKPOINT,),
    Verb.fit_sequence_model: (CHECKPOINT, f"tokens/{STORE_HEADER}"),
    Verb.tokenize: (STORE_HEADER,),
    Verb.generate: (SAMPLES,),
}
"""Verb → files of which one is there when `resume` has something to go on with."""

_WORK = (CHECKPOINT, STORE_HEADER, f"tokens/{STORE_HEADER}", SAMPLES, METRICS)
"""Files that show that a folder holds the work of a run."""


class RunFolder:
    """One run's folder, the same for all its processes, of which the first writes.

    Args:
        path: the folder; made if it does not exist.
        link: the `latest` link to set when the run is finished, or None for a folder outside `outputs/TASK`.
        processes: those of the run.
    """

    def __init__(self, path: Path, link: Path | None, processes: Processes = THESE) -> None:
        self.path = path
        self.processes = processes
        self._link = link
        self._config_before: str | None = None
        self._lock: RunLock | None = None
        if not self.writes:
            return
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
        self._lock = RunLock(self.path)
        remove_drafts(self.path)

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.release()

    def save_config(self, config: DictConfig) -> None:
        """Write the resolved configuration."""
        if not self.writes:
            return
        file = self / "config.yaml"
        if file.exists():
            self._config_before = file.read_text(encoding="utf-8")
        write_text(file, OmegaConf.to_yaml(config, resolve=True))

    def undo(self) -> None:
        """Take the configuration back, and the folder if it holds nothing else: a refused run leaves no trace."""
        if not self.writes:
            return
        file = self / "config.yaml"
        if self._config_before is not None:
            write_text(file, self._config_before)
        elif {entry.name for entry in self.path.iterdir()} <= {file.name, LOCK}:
            file.unlink(missing_ok=True)
            self.unlock()
            self.path.rmdir()

    def finish(self, metrics: Metrics) -> None:
        """Write `metrics.json` and point `latest` here."""
        if not self.writes:
            return
        text = json.dumps(dict(sorted(metrics.items())), indent=2, ensure_ascii=False) + "\n"
        write_text(self / METRICS, text)
        if self._link is not None:
            temporary = self._link.with_name(f".{_LATEST}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(self.path, self._link.parent))
            os.replace(temporary, self._link)


def new_run(outputs: str, task: str, run_dir: str | None, job: int | None) -> RunFolder:
    """The folder for a new run: `run_dir` if given, else `OUTPUTS/TASK/DATE_TIME`; `job` is its number in a sweep."""
    home = Path(outputs) / task
    if run_dir is not None:
        path = _numbered(run_dir, job)
        found = next((name for name in _WORK if (path / name).exists()), None)
        if found is not None:
            raise UserError(
                f"run_dir={path} holds an earlier run ({found}); go on with it by resume={path}, delete it, or choose "
                "another run_dir"
            )
        return RunFolder(path, None)
    path = _numbered(str(home / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")), job)
    stamp, attempt = path, 1
    while not _made(path):
        path, attempt = Path(f"{stamp}.{attempt}"), attempt + 1
    return RunFolder(path, home / _LATEST)


def _made(path: Path) -> bool:
    """Make a folder; False if there is one, maybe that of a run started at the same moment."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return path.parent.is_file()  # then RunFolder says what is wrong
    except OSError:
        pass
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
    if THESE.size == 1 and not THESE.first:  # started by the first process, which named its folder
        return RunFolder(Path(composed.run_dir), None), composed.resume
    with THESE.first_goes_ahead() as first:
        if first:
            folder, resume = _find_run(composed, job)
            folder.lock()
    if not THESE.first:
        return RunFolder(Path(str(THESE.agree(None))), None), THESE.agree(None) or None
    THESE.agree(str(folder.path))
    THESE.agree(str(resume or ""))
    return folder, resume


def _find_run(composed: DictConfig, job: int | None) -> tuple[RunFolder, Any]:
    outputs, task, given, resume = (composed[key] for key in ("outputs", "task", "run_dir", "resume"))
    proofs = _PROOFS.get(composed.verb, ())
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


def can_go_on(folder: Path, verb: Verb) -> bool:
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
        runs = [run for run in home.glob("*") if not run.is_symlink() and _holds(run, proofs)]
        if not runs:
            raise UserError(
                f"resume=true: no interrupted run (with {proofs[0]}) under {home}; start one without resume"
            )
        path = max(runs, key=lambda run: run.name)
        return RunFolder(path, home / _LATEST)
    path = Path(str(resume))
    if path.suffix == ".ckpt":
        if not path.exists():
            raise UserError(f"resume={resume} does not exist; give a checkpoint, or the folder of an interrupted run")
        path = path.parent.parent
    elif not _holds(path, proofs):
        raise UserError(f"resume={resume}: {path / proofs[0]} does not exist; give the folder of an interrupted run")
    return RunFolder(path, home / _LATEST if path.resolve().parent == home.resolve() else None)


def predecessor(outputs: str, task: str, key: str, given: str | None) -> Path:
    """The run folder that another task left: `given`, or the newest finished run of `task`.

    Raises:
        UserError: there is none; the message says which command makes it.
    """
    if given is not None:
        if not Path(given).exists():
            raise UserError(f"{key}={given} does not exist; give the folder of a run of task={task}")
        return Path(given)
    latest = Path(outputs) / task / _LATEST
    if not latest.exists():
        raise UserError(
            f"{key}: no finished run of task={task} under {Path(outputs) / task}; "
            f"run `python -m cogview_pl.run task={task}` first, or set {key}=RUN_FOLDER"
        )
    return latest.resolve()
