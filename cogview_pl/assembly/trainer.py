"""Training of both stages: the Lightning trainer, resuming, and the final metrics."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

from cogview_pl.assembly.busy_machine import warn_of_busy_cores
from cogview_pl.assembly.checks import check_validation, uses_gpu
from cogview_pl.assembly.instantiate import instantiate
from cogview_pl.assembly.kept_checkpoints import ema_decay, settings_of_kept, take_final_weights
from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.strategy import DEEPSPEED, check_heads, lightning_strategy, num_devices
from cogview_pl.data.config import DataConfig
from cogview_pl.data.loader import suitable_workers
from cogview_pl.data.samples import CaptionedImages
from cogview_pl.durable.write import disk_full_named
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.lit.callbacks import EMA, StopAtStepEnd
from cogview_pl.lit.callbacks.hyperparameters import Hyperparameters
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.lit.config import StrategyKind
from cogview_pl.lit.data_module import DataModule
from cogview_pl.lit.optimizers import BuildOptimizer
from cogview_pl.lit.restoring import fit_to_accumulation
from cogview_pl.runs.history import newest_config
from cogview_pl.runs.ranks import require_node
from cogview_pl.runs.record import OPTIMIZER
from cogview_pl.runs.resume import checkpoint_of, remember_in_checkpoints, require_same_run, require_steps_left
from cogview_pl.runs.run_folder import RunFolder

_LOG = "tensorboard"
_HYPERPARAMETERS = (
    *("seed", "init_from", "compile", "activation_checkpointing", "precision", "strategy", "trainer", "optimizer"),
    *("data", "image_tokenizer", "text", "model", "template", "sequences", "lora"),
)
"""Groups and keys of the configuration that loggers get."""
_HIDES = "Please call `iter(combined_loader)` first"
"""Message of an error in Lightning's clean-up that hides the first error, which started a loader raised."""


def optimizer_node(options: TrainingOptions) -> dict[str, Any]:
    """The `_target_` node of the optimizer.

    With tensor parallelism `fused` is off, because that kernel cannot mix full and sharded tensors.
    """
    node = options.optimizer.optimizer
    if options.strategy.kind == StrategyKind.tp and node.get("fused"):
        return {**node, "fused": False}
    return node


def optimizer_factory(options: TrainingOptions) -> BuildOptimizer:
    """The optimizer that `conf/optimizer/` describes; raises UserError if it does not take its arguments."""
    build = instantiate(optimizer_node(options), "optimizer.optimizer")
    try:
        build([torch.nn.Parameter(torch.zeros(1))])  # a partial finds wrong arguments only when it is called
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.optimizer: {error}; see conf/optimizer/") from error
    return build  # type: ignore[no-any-return]


def seed_all(seed: int) -> None:
    """Seed every random generator, and silence warnings about deliberate choices."""
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)  # "Experiment not found. Creating it"
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training.*")  # a frozen codebook
    warnings.filterwarnings("ignore", message="To copy construct from a tensor.*")  # a learning rate of torchao's
    warnings.filterwarnings("ignore", message=".*recommended to use .*sync_dist=True.*")  # logged values are summed
    seed_everything(seed, workers=True, verbose=False)


def data_module(
    train_set: Any, val_set: Any, collate: Callable[[list[Any]], Any], data: DataConfig, options: TrainingOptions
) -> DataModule:
    """The data loaders of a training run."""
    images = len(train_set) if isinstance(train_set, CaptionedImages) else 0
    here = num_devices({**options.trainer, "num_nodes": 1})
    return DataModule(
        train_set,
        val_set,
        collate=collate,
        batch_size=data.batch_size,
        num_workers=suitable_workers(data.num_workers, images, here),
        seed=options.seed,
        worker_timeout=data.worker_timeout,
        look=SIGNALS.check_while_waiting,
        max_val_samples=data.max_val_samples,
    )


def train(
    options: TrainingOptions,
    folder: RunFolder,
    module: LightningModule,
    data: DataModule,
    *,
    identity: dict[str, Any],
    settings: dict[str, Any],
    inputs: dict[str, str],
    num_heads: int | None = None,
) -> dict[str, float]:
    """Train, validate at the end, and return the last value of every logged metric.

    The module then has the weights that become `model/`; `model/step` says of which step.

    Args:
        options: options of the run.
        folder: folder of the run; with `resume` it holds the checkpoint to resume from.
        module, data: the model and its training and validation data.
        identity: kind and constructor arguments of the model; checkpoints keep them, and a resumed run compares them.
        settings: further values that a resumed run compares; the run folder keeps them.
        inputs: hashes of the data and of the model to start from; the run folder keeps them for a resumed run.
        num_heads: attention heads that strategy=tp divides; None for a model without attention.

    Raises:
        UserError: the checkpoint is of another stage or model, or an input has changed.
        Stopped: after a signal, once the checkpoint is saved.
    """
    checkpoint = checkpoint_of(folder, options.resume, folders=options.strategy.kind in DEEPSPEED)
    identity = {**identity, "inputs": inputs}
    metrics: dict[str, Any] = {}
    if checkpoint is not None:
        steps, before = require_same_run(checkpoint, identity, options.verify)
        require_steps_left(checkpoint, steps, options.trainer["max_steps"], finished=folder.had_finished)
        metrics |= before
    remember_in_checkpoints(module, identity, metrics)
    fit_to_accumulation(module, options.trainer["accumulate_grad_batches"])
    require_node(options.trainer.get("num_nodes", 1))
    check_validation(options.callbacks, len(data.val_samples), len(data.val))  # type: ignore[arg-type]
    trainer = _trainer(options, folder)
    if num_heads is not None:
        check_heads(options.strategy, num_heads, trainer)
    with folder.processes.first_goes_ahead() as first:
        if first:
            # Not the batch size: it may change with the number of devices.
            own = {"seed": options.seed, OPTIMIZER: options.optimizer.optimizer["_target_"]}
            own |= settings_of_kept(options.callbacks)
            folder.require_same(own | settings, inputs, options.verify)
            folder.begin()
    SIGNALS.check()
    if not uses_gpu(options.trainer) and folder.writes:
        warn_of_busy_cores()
    with disk_full_named(folder / _LOG):  # writers of other files name them
        _fit(trainer, module, data, checkpoint)
        found = trainer.callback_metrics
        metrics |= found
        # A run that was stopped after its last step has not been validated in this process.
        if not any(name.startswith("val/") for name in found):
            trainer.validate(module, datamodule=data, verbose=False)
            metrics |= trainer.callback_metrics
        metrics |= take_final_weights(options, trainer, module, writes=folder.writes)
    return {name: float(value) for name, value in metrics.items()}


def _fit(trainer: Trainer, module: LightningModule, data: DataModule, checkpoint: Path | None) -> None:
    """Train, and turn errors of Lightning into errors that name the cause."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:  # it would exit with code 0, as a finished run does
        raise Stopped(SIGNALS.received or signal.SIGTERM) from None
    except Exception as error:
        if _HIDES in str(error) and error.__context__ is not None:
            raise error.__context__ from None
        steps_began = SIGNALS.deferred
        if checkpoint is None or steps_began or isinstance(error, (UserError, OSError)):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"resume: {checkpoint} does not fit this run ({reason}); go on from another checkpoint, or start anew"
        ) from error


def _trainer(options: TrainingOptions, folder: RunFolder) -> Trainer:
    nodes = dict(options.callbacks)
    if ema_decay(nodes) is None:
        nodes.pop("ema", None)
    callbacks = [instantiate(node, f"callbacks.{name}") for name, node in nodes.items()]
    callbacks.sort(key=lambda callback: isinstance(callback, EMA))  # after those that use the model in a validation
    # It must be first, because it sets the step that other callbacks log.
    callbacks.insert(0, StopAtStepEnd(lambda: SIGNALS.asked, SIGNALS.listen, _defer_signals))
    if not options.logger:  # LearningRateMonitor refuses to run without a logger
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    elif folder.writes:
        callbacks.append(Hyperparameters(_hyperparameters(folder)))
    loggers = [instantiate(node, f"logger.{name}") for name, node in options.logger.items()]
    try:
        return Trainer(
            **{**options.trainer, "val_check_interval": _validation_interval(options.trainer)},
            **options.precision,
            strategy=lightning_strategy(options.strategy),
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[DurableCheckpointIO()],
            gradient_clip_val=options.optimizer.gradient_clip,
            default_root_dir=str(folder.path),
            use_distributed_sampler=False,  # the data module divides samples among processes itself
            max_epochs=-1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar="progress" in options.callbacks,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"trainer, precision or strategy: {error}") from error


def _hyperparameters(folder: RunFolder) -> dict[str, Any]:
    """Dotted key → plain value, of the configuration of the run; values that are not set are left out."""
    file = newest_config(folder.path)
    found = OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else {}
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        elif value is not None:
            flat[prefix] = value if isinstance(value, (int, float, str)) else str(value)

    assert isinstance(found, dict)
    add("", {key: value for key, value in found.items() if key in _HYPERPARAMETERS})
    return flat


def _validation_interval(trainer: Mapping[str, Any]) -> int:
    """Number of batches between two validations."""
    steps: int = min(trainer["val_check_interval"], trainer["max_steps"])
    return steps * int(trainer["accumulate_grad_batches"])


def _defer_signals(deferred: bool) -> None:
    SIGNALS.deferred = deferred
