"""Checkpoints of training: identity and metrics of their run, and checks before a run resumes from one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule

from cogview_pl.checkpoints.training_checkpoint import ENTRY
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import CHECKPOINT, RunFolder

_PARTS = {"state_dict": dict, "optimizer_states": list, "lr_schedulers": list, "loops": dict, "callbacks": dict}
_NEVER_EMPTY = ("state_dict", "optimizer_states", "loops")


def checkpoint_of(folder: RunFolder, resume: Any, *, folders: bool) -> Path | None:
    """The checkpoint to resume from: the one that `resume` names, or the newest; None if there is none.

    Args:
        folder: folder of the run.
        resume: value of the configuration key.
        folders: whether checkpoints are folders, as those of DeepSpeed.

    Raises:
        UserError: the checkpoint is a folder and should not be.
    """
    if not resume:
        return None
    given = Path(str(resume))
    file = given if given.suffix == ".ckpt" else folder / CHECKPOINT
    if file.is_dir() and not folders:
        raise UserError(f"resume: {file} is a folder, as DeepSpeed's checkpoints are; go on with the same strategy")
    return file if file.exists() else None


def remember_in_checkpoints(module: LightningModule, identity: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Store identity and last metrics of the run in every checkpoint.

    Args:
        module: module in training.
        identity: `kind`, `settings` and `inputs`.
        metrics: metrics of the checkpoint that the run resumes from, for those that it has not logged again.
    """
    hook = partial(_remember, module, dict(identity), dict(metrics), module.on_save_checkpoint)
    module.on_save_checkpoint = hook  # type: ignore[method-assign]


def _remember(
    module: LightningModule,
    identity: dict[str, Any],
    before: dict[str, float],
    hook: Callable[[dict[str, Any]], None],
    checkpoint: dict[str, Any],
) -> None:
    hook(checkpoint)
    metrics = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    checkpoint[ENTRY] = {**identity, "metrics": before | metrics}


class Progress(NamedTuple):
    """Progress of a run that is resumed."""

    steps: int = 0
    """Optimizer steps that it has done; 0 if they are not known before training."""
    metrics: Mapping[str, float] = {}
    """Metrics that it logged last."""


def require_same_run(file: Path, identity: Mapping[str, Any], verify: bool) -> Progress:
    """Refuse a damaged checkpoint, or a checkpoint of another run; returns the progress that it holds.

    Args:
        file: the checkpoint; a folder is from DeepSpeed, and DeepSpeed checks it.
        identity: `kind`, `settings` and `inputs` of the resumed run.
        verify: compare `inputs` too.

    Raises:
        UserError: it is damaged, of another program, or of another stage, model or data.
    """
    if file.is_dir():
        return Progress()
    found = _read(file)
    if found["kind"] != identity["kind"]:
        raise UserError(
            f"resume: {file} holds a checkpoint of stage {found['kind']}, this task trains {identity['kind']}; "
            "give a run of this task"
        )
    for key in {**identity["settings"], **found["settings"]}:
        before, now = found["settings"].get(key), identity["settings"].get(key)
        if before != now:
            raise UserError(
                f"resume: {file} was trained with {key}={before}, this run has {now}; go on with {key}={before}, or "
                "start a new run"
            )
    for key, now in identity["inputs"].items() if verify else ():
        if found["inputs"].get(key, now) != now:
            raise UserError(
                f"resume: {key} has changed since {file} was saved; restore it, or set verify=false to go on with the "
                "present one"
            )
    return Progress(found["steps"], {name: float(value) for name, value in found["metrics"].items()})


def require_steps_left(file: Path, done: int, max_steps: int, *, finished: bool) -> None:
    """Refuse a training run that has no steps left.

    Args:
        file: the checkpoint that it resumes from.
        done: optimizer steps of the checkpoint.
        max_steps: number of optimizer steps of the run.
        finished: whether the run had finished; else validation and model of the last step may be missing.

    Raises:
        UserError: there are no steps left.
    """
    if done > max_steps or (done == max_steps and finished):
        raise UserError(
            f"resume: {file} has done {done} steps, and trainer.max_steps={max_steps} leaves none; set "
            f"trainer.max_steps above {done}, or resume from an earlier checkpoint"
        )


def _same(other: Path, file: Path) -> bool:
    """Whether two names lead to one file, as those of the newest checkpoint do."""
    return other == file or (file.exists() and other.samefile(file))


def _read(file: Path) -> dict[str, Any]:
    """The project's entries in a checkpoint, after a check of its checksums and parts."""
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not compare checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for name, kind in _PARTS.items():
            if not isinstance(checkpoint[name], kind) or (name in _NEVER_EMPTY and not checkpoint[name]):
                raise ValueError(f"its {name} are no {kind.__name__}, or empty")
        found = {"inputs": {}, **checkpoint[ENTRY], "steps": int(checkpoint["global_step"])}
        for name in ("settings", "inputs", "metrics"):
            if not isinstance(found[name], dict):
                raise ValueError(f"its {name} are no dictionary")
        found["kind"], _ = str(found["kind"]), [float(value) for value in found["metrics"].values()]
    except Exception as error:
        words = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(words.split())[:200] or type(error).__name__
        others = sorted(str(other) for other in file.parent.glob("*.ckpt") if not _same(other, file))
        raise UserError(
            f"resume: {file} cannot be read ({reason}); it is damaged or not one of our checkpoints"
            + (f"; go on from another one: resume={others[-1]}" if others else "")
        ) from error
    return found
