"""Checks of a training run: options that exclude each other are refused before any file is read."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.strategy import DEEPSPEED, num_devices
from cogview_pl.errors import UserError
from cogview_pl.kernels.availability import missing_for_triton
from cogview_pl.lit.config import OF_VALIDATION, StrategyKind
from cogview_pl.runs.ranks import RANKS

_OURS = "cogview_pl.lit."  # optimizers of the project need full tensors, or their state cannot be gathered
_LOW_MEMORY = f"{_OURS}low_memory."
ADAMW_OFFLOAD = f"{_LOW_MEMORY}adamw_offload"
"""`_target_` of the optimizer that keeps its states on the host."""
_ROUNDS_AT_RANDOM = ("adamw_bf16", "adamw_8bit")

_log = logging.getLogger(__name__)


def check_precision(precision: Mapping[str, Any], *, on_gpu: bool) -> None:
    """Raises UserError for fp16 without a GPU: CPUs have no fast fp16 arithmetic."""
    if precision.get("precision") == "16-mixed" and not on_gpu:
        raise UserError("precision=fp16 needs a CUDA GPU and none was found; use precision=fp32 or precision=bf16")


def check_training(options: TrainingOptions, *, shardable: bool) -> None:
    """Refuse precision, optimizer and strategy that exclude each other.

    Args:
        options: options of the run.
        shardable: whether the model can be sharded over devices.

    Raises:
        UserError: two options exclude each other; the message names the key to change.
    """
    check_precision(options.precision, on_gpu=uses_gpu(options.trainer))
    _check_optimizer(options)
    _check_schedule(options)
    _check_strategy(options, shardable=shardable)


def _check_schedule(options: TrainingOptions) -> None:
    """Refuse a schedule that starts at or after its end."""
    start, end = options.optimizer.schedule_start, options.optimizer.schedule_steps or options.trainer["max_steps"]
    if start >= end:
        raise UserError(
            f"optimizer.schedule_start={start} must be below the end of the schedule, step {end}; raise "
            "optimizer.schedule_steps, or trainer.max_steps where that is null"
        )


def check_validation(callbacks: Mapping[str, Any], measured: int, samples: int) -> None:
    """Say that validations measure few or no samples; raises UserError where a callback needs a metric of none.

    Args:
        callbacks: nodes of the callbacks.
        measured: number of samples that each validation measures.
        samples: number of samples in the validation split.
    """
    if 0 < measured < samples and RANKS.first:
        _log.info(
            "validations measure %s of the %s samples in the validation split, at equal distances "
            "(data.max_val_samples=%s; null measures all)",
            *(f"{measured:,}", f"{samples:,}", measured),
        )
    if samples:
        return
    for name, node in callbacks.items():
        metric = str(node.get("monitor", ""))
        if metric.startswith(OF_VALIDATION):
            raise UserError(
                f"callbacks.{name}.monitor={metric}: the validation split has no samples; raise data.val_fraction, or "
                "monitor a metric of training"
            )
    warnings.filterwarnings("ignore", message="Total length of `Loader` across ranks is zero.*")
    if RANKS.first:
        _log.warning("the validation split has no samples: nothing is measured at validation, and no images are shown")


def uses_gpu(trainer: Mapping[str, Any]) -> bool:
    """Whether a run uses a CUDA GPU."""
    return trainer["accelerator"] not in ("cpu", "mps") and torch.cuda.is_available()


def prepare_compiler(options: TrainingOptions) -> None:
    """With `compile=true`, start from an empty cache of compiled code; raises UserError if a compiler is missing.

    An earlier stage of a chain may have compiled another model in this process, and torch stops compiling a function
    after a few variants of it.
    """
    if not options.compile:
        return
    missing = missing_for_triton() if uses_gpu(options.trainer) else _missing_on_cpu()
    if missing is not None:
        raise UserError(f"compile=true: {missing}, or set compile=false")
    torch.compiler.reset()


def _missing_on_cpu() -> str | None:
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        return f"on a CPU it needs a C++ compiler, and {compiler} was not found; install one or name it in CXX"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        return f"on a CPU it needs the headers of Python, and {headers} was not found; install them (python3-dev)"
    return None


def _check_optimizer(options: TrainingOptions) -> None:
    optimizer = str(options.optimizer.optimizer.get("_target_", "")).removeprefix(_LOW_MEMORY)
    if options.precision.get("precision") == "bf16-true":
        _check_bf16_weights(options, optimizer)
    elif optimizer == "adamw_bf16":
        raise UserError(
            "optimizer=adamw_bf16 is for weights in bf16; set precision=bf16_true, or use optimizer=adamw_8bit"
        )
    if optimizer == "adamw_offload":
        _check_offload(options)
    if optimizer in _ROUNDS_AT_RANDOM and uses_gpu(options.trainer):
        missing = missing_for_triton()
        if missing is not None:
            raise UserError(f"optimizer={optimizer}: {missing}, or use optimizer=adamw")


def _check_bf16_weights(options: TrainingOptions, optimizer: str) -> None:
    if optimizer not in _ROUNDS_AT_RANDOM:
        raise UserError(
            "precision=bf16_true loses small steps of an optimizer that rounds to the nearest number; set "
            "optimizer=adamw_bf16 or optimizer=adamw_8bit"
        )
    if options.lora.rank:
        raise UserError(
            "precision=bf16_true: adapters are trained in fp32; use precision=bf16, which holds the frozen weights in "
            "bf16, or lora.rank=0"
        )


def _check_offload(options: TrainingOptions) -> None:
    if options.precision.get("precision") == "16-mixed":
        raise UserError("optimizer=adamw_offload cannot scale the loss of precision=fp16; use precision=bf16")
    if options.optimizer.gradient_clip:
        raise UserError(
            f"optimizer.gradient_clip={options.optimizer.gradient_clip}: optimizer=adamw_offload reads gradients "
            "before their norm is known; set optimizer.gradient_clip=0"
        )
    if options.trainer["devices"] != 1 or options.trainer["num_nodes"] != 1:
        raise UserError(
            "optimizer=adamw_offload works on one device; set trainer.devices=1, or use optimizer=adamw_8bit"
        )
    if options.optimizer.optimizer["offload_gradients"] and options.trainer["accumulate_grad_batches"] > 1:
        raise UserError(
            "optimizer.optimizer.offload_gradients=true cannot add up gradients of several batches; set it to "
            "false, or trainer.accumulate_grad_batches=1"
        )


def _check_strategy(options: TrainingOptions, *, shardable: bool) -> None:
    kind = options.strategy.kind
    name = f"strategy={kind.value}"
    _check_started(kind, options.trainer)
    if not kind.sharded:
        return
    if not shardable:
        raise UserError(f"{name}: an image tokenizer is small, so each device trains the full model; set strategy=ddp")
    target = str(options.optimizer.optimizer.get("_target_"))
    if target.startswith(_OURS):
        optimizer = target.rpartition(".")[2].lower()
        raise UserError(
            f"{name}: optimizer={optimizer} needs full tensors, and no device has them; set optimizer=adamw or "
            "strategy=ddp"
        )
    if options.lora.rank:
        raise UserError(f"{name}: lora.rank={options.lora.rank} needs full weights; set strategy=ddp, or lora.rank=0")
    if kind in DEEPSPEED:
        _check_deepspeed(name)
        return
    if options.precision["precision"] == "16-mixed":
        raise UserError(
            f"{name}: precision=fp16 needs a loss scaler that sees all gradients; set precision=bf16 or strategy=ddp"
        )
    if kind == StrategyKind.tp and options.compile:
        raise UserError(f"{name} does not go with compile=true; set compile=false")


def _check_started(kind: StrategyKind, trainer: Mapping[str, Any]) -> None:
    """Raises UserError if torchrun or SLURM started the run with another number of processes than devices."""
    if RANKS.size > 1 and (kind == StrategyKind.single or num_devices(trainer) != RANKS.size):
        raise UserError(
            f"{RANKS.size} processes were started for strategy={kind.value}, trainer.devices={trainer['devices']} and "
            f"trainer.num_nodes={trainer['num_nodes']}; set strategy=ddp or fsdp, and as many devices as processes"
        )


def _check_deepspeed(name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f'{name} needs DeepSpeed; pip install "cogview_pl[deepspeed]", or set strategy=fsdp')
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs CUDA GPUs and none was found; set strategy=fsdp")
