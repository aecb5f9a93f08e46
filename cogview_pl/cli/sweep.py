"""A sweep: its folder, the configurations of its jobs, and its end: the table, the exit code, how it goes on."""

from __future__ import annotations

import copy
import importlib.util
import logging
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from cogview_pl.cli.messages import errors_in_one_line, one_line
from cogview_pl.cli.overrides import quoted
from cogview_pl.cli.sweep_jobs import Job, State, configuration_hash, fixed_keys, job_name, run_job, saved_jobs, varying
from cogview_pl.cli.sweep_table import print_best, print_table, write_csv
from cogview_pl.config.objectives import check_objective
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.run_folder import SWEEP, Metrics, dated_folder

_log = logging.getLogger(__name__)


class Sweep(Callback):
    """Hydra's callback for a sweep. A launcher sends it to other processes, so it has no state."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder, and take over the configurations of the jobs and the signals."""
        hydra_node, stack = config.hydra, ExitStack()
        launcher, sweeper = hydra_node.launcher._target_, hydra_node.sweeper._target_
        with errors_in_one_line():  # here, because Hydra turns exceptions of a callback into warnings
            _require_launcher(launcher)
            if not OmegaConf.is_missing(config, "verb"):  # else the task varies, and each job checks it
                check_objective(config)
            folder = Path(str(RANKS.agree(str(_folder(config)) if RANKS.first else None)))
        hydra_node.sweep.dir = str(folder)
        hydra: Any = GlobalHydra.instance().hydra
        hydra.config_loader = JobConfigs(hydra.config_loader, folder, fixed_keys(config))
        _silence(sweeper)
        signals: Any = SIGNALS if launcher.endswith(".BasicLauncher") else _while_others_work()
        stack.enter_context(signals)
        if RANKS.first:
            print(f"sweep: {folder}", flush=True)
        _begun.append(_Begun(folder, config, stack))


@dataclass(frozen=True)
class _Begun:
    """The sweep of this process."""

    folder: Path
    config: DictConfig
    until_its_end: ExitStack

    def end(self) -> list[Job]:
        """Print the table and write `sweep.csv`; returns the jobs."""
        self.until_its_end.close()
        jobs = saved_jobs(self.folder)
        if RANKS.first:
            metrics, objective = self.config.sweep.metrics, self.config.objective
            table = write_csv(self.folder, jobs, metrics)
            print_table(jobs, metrics, objective)
            direction = self.config.hydra.sweeper.get("direction")
            if objective is not None and direction is not None:
                print_best(jobs, objective, largest=getattr(direction, "name", direction) == "maximize")
            print(f"table: {table}")
        return jobs


_begun: list[_Begun] = []


class JobConfigs(ConfigLoader):
    """Composes the configurations of the jobs.

    Each gets its name, and the folder of the sweep as `run_dir`. A job that cannot be composed gets the reason in place
    of a configuration, so that it fails alone.
    """

    def __init__(self, loader: ConfigLoader, folder: Path, fixed: frozenset[str]) -> None:
        self._loader = loader
        self._folder = folder
        self._fixed = fixed

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose one job."""
        ours: dict[str, Any] = {"varies": varying(sweep_overrides, self._fixed)}
        composed: Any
        try:
            composed = self._loader.load_sweep_config(master_config, sweep_overrides)
            composed.run_dir = str(self._folder)
        except Exception as error:
            ours["not_composed"] = one_line(error)
            if ours["not_composed"] is None:
                raise
            composed = DictConfig({"hydra": copy.deepcopy(master_config.hydra)})
            composed.hydra.overrides.task = sweep_overrides
        with open_dict(composed):
            composed.hydra.callbacks.sweep.update(ours)
        composed.hydra.sweep.dir = str(self._folder)
        composed.hydra.job.name = job_name(ours["varies"])
        return composed

    def load_configuration(self, *arguments: Any, **options: Any) -> DictConfig:
        return self._loader.load_configuration(*arguments, **options)

    def get_search_path(self) -> Any:
        return self._loader.get_search_path()

    def get_sources(self) -> list[Any]:
        return self._loader.get_sources()

    def list_groups(self, parent_name: str) -> list[str]:
        return self._loader.list_groups(parent_name)

    def get_group_options(self, *arguments: Any, **options: Any) -> list[str]:
        return self._loader.get_group_options(*arguments, **options)

    def compute_defaults_list(self, *arguments: Any, **options: Any) -> Any:
        return self._loader.compute_defaults_list(*arguments, **options)


def run_job_of_sweep(composed: DictConfig, run: Callable[[], Metrics]) -> float | None:
    """Run the present job of the sweep; returns its `objective`, which a sweeper such as Optuna reads.

    Returns None without an objective, and for a job that has failed.

    Raises:
        Stopped: by a signal.
    """
    SIGNALS.check()
    hydra = HydraConfig.get()
    ours: Any = hydra.callbacks["sweep"]
    job = Job(hydra.job.num, dict(ours.varies), configuration_hash(composed))
    _log.info("job %d: %s", job.number, job.name)
    objective = composed.get("objective")

    def composes_and_runs() -> Metrics:
        if "not_composed" in ours:
            raise UserError(ours.not_composed)
        check_objective(composed)
        return run()

    ended = run_job(job, Path(hydra.sweep.dir), objective, composes_and_runs)
    if ended.reason and RANKS.first:
        print(f"job {job.number}: {ended.reason}", file=sys.stderr)
    value = ended.metrics.get(objective) if objective is not None and ended.state is State.done else None
    return None if value is None else float(value)


@contextmanager
def table_at_the_end() -> Iterator[None]:
    """Inside the block a sweep may run; however it ends, its table is printed.

    Raises:
        SystemExit: with code 1, if a job has failed.
        Stopped: with advice on how the sweep goes on.
    """
    jobs: list[Job] = []
    try:
        try:
            yield
        finally:
            folder = _begun[-1].folder if _begun else None
            jobs = _begun.pop().end() if _begun else []
    except Stopped as stop:
        if folder is not None:
            stop.advice = f"go on with {_once_more(folder)}"
        raise
    except Exception:
        if not jobs or any(job.state is State.done for job in jobs):
            raise
        # Optuna complains that no trial is complete; the table says why
    if any(job.state is not State.done and job.state is not State.pruned for job in jobs):
        sys.exit(1)


def _silence(sweeper: str) -> None:
    """Keep loggers quiet that repeat what the table says."""
    for name in ("hydra", "hydra_plugins", "submitit"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if "optuna" in sweeper:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.CRITICAL)


def _once_more(folder: Path) -> str:
    """The command of this sweep, in the same folder, so that jobs that are done do not run again."""
    given = [word for word in sys.argv[1:] if not word.startswith(("run_dir=", "resume="))]
    return shlex.join(["python", "-m", "cogview_pl.run", *given, f"run_dir={quoted(str(folder))}", "resume=auto"])


def _folder(config: DictConfig) -> Path:
    """`run_dir` if it is given, else a new folder `OUTPUTS/TASK/DATE_TIME_sweep`.

    Raises:
        UserError: the folder holds another sweep, or it cannot be made.
    """
    if config.run_dir is not None:
        folder = Path(config.run_dir).expanduser()
        if saved_jobs(folder) and config.resume != "auto":
            raise UserError(
                f"run_dir={folder} holds an earlier sweep; go on with it by resume=auto, or choose another run_dir"
            )
    else:
        task = "sweep" if OmegaConf.is_missing(config, "task") else config.task
        folder = dated_folder(Path(config.outputs).expanduser() / task, SWEEP)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of the sweep cannot be made ({error}); choose another outputs") from error
    return folder


def _require_launcher(target: str) -> None:
    """Raises UserError if the launcher is not installed, or needs SLURM, and this machine has none."""
    if ".hydra_submitit_launcher." in target and importlib.util.find_spec("submitit") is None:
        raise UserError('hydra/launcher=submitit needs hydra-submitit-launcher; pip install "cogview_pl[slurm]"')
    if target.endswith(".SlurmLauncher") and shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher=submitit_slurm: this machine has no srun; call it on a login node of a SLURM cluster, or "
            "take hydra/launcher=submitit_local"
        )


@contextmanager
def _while_others_work() -> Iterator[None]:
    """Inside the block a signal raises Stopped at once, and a job that was killed counts as one without a value.

    This process only waits for its jobs, so it has nothing to save. For a killed job submitit raises an error, and the
    launcher would then forget the other jobs.
    """
    import submitit

    submitted_job: Any = submitit.Job

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    results = submitted_job.results

    def results_or_none(submitted: Any) -> list[Any]:
        try:
            return results(submitted)
        except Exception as error:
            _log.debug("a job without a result", exc_info=error)
            return [JobReturn(status=JobStatus.COMPLETED)]

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    submitted_job.results = results_or_none
    try:
        yield
    finally:
        submitted_job.results = results
        for number, handler in before.items():
            signal.signal(number, handler)
