"""Skips and counts steps without a finite gradient; too many in a row end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError

_KEYS_IN_MESSAGE = 4
_LOWER = 10
_HALVINGS = 16  # a loss scaler may need as many steps in a row to come down from its first scale, 65,536


class NanGuard(Callback):
    """Skips steps whose gradient is not finite (bad steps), and ends training after `patience` of them in a row.

    - With `precision=fp16` the loss scaler skips bad steps and halves its scale. On a CPU the optimizer gets no
      gradient. On a GPU without a scaler a bad gradient becomes zero, so that the CPU need not wait for the GPU.
    - `train/bad_steps` counts them.
    - Before it ends a run, it plays the first bad batch again. It names the first module whose output is not finite,
      or else the first parameter whose gradient is not finite, and lists the batch's samples in `bad_batch.json`. It
      writes no checkpoint: the run goes on from the last one before.
    - Weights that are not finite never replace a checkpoint.

    On a GPU the count is read every `patience` steps, so a run may end up to `patience` steps later.

    Args:
        folder: the run's folder.
        patience: bad steps in a row that end the run; 16 more with a loss scaler, which searches its scale.
    """

    def __init__(self, folder: str, patience: int) -> None:
        self._folder = Path(folder)
        self._patience = patience
        self._streak: Tensor | None = None
        self._total = 0
        self._counted: Tensor | None = None

    def state_dict(self) -> dict[str, int]:
        return {"bad_steps": self._total + (0 if self._counted is None else int(self._counted))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._total = state_dict["bad_steps"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count on the device, and keep a bad gradient from the weights."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        norm = torch.nn.utils.get_total_norm([_local(p.grad) for p in parameters])
        good = _on_all_devices(trainer, norm.isfinite())
        if self._streak is None or self._counted is None:
            self._streak = self._counted = torch.zeros((), dtype=torch.int64, device=good.device)
        self._streak = torch.where(good, 0, self._streak + 1)
        self._counted = self._counted + (~good).long()
        if _scaler(trainer):
            return
        if good.device.type != "cpu":
            for parameter in parameters:
                gradient = _local(parameter.grad)
                gradient.copy_(torch.where(good, gradient, 0))
        elif not good:
            optimizer.zero_grad()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run after too many bad steps in a row."""
        if self._streak is None or self._counted is None:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = (batch_idx + 1) // trainer.accumulate_grad_batches  # also counts steps that a scaler skips
        if self._streak.device.type == "cpu" or step % self._patience == 0:
            pl_module.log("train/bad_steps", float(self._total + int(self._counted)))
            if (streak := int(self._streak)) >= self._patience + (_HALVINGS if _scaler(trainer) else 0):
                self._stop(trainer, pl_module, streak)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises UserError before weights that are not finite would replace a checkpoint."""
        for name, value in (*pl_module.named_parameters(), *pl_module.named_buffers()):
            if value.is_floating_point() and not bool(_local(value).isfinite().all()):
                _keep_checkpoints(trainer)
                raise UserError(
                    f"step {trainer.global_step}: {name} is not finite; no checkpoint of it was written, the last "
                    f"one is from before; {_ADVICE}",
                    overrides=_lower_rates(trainer),
                )

    def _stop(self, trainer: Trainer, module: LightningModule, streak: int) -> None:
        _keep_checkpoints(trainer)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        samples = data.samples_of_batch(done - streak * trainer.accumulate_grad_batches)
        keys = [data.key(index) for index in samples]
        batch = data.collate([data.train[index] for index in samples])
        layer = first_bad_layer(module, trainer.strategy.batch_to_device(batch))
        step = trainer.global_step - streak + 1
        found = {"step": step, "layer": layer, "samples": samples, "keys": keys}
        file = self._folder / "bad_batch.json"
        if trainer.is_global_zero:
            write_text(file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        some = ", ".join(keys[:_KEYS_IN_MESSAGE]) + (", …" if len(keys) > _KEYS_IN_MESSAGE else "")
        raise UserError(
            f"{streak} steps in a row had no finite gradient, from step {step} on; first bad layer: {layer}; samples "
            f"of that batch: {some} (all in {file}); {_ADVICE}",
            overrides=_lower_rates(trainer),
        )


_ADVICE = "lower optimizer.optimizer.lr or raise optimizer.warmup, mend the samples, or choose another precision"


def _lower_rates(trainer: Trainer) -> list[str]:
    """Overrides that divide the peak learning rates by ten."""
    (optimizer,) = trainer.optimizers
    groups = [group for group in reversed(optimizer.param_groups) if "matrices" in group]
    peaks = {group["matrices"]: float(group["initial_lr"]) for group in groups}  # the model's groups come first
    one = optimizer.defaults.get("lr")
    rates = {"lr": peaks.get(False), "matrix_lr": peaks.get(True)} if one is None else {"lr": float(one)}
    return [f"optimizer.optimizer.{name}={peak / _LOWER:.3g}" for name, peak in rates.items() if peak is not None]


def first_bad_layer(module: LightningModule, batch: Any) -> str:
    """Name of the first module, in the order of computation, whose output on a training batch is not finite.

    If all outputs are finite: the first parameter, from the input on, whose gradient is not finite. `none` if all
    gradients are finite too: the batch is fine with the present weights.
    """
    found: list[str] = []
    hooks = [child.register_forward_hook(_listener(name, found)) for name, child in module.named_modules() if name]
    bound = {name: buffer.clone() for name, buffer in module.named_buffers()}
    logs, module.log = module.log, _silent  # type: ignore[method-assign]
    logs_many, module.log_dict = module.log_dict, _silent  # type: ignore[method-assign]
    try:
        loss = module.training_step(batch, 0)
        if found or not isinstance(loss, Tensor):
            return found[0] if found else "none"
        if not bool(loss.isfinite()):
            return "the loss"
        names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        bad = (n for n, g in zip(names, gradients, strict=True) if g is not None and not bool(g.isfinite().all()))
        return next((f"the gradient of {name}" for name in bad), "none")
    finally:
        module.log, module.log_dict = logs, logs_many  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(bound[name])


def _listener(name: str, found: list[str]) -> Any:
    def listen(module: nn.Module, arguments: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors):
            found.append(name)

    return listen


def _scaler(trainer: Trainer) -> bool:
    """Whether training has a loss scaler."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _silent(*arguments: Any, **options: Any) -> None:
    """Log nothing."""


def _keep_checkpoints(trainer: Trainer) -> None:
    """Write no checkpoint when the run ends with an error."""
    for callback in trainer.checkpoint_callbacks:
        callback.save_on_exception = False  # type: ignore[attr-defined]


def _local(tensor: Any) -> Tensor:
    """This device's shard of a sharded tensor, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def _on_all_devices(trainer: Trainer, good: Tensor) -> Tensor:
    """Whether the gradient is good on all devices; a sharded one can be bad on one device only."""
    if trainer.world_size > 1:
        good = good.to(torch.int32)
        torch.distributed.all_reduce(good, torch.distributed.ReduceOp.MIN)
    return good.bool()
