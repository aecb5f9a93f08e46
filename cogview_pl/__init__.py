"""CogView in PyTorch Lightning and Hydra: Chinese text to images with a VQ-VAE and a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogview_pl.generation.pipeline import CogView

__all__ = ["CogView"]


def __getattr__(name: str) -> Any:
    """Import `CogView` on first use, so that `--help` does not wait for torch."""
    if name == "CogView":
        from cogview_pl.generation.pipeline import CogView

        return CogView
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
