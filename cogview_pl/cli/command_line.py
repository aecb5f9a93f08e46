"""Words of the command line: before Hydra reads them, and those that a stage of a chain or another process gets."""

from __future__ import annotations

import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from cogview_pl.cli.overrides import quote_override
from cogview_pl.runs.command import config_flags

_CHAIN_KEYS = ("experiment", "task", "stages", "common", "run_dir")  # a chain does not hand these on to its stages
_MULTIRUN = ("-m", "--multirun")


def hydra_words(words: list[str]) -> list[str]:
    """The words as Hydra reads them."""
    # Hydra's usual `+experiment=NAME` is for configurations without that group; ours has it.
    words = [word.removeprefix("+") if word.startswith("+experiment=") else word for word in words]
    flags = [word for word in words if word in _MULTIRUN]  # argparse takes them only in front of the overrides
    return [*flags, *(quote_override(word, sweeps=bool(flags)) for word in words if word not in _MULTIRUN)]


def job_name() -> str | None:
    """Name of this job in a sweep, None outside of one."""
    hydra = HydraConfig.get()
    return hydra.job.name if hydra.mode == RunMode.MULTIRUN else None  # type: ignore[no-any-return]


def job_words() -> list[str]:
    """Words that start this run, or this job of a sweep, once more."""
    return sys.argv[1:] if job_name() is None else [*config_flags(), *HydraConfig.get().overrides.task]


def stage_overrides(overrides: list[str]) -> list[str]:
    """Overrides of one stage of a chain: its own, then those that the user gave for the whole chain."""
    given = HydraConfig.get().overrides.task
    return [
        *map(quote_override, overrides),
        *(word for word in given if word.lstrip("+~").split("=")[0].split(".")[0] not in _CHAIN_KEYS),
    ]
