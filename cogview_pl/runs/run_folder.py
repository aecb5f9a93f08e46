"""The folder of a run: its path, the files that every run writes, and how later runs find it.

outputs/TASK/DATE_TIME/    .cogview_pl.json, config.yaml, metrics.json, and the results of the task; resumed runs also
                           have config.resumed-2.yaml and so on
outputs/TASK/DATE_TIME_sweep/NAME/    a job of a sweep, named by its values of the swept keys
outputs/TASK/latest        the newest finished run (durable/latest.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cogview_pl.checkpoints.manifest import file_hash
from cogview_pl.durable import latest
from cogview_pl.durable.latest import LATEST
from cogview_pl.durable.read import why_unusable
from cogview_pl.durable.write import clear_for_writing, is_draft, write_bytes, write_text
from cogview_pl.errors import UserError
from cogview_pl.runs.history import CONFIG, next_config, text_hash
from cogview_pl.runs.lock import LOCK, RunLock
from cogview_pl.runs.ranks import RANKS, Processes
from cogview_pl.runs.record import RECORD, RunRecord, is_run

Metrics = Mapping[str, "float | str"]
"""Metrics of a run. Only the protocol of task=evaluate has texts as values."""

METRICS = "metrics.json"
CHECKPOINT = "checkpoints/last.ckpt"
STORE_HEADER = "token_store/header.json"
SAMPLES = "samples.jsonl"
SKIPPED = "skipped.jsonl"
"""Images that cannot be read, with the reason."""
CHAIN = "chain.json"
"""Progress of a chain."""
REPORT = "report.html"

SWEEP = "_sweep"
"""End of the name of a sweep's folder."""

_WORK = (CHECKPOINT, STORE_HEADER, f"tokens/{STORE_HEADER}", SAMPLES, CHAIN, METRICS)
"""Files that prove that a folder holds results of a run."""

_LOGS = (".out", ".err", ".log")
"""Suffixes of a job's output; a scheduler may write it into the folder before the run starts."""


class RunFolder:
    """The folder of a run. All processes of the run share it, and the first process writes.

    A resumed run writes nothing before `begin`, so a refused run leaves the folder unchanged.

    Args:
        path: the folder; it is made if it does not exist.
        link: path of `latest`, which names the run when it has finished; None for a folder outside `outputs/TASK`.
        processes: processes of the run.
        goes_on: whether the folder holds a run that is resumed.

    Raises:
        UserError: the folder cannot be made, or the place of `latest` is taken.
    """

    def __init__(self, path: Path, link: Path | None, processes: Processes = RANKS, *, goes_on: bool = False) -> None:
        self.path = path
        self.processes = processes
        self.remarks: list[str] = []
        """Sentences that the end of the run shows below its numbers, such as a warning with the override to try."""
        self._link = link
        self._goes_on = goes_on
        self._lock: RunLock | None = None
        self._record = RunRecord("")
        self._config = ""
        self.had_finished = False
        """Whether the run that is resumed went to its end."""
        self._config_file: Path | None = None
        self._before: dict[Path, bytes] = {}
        self._work: list[tuple[str, int]] = []
        self._in_earnest = True
        if not self.writes:
            return
        if link is not None:
            latest.require_free(link)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={path} cannot be made ({error}); choose another run_dir") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run; the methods below do nothing in other processes."""
        return self.processes.first

    def lock(self) -> None:
        """Lock the folder, and delete drafts of killed runs; raises UserError if a live run uses the folder."""
        if not self.writes:
            return
        lock = RunLock(self.path)
        try:
            clear_for_writing(self.path)  # after the lock, because a live run may have drafts
        except BaseException:
            lock.release()
            raise
        self._lock = lock

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    @property
    def has_begun(self) -> bool:
        """Whether all checks have passed."""
        return self._config_file is not None

    def describe(self, config: DictConfig, choices: Mapping[str, str] | None = None, words: str = "") -> None:
        """Take in the resolved configuration; a new run writes it at once, with its record.

        Args:
            config: configuration of the run.
            choices: group → choice, from which the configuration was composed.
            words: what a resumed run changes, as a comment in its configuration.

        Raises:
            UserError: the resumed run is of another task, or its record is damaged.
        """
        if not self.writes:
            return
        self._config = words + OmegaConf.to_yaml(config, resolve=True)
        a_part = config.get("token_store", {}).get("part") is not None
        self._in_earnest = not a_part and not config.get("trainer", {}).get("fast_dev_run")
        if self._goes_on:
            self._record = RunRecord.load(self.path)
            if self._record.task != config.task:
                raise UserError(
                    f"resume: {self.path} is a run of task={self._record.task}, this is task={config.task}; give a run "
                    f"of this task, or start a new one with init_from={self.path}"
                )
            self.had_finished = self._record.metrics is not None and (self / METRICS).exists()
            self._record.metrics = None  # until it finishes again
        else:
            self._record = RunRecord(config.task)
        self._record.choices |= choices or {}
        if not self._goes_on:
            self.begin()

    def require_same(self, settings: Mapping[str, Any], inputs: Mapping[str, str], verify: bool) -> None:
        """Compare a resumed run with its record, and add new values to it; `begin` writes the record.

        Args:
            settings: plain values that results depend on.
            inputs: hashes of the inputs.
            verify: False replaces values and hashes without comparing them.

        Raises:
            UserError: a setting or an input has changed.
        """
        if self._goes_on:
            self._record.require_same(self.path, settings, inputs, verify)
        self._record.settings |= settings
        self._record.inputs |= inputs

    def begin(self) -> None:
        """Write record and configuration, after every check has passed."""
        if not self.writes:
            return
        if self._config_file is None:
            self._config_file = next_config(self.path) if self._goes_on else self / CONFIG
            files = (self / RECORD, self._config_file)
            self._before = {file: file.read_bytes() for file in files if file.exists()}
            self._work = self._progress()
            self._record.configurations[self._config_file.name] = text_hash(self._config)
            self._record.save(self.path)  # before its file: a kill in between leaves the earlier one as the newest
            write_text(self._config_file, self._config)
        else:
            self._record.save(self.path)

    def undo(self) -> None:
        """Take the configuration back, or delete a folder without results: a refused run leaves no files.

        A run that has made progress since it began keeps its configuration.
        """
        if not self.writes or (self._config_file is not None and self._work != self._progress()):
            return
        if self._goes_on or self._before:
            for file in (self / RECORD, self._config_file) if self._config_file is not None else ():
                with suppress(UserError):  # a full disk has ended the run, and its message has been printed
                    self._put_back(file)
        elif {entry.name for entry in self.path.iterdir()} <= {CONFIG, LOCK, RECORD}:
            for name in (CONFIG, RECORD):
                (self / name).unlink(missing_ok=True)
            self.unlock()
            self.path.rmdir()

    def _put_back(self, file: Path) -> None:
        if file in self._before:
            write_bytes(file, self._before[file])
        else:
            file.unlink(missing_ok=True)

    def _progress(self) -> list[tuple[str, int]]:
        """Files that prove progress, with their times of change in ns."""
        return [(name, (self / name).stat().st_mtime_ns) for name in _WORK if (self / name).exists()]

    def finish(self, metrics: Metrics) -> None:
        """Write `metrics.json`, and let `latest` name this folder.

        It does not name a trial (`trainer.fast_dev_run`), nor a part of a token store.
        """
        if not self.writes:
            return
        text = json.dumps(dict(sorted(metrics.items())), indent=2, ensure_ascii=False) + "\n"
        write_text(self / METRICS, text)
        self._record.metrics = file_hash(self / METRICS)
        self.begin()
        if self._link is not None and self._in_earnest:
            latest.move(self._link, self.path)


def require_metrics(path: Path) -> None:
    """Raises UserError if `metrics.json` of a finished run is damaged; files outside run folders are not checked."""
    if path.is_dir() and is_run(path) and (path / METRICS).is_file():
        noted = RunRecord.load(path).metrics
        if noted is not None and noted != file_hash(path / METRICS):
            raise UserError(f"{path / METRICS} is damaged: it is not what the run wrote; copy the run again")


def new_run(outputs: str, task: str, run_dir: str | None, job: str | None) -> RunFolder:
    """The folder of a new run: `run_dir` if given, else `OUTPUTS/TASK/DATE_TIME`.

    The folder of the job `job` of a sweep lies in `run_dir`, which is the folder of the sweep.

    Raises:
        UserError: `run_dir` holds an earlier run, or files that no run has made.
    """
    home = Path(outputs) / task
    if run_dir is not None:
        path = numbered(run_dir, job)
        _require_free(path)
        in_a_sweep = job is not None and Path(run_dir).resolve().parent == home.resolve()
        return RunFolder(path, home / LATEST if in_a_sweep else None)
    return RunFolder(numbered(str(dated_folder(home)), job), home / LATEST)


def dated_folder(home: Path, suffix: str = "") -> Path:
    """Make the folder `HOME/DATE_TIME` with a suffix; a number follows if another run has made it in this second.

    If it cannot be made, the error is left to whoever writes there.
    """
    stamp = home / f"{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}{suffix}"
    path, attempt = stamp, 1
    while not _made(path):
        path, attempt = Path(f"{stamp}.{attempt}"), attempt + 1
    return path


def _require_free(path: Path) -> None:
    """Raises UserError if a new run in a folder could overwrite files."""
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
    strangers = sorted(entry.name for entry in entries if entry.suffix not in _LOGS)
    if strangers:
        raise UserError(
            f"run_dir={path} holds files that no run has made ({', '.join(strangers[:3])}"
            f"{', …' if len(strangers) > 3 else ''}), which it might write over; choose a folder that is new or empty"
        )


def _made(path: Path) -> bool:
    """Make a folder; False if it exists, for example because another run started in the same second."""
    try:
        path.mkdir(parents=True)
    except OSError:
        return not os.path.lexists(path)  # if no folder can be made, RunFolder raises the error
    return True


def numbered(path: str, job: str | None) -> Path:
    """The folder of a run; that of the job `job` of a sweep lies in the folder of the sweep."""
    return Path(path) if job is None else Path(path) / job


def predecessor(outputs: str, task: str, key: str, given: str | None) -> Path:
    """The run folder of another task: `given`, or the newest finished run of `task`.

    Raises:
        UserError: there is no such run; the message names the command that makes one.
    """
    if given is not None:
        if not Path(given).exists():
            raise UserError(f"{key}={given} {why_unusable(given)}; give the folder of a run of task={task}")
        return Path(given)
    found = latest.newest(Path(outputs) / task / LATEST)
    if found is None:
        raise UserError(
            f"{key}: no finished run of task={task} under {Path(outputs) / task}; "
            f"run `python -m cogview_pl.run task={task}` first, or set {key}=RUN_FOLDER"
        )
    return found
