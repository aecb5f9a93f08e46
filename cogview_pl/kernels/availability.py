"""Abilities of devices: the project's Triton kernels, float64."""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_FROM = (8, 0)  # first compute capability with bf16 matmuls
WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no float64."""
FUSED_SUMS = {"enable_fp_fusion": True}
"""Option of every Triton kernel: one instruction for a product and a sum. Without it, Triton's default decides."""


def best_device() -> str:
    """`cuda`, `mps` or `cpu`: the first that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has nothing wider."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


@cache
def runs_kernels(device: torch.device) -> bool:
    """Whether the project's Triton kernels run on a device: an NVIDIA GPU from Ampere on, with what Triton needs."""
    enough = on_nvidia(device) and torch.cuda.get_device_capability(device) >= _FROM
    return enough and missing_for_triton() is None


def on_nvidia(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU; torch uses the name `cuda` for AMD GPUs too."""
    return device.type == "cuda" and torch.version.cuda is not None


def current(device: torch.device) -> AbstractContextManager[None]:
    """Context in which a GPU is the current device, as Triton and CUDA graphs require; no effect on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def missing_for_triton() -> str | None:
    """The part that Triton lacks on this machine and its remedy, for an error message; None: nothing is missing."""
    if importlib.util.find_spec("triton") is None:
        return "on a GPU it needs Triton, which was not found; install the package triton"
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang", "cc"])):
        return f"on a GPU Triton needs a C compiler, and {named or 'gcc'} was not found; install one or name it in CC"
    return None
