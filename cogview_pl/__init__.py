"""CogView in PyTorch Lightning and Hydra: Chinese text to images with a VQ-VAE and a transformer."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview_pl.assembly.cogview import CogView
    from cogview_pl.generation.config import Sampling
    from cogview_pl.run import run

if sys.argv[:1] == ["-m"]:  # a program of ours is being imported; until a run listens, Ctrl-C just ends it
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.1.0"

__all__ = ["CogView", "Sampling", "__version__", "run"]

_OFFERED = {"CogView": "cogview_pl.assembly.cogview", "Sampling": "cogview_pl.generation.config"}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import on first use, so that `--help` does not wait for torch."""
    if name == "run":  # the module, which can be called like its function
        return importlib.import_module("cogview_pl.run")
    if name in _OFFERED:
        return getattr(importlib.import_module(_OFFERED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
