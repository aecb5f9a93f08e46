"""Reading foreign `.pt` files without running anything that is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from cogview_pl.errors import UserError

# What training programs leave beside the weights: states of NumPy's random generator, as arrays and scalars. These
# names build arrays from bytes and can do nothing else. Files from NumPy 1 and NumPy 2 spell the module differently.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED: list[Any] = [
    *((np._core.multiarray._reconstruct, f"{module}._reconstruct") for module in _NUMPY),  # type: ignore[attr-defined]
    *((np._core.multiarray.scalar, f"{module}.scalar") for module in _NUMPY),  # type: ignore[attr-defined]
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(name)) for name in ("u1", "i1", "u4", "i4", "u8", "i8", "f4", "f8")),
]


def read_pt(file: Path, key: str) -> dict[str, Any]:
    """The dictionary in a `.pt` file, on the CPU, its tensors mapped from the disk where the format allows it.

    Only tensors, plain Python values, and the NumPy arrays of random-generator states are read.

    Raises:
        UserError: the file is missing, damaged, holds anything else, or something that would have to be executed;
            the message names the config `key`.
    """
    if not file.is_file():
        raise UserError(f"{key}: {file} does not exist; give the released .pt file or its folder")
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise UserError(
            f"{key}: {file} was refused: it asks to run {_refused_global(str(error))}, and a file of weights has no "
            "need to; get the file from a source that you trust"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{key}: {file} is damaged or no PyTorch file ({reason}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds a {type(found).__name__}, not a dictionary of weights")
    return found


def _refused_global(message: str) -> str:
    """The name that torch refused, out of its long message."""
    for mark in ("GLOBAL ", "Unsupported class "):
        if mark in message:
            return message.split(mark, 1)[1].split()[0]
    return "code"
