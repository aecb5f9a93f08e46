"""verb chain: runs the tasks of a recipe one after the other, each in its own run folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cogview_pl.cli.summary import print_aims
from cogview_pl.config.schema import Config
from cogview_pl.durable import latest
from cogview_pl.durable.write import write_bytes
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.chain_progress import ChainProgress, StageProgress, chain_progress
from cogview_pl.runs.lifetime import free_memory
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.report.page import Stage, write_report
from cogview_pl.runs.run_folder import METRICS, Metrics, RunFolder, require_metrics
from cogview_pl.runs.side_by_side import StageProcess, run_lanes

_log = logging.getLogger(__name__)


class RunStage(Protocol):
    """Runs one task, and returns its folder and metrics."""

    def __call__(
        self, overrides: list[str], given: Sequence[str], begun: Callable[[Path], None], interrupted: Path | None
    ) -> tuple[Path, Metrics]:
        """Run it.

        Args:
            overrides: overrides of the stage.
            given: overrides of the user for all stages.
            begun: called with the folder once it is known.
            interrupted: folder of the stage's run before the chain was stopped.
        """


class StartStage(Protocol):
    """Starts one task, or goes on with it, in a process of its own."""

    def __call__(
        self, overrides: list[str], given: Sequence[str], interrupted: Path | None, log: Path, threads: int
    ) -> StageProcess:
        """Start it.

        Args:
            overrides: overrides of the stage.
            given: overrides of the user for all stages.
            interrupted: folder of the stage's run before the chain was stopped.
            log: file for all that it says.
            threads: threads that it gets.
        """


def run(
    config: Config, folder: RunFolder, run_stage: RunStage, start_stage: StartStage, words: Sequence[str]
) -> Metrics:
    """Run every stage of `stages` and write `report.html`; returns the union of their metrics (later stages win).

    A resumed chain goes on in the stage where it was stopped, and repeats no finished stage. Metrics under `perf/` get
    the name of their stage: `perf/pretrain_tokens_per_s`, `perf/pretrain_s`.

    Args:
        config: configuration of the chain.
        folder: its folder.
        run_stage: runs one task.
        start_stage: starts one task of `side_by_side`.
        words: overrides of the user for all stages.

    Raises:
        UserError: there are no stages.
    """
    if not config.stages:
        raise UserError("stages is empty; choose a recipe (experiment=quickstart), or list stages in a file of yours")
    progress = chain_progress(folder, words)
    metrics: dict[str, float | str] = {}
    finished: dict[str, Stage] = {}
    lanes, threads = _lanes(config)
    for number, (name, overrides) in enumerate(config.stages.items(), start=1):
        SIGNALS.check()
        if any(name in lane for lane in lanes):
            _run_side_by_side(config, folder, progress, lanes, threads, start_stage)
            lanes = []
        title = f"[{number}/{len(config.stages)}] {name}"
        done = progress.stages.get(name)
        if done is not None and progress.has_finished(name):
            _log.info("%s had finished: %s", title, done.folder)
        else:
            _log.info("%s", title)
            done = _run(folder, progress, name, [*config.common, *overrides], run_stage)
        found, stage = done.metrics or {}, Path(done.folder)
        metrics |= {key.replace("perf/", f"perf/{name}_", 1): value for key, value in found.items()}
        metrics[f"perf/{name}_s"] = round(done.seconds, 1)
        finished[name] = Stage(stage, found, done.seconds)
        for sheet in (stage / "reconstructions.png", stage / "samples" / "grid.png"):
            if folder.writes and sheet.exists():
                write_bytes(folder / f"{name}.png", sheet.read_bytes())
    if folder.writes:
        write_report(folder.path, config.task, finished, config.aims)
        print_aims(config.aims, {name: stage.metrics for name, stage in finished.items()})
    return metrics


def _lanes(config: Config) -> tuple[list[list[str]], int]:
    """The lanes of `side_by_side` without stages that were taken out, and the threads of each.

    There are none where they would not be faster.
    """
    lanes = [[name for name in lane if name in config.stages] for lane in config.side_by_side]
    lanes = [lane for lane in lanes if lane]
    if len(lanes) < 2 or RANKS.size > 1:
        return [], 0
    import torch  # not before, because a chain of a sweep may never need it

    from cogview_pl.assembly.devices import device_type

    on_cpu = device_type(config.trainer["accelerator"]) == "cpu"
    threads = torch.get_num_threads() // len(lanes)
    return (lanes, threads) if on_cpu and threads else ([], 0)


def _run_side_by_side(
    config: Config,
    folder: RunFolder,
    progress: ChainProgress,
    lanes: list[list[str]],
    threads: int,
    start_stage: StartStage,
) -> None:
    """Run the stages of all lanes that have not finished, the lanes at the same time."""
    unfinished = [[name for name in lane if not progress.has_finished(name)] for lane in lanes]

    def start(name: str) -> StageProcess:
        before = progress.stages.get(name)
        stage = start_stage(
            [*config.common, *config.stages[name]],
            progress.words,
            Path(before.folder) if before is not None else None,
            folder / f"{name}.log",
            threads,
        )
        progress.begin(folder, name, stage.folder)
        _log.info("%s runs with threads=%d; it says more in %s", name, threads, stage.log)
        return stage

    def ended(name: str, stage: StageProcess, seconds: float) -> None:
        latest.move(stage.folder.parent / latest.LATEST, stage.folder)
        require_metrics(stage.folder)
        progress.finish(folder, name, seconds, json.loads((stage.folder / METRICS).read_text(encoding="utf-8")))

    try:
        run_lanes(unfinished, start, ended)
    except BaseException:
        progress.forget_what_is_gone(folder)
        raise
    parallel = {name for lane in lanes for name in lane}
    for name in filter(parallel.__contains__, config.stages):  # not as they happened to end
        finished = Path(progress.stages[name].folder)
        latest.move(finished.parent / latest.LATEST, finished)


def _run(
    folder: RunFolder, progress: ChainProgress, name: str, overrides: list[str], run_stage: RunStage
) -> StageProgress:
    """Run a stage, or go on with it."""
    before = progress.stages.get(name)
    started = time.perf_counter()
    try:
        _, metrics = run_stage(
            overrides,
            progress.words,
            lambda path: progress.begin(folder, name, path),
            Path(before.folder) if before is not None else None,
        )
    except BaseException:
        progress.forget_what_is_gone(folder)
        raise
    free_memory()
    progress.finish(folder, name, time.perf_counter() - started, metrics)
    return progress.stages[name]
