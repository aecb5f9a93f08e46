"""The lifetime of a run in its folder: it locks the folder, listens to signals, and cleans up at the end."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.runs.command import how_to_resume
from cogview_pl.runs.interrupted import can_go_on, open_run
from cogview_pl.runs.run_folder import RunFolder


@contextmanager
def run_folder(
    composed: DictConfig, job: str | None, choices: Mapping[str, str] | None = None, comment: str = ""
) -> Iterator[RunFolder]:
    """Open, describe and lock the folder of a run, and listen to signals; `run_dir` and `resume` are filled in.

    A refused run leaves no files, and neither does a stopped run that cannot be resumed. `Stopped`, and an error of a
    run that has begun, get advice on how to go on.

    Args:
        composed: configuration of the run.
        job: name of the run in a sweep.
        choices: group → choice, from which it was composed.
        comment: first line of its file.
    """
    folder, composed.resume = open_run(composed, job)
    composed.run_dir = str(folder.path)
    is_chain = composed.verb.value == "chain"
    try:
        with SIGNALS:
            folder.describe(composed, choices, comment)
            yield folder
    except (UserError, OmegaConfBaseException) as error:
        if isinstance(error, UserError) and folder.has_begun and can_go_on(folder.path, composed.verb.value):
            # The whole chain goes on, not only the stage that has failed.
            error.advice = how_to_resume(folder.path, () if is_chain else error.overrides)
        folder.undo()
        raise
    except Stopped as stop:
        goes_on = can_go_on(folder.path, composed.verb.value)
        stop.advice = how_to_resume(folder.path) if goes_on else stop.advice or "start it again"
        if not goes_on:
            folder.undo()
        raise
    finally:
        folder.unlock()


def free_memory() -> None:
    """Free the models of a run that has ended, before the next one of this process makes its own.

    A trainer, its module and its optimizer refer to each other. Python collects such a cycle after a number of new
    objects, whatever their size, and a few models are few objects.
    """
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
