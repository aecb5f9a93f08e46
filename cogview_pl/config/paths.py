"""Paths of the configuration that lead through `latest`, where that is a file and no link."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig, OmegaConf

from cogview_pl.config.text_keys import expand_home
from cogview_pl.durable.latest import LATEST, through_latest


def resolve_paths(config: DictConfig) -> None:
    """Replace `~` and files `latest` in all paths; raises UserError if a file `latest` does not name a run."""
    expand_home(config)
    follow_latest(config)


def follow_latest(node: DictConfig | ListConfig) -> None:
    """Replace `…/latest/…` in all values by the run that a file `latest` names; links are left as they are.

    Raises:
        UserError: a file `latest` does not name a run.
    """
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, (DictConfig, ListConfig)):
            follow_latest(value)
        elif isinstance(value, str) and LATEST in value:
            found = str(through_latest(value))
            if found != value:
                node[key] = found
