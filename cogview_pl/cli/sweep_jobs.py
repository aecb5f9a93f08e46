"""The jobs of a sweep: what varies among them, and their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

_LONGEST = 200  # bytes of a name; file systems take 255, and files of drafts and locks add some
_DIGITS = 8  # of the hash that replaces the end of a longer name


def fixed_keys(sweep: DictConfig) -> frozenset[str]:
    """Keys, as overrides spell them, that have one value in all jobs of a sweep.

    Args:
        sweep: configuration of the whole sweep, with the node `hydra`.
    """
    params = sweep.hydra.sweeper.get("params") or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *sweep.hydra.overrides.task]
    given = OverridesParser.create().parse_overrides(words)
    swept = {word.get_key_element() for word in given if word.is_sweep_override()}
    return frozenset(word.get_key_element() for word in given if word.get_key_element() not in swept)


def varying(overrides: Sequence[str], fixed: frozenset[str]) -> dict[str, str]:
    """Swept keys of a job and their values."""
    pairs = (word.partition("=") for word in overrides if not word.startswith("hydra."))
    return {key.lstrip("+"): value for key, _, value in pairs if key not in fixed}


def job_name(varies: dict[str, str]) -> str:
    """Name of a job, which is the name of its folder: `optimizer.optimizer.lr=0.001,seed=1`."""
    name = ",".join(f"{key}={value.strip(_QUOTES)}" for key, value in sorted(varies.items())) or "job"
    name = name.replace("/", "_").replace("\0", "")
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]
    return name.encode()[: _LONGEST - _DIGITS - 1].decode(errors="ignore") + f"-{digest}"


_QUOTES = "'\""
