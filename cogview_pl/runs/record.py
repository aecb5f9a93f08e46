"""Record of a run, `.cogview_pl.json`: its task, its settings, and hashes of its inputs.

The record marks a folder as a run folder: only in marked folders are files overwritten or deleted. A resumed run is
compared with the record, settings by their values and inputs (data, models) by their hashes.
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
OPTIMIZER = "optimizer.optimizer._target_"
"""Key of the class of the optimizer; another class cannot use its state."""

_LARGEST = 1 << 20  # bytes; a usual record has a few thousand


@dataclass
class RunRecord:
    """Task, settings, inputs and metrics of a run."""

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Values that results depend on; a resumed run must have the same."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Key or name of an input → its hash."""
    metrics: str | None = None
    """Hash of `metrics.json` of a finished run."""
    choices: dict[str, str] = field(default_factory=dict)
    """Group of the configuration → choice, and key that it adds, as `++KEY` → value; a resumed run is composed from
    the same ones."""

    configurations: dict[str, str] = field(default_factory=dict)
    """Name of each file of configuration → its hash."""

    def save(self, folder: Path) -> None:
        """Replace the record of a run folder."""
        values = asdict(self)
        write_text(folder / RECORD, json.dumps({**values, "crc32": checksum(values)}, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read the record of a run folder.

        Raises:
            UserError: there is no record, so the folder is no run folder; or the record is damaged.
        """
        file = folder / RECORD
        if not file.is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no {RECORD}; give one that a task has made")
        try:
            values = json.loads(read_file(file, _LARGEST))
            if values.pop("crc32") != checksum(values):
                raise ValueError("its checksum is wrong")
            return cls(**require_types(cls, values))
        except (UnreadableError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}); start the run anew in another folder") from error

    def require_same(self, folder: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], verify: bool) -> None:
        """Compare settings and inputs of a resumed run with the record, where it has their keys.

        Args:
            folder: folder of the run.
            settings: plain values that results depend on.
            inputs: key or name of an input → its hash.
            verify: False compares only settings without which the state of the run cannot be used.

        Raises:
            UserError: a value differs.
        """
        for key, value in settings.items():
            if key in self.settings and self.settings[key] != value and (verify or key == OPTIMIZER):
                begun, now = _typed(self.settings[key]), _typed(value)
                remedy = f"start anew from its weights with init_from={folder}"
                if key != OPTIMIZER:
                    remedy = "set verify=false to go on with the present value"
                raise UserError(
                    f"resume: {folder} was begun with {key}={begun}, this run has {now}; go on with {key}={begun}, or "
                    f"{remedy}"
                )
        for key, value in inputs.items() if verify else ():
            if key in self.inputs and self.inputs[key] != value:
                raise UserError(
                    f"resume: {key} has changed since {folder} was begun; restore it, start anew without resume, or "
                    "set verify=false to go on with the present one"
                )


def _typed(value: Any) -> Any:
    """A value as it is typed on the command line."""
    return "null" if value is None else value


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / RECORD).is_file()


def checksum(values: Mapping[str, Any]) -> int:
    """CRC-32 of plain values."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
