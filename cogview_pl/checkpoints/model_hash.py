"""A hash of the weights at a path, by which a run that goes on knows them again."""

from __future__ import annotations

from pathlib import Path

import xxhash

from cogview_pl.checkpoints.adapter_folder import BASE, find_adapter, find_base
from cogview_pl.checkpoints.manifest import MANIFEST
from cogview_pl.checkpoints.training_checkpoint import checkpoint_hash, find_checkpoint


def model_hash(path: str | Path) -> str:
    """A hash that changes with the weights at a path, without reading them: of checksums, or sizes and times."""
    digest = xxhash.xxh3_128()
    checkpoint = find_checkpoint(path)
    if checkpoint is not None and checkpoint.is_file():
        base = model_hash(find_base(checkpoint, "base")) if find_adapter(checkpoint) else ""
        return xxhash.xxh3_128(f"{checkpoint_hash(checkpoint)} {base}".encode()).hexdigest()
    for file in sorted(_files_of_model(Path(path))):
        if file.name == MANIFEST:
            digest.update(file.read_bytes())
        elif file.name == BASE:
            digest.update(model_hash(file.read_text(encoding="utf-8").strip()).encode())
        else:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _files_of_model(path: Path) -> list[Path]:
    """The files that tell a model from another: manifests, where the folder has them."""
    if path.is_file():
        return [path]
    folder = find_adapter(path) or (path / "model" if (path / "model").is_dir() else path)
    files = [file for file in folder.rglob("*") if file.is_file()]
    marked = [file for file in files if file.name in (MANIFEST, BASE)]
    return marked or files
