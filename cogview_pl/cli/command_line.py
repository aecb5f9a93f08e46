"""Words of the command line: before Hydra reads them, and those that a stage of a chain or another process gets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from cogview_pl.cli.overrides import quote_override
from cogview_pl.runs.command import config_flags

_CHAIN_KEYS = ("experiment", "task", "stages", "common", "side_by_side", "aims", "run_dir", "resume")
"""Keys that a chain does not hand on to its stages."""
_MULTIRUN = ("-m", "--multirun")


def hydra_words(words: list[str]) -> list[str]:
    """The words as Hydra reads them."""
    # Hydra's usual `+experiment=NAME` is for configurations without that group; ours has it.
    words = [word.removeprefix("+") if word.startswith("+experiment=") else word for word in words]
    flags = [word for word in words if word in _MULTIRUN]  # argparse takes them only in front of the overrides
    return [*flags, *(quote_override(word, sweeps=bool(flags)) for word in words if word not in _MULTIRUN)]


def is_one_run(words: list[str]) -> bool:
    """Whether the words ask for one run, by overrides only."""
    return not any(word.startswith(("-", "hydra.mode=")) for word in words)


def job_name() -> str | None:
    """Name of this job in a sweep, None outside of one."""
    hydra = HydraConfig.get()
    return hydra.job.name if hydra.mode == RunMode.MULTIRUN else None  # type: ignore[no-any-return]


def job_words() -> list[str]:
    """Words that start this run, or this job of a sweep, once more."""
    return sys.argv[1:] if job_name() is None else [*config_flags(), *overrides_of(HydraConfig.get())]


def words_for_stages(of_the_run: Mapping[str, str]) -> list[str]:
    """Overrides that the user gave for all stages of a chain.

    Args:
        of_the_run: choices that a resumed chain has from its run, so that they were not given now.
    """
    kept = {f"{name}={value}" for name, value in of_the_run.items()}
    given = [word for word in overrides_of(HydraConfig.get()) if word not in kept]
    return [word for word in given if word.lstrip("+~").split("=")[0].split(".")[0] not in _CHAIN_KEYS]


def overrides_of(node: Any) -> list[str]:
    """The overrides in Hydra's node as they were given: access through OmegaConf would replace `${…}` in them."""
    return OmegaConf.to_container(node.overrides, resolve=False)["task"]  # type: ignore[call-overload, index, return-value]
