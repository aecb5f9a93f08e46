"""Which checkpoints a run keeps by a metric of its validation, and what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from cogview_pl.errors import UserError
from cogview_pl.lit.callbacks import Checkpoints, StopAtStepEnd

from .fitting import loader, trainer
from .test_checkpoints import Fails, Model, callback, run, steps_of

LOSSES = (3.539, 3.055, 2.988, 3.189, 3.355)


class Scored(Model):
    """Logs one of the given losses at each validation, which every second step has."""

    def __init__(self, losses: tuple[float, ...], error: Exception | None = None, at: tuple[str, int] = ("", 0)):
        super().__init__(error, at)
        self.losses = losses

    def on_validation_epoch_end(self) -> None:
        loss = self.losses[(self.global_step + 1) // 2 - 1]
        self.log_dict({"val/loss": loss, "eval/psnr": -loss, "val/fid": loss})


def best(folder: Path, losses: tuple[float, ...] = LOSSES, steps: int = 10, **options: Any) -> Any:
    return run(folder, Scored(losses), steps, **{"monitor": "val/loss", "mode": None, **options})


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [6]),
        ({"save_top_k": 2}, [4, 6]),
        ({"save_top_k": -1}, [2, 4, 6, 8, 10]),
        ({"save_top_k": 0}, []),
        ({"mode": "max"}, [2]),
        ({"monitor": "eval/psnr"}, [6]),
        ({"monitor": "val/fid", "mode": "min", "save_top_k": 3}, [4, 6, 8]),
        ({"monitor": "step"}, [9]),  # every three steps, without regard to validations
    ],
)
def test_the_best_steps_are_kept(tmp_path: Path, options: dict[str, Any], kept: list[int]) -> None:
    given = best(tmp_path, **options)
    assert steps_of(tmp_path) == {"last.ckpt": 10, **{f"step_{step}.ckpt": step for step in kept}}
    for step in kept:  # the weights after that step
        assert torch.load(tmp_path / f"step_{step}.ckpt", weights_only=True)["state_dict"]["weight"] == -step
    if options.get("save_top_k", 1) in (1, 2, -1) and not {"mode", "monitor"} & options.keys():
        assert Path(given.checkpoint_callback.best_model_path).name == "step_6.ckpt"


def test_the_last_step_takes_part_wherever_it_lies(tmp_path: Path) -> None:
    """Nine steps, a validation every two: the last one is validated too, and `last.ckpt` knows of it."""
    stop = StopAtStepEnd(lambda: False, lambda: None, lambda deferred: None)
    checkpoints = callback(tmp_path, monitor="val/loss", mode=None)
    given = trainer(
        9,
        enable_checkpointing=True,
        callbacks=[stop, checkpoints],
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    given.fit(Scored((5, 4, 3, 4, 1)), loader([0] * 99), loader([0]))
    assert steps_of(tmp_path) == {"last.ckpt": 9, "step_9.ckpt": 9}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][checkpoints.state_key]
    assert saved["best_model_score"] == 1 and Path(saved["best_model_path"]).name == "step_9.ckpt"


def test_a_resumed_run_knows_the_best_of_the_steps_before(tmp_path: Path) -> None:
    """Killed after step 7; the step of the best validation, 6, is in `last.ckpt`, and stays."""
    with pytest.raises(Fails):
        run(tmp_path, Scored(LOSSES, Fails(), ("inside", 7)), 10, monitor="val/loss", mode=None)
    assert steps_of(tmp_path) == {"last.ckpt": 6, "step_6.ckpt": 6}
    given = run(tmp_path, Scored(LOSSES), 10, start=tmp_path / "last.ckpt", monitor="val/loss", mode=None)
    assert steps_of(tmp_path) == {"last.ckpt": 10, "step_6.ckpt": 6}
    assert float(given.checkpoint_callback.best_model_score) == pytest.approx(2.988)


def test_a_file_is_dropped_only_after_the_last_checkpoint_knows_of_it(tmp_path: Path) -> None:
    """A kill between two writes must not leave a `last.ckpt` that names a deleted file as the best."""
    seen: list[tuple[str, set[str]]] = []

    class Spies(Checkpoints):
        def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
            seen.append((Path(filepath).name, set(steps_of(tmp_path))))
            super()._save_checkpoint(trainer, filepath)

    made = callback(tmp_path, monitor="val/loss", mode="min", background_mb=None)
    made.__class__ = Spies
    given = trainer(4, enable_checkpointing=True, callbacks=[made], val_check_interval=2, check_val_every_n_epoch=None)
    given.fit(Scored((2, 1)), loader([0] * 99), loader([0]))
    assert seen[-1] == ("last.ckpt", {"last.ckpt", "step_2.ckpt", "step_4.ckpt"})
    assert set(steps_of(tmp_path)) == {"last.ckpt", "step_4.ckpt"}


def test_a_metric_that_no_validation_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor=val/los: .* eval/psnr, val/fid, val/loss"):
        best(tmp_path, monitor="val/los", mode="min")


def test_a_checkpoint_at_the_end_of_an_epoch_does_not_wait_for_a_validation(tmp_path: Path) -> None:
    """Epochs of three batches, a checkpoint every three steps, a validation at step 8."""
    found: list[dict[str, int]] = []

    class Looks(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            found.append(steps_of(tmp_path))

    given = trainer(
        8,
        enable_checkpointing=True,
        callbacks=[callback(tmp_path, background_mb=None)],
        val_check_interval=8,
        check_val_every_n_epoch=None,
    )
    given.fit(Looks(), loader([0] * 3), loader([0]))
    assert found[3] == {"last.ckpt": 3, "step_3.ckpt": 3}
    assert found[6] == {"last.ckpt": 6, "step_6.ckpt": 6}
