"""Whether a model can be guided: training must have shown it empty texts."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cogview_pl.generation.config import Sampling
from cogview_pl.runs.history import newest_config
from cogview_pl.runs.ranks import RANKS
from cogview_pl.runs.record import is_run

_log = logging.getLogger(__name__)
_KEY = "sequences.conditioning_dropout"


def warn_of_guidance(sampling: Sampling, model: Path) -> None:
    """Log a warning if guidance is asked for and the run that trained the model had no conditioning dropout.

    Args:
        sampling: the options of the sampler.
        model: a run folder, or a model or checkpoint in it; nothing is known of models outside of run folders.
    """
    if not sampling.guided or _conditioning_dropout(model) != 0 or not RANKS.first:
        return
    _log.warning(
        f"sampler.guidance={sampling.guidance:g}: {model} was trained with {_KEY}=0, so it has not learned images "
        f"without a text, and guidance may spoil its images; set sampler.guidance=1, or train with {_KEY}=0.1"
    )


def _conditioning_dropout(model: Path) -> float | None:
    path = model.resolve()
    run = next(
        (folder for folder in (path, *path.parents[:2]) if is_run(folder) and newest_config(folder).is_file()), None
    )
    if run is None:
        return None
    try:
        found = OmegaConf.select(OmegaConf.load(newest_config(run)), _KEY)
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException):
        return None  # the model does not depend on this file
    return float(found) if isinstance(found, (int, float)) else None
