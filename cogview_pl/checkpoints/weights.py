"""Weights in safetensors files: written as a whole, mapped when they are read, and fitted into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogview_pl.durable import replacing
from cogview_pl.errors import UserError


def save_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file; the tensors are on the CPU and contiguous."""
    with replacing(file) as draft:
        save_file(dict(weights), draft)


def read_weights(file: Path, *, finite: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from the disk.

    Args:
        file: the file.
        finite: refuse weights that are not finite, which costs a pass over them.

    Raises:
        UserError: the file is damaged, or holds NaN or infinity.
    """
    try:
        found = load_file(file)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError, MemoryError) as error:
        raise UserError(f"{file} is damaged ({_reason(error)}); copy the folder again") from error
    if finite:
        require_finite(found, file)
    return found


def require_finite(weights: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for name, tensor in weights.items():
        # A finite sum shows it in a tenth of the time; that of large finite numbers may overflow.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(
                f"{file}: {name} holds numbers that are not finite; the training that made it has failed, take an "
                "earlier checkpoint (verify=false reads it all the same)"
            )


def number_of_tensors(file: Path) -> int:
    """How many tensors a safetensors file holds, by its header; raises UserError if that is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return len(opened.keys())
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{file} is damaged ({_reason(error)}); copy the folder again") from error


def load_weights(model: nn.Module, file: Path, *, finite: bool) -> None:
    """Fit the weights of a file into a model, in fp32, in evaluation mode; they stay mapped where they are fp32.

    Raises:
        UserError: the file is damaged or does not fit, or see `read_weights`.
    """
    weights = {name: _float32(tensor) for name, tensor in read_weights(file, finite=finite).items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit its config.yaml or is damaged: {_reason(error)}") from error
    model.eval()


def _float32(tensor: Tensor) -> Tensor:
    """Converted weights may be stored in half precision; counters stay what they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
