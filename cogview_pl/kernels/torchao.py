"""torchao (extra `quant`): imported where a key asks for it, without its noise."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from cogview_pl.errors import UserError


def import_torchao(module: str, asked: str) -> Any:
    """A module of torchao, such as `torchao.optim`.

    Args:
        module: its dotted name.
        asked: key and value that need it, such as `quantization=int8`, for the message.

    Raises:
        UserError: torchao is not installed.
    """
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # it warns about torchao's enums
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{asked} needs torchao; pip install "cogview_pl[quant]"') from error


def int8_parts(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Matrix in int8 `(outputs, inputs)` and scale per output of a weight that torchao holds so; None for others."""
    inside = getattr(weight, "qdata", None)
    if inside is None or inside.dtype != torch.int8 or inside.shape != weight.shape:
        return None
    return inside, weight.scale  # type: ignore[attr-defined]
