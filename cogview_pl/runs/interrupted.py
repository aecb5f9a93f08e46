"""Finds the run that `resume` names, and opens the folder of a new or a resumed run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogview_pl.durable.latest import LATEST
from cogview_pl.durable.read import why_unusable
from cogview_pl.errors import UserError
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.record import RunRecord, is_run
from cogview_pl.runs.run_folder import (
    CHAIN,
    CHECKPOINT,
    METRICS,
    SAMPLES,
    STORE_HEADER,
    SWEEP,
    Metrics,
    RunFolder,
    new_run,
    numbered,
    require_metrics,
)

_log = logging.getLogger(__name__)

_AUTO = "auto"
_PROOFS: dict[str, tuple[str, ...]] = {
    "fit_image_tokenizer": (CHECKPOINT,),
    "fit_sequence_model": (CHECKPOINT, f"tokens/{STORE_HEADER}"),
    "tokenize": (STORE_HEADER,),
    "generate": (SAMPLES,),
    "rerank": (SAMPLES,),
    "magnify": (SAMPLES,),
    "chain": (CHAIN,),
}
"""Verb → files that prove progress: a run can be resumed if one of them exists."""
_EVERY_PROOF = tuple({proof for proofs in _PROOFS.values() for proof in proofs})


def can_go_on(folder: Path, verb: str) -> bool:
    """Whether the folder of a verb's run can be resumed."""
    return _holds(folder, _PROOFS.get(verb, ()))


def is_finished(folder: Path) -> bool:
    """Whether the run of a folder went to its end; raises UserError if its record is damaged."""
    return (folder / METRICS).is_file() and RunRecord.load(folder).metrics is not None


def finished_metrics(folder: Path) -> Metrics:
    """Metrics of a finished run, for a command that resumes it without any change.

    Raises:
        UserError: `metrics.json` is damaged.
    """
    require_metrics(folder)
    _log.info(
        "%s has finished, and nothing is left to do; trainer.max_steps=… above its own extends a training run", folder
    )
    found: Metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return found


def run_to_resume(composed: DictConfig, job: str | None) -> tuple[Path, str] | None:
    """Folder of the run that `resume` asks for, and `resume` as a path; None for a new run.

    Args:
        composed: configuration of the run.
        job: name of the run in a sweep.

    Raises:
        UserError: there is no such run.
    """
    outputs, task, given, resume = (composed[key] for key in ("outputs", "task", "run_dir", "resume"))
    proofs = _PROOFS.get(composed.verb.value, ())
    if resume == _AUTO:
        if given is None:
            raise UserError("resume=auto: set run_dir, which is where it looks for a run to go on with")
        path = numbered(given, job)
        resume = str(path) if _holds(path, proofs) else None
    if not resume:
        return None
    if not proofs:
        raise UserError(f"resume={resume}: task={task} keeps nothing to go on with; start it without resume")
    if resume is True:
        path = newest_interrupted(Path(outputs) / task, proofs)
        return path, str(path)
    return _named(str(resume), proofs), str(resume)


def open_run(composed: DictConfig, job: str | None) -> tuple[RunFolder, Any]:
    """The folder of a run, and the value of `resume`, where `auto` and `true` are replaced by a path or None.

    The first process finds or makes the folder and locks it; the others get its path.

    Args:
        composed: configuration of the run.
        job: name of the run in a sweep.

    Raises:
        UserError: there is no run to resume, a new run would overwrite an earlier one, or a live run uses the folder.
    """
    if RANKS.size == 1 and not RANKS.first:  # the first process started this one with the path of the folder
        return RunFolder(Path(composed.run_dir), None), composed.resume
    with RANKS.first_goes_ahead() as first:
        if first:
            folder, resume = _open(composed, job)
            folder.lock()
    if not RANKS.first:
        return RunFolder(Path(str(RANKS.agree(None))), None), RANKS.agree(None) or None
    RANKS.agree(str(folder.path))
    RANKS.agree(resume or "")
    return folder, resume


def _open(composed: DictConfig, job: str | None) -> tuple[RunFolder, str | None]:
    found = run_to_resume(composed, job)
    if found is None:
        return new_run(composed.outputs, composed.task, composed.run_dir, job), None
    path, resume = found
    home = Path(composed.outputs) / composed.task
    of_the_task = home.resolve() in (path.resolve().parent, path.resolve().parent.parent)
    return RunFolder(path, home / LATEST if of_the_task else None, goes_on=True), resume


def newest_interrupted(home: Path, proofs: Sequence[str] = _EVERY_PROOF) -> Path:
    """The newest run of a task that has begun and not finished.

    Args:
        home: folder of the runs of the task.
        proofs: files that prove progress.

    Raises:
        UserError: there is none.
    """
    found = [run for pattern in ("*", f"*{SWEEP}*/*") for run in home.glob(pattern)]
    runs = [run for run in found if not run.is_symlink() and is_run(run) and _holds(run, proofs)]
    for path in sorted(runs, key=str, reverse=True):
        if not is_finished(path):
            return path
    words = f"resume=true: no interrupted run (with {proofs[0]}) under {home}; start one without resume"
    if runs and CHAIN not in proofs:
        words += f", or name a finished run to extend it: resume={max(runs, key=str)} trainer.max_steps=…"
    raise UserError(words)


def _named(resume: str, proofs: Sequence[str]) -> Path:
    """The folder of the run that a path names: the path itself, or that of a checkpoint in it."""
    path = Path(resume)
    if path.is_symlink() or path.suffix == ".ckpt":  # the run will change the link outputs/TASK/latest
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
    RunRecord.load(path)  # raises if the folder is no run folder
    return path


def _holds(folder: Path, proofs: Sequence[str]) -> bool:
    return any((folder / proof).exists() for proof in proofs)
