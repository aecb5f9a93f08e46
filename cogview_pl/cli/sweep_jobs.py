"""The jobs of a sweep: what varies among them, their names, and how each one ended.

A job writes its end into `SWEEP/.jobs/NAME.json`. So the table has it also if the job ran on another machine, or if the
sweep was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cogview_pl.cli.command_line import overrides_of
from cogview_pl.cli.messages import one_line
from cogview_pl.config.keys import did_you_mean, nearest_words
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import Stopped
from cogview_pl.runs.lifetime import free_memory
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.run_folder import Metrics

_RECORDS = ".jobs"
_LONGEST = 200  # bytes of a name; file systems take 255, and files of drafts and locks add some
_DIGITS = 8  # of the hash that replaces the end of a longer name
_QUOTES = "'\""
_PER_CALL = ("run_dir", "resume")  # keys that differ when a sweep is called once more


class State(str, Enum):
    """How far a job is."""

    running = "running"
    done = "done"
    failed = "failed"
    pruned = "pruned"
    stopped = "stopped"


@dataclass
class Job:
    """A job of a sweep.

    Attributes:
        number: in the order of the sweep.
        varies: swept keys and their values.
        configuration: hash of its whole configuration.
        metrics: of a job that is done.
        reason: one line, for a job that is not done.
    """

    number: int
    varies: dict[str, str]
    configuration: str
    state: State = State.running
    metrics: dict[str, float | str] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return job_name(self.varies)

    def repeats(self, other: Job) -> bool:
        """Whether this job is done and `other` would do the same."""
        same = (self.varies, self.configuration) == (other.varies, other.configuration)
        return same and self.state is State.done

    def save(self, sweep: Path) -> None:
        """Replace the record of the job in the folder of its sweep; only the first process does so."""
        if not RANKS.first:
            return
        folder = sweep / _RECORDS
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.name}.json", json.dumps(asdict(self), ensure_ascii=False) + "\n")


def saved_jobs(sweep: Path) -> list[Job]:
    """Jobs that have begun, in the order of the sweep."""
    files = (sweep / _RECORDS).glob("*.json")
    found = [Job(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    for job in found:
        job.state = State(job.state)
    return sorted(found, key=lambda job: (job.number, job.name))


def run_job(job: Job, sweep: Path, objective: str | None, run: Callable[[], Metrics]) -> Job:
    """Run one job and keep how it ended; an error ends this job only.

    A job that an earlier call of the sweep has finished, with the same configuration, does not run again.

    Args:
        job: the job, which is about to begin.
        sweep: folder of the sweep.
        objective: metric that the job must have.
        run: runs the job; returns its metrics, which are empty in a process that does not write.

    Raises:
        Stopped: by a signal, which ends the whole sweep.
    """
    earlier = next((other for other in saved_jobs(sweep) if other.repeats(job)), None) if RANKS.first else None
    if RANKS.agree("" if earlier is None else "earlier"):
        return earlier or job
    job.save(sweep)
    try:
        job.metrics = dict(run())
        if objective is not None and RANKS.first:
            _require_objective(objective, job.metrics)
        job.state = State.done
    except Stopped:
        job.state = State.stopped
        raise
    except SystemExit:  # of another process of this job, after the first one has failed
        if RANKS.first:
            raise
    except Exception as error:
        job.state, job.reason = _how_it_failed(error)
    finally:
        job.save(sweep)
    free_memory()
    return job


def configuration_hash(composed: DictConfig) -> str:
    """Hash of a configuration without the keys that differ when a sweep is called once more."""
    values: Any = OmegaConf.to_container(composed)
    text = json.dumps(
        {key: value for key, value in values.items() if key not in _PER_CALL}, sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _require_objective(objective: str, metrics: Metrics) -> None:
    """Raises UserError if the objective is no finite number."""
    if objective not in metrics:
        guesses = did_you_mean(nearest_words(objective, metrics))
        raise UserError(
            f"objective={objective}: the task has no such metric{guesses or '; it has ' + ', '.join(metrics)}"
        )
    value = metrics[objective]
    if isinstance(value, str) or not math.isfinite(value):
        raise UserError(f"{objective} is {value}, which is no number to compare jobs by")


def _how_it_failed(error: Exception) -> tuple[State, str]:
    """State and reason of a job that an error has ended; a defect of ours also prints its traceback."""
    optuna: Any = sys.modules.get("optuna")
    if optuna is not None and isinstance(error, optuna.TrialPruned):
        return State.pruned, " ".join(str(error).split()) or "pruned"
    message = one_line(error)
    if message is None:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    return State.failed, " ".join(message.split())


def fixed_keys(sweep: DictConfig) -> frozenset[str]:
    """Keys, as overrides spell them, that have one value in all jobs of a sweep.

    Args:
        sweep: configuration of the whole sweep, with the node `hydra`.
    """
    params = sweep.hydra.sweeper.get("params") or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *overrides_of(sweep.hydra)]
    given = OverridesParser.create().parse_overrides(words)
    swept = {word.get_key_element() for word in given if word.is_sweep_override()}
    return frozenset(word.get_key_element() for word in given if word.get_key_element() not in swept)


def varying(overrides: Sequence[str], fixed: frozenset[str]) -> dict[str, str]:
    """Swept keys of a job and their values."""
    pairs = (word.partition("=") for word in overrides if not word.startswith("hydra."))
    return {key.lstrip("+"): value.strip(_QUOTES) for key, _, value in pairs if key not in fixed}


def job_name(varies: Mapping[str, str]) -> str:
    """Name of a job, which is the name of its folder: `optimizer.optimizer.lr=0.001,seed=1`."""
    name = ",".join(f"{key}={value}" for key, value in sorted(varies.items())) or "job"
    name = re.sub(r'[/\\:*?"<>|]', "_", name.replace("\0", ""))  # signs that no folder has on Windows
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]
    return name.encode()[: _LONGEST - _DIGITS - 1].decode(errors="ignore") + f"-{digest}"
