"""Which checkpoints a run leaves: at its end, when it is stopped, when it fails, and in a folder that was moved."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from cogview_pl.lit.callbacks import Checkpoints

from .fitting import loader, trainer


class Fails(Exception):
    """What ends a run."""


class Model(LightningModule):
    """Raises an error where it is told to: `(hook, batch)`."""

    def __init__(self, error: Exception | None = None, at: tuple[str, int] = ("", 0)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.error, self.at = error, at

    def look(self, hook: str, batch: int) -> None:
        if (hook, batch) == self.at and self.error is not None:
            raise self.error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.look("inside", batch_idx)
        return self.weight * 1

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.look("start", batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look("validation", self.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def callback(folder: Path, **options: Any) -> Checkpoints:
    settings: dict[str, Any] = {
        "dirpath": folder,
        "filename": "step_{step}",
        "auto_insert_metric_name": False,
        "every_n_train_steps": 3,
        "save_top_k": 1,
        "monitor": "step",
        "mode": "max",
        "save_last": True,
        "enable_version_counter": False,
        "save_on_exception": True,
        "background_mb": 0,  # all are written by a thread
    }
    return Checkpoints(**settings | options)


def run(
    folder: Path,
    model: Model,
    steps: int,
    start: Path | None = None,
    accumulate: int = 1,
    more: Sequence[Callback] = (),
    **options: Any,
) -> Any:
    """A run that validates every two steps, with more callbacks."""
    given = trainer(
        steps,
        enable_checkpointing=True,
        callbacks=[callback(folder, **options), *more],
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None,
    )
    given.fit(model, loader([0] * 99), loader([0]), ckpt_path=start, weights_only=True)
    return given


def steps_of(folder: Path) -> dict[str, int]:
    """Names of checkpoints, and the steps that they hold."""
    return {file.name: torch.load(file, weights_only=True)["global_step"] for file in folder.glob("*.ckpt")}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (2, {"last.ckpt": 2}),
        (3, {"last.ckpt": 3, "step_3.ckpt": 3}),
        (5, {"last.ckpt": 5, "step_3.ckpt": 3}),
        (7, {"last.ckpt": 7, "step_6.ckpt": 6}),
    ],
)
def test_the_last_step_is_kept_wherever_it_lies(tmp_path: Path, steps: int, expected: dict[str, int]) -> None:
    given = run(tmp_path, Model(), steps)
    assert steps_of(tmp_path) == expected
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"] == -steps
    assert Path(given.checkpoint_callback.last_model_path).name == "last.ckpt"


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_validation_end", "on_train_end"])
def test_the_step_is_kept_in_which_a_callback_ends_the_run(tmp_path: Path, hook: str) -> None:
    """As `max_time` does in a step, and early stopping in a validation."""

    class Ends(Callback):
        def asked(self, trainer: Trainer, *arguments: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == 4 - (hook == "on_train_batch_start")

    model = Model()
    setattr(Ends, hook, Ends.asked)
    if hook == "on_train_end":  # after the callbacks
        model.on_train_batch_end = lambda *arguments: Ends().asked(model.trainer)  # type: ignore[method-assign]
    run(tmp_path, model, 9, more=[Ends()])
    assert steps_of(tmp_path) == {"last.ckpt": 4, "step_3.ckpt": 3}
    run(tmp_path, Model(), 5, start=tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["weight"] == -5


@pytest.mark.parametrize(
    ("error", "at", "expected"),
    [
        (Fails(), ("start", 5), 3),  # Lightning has begun the batch
        (Fails(), ("inside", 5), 3),
        (Fails(), ("validation", 4), 4),  # between two steps
        (SIGTERMException(), ("validation", 4), 4),
        (SIGTERMException(), ("start", 5), 5),  # Lightning raises it after a step
    ],
)
def test_a_run_that_ends_early_saves_where_it_can_go_on_exactly(
    tmp_path: Path, error: Exception, at: tuple[str, int], expected: int
) -> None:
    """In `last.ckpt` alone."""
    with pytest.raises(type(error)):
        run(tmp_path, Model(error, at), 9)
    assert steps_of(tmp_path) == {"last.ckpt": expected, "step_3.ckpt": 3}


@pytest.mark.parametrize("options", [{"save_on_exception": False}, {"every_n_train_steps": 4}])
def test_nothing_is_saved_unasked_or_again(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(Fails):
        run(tmp_path, Model(Fails(), ("validation", 4)), 9, **options)
    every = options.get("every_n_train_steps", 3)
    assert steps_of(tmp_path) == {"last.ckpt": every, f"step_{every}.ckpt": every}


@pytest.mark.parametrize(("batch", "expected"), [(8, 4), (9, 3)])
def test_gradients_that_are_being_added_up_are_not_saved(tmp_path: Path, batch: int, expected: int) -> None:
    """Batches 8 and 9 make step 5; a run cannot go on after batch 8."""

    class Loader(list[int]):
        def __getitem__(self, index: Any) -> Any:
            if index == batch:
                raise Fails
            return 0

    given = trainer(9, enable_checkpointing=True, callbacks=[callback(tmp_path)], accumulate_grad_batches=2)
    with pytest.raises(Fails):
        given.fit(Model(), loader(Loader([0] * 99)))
    assert steps_of(tmp_path)["last.ckpt"] == expected


def test_a_run_whose_folder_was_moved_tidies_up_in_the_new_one(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    run(old, Model(), 4)
    shutil.copytree(old, new)
    given = run(new, Model(), 7, start=new / "last.ckpt")
    assert steps_of(new) == {"last.ckpt": 7, "step_6.ckpt": 6}
    assert steps_of(old) == {"last.ckpt": 4, "step_3.ckpt": 3}
    found = given.checkpoint_callback
    assert Path(found.best_model_path) == Path(found.kth_best_model_path) == new / "step_6.ckpt"
    assert {Path(path) for path in found.best_k_models} == {new / "step_6.ckpt"}


SAVED = {"monitor": "step", "best_model_score": torch.tensor(3), "current_score": None, "kth_value": torch.tensor(3)}


def test_paths_of_a_checkpoint_lead_nowhere_else(tmp_path: Path) -> None:
    """Names alone are taken, and of checkpoints only."""
    given = callback(tmp_path)
    three, two = torch.tensor(3), torch.tensor(2)
    paths = {
        "best_k_models": {"/etc/passwd": three, "/elsewhere/step_2.ckpt": two, "../step_3.ckpt": three},
        "kth_best_model_path": "/elsewhere/step_2.ckpt",
        "best_model_path": "/home/step_3.ckpt",
        "last_model_path": "/etc/shadow",
        "dirpath": "/elsewhere",
    }
    given.load_state_dict({**SAVED, **paths})
    assert given.best_k_models == {str(tmp_path / "step_2.ckpt"): two, str(tmp_path / "step_3.ckpt"): three}
    assert given.kth_best_model_path == str(tmp_path / "step_2.ckpt")
    assert given.best_model_path == str(tmp_path / "step_3.ckpt")
    assert given.last_model_path == ""
    assert given.dirpath == str(tmp_path)


@pytest.mark.parametrize(
    ("models", "worst", "expected"),
    [
        ({"a/step_3.ckpt": 3}, "a/step_9.ckpt", "step_3.ckpt"),  # not one of them
        ({}, "a/step_9.ckpt", ""),
        ("not a dictionary", None, ""),
    ],
)
def test_the_worst_checkpoint_is_one_of_those_kept(tmp_path: Path, models: Any, worst: Any, expected: str) -> None:
    given = callback(tmp_path)
    given.load_state_dict({**SAVED, "best_k_models": models, "kth_best_model_path": worst})
    assert given.kth_best_model_path == (str(tmp_path / expected) if expected else "")
    assert len(given.best_k_models) == bool(expected)
    assert given.best_model_path == given.last_model_path == ""
