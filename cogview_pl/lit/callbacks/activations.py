"""Largest activations, as a share of the range of fp16; Sandwich-LN and PB-Relax keep them small (paper §2.4)."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cogview_pl.lit.optimizers import logs_this_step

_FP16_MAX = torch.finfo(torch.float16).max


class Activations(Callback):
    """Logs the largest |residual stream| of each group of layers, and its share of fp16's range.

    Args:
        groups: number of groups of consecutive layers.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self._hooks: list[Any] = []
        self._largest: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hook the blocks, in logging steps only."""
        if not logs_this_step(trainer):
            return
        blocks = list(pl_module.model.blocks)  # type: ignore[union-attr, arg-type]
        for layer, block in enumerate(blocks):
            group = layer * min(self.groups, len(blocks)) // len(blocks)
            self._hooks.append(block.register_forward_hook(self._listener(group)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for group, largest in self._largest.items():
            pl_module.log(f"activations/group{group}_max", largest)
            pl_module.log(f"activations/group{group}_fp16_share", largest / _FP16_MAX)
        self._hooks, self._largest = [], {}

    def _listener(self, group: int) -> Any:
        def listen(block: nn.Module, arguments: Any, output: Tensor) -> None:
            largest = output.detach().abs().amax().float()
            self._largest[group] = torch.maximum(largest, self._largest.get(group, largest))

        return listen
