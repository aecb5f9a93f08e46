"""Which optimizers and precisions go together in training."""

from __future__ import annotations

from cogview_pl.assembly.compiler import trains_on_gpu
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.kernels.availability import missing_for_triton

_OURS = "cogview_pl.lit.low_memory."
ADAMW_8BIT, ADAMW_OFFLOAD = f"{_OURS}adamw_8bit", f"{_OURS}adamw_offload"
"""As optimizers name them in `_target_`."""

_ROUNDS_AT_RANDOM = ("adamw_bf16", "adamw_8bit")


def check_levers(config: Config) -> None:
    """Raises UserError for an optimizer that cannot work in this run's precision or on its devices."""
    optimizer = str(config.optimizer.optimizer.get("_target_", "")).removeprefix(_OURS)
    precision = config.precision.get("precision")
    if precision == "bf16-true":
        _check_bf16_weights(config, optimizer)
    elif optimizer == "adamw_bf16":
        raise UserError(
            "optimizer=adamw_bf16 is for weights in bf16; set precision=bf16_true, or use optimizer=adamw_8bit"
        )
    if optimizer == "adamw_offload":
        _check_offload(config)
    if optimizer in _ROUNDS_AT_RANDOM and trains_on_gpu(config):
        missing = missing_for_triton()
        if missing is not None:
            raise UserError(f"optimizer={optimizer}: {missing}, or use optimizer=adamw")


def _check_bf16_weights(config: Config, optimizer: str) -> None:
    if optimizer not in _ROUNDS_AT_RANDOM:
        raise UserError(
            "precision=bf16_true loses small steps of an optimizer that rounds to the nearest number; set "
            "optimizer=adamw_bf16 or optimizer=adamw_8bit"
        )
    if config.lora.rank:
        raise UserError(
            "precision=bf16_true: adapters are trained in fp32; use precision=bf16, which holds the frozen weights in "
            "bf16, or lora.rank=0"
        )


def _check_offload(config: Config) -> None:
    if config.precision.get("precision") == "16-mixed":
        raise UserError("optimizer=adamw_offload cannot scale the loss of precision=fp16; use precision=bf16")
    if config.optimizer.gradient_clip:
        raise UserError(
            f"optimizer.gradient_clip={config.optimizer.gradient_clip}: optimizer=adamw_offload reads gradients before "
            "their norm is known; set optimizer.gradient_clip=0"
        )
    if config.trainer["devices"] != 1 or config.trainer["num_nodes"] != 1:
        raise UserError(
            "optimizer=adamw_offload works on one device; set trainer.devices=1, or use optimizer=adamw_8bit"
        )
    if config.optimizer.optimizer["offload_gradients"] and config.trainer["accumulate_grad_batches"] > 1:
        raise UserError(
            "optimizer.optimizer.offload_gradients=true cannot add up gradients of several batches; set it to "
            "false, or trainer.accumulate_grad_batches=1"
        )
