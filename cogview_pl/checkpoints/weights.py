"""Weights in safetensors files: written at once, mapped into memory when read, and loaded into a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cogview_pl.durable.write import replacing
from cogview_pl.errors import UserError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors files."""

_DAMAGED = (SafetensorError, ValueError, TypeError, KeyError, OverflowError, RuntimeError, MemoryError)
"""Errors of the library for damaged files, in its various versions."""


def save_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file; the tensors are on the CPU and contiguous.

    The library's own writer makes a temporary file with a random name that a killed run would leave there, and that
    only its owner may read.
    """
    # Wide numbers first, so that each tensor starts at a multiple of its item size.
    ordered = sorted(weights.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in ordered:
        span = [place, place := place + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(file) as draft, draft.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(tensor.flatten().view(torch.uint8).numpy().data)


def read_weights(file: Path, *, finite: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory.

    Args:
        file: the file.
        finite: refuse weights that are not finite; it takes a pass over them.

    Raises:
        UserError: the file is damaged, or holds NaN or infinity.
    """
    try:
        found = load_file(file)
        for name, tensor in found.items():
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"{name} is of {tensor.dtype}")
    except _DAMAGED as error:
        raise UserError(f"{file} is damaged ({_reason(error)}); copy the folder again") from error
    if finite:
        require_finite(found, file)
    return found


def require_finite(weights: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for name, tensor in weights.items():
        # The sum takes a tenth of the time, but large finite numbers may overflow it.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(
                f"{file}: {name} holds numbers that are not finite; the training that made it has failed, take an "
                "earlier checkpoint (verify=false reads it all the same)"
            )


def number_of_tensors(file: Path) -> int:
    """Number of tensors in a safetensors file, from its header; raises UserError if the header is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return len(opened.keys())
    except _DAMAGED as error:
        raise UserError(f"{file} is damaged ({_reason(error)}); copy the folder again") from error


def load_weights(model: nn.Module, file: Path, *, finite: bool) -> None:
    """Load the weights of a file into a model, in fp32, in evaluation mode; fp32 weights stay mapped.

    Raises:
        UserError: the file is damaged or does not fit, or see `read_weights`.
    """
    assign_weights(model, read_weights(file, finite=finite), file)


def assign_weights(
    model: nn.Module, weights: Mapping[str, Tensor], file: Path, described_by: str = "config.yaml"
) -> None:
    """Put weights into a model, in fp32, in evaluation mode; fp32 weights are shared.

    Raises:
        UserError: the weights do not fit; the message names their file, and what describes the model.
    """
    try:
        model.load_state_dict({name: _float32(tensor) for name, tensor in weights.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit its {described_by} or is damaged: {_reason(error)}") from error
    model.eval()


def _float32(tensor: Tensor) -> Tensor:
    """Floating-point tensors as fp32 (converted weights may have half precision); counters keep their dtype."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
