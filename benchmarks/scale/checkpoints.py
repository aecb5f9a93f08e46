"""A checkpoint of a training: how long it stops it."""

from __future__ import annotations

import time
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.scale.measure import MEGABYTE, Subject

EVERY, STEP_S = 2, 0.5
"""Steps between two checkpoints, and seconds of a step, in which the CPU waits for a device."""

_NUMBERS = 2**16  # in one tensor of the model


def _nothing(folder: Path, size: int) -> None:
    """No data are needed."""


@cache
def _module() -> type[Any]:
    import torch
    from lightning import LightningModule

    class Waits(LightningModule):
        """Tensors of a number of bytes, and steps that wait, also for the first checkpoint to be on the disk."""

        def __init__(self, size: int, last: Path) -> None:
            super().__init__()
            self.last = last
            self.weight = torch.nn.Parameter(torch.zeros(()))
            count = int(size // 4 // _NUMBERS)
            self.began: list[float] = []
            self.ended: list[float] = []
            self.tensors = torch.nn.ParameterList(
                torch.nn.Parameter(torch.randn(_NUMBERS), requires_grad=False) for _ in range(count)
            )

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.began.append(time.perf_counter())
            while batch_idx == EVERY and not self.last.exists():
                time.sleep(STEP_S / 10)
            time.sleep(STEP_S)
            self.ended.append(time.perf_counter())
            return self.weight * 1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.weight], lr=1.0)

    return Waits


def _warm_up() -> None:
    import cogview_pl.assembly.trainer  # noqa: F401

    _module()


def _stop(number: int, folder: Path, megabytes: int) -> float:
    """Seconds between the end of the step that has the checkpoint of a number and the next step."""
    from lightning import Trainer
    from omegaconf import OmegaConf
    from torch.utils.data import DataLoader

    from cogview_pl.assembly.instantiate import instantiate
    from cogview_pl.config.shipped import shipped
    from cogview_pl.lit.checkpoint_io import DurableCheckpointIO

    node: Any = OmegaConf.load(shipped("conf") / "callbacks" / "fit.yaml")["checkpoint"]
    node.dirpath, node.every_n_train_steps, node.save_on_exception = str(folder), EVERY, False
    trainer = Trainer(
        accelerator="cpu",
        max_steps=number * EVERY + 1,
        callbacks=[instantiate(OmegaConf.to_container(node), "callbacks.checkpoint")],
        plugins=[DurableCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = _module()(megabytes * MEGABYTE, folder / "last.ckpt")
    trainer.fit(module, DataLoader([0] * (number * EVERY + 1), batch_size=None))  # type: ignore[arg-type]
    return float(module.began[number * EVERY] - module.ended[number * EVERY - 1])


_SIZES = (10, 100, 1000, 4000)

SUBJECTS = (
    Subject("stop for the first checkpoint", "MB", _SIZES, _nothing, partial(_stop, 1), _warm_up),
    Subject("stop for a later checkpoint", "MB", _SIZES, _nothing, partial(_stop, 2), _warm_up),
)
