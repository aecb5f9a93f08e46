"""verb chain: runs the tasks of a recipe one after the other, each in its own run folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from cogview_pl.config.schema import Config
from cogview_pl.durable.write import write_bytes
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.report.page import Stage, write_report
from cogview_pl.runs.run_folder import Metrics, RunFolder

_log = logging.getLogger(__name__)

RunStage = Callable[[list[str]], tuple[Path, Metrics]]
"""Runs one task from its overrides; returns its folder and metrics."""


def run(config: Config, folder: RunFolder, run_stage: RunStage) -> Metrics:
    """Run every stage of `stages` and write `report.html`; returns the union of their metrics (later stages win).

    Metrics under `perf/` get the name of their stage: `perf/pretrain_tokens_per_s`, `perf/pretrain_s`.

    Raises UserError if there are no stages.
    """
    if not config.stages:
        raise UserError("stages is empty; choose a recipe (experiment=quickstart), or list stages in a file of yours")
    metrics: dict[str, float | str] = {}
    finished: dict[str, Stage] = {}
    for number, (name, overrides) in enumerate(config.stages.items(), start=1):
        SIGNALS.check()
        _log.info("[%d/%d] %s", number, len(config.stages), name)
        started = time.perf_counter()
        stage, found = run_stage([*config.common, *overrides])
        seconds = time.perf_counter() - started
        metrics |= {key.replace("perf/", f"perf/{name}_", 1): value for key, value in found.items()}
        metrics[f"perf/{name}_s"] = round(seconds, 1)
        finished[name] = Stage(stage, found, seconds)
        _log.info("[%d/%d] %s took %.0f s: %s", number, len(config.stages), name, seconds, stage)
        for sheet in (stage / "reconstructions.png", stage / "samples" / "grid.png"):
            if folder.writes and sheet.exists():
                write_bytes(folder / f"{name}.png", sheet.read_bytes())
                _log.info("images: %s", folder / f"{name}.png")
    if folder.writes:
        _log.info("report: %s", write_report(folder.path, config.task, finished))
    return metrics
