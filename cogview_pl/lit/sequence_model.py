"""Stage 2 under Lightning: per-slot losses, optimizer."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.generation.pipeline import CogView
from cogview_pl.lit.optimizers import (
    OptimizerFactory,
    ParameterGroup,
    configure_optimizers,
    log_gradient_norm,
    logs_this_step,
)
from cogview_pl.transformer.flops import training_flops
from cogview_pl.transformer.loss import SequenceLoss, over_devices, sequence_loss
from cogview_pl.transformer.model import Transformer
from cogview_pl.transformer.parallel import clip_gradients, shard_weights, tensor_parallel


class SequenceModule(LightningModule):
    """Trains a transformer on sequences laid out by a template; which task it is follows from the data alone.

    Args:
        model: the sequence model.
        slot_names: names of the template's slots, for the logs (`val/loss_text`, `val/loss_image`).
        slot_ids: per slot the ids that its tokens are predicted among; None: all of the vocabulary.
        target: the slot that generation fills, as index into `slot_names`.
        token_noise: share of its tokens that are read as others in training (`with_noise`).
        optimizer: makes the optimizer and its schedule.
        painter: paints with these weights while they train, for the logs; None where the task paints nothing.
        val_prompts: captions of the validation split for it.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slot_names: list[str],
        slot_ids: list[range] | None,
        target: int,
        token_noise: float,
        optimizer: OptimizerFactory,
        painter: CogView | None,
        val_prompts: list[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.slot_names = slot_names
        self.slot_ids = slot_ids
        self.target = target
        self.token_noise = token_noise
        self.optimizer_factory = optimizer
        self.painter = painter
        self.val_prompts = val_prompts
        self._val_sums: Tensor | None = None
        self._frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self.strict_loading = not self._frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is not trained: a resumed run reads it from where this one did."""
        for name in self._frozen:
            del checkpoint["state_dict"][name]

    def configure_model(self) -> None:
        """Spread the weights over the devices, where the strategy has a mesh of them."""
        if self.device_mesh is None or self.model.sharded:
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            tensor_parallel(self.model, self.device_mesh["tensor_parallel"])
        else:
            shard_weights(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """One step."""
        inputs = with_noise(batch, self.target, self.token_noise) if self.token_noise else None
        result = self._loss(batch, inputs)
        if self.trainer.world_size > 1:
            result = over_devices(result, self._total, self.trainer.world_size)
        self.log("train/loss", result.loss)
        for name, total, count in zip(self.slot_names, result.slot_sums_S, result.slot_counts_S, strict=True):
            if logs_this_step(self.trainer) and count > 0:
                self.log(f"train/loss_{name}", total / count)
        return result.loss

    def training_flops(self, batch: SequenceBatch) -> Tensor:
        """Operations of a training step on a batch, padding included; int64 scalar."""
        return training_flops(self.model, batch.weights, batch.slots, self.slot_ids)

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Add up the cross-entropies and token counts of one batch."""
        result = self._loss(batch)
        weight = batch.weights[:, 1:].float().sum()
        sums = torch.stack([*result.slot_sums_S, *result.slot_counts_S, result.loss * weight, weight]).double()
        self._val_sums = sums if self._val_sums is None else self._val_sums + sums

    def on_validation_epoch_end(self) -> None:
        """Mean cross-entropy per token (nats) of each slot, over the whole set and all devices."""
        if self._val_sums is None:
            return
        sums = self._total(self._val_sums)
        self._val_sums = None
        slots = len(self.slot_names)
        for name, total, count in zip(self.slot_names, sums[:slots], sums[slots : 2 * slots], strict=True):
            if count > 0:
                self.log(f"val/loss_{name}", (total / count).float())
        self.log("val/loss", (sums[-2] / sums[-1]).float())

    def configure_optimizers(self) -> Any:
        """Weight decay on matrices and tables, none on biases and LayerNorms; of frozen weights nothing is kept."""
        groups = self.model.parameter_groups()
        matrices, tables, vectors = ([p for p in group if p.requires_grad] for group in groups)
        named = [
            ParameterGroup("matrices", matrices, matrices=True, decay=True),
            ParameterGroup("tables", tables, matrices=False, decay=True),
            ParameterGroup("vectors", vectors, matrices=False, decay=False),
        ]
        return configure_optimizers(self.optimizer_factory, named, self.trainer.max_steps)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient before it is clipped."""
        log_gradient_norm(self)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradient, which Lightning cannot where some weights are spread over devices."""
        if not self.model.sharded:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_gradients(list(self.model.parameters()), gradient_clip_val)

    def _total(self, numbers: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(numbers, reduce_op="sum")  # type: ignore[return-value]

    def _loss(self, batch: SequenceBatch, inputs: Tensor | None = None) -> SequenceLoss:
        slots = len(self.slot_names)
        return sequence_loss(
            self.model, batch.tokens, batch.positions, batch.weights, batch.slots, slots, self.slot_ids, inputs
        )


def with_noise(batch: SequenceBatch, slot: int, share: float) -> Tensor:
    """Tokens `(B, L)` of a batch in which a share of those in a slot is replaced by others out of the same batch.

    A model that has read wrong tokens in training goes on better after mistakes of its own. The last token of the slot
    in each row stays: where it closes a text it must not turn up elsewhere.
    """
    inside = batch.slots == slot
    inside[:, :-1] &= batch.slots[:, 1:] == slot
    at = (inside & (torch.rand(inside.shape, device=inside.device, dtype=torch.float32) < share)).nonzero(as_tuple=True)
    pool = batch.tokens[inside]
    tokens = batch.tokens.clone()
    tokens[at] = pool[torch.randint(max(1, len(pool)), (len(at[0]),), device=pool.device)]
    return tokens
