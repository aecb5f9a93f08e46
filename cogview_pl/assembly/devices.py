"""Devices of this machine that `trainer.accelerator` and `trainer.devices` name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cogview_pl.assembly.checks import check_precision
from cogview_pl.errors import UserError
from cogview_pl.runs.ranks import RANKS

_KINDS = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps"), "cuda": ("cuda",), "mps": ("mps",), "cpu": ("cpu",)}
"""Value of `trainer.accelerator` → kinds of devices that it means, best first."""
_WEIGHTS = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


def device_type(accelerator: str) -> str:
    """`cuda`, `mps` or `cpu`: the device that a run uses.

    Raises:
        UserError: this machine has no such device.
    """
    if accelerator not in _KINDS:
        raise UserError(f"trainer.accelerator={accelerator}: there is no such choice; use {', '.join(_KINDS)}")
    found = next((kind for kind in _KINDS[accelerator] if _count(kind)), None)
    if found is None:
        raise UserError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__} finds no such device on this machine; set "
            "trainer.accelerator=cpu, or auto for the best that there is"
        )
    return found


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Raises UserError for an accelerator, or more devices, than this machine has."""
    kind, devices = device_type(trainer["accelerator"]), trainer["devices"]
    if kind == "cpu" or RANKS.size > 1:  # a scheduler may show each process its own device only
        return
    numbers = devices if isinstance(devices, (list, tuple)) else range(devices if isinstance(devices, int) else 1)
    if max(numbers, default=0) >= _count(kind):
        raise UserError(
            f"trainer.devices={devices}: this machine has {_count(kind)} of {kind}; lower it, or set "
            "trainer.accelerator=cpu"
        )


def weights_dtype(precision: Mapping[str, Any]) -> torch.dtype:
    """Precision of the weights in inference: 16 bits with `precision=fp16` or `bf16`, though training keeps fp32."""
    return _WEIGHTS.get(precision["precision"], torch.float32)


def inference_device(trainer: Mapping[str, Any], precision: Mapping[str, Any]) -> tuple[str, torch.dtype]:
    """Device of this process, and precision of its weights in inference; a GPU becomes the current one.

    Raises:
        UserError: this machine has no such device, or fp16 without a GPU.
    """
    kind, devices = device_type(trainer["accelerator"]), trainer["devices"]
    check_precision(precision, on_gpu=kind != "cpu")
    if kind != "cuda":
        return kind, weights_dtype(precision)
    local = RANKS.local_rank
    number = devices[local] if isinstance(devices, (list, tuple)) else local % _count(kind)
    torch.cuda.set_device(number)
    return f"{kind}:{number}", weights_dtype(precision)


def _count(kind: str) -> int:
    """Number of devices of a kind on this machine."""
    if kind == "cuda":
        return torch.cuda.device_count()
    return 1 if kind == "cpu" else int(torch.backends.mps.is_available())
