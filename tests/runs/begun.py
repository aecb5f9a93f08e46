"""Makes folders of begun runs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cogview_pl.config.choices import Verb
from cogview_pl.runs.record import RunRecord


def run(**keys: object) -> DictConfig:
    return OmegaConf.create({"task": "pretrain", "verb": Verb.fit_sequence_model, "run_dir": None, **keys})


def begun(path: Path, *left: str, **record: object) -> Path:
    """A run folder with some files of a task."""
    for name in left:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    path.mkdir(parents=True, exist_ok=True)
    RunRecord("pretrain", **record).save(path)  # type: ignore[arg-type]
    return path


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
