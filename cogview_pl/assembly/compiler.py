"""What `compile=true` needs on this machine, looked for before an hour of work is lost to its absence."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.kernels.availability import missing_for_triton


def prepare_compiler(config: Config) -> None:
    """With `compile=true`, start from an empty cache of compiled code; raises UserError if a compiler is missing.

    Another stage of a chain may have left code for another model in this process, and torch gives up on a function
    after a few variants of it.
    """
    if not config.compile:
        return
    missing = missing_for_triton() if trains_on_gpu(config) else _missing_on_cpu()
    if missing is not None:
        raise UserError(f"compile=true: {missing}, or set compile=false")
    torch.compiler.reset()


def trains_on_gpu(config: Config) -> bool:
    """Whether a run of this configuration uses a CUDA GPU."""
    return config.trainer["accelerator"] != "cpu" and torch.cuda.is_available()


def _missing_on_cpu() -> str | None:
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        return f"on a CPU it needs a C++ compiler, and {compiler} was not found; install one or name it in CXX"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        return f"on a CPU it needs the headers of Python, and {headers} was not found; install them (python3-dev)"
    return None
