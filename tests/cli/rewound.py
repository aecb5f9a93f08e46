"""A finished run taken back to one of its checkpoints, and what resuming it must give."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from .test_resume import last_checkpoint, metrics, tensors

KEEP_ALL = ("callbacks.checkpoint.every_n_train_steps=3", "callbacks.checkpoint.save_top_k=-1")
"""Overrides of a run that can be taken back to step 3."""


def rewind(run: Path, copy: Path) -> None:
    """Leave of a run made with `KEEP_ALL` what a kill behind step 3 would have left; the whole goes to `copy`."""
    shutil.copytree(run, copy)
    for made in ("model", "adapter"):
        shutil.rmtree(run / made, ignore_errors=True)
    (run / "metrics.json").unlink()
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(run / "checkpoints" / "step_3.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    for name, state in checkpoint["callbacks"].items():  # it was written right before last.ckpt, and names none
        if name.startswith("ModelCheckpoint"):
            state["last_model_path"] = str(last)
    torch.save(checkpoint, last)


def require_same(one: Path, other: Path) -> None:
    """Weights, adapters, optimizer and metrics of two finished runs are equal to the bit."""
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
