"""Where code that Triton makes for GPUs can run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

_FROM = (8, 0)  # compute capability that multiplies bf16


@cache
def runs_kernels(device: torch.device) -> bool:
    """Whether the project's own kernels run there: a GPU of NVIDIA from Ampere on, and all that Triton needs."""
    enough = on_nvidia(device) and torch.cuda.get_device_capability(device) >= _FROM
    return enough and missing_for_triton() is None


def on_nvidia(device: torch.device) -> bool:
    """Whether the device is a GPU of NVIDIA; torch calls those of AMD `cuda` as well."""
    return device.type == "cuda" and torch.version.cuda is not None


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one, on which Triton starts kernels and graphs are recorded; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def missing_for_triton() -> str | None:
    """What Triton lacks here, and what to do; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "on a GPU it needs Triton, which was not found; install the package triton"
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang", "cc"])):
        return f"on a GPU Triton needs a C compiler, and {named or 'gcc'} was not found; install one or name it in CC"
    return None
