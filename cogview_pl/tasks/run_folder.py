"""The folder of a run: where it is made, what every run leaves in it, how later runs find it.

outputs/TASK/DATE_TIME/    config.yaml, metrics.json, and what the task makes
outputs/TASK/latest        link to the newest finished one
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cogview_pl.errors import UserError
from cogview_pl.tasks.processes import THESE, Processes

Metrics = Mapping[str, "float | str"]
"""What a verb returns; texts only in the protocol of task=evaluate."""

_LATEST = "latest"


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

    def save_config(self, config: DictConfig) -> None:
        """Write the resolved configuration."""
        if not self.writes:
            return
        file = self / "config.yaml"
        if file.exists():
            self._config_before = file.read_text(encoding="utf-8")
        OmegaConf.save(config, file, resolve=True)

    def undo(self) -> None:
        """Take the configuration back, and the folder if it holds nothing else: a refused run leaves no trace."""
        if not self.writes:
            return
        file = self / "config.yaml"
        if self._config_before is not None:
            file.write_text(self._config_before, encoding="utf-8")
        elif {entry.name for entry in self.path.iterdir()} <= {file.name}:
            file.unlink(missing_ok=True)
            self.path.rmdir()

    def finish(self, metrics: Metrics) -> None:
        """Write `metrics.json` and point `latest` here."""
        if not self.writes:
            return
        temporary = self / "metrics.json.tmp"
        temporary.write_text(json.dumps(dict(sorted(metrics.items())), indent=2, ensure_ascii=False) + "\n")
        os.replace(temporary, self / "metrics.json")
        if self._link is not None:
            temporary = self._link.with_name(f".{_LATEST}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(self.path, self._link.parent))
            os.replace(temporary, self._link)


def open_run(find: Callable[[], RunFolder], given: str | None) -> RunFolder:
    """The folder that the first process finds or makes, in all processes of the run.

    Args:
        find: finds or makes it.
        given: its path, for a process that was started by the first one.
    """
    if THESE.size == 1 and not THESE.first:
        assert given is not None
        return RunFolder(Path(given), None)
    with THESE.first_goes_ahead() as first:
        folder = find() if first else None
    path = THESE.agree(str(folder.path) if folder else None)
    return folder or RunFolder(Path(str(path)), None)


def new_run(outputs: str, task: str, run_dir: str | None, job: int | None) -> RunFolder:
    """The folder for a new run: `run_dir` if given, else `OUTPUTS/TASK/DATE_TIME`; `job` is its number in a sweep."""
    home = Path(outputs) / task
    suffix = "" if job is None else f"_{job}"
    if run_dir is not None:
        return RunFolder(Path(f"{run_dir}{suffix}"), None)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S") + suffix
    path, attempt = home / stamp, 1
    while path.exists():
        path, attempt = home / f"{stamp}.{attempt}", attempt + 1
    return RunFolder(path, home / _LATEST)


def interrupted_run(outputs: str, task: str, resume: object, proof: str) -> RunFolder:
    """The folder to go on with.

    Args:
        outputs, task: where runs of this task are.
        resume: True for the newest run that left `proof`, or the path of a run folder.
        proof: file that shows that there is something to go on with, relative to the run folder.

    Raises:
        UserError: there is no such run.
    """
    home = Path(outputs) / task
    if resume is True:
        runs = [run for run in home.glob("*") if not run.is_symlink() and (run / proof).exists()]
        if not runs:
            raise UserError(f"resume=true: no interrupted run (with {proof}) under {home}; start one without resume")
        path = max(runs, key=lambda run: run.name)
        return RunFolder(path, home / _LATEST)
    path = Path(str(resume))
    if path.suffix == ".ckpt":
        path = path.parent.parent
    if not (path / proof).exists():
        raise UserError(f"resume={resume}: {path / proof} does not exist; give the folder of an interrupted run")
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
