"""What a strategy asks of a run, looked at before anything is trained."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from lightning import Trainer

from cogview_pl.choices import StrategyKind
from cogview_pl.config import Config, instantiate
from cogview_pl.errors import UserError
from cogview_pl.tasks.processes import THESE

_WHOLE_GRADIENTS = ("cogview_pl.lit.muon.Muon",)  # optimizers that need the whole gradient of a matrix
_DEEPSPEED = (StrategyKind.deepspeed_2, StrategyKind.deepspeed_3)


def check_strategy(config: Config, *, spreads: bool) -> None:
    """Refuse what the strategy cannot do.

    Args:
        config: the run's configuration.
        spreads: whether the model can be spread over devices.

    Raises:
        UserError: naming the key to change.
    """
    kind = config.strategy.kind
    name = f"strategy={kind.value}"
    if not kind.spreads:
        return
    if not spreads:
        raise UserError(f"{name}: an image tokenizer is small and trains whole on each device; set strategy=ddp")
    if config.optimizer.optimizer.get("_target_") in _WHOLE_GRADIENTS:
        raise UserError(
            f"{name}: optimizer=muon needs whole gradients, which no device has; set optimizer=adamw or strategy=ddp"
        )
    if kind in _DEEPSPEED:
        _check_deepspeed(name)
        return
    if config.precision["precision"] == "16-mixed":
        raise UserError(
            f"{name}: precision=fp16 needs a loss scaler that sees all gradients; set precision=bf16 or strategy=ddp"
        )
    if kind == StrategyKind.tp and config.compile:
        raise UserError(f"{name} does not go with compile=true; set compile=false")


def check_heads(config: Config, trainer: Trainer) -> None:
    """Raises UserError if tensor parallelism cannot divide the model's heads among the devices."""
    heads, devices = config.model.num_heads, trainer.world_size
    if config.strategy.kind == StrategyKind.tp and heads % devices:
        raise UserError(
            f"strategy=tp: model.num_heads={heads} cannot be divided among {devices} devices; change trainer.devices"
        )


def check_world(trainer: Trainer) -> None:
    """Raises UserError if torchrun or SLURM started another number of processes than the run has devices for."""
    if THESE.size > 1 and trainer.world_size != THESE.size:
        raise UserError(
            f"trainer.devices and trainer.num_nodes make {trainer.world_size} processes, {THESE.size} were started; "
            "set them, and strategy, to what torchrun or SLURM starts"
        )


def lightning_strategy(config: Config) -> Any:
    """What `lightning.Trainer` takes as its strategy; raises UserError if it cannot be made."""
    given = config.strategy.strategy
    return given if isinstance(given, str) else instantiate(given, "strategy.strategy")


def without_fused_kernel(config: Config) -> dict[str, Any]:
    """The optimizer's node; with tensor parallelism without `fused`, which takes no mixture of whole and split ones."""
    node = config.optimizer.optimizer
    if config.strategy.kind == StrategyKind.tp and node.get("fused"):
        return {**node, "fused": False}
    return node


def _check_deepspeed(name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f'{name} needs DeepSpeed; pip install "cogview_pl[deepspeed]", or set strategy=fsdp')
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs CUDA GPUs and none was found; set strategy=fsdp")
