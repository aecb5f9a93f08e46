"""Configurations of a run: `config.yaml` of its start, `config.resumed-2.yaml` of its second part, and so on.

No file of them is rewritten, so they say what ran when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cogview_pl.durable.read import UnreadableError, read_file
from cogview_pl.errors import UserError

CONFIG = "config.yaml"

_RESUMED = "config.resumed-{}.yaml"
_FIRST_RESUMED = 2
_LARGEST = 1 << 26  # bytes; only a list of prompts makes one larger than a few thousand


def newest_config(folder: Path) -> Path:
    """The configuration of the newest part of a run; the file may not exist."""
    return folder / (_RESUMED.format(found) if (found := _parts(folder)) else CONFIG)


def text_hash(text: str) -> str:
    """Hash of a configuration."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_newest_config(folder: Path, hashes: Mapping[str, str]) -> str:
    """Text of the configuration of the newest part of a run.

    Args:
        folder: folder of the run.
        hashes: name of a file → hash; files without one are not compared.

    Raises:
        UserError: it cannot be read, or is not what the run wrote.
    """
    file = newest_config(folder)
    try:
        text = read_file(file, _LARGEST).decode("utf-8")
    except (UnreadableError, UnicodeDecodeError) as error:
        raise UserError(f"resume: {file} {error}; copy it again, or start anew with init_from={folder}") from None
    if hashes.get(file.name, known := text_hash(text)) != known:
        raise UserError(
            f"resume: {file} is not what the run wrote; copy it again and give changes as overrides, or set "
            "verify=false to take it as it is"
        )
    return text


def parsed_config(folder: Path, text: str) -> dict[str, Any]:
    """Values of a configuration; raises UserError if it is damaged."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.create(text))
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"resume: the configuration in {folder} is damaged ({reason}); start anew") from error
    return found


def next_config(folder: Path) -> Path:
    """The file for the configuration of the next part of a run that is resumed."""
    return folder / _RESUMED.format(max(_FIRST_RESUMED, _parts(folder) + 1))


def _parts(folder: Path) -> int:
    """Largest number of a part with a configuration; 0: there is only the first one, or none."""
    before, after = _RESUMED.split("{}")
    numbers = [file.name.removeprefix(before).removesuffix(after) for file in folder.glob(_RESUMED.format("*"))]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)
