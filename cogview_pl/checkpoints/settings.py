"""`config.yaml` of a folder of weights: plain values, checked when they are read."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.durable.read import UnreadableError, read_file
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError
from cogview_pl.limits import out_of_range

T = TypeVar("T")

CONFIG = "config.yaml"

Settings = Mapping[str, Any]

_LARGEST = 1 << 16  # bytes; our files have a few thousand
_DEEPEST = 16  # nested mappings and lists; our files have three levels
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
_UNFIT = (  # errors of constructors for settings of the wrong type, range or name
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, AssertionError),
    *(RuntimeError, MemoryError, yaml.YAMLError, OmegaConfBaseException),
)


def write_settings(folder: Path, settings: Settings) -> None:
    """Replace the `config.yaml` of a folder."""
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(settings))))


def read_settings(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a folder, as plain values.

    Raises:
        UserError: it is missing, no YAML, no mapping, deeply nested, or uses aliases.
    """
    file = folder / CONFIG
    try:
        with unfit_named(file):
            text = read_file(file, _LARGEST).decode("utf-8")
            _require_plain(text)
            found = OmegaConf.to_container(OmegaConf.create(text))
            if not isinstance(found, dict):
                raise ValueError("it is no mapping")
    except UnreadableError as error:
        raise UserError(f"{file} {error}; copy the folder again") from None
    return {str(name): value for name, value in found.items()}


def _require_plain(text: str) -> None:
    """Raises ValueError for aliases and deep nesting, with which a short YAML can fill any memory or take for ever."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise ValueError("it uses YAML aliases")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")


@contextmanager
def unfit_named(file: Path, copied: str = "folder") -> Iterator[None]:
    """Context that turns errors of wrong settings into a UserError that names their file, and what to copy again."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); copy the {copied} again") from error
    except _UNFIT as error:
        words = f"no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(words.split())[:300] or type(error).__name__
        raise UserError(f"{file} is damaged ({reason}); copy the {copied} again") from error


def plain(value: Any) -> Any:
    """Options as plain values: Enum members become their values, dataclasses become dictionaries."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {name: plain(item) for name, item in vars(value).items()}  # with keys added by `+` on the command line
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_plain(kind: type[T], values: Settings) -> T:
    """A dataclass of options from plain values, as `plain` gives them.

    Raises:
        ValueError: a field is missing, unknown, of the wrong type or out of range; the message names it.
    """
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if names != set(values):
        missing, unknown = sorted(names - set(values)), sorted(map(str, set(values) - names))
        raise ValueError(f"no {missing[0]}" if missing else f"{unknown[0]} is unknown")
    hints = get_type_hints(kind)
    require_types(kind, values)
    made = kind(**{name: _typed(value, hints[name]) for name, value in values.items()})
    for name, value, words in out_of_range(made):
        raise ValueError(f"{name} is {value}, must be {words}")
    return made


def _typed(value: Any, hint: Any) -> Any:
    """A plain value with Enum members where the hint says so."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return [_typed(item, get_args(hint)[0]) for item in value] if get_origin(hint) is list else value


def require_types(build: Callable[..., Any], arguments: Settings) -> Settings:
    """The arguments; raises ValueError naming the first whose type differs from the declaration of `build`.

    Without the check a wrong type would fail long after the folder was read.
    """
    hints = get_type_hints(build.__init__ if isinstance(build, type) else build)  # type: ignore[misc]
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{name} is {value!r}")
    return arguments


def _fits(value: object, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if kind in (Sequence, list):
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is Mapping:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if kind is types.NoneType:
        return value is None
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [member.value for member in kind]
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)
