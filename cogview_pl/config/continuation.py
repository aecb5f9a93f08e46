"""Merges the configuration of an earlier part of a run with one that is composed now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.config.text_keys import literal

_OF_THIS_CALL = ("resume", "run_dir", "plan", "verify")
"""Keys that hold for one part of a run."""


def take_over(composed: DictConfig, saved: dict[str, Any], own: Sequence[str]) -> None:
    """Set the values of an earlier configuration.

    A value that the earlier configuration had from an interpolation, such as `${run_dir}/checkpoints`, becomes this
    interpolation again.

    Args:
        composed: configuration composed from the same groups; it is changed.
        saved: resolved values of the earlier configuration.
        own: dotted keys that keep the value in `composed`.
    """
    with open_dict(composed):
        _take_over(composed, saved, (*_OF_THIS_CALL, *own), "", OmegaConf.create(literal(saved)))


def keep_schedule(composed: DictConfig, saved: dict[str, Any], own: Sequence[str]) -> None:
    """Keep the length of the learning-rate schedule where `trainer.max_steps` changes and no length is given.

    Otherwise the rate of an extended run would jump from the end of one cosine to the middle of another.
    """
    before = saved.get("trainer", {}).get("max_steps")
    schedule = composed.optimizer
    chosen = {"optimizer.schedule_steps", "optimizer.schedule_start"} & set(own)
    if before not in (None, composed.trainer.get("max_steps")) and schedule.schedule_steps is None and not chosen:
        schedule.schedule_steps = before


def changed_values(composed: DictConfig, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key → earlier value and present value, where they differ; None for a missing key."""
    now = composed.copy()
    now.run_dir = saved.get("run_dir")  # it is part of other values
    before, after = dict(leaves(saved)), dict(leaves(OmegaConf.to_container(now, resolve=True, enum_to_str=True)))
    return {
        key: (before.get(key), after.get(key))
        for key in [*before, *(after.keys() - before.keys())]
        if before.get(key) != after.get(key) and key.partition(".")[0] not in _OF_THIS_CALL
    }


def differing_keys(one: DictConfig, other: DictConfig) -> list[str]:
    """Dotted keys with another value, or interpolation, in the other configuration, or without one."""
    before, after = (dict(leaves(OmegaConf.to_container(config, enum_to_str=True))) for config in (one, other))
    missing = object()
    return [key for key in {**before, **after} if before.get(key, missing) != after.get(key, missing)]


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries; an empty dictionary is a value."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _take_over(node: DictConfig, saved: dict[str, Any], own: tuple[str, ...], prefix: str, root: DictConfig) -> None:
    closed = OmegaConf.get_type(node) is not dict  # the fields of a dataclass
    for name in list(node):
        key = f"{prefix}{name}"
        if _covered(key, own):
            continue
        if name in saved:
            _set(node, str(name), saved[name], own, key, root)
        elif not closed and not any(given.startswith(f"{key}.") for given in own):
            del node[name]
    missing = () if closed else tuple(name for name in saved if name not in node)  # in order, for stages of a chain
    for name in missing:
        if not _covered(f"{prefix}{name}", own):
            node[name] = literal(saved[name])


def _set(node: DictConfig, name: str, value: Any, own: tuple[str, ...], key: str, root: DictConfig) -> None:
    if OmegaConf.is_interpolation(node, name):
        if not _gives(root, key, OmegaConf.to_container(node)[name], value):  # type: ignore[index, call-overload]
            node[name] = literal(value)
        return
    inner = None if OmegaConf.is_missing(node, name) else node[name]
    if isinstance(inner, DictConfig) and isinstance(value, dict) and _fits(inner, value, own, key):
        _take_over(inner, value, own, f"{key}.", root)
    else:
        node[name] = literal(value)


def _fits(node: DictConfig, saved: dict[str, Any], own: tuple[str, ...], key: str) -> bool:
    """Whether both have the keys of one class, or the class is chosen now."""
    same = "_target_" not in saved or node.get("_target_") in (None, saved["_target_"])
    return same or _covered(f"{key}._target_", own)


def _gives(root: DictConfig, key: str, interpolation: str, value: Any) -> bool:
    """Whether an interpolation has this value in the earlier configuration."""
    OmegaConf.update(root, key, interpolation)
    try:
        return bool(OmegaConf.select(root, key) == value)
    except OmegaConfBaseException:
        return False
    finally:
        OmegaConf.update(root, key, literal(value))


def _covered(key: str, own: tuple[str, ...]) -> bool:
    """Whether the key, or a node that it is in, is among the given keys."""
    return any(key == given or key.startswith(f"{given}.") for given in own)
