"""LightningModule of stage 2: loss per slot, optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.generation.pipeline import ImageGenerator
from cogview_pl.kernels.availability import widest_float
from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.lit.optimizers import (
    BuildOptimizer,
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
    """Trains a transformer on sequences that a template lays out. Pretraining and finetunes differ in their data only.

    Args:
        model: the sequence model.
        slot_names: names of the template's slots, for the logs (`val/loss_text`, `val/loss_image`).
        slot_ids: per slot, the ids among which its tokens are predicted; None: the whole vocabulary.
        target: index into `slot_names` of the slot that generation fills.
        token_noise: share of the target's input tokens that are replaced in training (`with_noise`).
        optimizer: schedule and weight decay.
        build_optimizer: parameter groups → optimizer.
        generator: generates images with the weights in training, for the logs; None for tasks without images.
        val_prompts: captions of the validation split, as prompts for the generator.
        val_sources: codes of their source images, int64 `(B, y, x)`, for a generator that takes them.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slot_names: list[str],
        slot_ids: list[range] | None,
        target: int,
        token_noise: float,
        optimizer: OptimizerConfig,
        build_optimizer: BuildOptimizer,
        generator: ImageGenerator | None,
        val_prompts: list[str],
        val_sources: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.slot_names = slot_names
        self.slot_ids = slot_ids
        self.target = target
        self.token_noise = token_noise
        self.optimizer_options = optimizer
        self.build_optimizer = build_optimizer
        self.generator = generator
        self.val_prompts = val_prompts
        self.val_sources = val_sources
        self._val_sums: Tensor | None = None
        self._frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self.strict_loading = not self._frozen

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Metrics for the progress bar: the loss per token of the slot that generation fills."""
        return (f"train/loss_{self.slot_names[self.target]}",)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out frozen weights: a resumed run reads them from the model that it started from."""
        for name in self._frozen:
            del checkpoint["state_dict"][name]

    def configure_model(self) -> None:
        """Shard the weights over the devices, if the strategy has a mesh of them."""
        if self.device_mesh is None or self.model.sharded:
            return
        if self.device_mesh["tensor_parallel"].size() > 1:
            tensor_parallel(self.model, self.device_mesh["tensor_parallel"])
        else:
            shard_weights(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Loss of one step, averaged over the weights of the predictions on all devices."""
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
        """Floating-point operations of a training step on a batch, padding included; int64 scalar."""
        return training_flops(self.model, batch.weights, batch.slots, self.slot_ids)

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Add up the cross-entropies and token counts of one batch."""
        result = self._loss(batch)
        weight = batch.weights[:, 1:].float().sum()
        sums = torch.stack([*result.slot_sums_S, *result.slot_counts_S, result.loss * weight, weight])
        sums = sums.to(widest_float(sums.device))
        self._val_sums = sums if self._val_sums is None else self._val_sums + sums

    def on_validation_epoch_end(self) -> None:
        """Log the mean cross-entropy per token (nats) of each slot, over the validation set of all devices."""
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
        """Weight decay on matrices and tables, none on biases and LayerNorms; frozen weights have no state."""
        groups = self.model.parameter_groups()
        matrices, tables, vectors = ([p for p in group if p.requires_grad] for group in groups)
        named = [
            ParameterGroup("matrices", matrices, matrices=True, decay=True),
            ParameterGroup("tables", tables, matrices=False, decay=True),
            ParameterGroup("vectors", vectors, matrices=False, decay=False),
        ]
        return configure_optimizers(self.build_optimizer, self.optimizer_options, named, self.trainer.max_steps)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient before it is clipped."""
        log_gradient_norm(self)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradient; Lightning cannot do that for sharded weights."""
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


def validation_metrics(slot_names: Iterable[str]) -> list[str]:
    """Names of the metrics that a validation logs."""
    return ["val/loss", *(f"val/loss_{name}" for name in slot_names)]


def with_noise(batch: SequenceBatch, slot: int, share: float) -> Tensor:
    """Tokens `(B, L)` with a share of those in a slot replaced by random tokens of that slot in the same batch.

    A model that reads wrong tokens in training recovers better from its own mistakes. The last token of the slot in
    each row is neither replaced nor drawn: in a text it is the end token, which must not occur elsewhere.
    """
    inside = batch.slots == slot
    inside[:, :-1] &= batch.slots[:, 1:] == slot
    at = (inside & (torch.rand(inside.shape, device=inside.device, dtype=torch.float32) < share)).nonzero(as_tuple=True)
    pool = batch.tokens[inside]
    tokens = batch.tokens.clone()
    tokens[at] = pool[torch.randint(max(1, len(pool)), (len(at[0]),), device=pool.device)]
    return tokens
