"""What a strategy asks of a run, looked at before anything is trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cogview_pl.config.choices import Verb
from cogview_pl.config.schema import Config, instantiate
from cogview_pl.errors import UserError
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.ranks import RANKS
from cogview_pl.transformer.model import Transformer
from cogview_pl.transformer.parallel import gather_weights, tensor_parallel

if TYPE_CHECKING:  # tasks that train nothing start without Lightning
    from lightning import Trainer

_OURS = "cogview_pl.lit."  # optimizers of ours cannot work on a part of a tensor, or their state cannot be put together
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
    _check_started(config)
    if not kind.sharded:
        return
    if not spreads:
        raise UserError(f"{name}: an image tokenizer is small and trains whole on each device; set strategy=ddp")
    target = str(config.optimizer.optimizer.get("_target_"))
    if target.startswith(_OURS):
        optimizer = target.rpartition(".")[2].lower()
        raise UserError(
            f"{name}: optimizer={optimizer} needs whole tensors, which no device has; set optimizer=adamw or "
            "strategy=ddp"
        )
    if config.lora.rank:
        raise UserError(
            f"{name}: lora.rank={config.lora.rank} trains beside whole weights; set strategy=ddp, or lora.rank=0"
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


def num_devices(config: Config) -> int:
    """Devices that one run trains on; `auto` and `-1` are those of this machine."""
    devices = config.trainer.get("devices", 1)
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        devices = max(1, torch.cuda.device_count())
    return devices * int(config.trainer.get("num_nodes", 1))


def tensor_parts(config: Config) -> int:
    """Devices among which tensor parallelism divides heads and inner units; 1 without it."""
    return num_devices(config) if config.strategy.kind == StrategyKind.tp else 1


def check_heads(config: Config, trainer: Trainer) -> None:
    """Raises UserError if tensor parallelism cannot divide the model's heads among the devices."""
    heads, devices = config.model.num_heads, trainer.world_size
    if config.strategy.kind == StrategyKind.tp and heads % devices:
        raise UserError(
            f"strategy=tp: model.num_heads={heads} cannot be divided among {devices} devices; change trainer.devices"
        )


def lightning_strategy(config: Config) -> Any:
    """What `lightning.Trainer` takes as its strategy; raises UserError if it cannot be made."""
    given = config.strategy.strategy
    return given if isinstance(given, str) else instantiate(given, "strategy.strategy")


def make_whole(config: Config, model: Transformer, keep: bool) -> None:
    """Weights that the strategy spread over devices whole again, where `keep`; the model will not train any more."""
    if config.strategy.kind != StrategyKind.deepspeed_3:
        gather_weights(model, keep)
        return
    import deepspeed

    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        whole = [parameter.detach().float().cpu() for parameter in parameters] if keep else []
    for parameter, value in zip(parameters, whole, strict=False):
        parameter.data = value


def inference_spread(config: Config) -> Callable[[Transformer], None]:
    """What makes a model ready for the devices that paint together; with another strategy than tp it does nothing.

    Raises:
        UserError: another task, `weights`, or devices that cannot be had; called, heads that cannot be divided.
    """
    if config.strategy.kind != StrategyKind.tp:
        return lambda model: None
    if config.verb != Verb.generate:
        raise UserError(f"strategy=tp trains and paints, task={config.task} runs on one device; set strategy=single")
    if config.quantization is not None:
        raise UserError(
            "strategy=tp divides matrices that quantization= would pack; set quantization=null or strategy=single"
        )
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from cogview_pl.lit.strategies import join_tensor_parallel

    options = config.trainer
    try:
        mesh = join_tensor_parallel(options["accelerator"], options["devices"], options["num_nodes"])
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"strategy=tp, trainer.devices={options['devices']}: {error}") from error

    def spread(model: Transformer) -> None:
        try:
            tensor_parallel(model, mesh)
        except ValueError as error:
            raise UserError(f"strategy=tp, trainer.devices={options['devices']}: {error}") from error

    return spread


def without_fused_kernel(config: Config) -> dict[str, Any]:
    """The optimizer's node; with tensor parallelism without `fused`, which takes no mixture of whole and split ones."""
    node = config.optimizer.optimizer
    if config.strategy.kind == StrategyKind.tp and node.get("fused"):
        return {**node, "fused": False}
    return node


def _check_started(config: Config) -> None:
    """Whether torchrun or SLURM, where it started the run, started a process for each device."""
    devices, nodes, kind = config.trainer["devices"], config.trainer["num_nodes"], config.strategy.kind.value
    if RANKS.size > 1 and (config.strategy.kind == StrategyKind.single or num_devices(config) != RANKS.size):
        raise UserError(
            f"{RANKS.size} processes were started for strategy={kind}, trainer.devices={devices} and "
            f"trainer.num_nodes={nodes}; set strategy=ddp or fsdp, and as many devices as processes"
        )


def _check_deepspeed(name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f'{name} needs DeepSpeed; pip install "cogview_pl[deepspeed]", or set strategy=fsdp')
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs CUDA GPUs and none was found; set strategy=fsdp")
