"""Writes Lightning's checkpoints: a kill leaves no partial file, and training goes on while a large one is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cogview_pl.durable.write import link, replacing
from cogview_pl.lit.background import Background
from cogview_pl.lit.snapshot import Snapshots, num_bytes


class DurableCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint in one step.

    Lightning's own writer makes the file in the system's temporary folder and moves it. On another file system a move
    is a copy, and a kill leaves half a checkpoint. It also holds the file in memory twice.

    A large checkpoint is copied in main memory, and a thread writes the copy. The links and deletions that rest on it
    wait for it, in the order in which they were asked for. The next checkpoint waits too, so there is one copy.

    Attributes:
        background_bytes: size from which a checkpoint is written by the thread.
    """

    def __init__(self) -> None:
        self.background_bytes = math.inf
        self._background = Background()
        self._snapshots = Snapshots()
        self._newest = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, or begin to.

        Raises:
            UserError: the disk is full, now or for the checkpoint before; the old file is intact.
        """
        self._background.wait()
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._newest = str(path)
        if num_bytes(checkpoint) < self.background_bytes:
            _write(checkpoint, file)
            return
        copied = self._snapshots.copy(checkpoint)
        self._background.submit(partial(_write, copied, file))

    def has_written(self, path: str | Path) -> bool:
        """Whether a file is the newest checkpoint of this process; strategies that write folders bypass this class."""
        return self._newest == str(path)

    def link_checkpoint(self, source: str | Path, path: str | Path) -> None:
        """Give the newest checkpoint, `source`, a second name, once it is written; see `durable.write.link`."""
        self._after_writing(partial(link, Path(source), Path(path)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, once the newest one is written."""
        self._after_writing(partial(super().remove_checkpoint, path))

    @contextmanager
    def in_foreground(self) -> Iterator[None]:
        """Inside the block checkpoints are written at once, without a copy."""
        before, self.background_bytes = self.background_bytes, math.inf
        try:
            yield
        finally:
            self.background_bytes = before

    def raise_error(self) -> None:
        """Raise the error of a checkpoint that could not be written; does not wait for the one that is under way."""
        self._background.raise_error()

    def wait(self) -> None:
        """Return when the newest checkpoint is on the disk; raises the error if it could not be written."""
        self._background.wait()

    def teardown(self) -> None:
        """Wait, and free the copy."""
        try:
            self.wait()
        finally:
            self._background.close()
            self._snapshots.clear()

    def _after_writing(self, job: Any) -> None:
        if self._background.busy:
            self._background.submit(job)
        else:
            self._background.raise_error()
            job()


def _write(checkpoint: dict[str, Any], file: Path) -> None:
    with replacing(file) as draft, draft.open("wb") as stream:
        torch.save(checkpoint, stream)
