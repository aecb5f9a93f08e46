"""The lifetime of a run in its folder: it locks the folder, listens to signals, and cleans up at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.runs.run_folder import RunFolder, can_go_on, open_run

_log = logging.getLogger(__name__)


@contextmanager
def run_folder(composed: DictConfig, job: str | None) -> Iterator[RunFolder]:
    """Open, describe and lock the folder of a run, and listen to signals; `run_dir` and `resume` are filled in.

    A refused run leaves no files, and neither does a stopped run that cannot be resumed. `Stopped` gets advice on how
    to go on.

    Args:
        composed: configuration of the run.
        job: name of the run in a sweep.
    """
    folder, composed.resume = open_run(composed, job)
    composed.run_dir = str(folder.path)
    try:
        with SIGNALS:
            folder.describe(composed)
            yield folder
    except (UserError, OmegaConfBaseException):
        folder.undo()
        raise
    except Stopped as stop:
        goes_on = can_go_on(folder.path, composed.verb.value)
        stop.advice = stop.advice or (f"go on with resume={folder.path}" if goes_on else "start it again")
        if not goes_on:
            folder.undo()
        raise
    finally:
        folder.unlock()
    if folder.writes:
        _log.info("done: %s", folder.path)
