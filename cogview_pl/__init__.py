"""CogView in PyTorch Lightning and Hydra: Chinese text to images with a VQ-VAE and a transformer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview_pl.generation.pipeline import CogView
    from cogview_pl.run import run

__all__ = ["CogView", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `--help` does not wait for torch."""
    if name == "CogView":
        from cogview_pl.generation.pipeline import CogView

        return CogView
    if name == "run":  # the module, which can be called like its function
        return importlib.import_module("cogview_pl.run")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
