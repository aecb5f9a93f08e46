"""Opens programs as feature networks: TorchScript and torch.export. Only for files that the user trusts.

Loading a program runs code of the file, and no check is possible before: TorchScript calls `__setstate__` of classes
in the file, and `torch.export.load` unpickles, evaluates and compiles.
"""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors import UserError

_METADATA = "cogview_pl.json"

_log = logging.getLogger(__name__)


class Program(NamedTuple):
    """A program and its metadata."""

    run: Callable[[Tensor], Any]
    metadata: dict[str, Any]
    """Content of the extra file `cogview_pl.json`: `{"resolution": …, "classes": […]}`; empty without that file."""


def open_program(file: Path, key: str, device: str) -> Program:
    """Load a program, after a warning.

    Args:
        file: program of TorchScript or torch.export that the user trusts.
        key: configuration key, for errors.
        device: device of the program.

    Raises:
        UserError: the program cannot be opened.
    """
    _log.warning("%s=%s runs code from this file, with all your rights, because you set it to be trusted", key, file)
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            metadata = next((archive.read(name) for name in names if name.endswith(f"/extra/{_METADATA}")), b"{}")
        exported = any(name.endswith("/archive_format") for name in names)
        run = _load_exported(file, device) if exported else _load_torchscript(file, device)
        found = json.loads(metadata)
    except Exception as error:  # a foreign program may raise anything
        raise UserError(f"{key}={file} cannot be opened ({reason_of(error)}); export it again") from error
    return Program(run, found if isinstance(found, dict) else {})


def reason_of(error: BaseException) -> str:
    """Last line of a message; TorchScript states the reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__


def _load_torchscript(file: Path, device: str) -> Callable[[Tensor], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated but still common
        return torch.jit.load(str(file), map_location=device).eval()


def _load_exported(file: Path, device: str) -> Callable[[Tensor], Any]:
    with file.open("rb") as stream:
        return torch.export.load(stream).module().to(device)  # type: ignore[arg-type]
