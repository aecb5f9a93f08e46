"""A checkpoint of a training: how long it stops it."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.scale.measure import MEGABYTE, Subject

STEPS, EVERY, STEP_S = 3, 2, 0.5
"""Steps of the training, the step that has a checkpoint, and seconds of a step, in which the CPU waits for a device."""

_NUMBERS = 2**16  # in one tensor of the model


def _nothing(folder: Path, size: int) -> None:
    """No data are needed."""


@cache
def _module() -> type[Any]:
    import torch
    from lightning import LightningModule

    class Waits(LightningModule):
        """Tensors of a number of bytes, and steps that wait."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            count = int(size // 4 // _NUMBERS)
            self.began: list[float] = []
            self.tensors = torch.nn.ParameterList(
                torch.nn.Parameter(torch.randn(_NUMBERS), requires_grad=False) for _ in range(count)
            )

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.began.append(time.perf_counter())
            time.sleep(STEP_S)
            return self.weight * 1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.weight], lr=1.0)

    return Waits


def _warm_up() -> None:
    import cogview_pl.assembly.trainer  # noqa: F401

    _module()


def _stop(folder: Path, megabytes: int) -> float:
    """Seconds between the end of the step that has a checkpoint and the next one."""
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
        max_steps=STEPS,
        callbacks=[instantiate(OmegaConf.to_container(node), "callbacks.checkpoint")],
        plugins=[DurableCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = _module()(megabytes * MEGABYTE)
    trainer.fit(module, DataLoader([0] * STEPS, batch_size=None))  # type: ignore[arg-type]
    return float(module.began[EVERY] - module.began[EVERY - 1] - STEP_S)


SUBJECTS = (
    Subject(
        "stop for a checkpoint",
        "MB",
        (10, 100, 1000, 4000),
        _nothing,
        _stop,
        _warm_up,
    ),
)
