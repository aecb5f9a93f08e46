"""Writes Lightning's checkpoints; a kill leaves no partial file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cogview_pl.durable.write import replacing


class DurableCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step.

    Lightning's own writer makes the file in the system's temporary folder and moves it. On another file system a move
    is a copy, and a kill leaves half a checkpoint. It also holds the file in memory twice.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; raises UserError if the disk is full, and leaves the old file intact."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as draft, draft.open("wb") as stream:
            torch.save(checkpoint, stream)
