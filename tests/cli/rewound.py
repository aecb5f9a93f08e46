"""Compares two runs that must be equal, and takes a run back to an earlier state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

KEEP_ALL = ("callbacks.checkpoint.every_n_train_steps=3", "callbacks.checkpoint.save_top_k=-1")
"""Overrides of a run that keeps the checkpoint of step 3."""


def rewind(run: Path, copy: Path) -> None:
    """Reduce a run made with `KEEP_ALL` to its state after a kill at step 3; the full run is moved to `copy`."""
    shutil.copytree(run, copy)
    for made in ("model", "adapter"):
        shutil.rmtree(run / made, ignore_errors=True)
    (run / "metrics.json").unlink()
    earlier, last = (run / "checkpoints" / name for name in ("step_3.ckpt", "last.ckpt"))
    assert torch.load(earlier, weights_only=True)["global_step"] == 3
    last.unlink()  # it is another name of the newest step
    shutil.copy(earlier, last)


def last_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


def metrics(run: Path) -> dict[str, float]:
    found = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith("perf/")}


def tensors(tree: Any, path: str = "") -> dict[str, Any]:
    """Path → leaf of nested dictionaries and lists."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in tensors(value, f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in tensors(value, f"{path}/{i}").items()}
    return {path: tree}


def require_same(one: Path, other: Path) -> None:
    """Assert that weights, adapters, optimizer states and metrics of two finished runs are equal to the bit."""
    files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    assert files
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        left, right = tensors(last_checkpoint(one)[part]), tensors(last_checkpoint(other)[part])
        assert left.keys() == right.keys()
        for name, value in left.items():
            same = torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
            assert same, f"{part}{name}"
    assert metrics(one) == metrics(other)


def rewind_samples(run: Path, lines: int) -> None:
    """Take a run back to a kill while it wrote the line after so many."""
    (run / "metrics.json").unlink()
    (run / "samples" / "grid.png").unlink(missing_ok=True)
    every = (run / "samples.jsonl").read_bytes().splitlines(keepends=True)
    cut = every[lines][:20] if lines < len(every) else b""
    (run / "samples.jsonl").write_bytes(b"".join(every[:lines]) + cut)


def require_same_results(one: Path, other: Path) -> None:
    """Every file byte for byte but configurations and the record, and all metrics but times."""

    def results(run: Path) -> set[Path]:
        files = {file.relative_to(run) for file in run.rglob("*") if file.is_file()}
        return {file for file in files if not file.match("config*.yaml") and file.name != ".cogview_pl.json"}

    assert results(one) == results(other)
    for file in results(one) - {Path("metrics.json")}:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert metrics(one) == metrics(other)
