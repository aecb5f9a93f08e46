"""`config.yaml` of a folder of weights: plain values, read without believing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.durable import write_text
from cogview_pl.errors import UserError

CONFIG = "config.yaml"

Settings = Mapping[str, Any]

_LARGEST = 1 << 20  # bytes: ours have a few thousand
_UNFIT = (  # what constructors raise for settings of the wrong type, range or name
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, AssertionError),
    *(RuntimeError, MemoryError, yaml.YAMLError, OmegaConfBaseException),
)


def write_settings(folder: Path, settings: Settings) -> None:
    """Replace the `config.yaml` of a folder."""
    write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(dict(settings))))


def read_settings(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a folder, as plain values.

    Raises:
        UserError: it is missing, no YAML, no mapping, or uses aliases, with which a few lines can fill any memory.
    """
    file = folder / CONFIG
    try:
        with unfit_named(file):
            if file.stat().st_size > _LARGEST:
                raise ValueError(f"it has {file.stat().st_size} bytes")
            text = file.read_text(encoding="utf-8")
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                raise ValueError("it uses YAML aliases")
            found = OmegaConf.to_container(OmegaConf.create(text))
            if not isinstance(found, dict):
                raise ValueError("it is no mapping")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; copy the folder again") from None
    return {str(name): value for name, value in found.items()}


@contextmanager
def unfit_named(file: Path) -> Iterator[None]:
    """Turns what settings of the wrong type, range or name raise into a UserError that names their file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file} is damaged ({error}); copy the folder again") from error
    except _UNFIT as error:
        words = f"no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(words.split())[:300] or type(error).__name__
        raise UserError(f"{file} is damaged ({reason}); copy the folder again") from error
