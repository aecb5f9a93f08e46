"""A sweep: its folder, the names of its jobs, and the table at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from cogview_pl.cli.sweep_jobs import fixed_keys, job_name, varying
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.run_folder import SWEEP, dated_folder

_COLUMNS = 6
_PREFERRED = ("val/", "eval/", "toy/", "codebook/usage", "perf/tokens_per_s")


class JobConfigs(ConfigLoader):
    """Composes the configurations of the jobs: each gets its name, and the folder of the sweep as `run_dir`."""

    def __init__(self, loader: ConfigLoader, folder: Path, fixed: frozenset[str]) -> None:
        self._loader = loader
        self._folder = folder
        self._fixed = fixed

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose one job."""
        composed = self._loader.load_sweep_config(master_config, sweep_overrides)
        composed.run_dir = composed.hydra.sweep.dir = str(self._folder)
        composed.hydra.job.name = job_name(varying(sweep_overrides, self._fixed))
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


class Sweep(Callback):
    """Makes the folder of a sweep, collects the metrics of the jobs, and prints them when the sweep ends."""

    def __init__(self) -> None:
        self._jobs: list[tuple[str, dict[str, Any]]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder."""
        folder = RANKS.agree(str(_folder(config)) if RANKS.first else None)
        with open_dict(config):
            config.hydra.sweep.dir = folder
        hydra: Any = GlobalHydra.instance().hydra
        hydra.config_loader = JobConfigs(hydra.config_loader, Path(str(folder)), fixed_keys(config))

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        """Keep the metrics of a job that has finished."""
        if job_return.status == JobStatus.COMPLETED and isinstance(job_return.return_value, dict):
            self._jobs.append((" ".join(job_return.overrides or []), job_return.return_value))

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Print the table."""
        names = sorted({name for _, metrics in self._jobs for name in metrics if name.startswith(_PREFERRED)})
        names = names[:_COLUMNS]
        width = max((len(overrides) for overrides, _ in self._jobs), default=0)
        print("\n" + " " * width, *(f"{name:>18}" for name in names))
        for overrides, metrics in self._jobs:
            cells = (f"{metrics[name]:18.4g}" if name in metrics else " " * 18 for name in names)
            print(f"{overrides:{width}}", *cells)


def _folder(config: DictConfig) -> Path:
    """`run_dir` if it is given, else a new folder `OUTPUTS/TASK/DATE_TIME_sweep`."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    task = "sweep" if OmegaConf.is_missing(config, "task") else config.task
    return dated_folder(Path(config.outputs) / task, SWEEP)
