"""The private names of third parties are there and do what our wrappers say; no other file of the room has any."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cogview_pl import lit
from cogview_pl.lit.lightning_internals import (
    LastCheckpoint,
    end_after_this_step,
    set_logged_step,
    set_mesh_sizes,
    torchao_adamw,
    tree_map,
)
from cogview_pl.lit.strategies import TensorParallelStrategy

from .fitting import fit, loader, trainer
from .models import sequence_batch, sequence_module

BATCHES = [sequence_batch(seed, rows=2, text=3, image=4) for seed in range(3)]


class AtStep(Callback):
    """Calls a function after the step of a number."""

    def __init__(self, step: int, action: Any) -> None:
        self.step = step
        self.action = action

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def test_a_run_ends_after_the_step() -> None:
    given = trainer(3, callbacks=[AtStep(2, lambda trainer: end_after_this_step(trainer, True))])
    with pytest.raises(SIGTERMException):
        given.fit(sequence_module(), loader(BATCHES))
    assert given.global_step == 2
    undone = [AtStep(2, lambda trainer: end_after_this_step(trainer, True))]
    undone += [AtStep(2, lambda trainer: end_after_this_step(trainer, False))]
    given = trainer(3, callbacks=undone)
    given.fit(sequence_module(), loader(BATCHES))
    assert given.global_step == 3


def test_the_step_of_the_logs() -> None:
    log = fit(sequence_module(), BATCHES, callbacks=[AtStep(2, lambda trainer: set_logged_step(trainer, 10))])
    assert list(log.series("train/loss")) == [0, 10, 11]


def test_the_last_checkpoint_alone(tmp_path: Path) -> None:
    checkpoints = LastCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=100, save_on_exception=True)
    found: list[tuple[bool, bool]] = []

    def save(trainer: Trainer) -> None:
        found.append((checkpoints.is_saved(trainer), checkpoints.saves_on_exception(trainer)))
        checkpoints.save_last_checkpoint(trainer)
        found.append((checkpoints.is_saved(trainer), checkpoints.saves_on_exception(trainer)))

    fit(sequence_module(), BATCHES, callbacks=[checkpoints, AtStep(2, save)], enable_checkpointing=True)
    assert found == [(False, True), (True, False)]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_sizes_of_a_mesh() -> None:
    strategy = TensorParallelStrategy()
    set_mesh_sizes(strategy, data_parallel=2, tensor_parallel=3)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (2, 3)


def test_nested_values() -> None:
    assert tree_map(lambda value: value + 1, {"a": [1, 2], "b": {"c": 3}}) == {"a": [2, 3], "b": {"c": 4}}


def test_the_optimizer_of_torchao() -> None:
    optim = pytest.importorskip("torchao.optim")
    assert torchao_adamw(optim).__bases__ == optim.AdamW8bit.__bases__
    assert torchao_adamw(SimpleNamespace(_AdamW=3)) == 3


def private_names(file: Path) -> list[str]:
    """Attributes with a leading underscore of anything but `self`, and private modules.

    torch documents `torch._foreach_*`.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            name = ast.unparse(node)
            found += [] if name.startswith(("self.", "cls.", "torch._foreach_")) else [name]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module and "._" in node.module else []
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
    return found


def test_private_names_are_in_one_file() -> None:
    room = Path(lit.__path__[0])
    found = {file.name: private_names(file) for file in room.rglob("*.py")}
    assert found.pop("lightning_internals.py")  # the test can tell
    assert not {name: names for name, names in found.items() if names}
