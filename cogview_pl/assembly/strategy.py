"""Devices of a run: their number, and functions that shard a model over them and gather its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from cogview_pl.assembly.instantiate import instantiate
from cogview_pl.errors import UserError
from cogview_pl.lit.config import StrategyConfig, StrategyKind
from cogview_pl.transformer.model import Transformer
from cogview_pl.transformer.parallel import gather_weights, tensor_parallel

if TYPE_CHECKING:  # inference must start without Lightning, which is slow to import
    from lightning import Trainer


DEEPSPEED = (StrategyKind.deepspeed_2, StrategyKind.deepspeed_3)
"""Strategies whose checkpoints are folders."""


def num_devices(trainer: Mapping[str, Any]) -> int:
    """Number of devices that a run uses; `auto` and `-1` mean all devices of this machine."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        devices = 1 if trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
    return devices * int(trainer.get("num_nodes", 1))


def tensor_parts(strategy: StrategyConfig, trainer: Mapping[str, Any]) -> int:
    """Number of devices that tensor parallelism divides heads and MLP units over; 1 without it."""
    return num_devices(trainer) if strategy.kind == StrategyKind.tp else 1


def check_heads(strategy: StrategyConfig, num_heads: int, trainer: Trainer) -> None:
    """Raises UserError if tensor parallelism cannot divide the model's heads among the devices."""
    devices = trainer.world_size
    if strategy.kind == StrategyKind.tp and num_heads % devices:
        raise UserError(
            f"strategy=tp: model.num_heads={num_heads} cannot be divided among {devices} devices; change "
            "trainer.devices"
        )


def lightning_strategy(strategy: StrategyConfig) -> Any:
    """The `strategy` argument of `lightning.Trainer`; raises UserError if it cannot be made."""
    given = strategy.strategy
    return given if isinstance(given, str) else instantiate(given, "strategy.strategy")


def gather_full_weights(strategy: StrategyConfig, model: Transformer, keep: bool) -> None:
    """Gather sharded weights in place, in processes with `keep`. The model cannot be trained afterwards."""
    if strategy.kind != StrategyKind.deepspeed_3:
        gather_weights(model, keep)
        return
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        full = [parameter.detach().float().cpu() for parameter in parameters] if keep else []
    for parameter, value in zip(parameters, full, strict=False):
        parameter.data = value


def inference_sharding(strategy: StrategyConfig, trainer: Mapping[str, Any]) -> Callable[[Transformer], None]:
    """A function that shards a model over the devices with strategy=tp, and does nothing with other strategies.

    Raises:
        UserError: the devices are not available. The function raises it if heads cannot be divided.
    """
    if strategy.kind != StrategyKind.tp:
        return lambda model: None
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from cogview_pl.lit.strategies import join_tensor_parallel

    try:
        mesh = join_tensor_parallel(trainer["accelerator"], trainer["devices"], trainer["num_nodes"])
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"strategy=tp, trainer.devices={trainer['devices']}: {error}") from error

    def shard(model: Transformer) -> None:
        try:
            tensor_parallel(model, mesh)
        except ValueError as error:
            raise UserError(f"strategy=tp, trainer.devices={trainer['devices']}: {error}") from error

    return shard
