"""Refuses keys without a value, and unknown keys; the message names the nearest known keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cogview_pl.config.shipped import shipped
from cogview_pl.errors import UserError

_ARGUMENTS_OF_TRAINER = {
    "trainer": "default",
    "precision": "fp32",
}  # group → a choice that has its usual keys
_MOST = 3  # largest number of suggestions
_ALIKE = 0.75  # smallest difflib ratio of two words that count as misspellings of each other


def check_keys(config: DictConfig) -> None:
    """Raises UserError for a key without a value, and for an unknown key, such as `foo` of `+foo=1`.

    Dataclasses define the keys of their nodes; `trainer` and `precision` have the arguments of `lightning.Trainer`.
    Keys of other nodes are not checked here: they are arguments of an object, and the object refuses unknown ones.
    """
    for key in sorted(OmegaConf.missing_keys(config)):
        raise UserError(f"{key} has no value; set it on the command line: {key}=…")
    for key in _not_in_schema(config):
        raise UserError(unknown_key(key, config))
    for group, choice in _ARGUMENTS_OF_TRAINER.items():
        usual = OmegaConf.load(shipped("conf") / group / f"{choice}.yaml")
        added = [name for name in config[group] if name not in usual]
        if added:  # this check is rare, because it imports torch
            _check_arguments(group, added)


def _check_arguments(group: str, names: list[str]) -> None:
    """Raises UserError for a name that is no argument of `lightning.Trainer`."""
    from cogview_pl.lit.config import trainer_arguments

    arguments = trainer_arguments()
    for name in names:
        if name not in arguments:
            guesses = [f"{group}.{guess}" for guess in nearest_words(name, arguments)]
            raise UserError(f"{group}.{name}: lightning.Trainer has no such argument{did_you_mean(guesses)}")


def unknown_key(key: str, root: DictConfig) -> str:
    """Message about a dotted key that a composed configuration does not have, with the nearest keys."""
    plain: Any = OmegaConf.to_container(root)
    others = [other for other in _dotted(plain) if not f"{other}.".startswith(f"{key}.")]
    return f"{key}: there is no such key{did_you_mean(_nearest_keys(key, others))}"


def did_you_mean(guesses: Sequence[str]) -> str:
    """Question at the end of a message; empty without guesses."""
    return f" (did you mean {' or '.join(guesses)}?)" if guesses else ""


def nearest_words(word: str, words: Iterable[str]) -> list[str]:
    """Up to three of the words: words with a similar spelling, nearest first, then words that contain `word`."""
    words = list(words)
    close = difflib.get_close_matches(word, words, n=_MOST, cutoff=_ALIKE)
    return list(dict.fromkeys([*close, *(other for other in words if word in other)]))[:_MOST]


def _nearest_keys(key: str, keys: list[str]) -> list[str]:
    """Up to three keys with the same last word, else with a similar last word in the same node, else anywhere."""
    parent, _, word = key.rpartition(".")
    by_word: dict[str, list[str]] = {}
    for other in keys:
        by_word.setdefault(other.rpartition(".")[2], []).append(other)
    if word in by_word:
        return sorted(by_word[word], key=lambda other: other.split(".")[0] != key.split(".")[0])[:_MOST]
    siblings = [name for name, places in by_word.items() if f"{parent}.{name}".lstrip(".") in places]
    if found := nearest_words(word, siblings):
        return [f"{parent}.{name}".lstrip(".") for name in found]
    alike = difflib.get_close_matches(word, by_word, n=1, cutoff=_ALIKE)
    return [other for name in alike for other in by_word[name]][:_MOST]


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all nodes and values, without the node `hydra`."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key != "hydra":
            yield key
            if isinstance(value, dict):
                yield from _dotted(value, f"{key}.")


def _not_in_schema(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted keys that the dataclass of their node does not define; a dataclass that extends `dict` allows any key."""
    schema = OmegaConf.get_type(config)
    closed = is_dataclass(schema) and not issubclass(schema, dict)
    known = {item.name for item in fields(schema)} if is_dataclass(schema) else set()
    for name in config:
        if closed and name not in known:
            yield prefix + str(name)
        elif isinstance(config[name], DictConfig):
            yield from _not_in_schema(config[name], f"{prefix + str(name)}.")
