"""Configurations as the command line composes them, in this process."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import hydra
from omegaconf import DictConfig, OmegaConf

from cogview_pl.cli.overrides import quote_override
from cogview_pl.config.schema import Config, register_schemas


def composition(*overrides: str) -> DictConfig:
    """What Hydra composes from these overrides; one of them names the task."""
    return deepcopy(_composition(*overrides))


@cache
def _composition(*overrides: str) -> DictConfig:
    register_schemas()
    with hydra.initialize(version_base="1.3", config_path="../conf"):
        return hydra.compose("config", overrides=[*map(quote_override, overrides)])


def composed(*overrides: str) -> Config:
    """The configuration of these overrides; one of them names the task."""
    config = OmegaConf.to_object(composition(*overrides))
    assert isinstance(config, Config)
    return config
