"""What makes a folder a run folder: a file of ours that says which task it is of and what it read.

It is the mark by which a folder is known before anything in it is written over or deleted, and what a run that goes on
is compared with: settings by their values, inputs (data, models) by a hash of what tells them apart.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cogview_pl.checkpoints.settings import require_types
from cogview_pl.durable.read import UnreadableError, read_file
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError

RECORD = ".cogview_pl.json"

_LARGEST = 1 << 20  # bytes: ours have a few thousand


@dataclass
class RunRecord:
    """What a run is."""

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Values that its results depend on, and that must not change while it is stopped."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Key or name of an input → hash of what tells it apart."""
    metrics: str | None = None
    """Hash of `metrics.json`, once the run has finished."""

    def save(self, folder: Path) -> None:
        """Replace the record of a run folder."""
        values = asdict(self)
        write_text(folder / RECORD, json.dumps({**values, "crc32": _checksum(values)}, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read the record of a run folder.

        Raises:
            UserError: there is none, so that the folder is none of ours, or it is damaged.
        """
        file = folder / RECORD
        if not file.is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no {RECORD}; give one that a task has made")
        try:
            values = json.loads(read_file(file, _LARGEST))
            if values.pop("crc32") != _checksum(values):
                raise ValueError("its checksum is wrong")
            return cls(**require_types(cls, values))
        except (UnreadableError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}); start the run anew in another folder") from error

    def require_same(self, folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """Compare what a run that goes on has with what it began with; what was not noted is not compared.

        Raises:
            UserError: something differs.
        """
        for key, value in settings.items():
            if key in self.settings and self.settings[key] != value:
                raise UserError(
                    f"resume: {folder} was begun with {key}={self.settings[key]}, this run has {value}; go on with the "
                    "same settings, or start anew without resume"
                )
        for key, value in inputs.items():
            if key in self.inputs and self.inputs[key] != value:
                raise UserError(
                    f"resume: {key} is not what it was when {folder} was begun; put it back as it was, start anew "
                    "without resume, or set verify=false to go on with what is there now"
                )


def is_run(folder: Path) -> bool:
    """Whether a folder is marked as that of a run."""
    return (folder / RECORD).is_file()


def _checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
