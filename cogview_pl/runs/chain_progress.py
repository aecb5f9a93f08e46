"""Progress of a chain, `chain.json`: the run of each stage, and the metrics of those that have finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cogview_pl.checkpoints.settings import require_types
from cogview_pl.durable.read import UnreadableError, read_file
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError
from cogview_pl.runs.record import checksum
from cogview_pl.runs.run_folder import CHAIN, Metrics, RunFolder

_LARGEST = 1 << 24  # bytes; a stage has a few thousand


@dataclass
class StageProgress:
    """Run of a stage."""

    folder: str
    """Folder of its run."""
    seconds: float = 0.0
    """Time that it took; of a stage that was stopped, the time of its last part."""
    metrics: dict[str, Any] | None = None
    """Its metrics; None until it has finished."""


@dataclass
class ChainProgress:
    """Progress of a chain; every process has it, and the first one writes it."""

    words: list[str] = field(default_factory=list)
    """Overrides that the user gave for all stages."""
    stages: dict[str, StageProgress] = field(default_factory=dict)
    """Name of a stage that has begun → its progress."""

    def has_finished(self, stage: str) -> bool:
        """Whether a stage has finished, and its run is there."""
        done = self.stages.get(stage)
        return done is not None and done.metrics is not None and Path(done.folder).is_dir()

    def begin(self, folder: RunFolder, stage: str, path: Path) -> None:
        """Note the run of a stage."""
        self.stages[stage] = StageProgress(str(path))
        self._save(folder)

    def finish(self, folder: RunFolder, stage: str, seconds: float, metrics: Metrics) -> None:
        """Note the end of a stage."""
        done = self.stages[stage]
        done.seconds, done.metrics = round(seconds, 1), dict(metrics)
        self._save(folder)

    def forget_what_is_gone(self, folder: RunFolder) -> None:
        """Forget stages without a folder: they were refused, or stopped before they had done anything."""
        self.stages = {name: stage for name, stage in self.stages.items() if Path(stage.folder).is_dir()}
        if self.stages:
            self._save(folder)
        elif folder.writes:
            (folder / CHAIN).unlink(missing_ok=True)

    def _save(self, folder: RunFolder) -> None:
        if folder.writes:
            values = asdict(self)
            text = json.dumps({**values, "crc32": checksum(values)}, ensure_ascii=False, indent=1)
            write_text(folder / CHAIN, text + "\n")


def chain_progress(folder: RunFolder, words: Sequence[str]) -> ChainProgress:
    """Progress of the chain in a folder.

    Args:
        folder: folder of the chain.
        words: overrides that the user gives for all stages now; they come after those given before.

    Raises:
        UserError: `chain.json` is damaged.
    """
    file = folder / CHAIN
    with folder.processes.first_goes_ahead() as first:
        found = _read(file) if first and file.exists() else {}
    values = json.loads(folder.processes.agree(json.dumps(found)) or "{}")
    stages = {name: StageProgress(**stage) for name, stage in values.get("stages", {}).items()}
    before = [word for word in values.get("words", []) if word not in words]
    return ChainProgress([*before, *words], stages)


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(read_file(file, _LARGEST))
        if values.pop("crc32") != checksum(values):
            raise ValueError("its checksum is wrong")
        require_types(ChainProgress, values)
    except (UnreadableError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); start the chain anew in another folder") from error
    return values
