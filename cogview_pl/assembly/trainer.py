"""What both stages share when they train: the Trainer, resume, the final metrics."""

from __future__ import annotations

import logging
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cogview_pl.assembly.strategy import check_heads, lightning_strategy, without_fused_kernel
from cogview_pl.config.schema import Config, instantiate
from cogview_pl.durable.write import disk_full_named
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.lit.callbacks import StopAtStepEnd
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.lit.data_module import DataModule
from cogview_pl.lit.optimizers import BuildOptimizer
from cogview_pl.runs.ranks import require_node
from cogview_pl.runs.resume import checkpoint_of, remember_in_checkpoints, require_same_run
from cogview_pl.runs.run_folder import RunFolder

_LOG = "tensorboard"
_SEQUENCES = ("replay_share", "conditioning_dropout", "token_noise")
_HIDES = "Please call `iter(combined_loader)` first"
"""What Lightning's clean-up raises in place of an error that came up while a loader was started."""


def optimizer_factory(config: Config) -> BuildOptimizer:
    """The optimizer that `conf/optimizer/` describes; raises UserError if it does not take its arguments."""
    build = instantiate(without_fused_kernel(config), "optimizer.optimizer")
    try:
        build([torch.nn.Parameter(torch.zeros(1))])  # a partial finds wrong arguments only when it is called
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.optimizer: {error}; see conf/optimizer/") from error
    return build  # type: ignore[no-any-return]


def seed(config: Config) -> None:
    """Seed every random generator, and keep Lightning quiet about choices that are ours."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="To copy construct from a tensor.*")  # a learning rate of torchao's
    warnings.filterwarnings("ignore", message=".*recommended to use .*sync_dist=True.*")  # what is logged is summed up
    seed_everything(config.seed, workers=True, verbose=False)


def train(
    config: Config,
    folder: RunFolder,
    module: LightningModule,
    data: DataModule,
    identity: dict[str, Any],
    inputs: dict[str, str],
) -> dict[str, float]:
    """Train, validate at the end, and return the last value of every logged metric.

    Args:
        config: the run's configuration.
        folder: its folder; with `resume` set it holds the checkpoint to go on from.
        module, data: what to train and on what.
        identity: kind and constructor arguments of the model, kept in checkpoints and compared on resume.
        inputs: hashes of the data and of the model to start from, noted in the folder and compared on resume.

    Raises:
        UserError: the checkpoint is of another stage or model, or an input is not what it was.
        Stopped: after a signal, once the checkpoint is saved.
    """
    checkpoint = checkpoint_of(config, folder)
    identity = {**identity, "inputs": inputs}
    metrics: dict[str, Any] = {} if checkpoint is None else require_same_run(checkpoint, identity, config.verify)
    remember_in_checkpoints(module, identity, metrics)
    require_node(config.trainer.get("num_nodes", 1))
    trainer = _trainer(config, folder)
    check_heads(config, trainer)
    with folder.processes.first_goes_ahead() as first:
        if first:
            folder.require_same(_settings(config), inputs, config.verify)
            folder.begin()
    SIGNALS.check()
    with disk_full_named(folder / _LOG):  # all other files are named where they are written
        _fit(trainer, module, data, checkpoint)
        found = trainer.callback_metrics
        metrics |= found
        # A run that was ended behind its last step has not validated in this process.
        steps = _validation_interval(config) // config.trainer["accumulate_grad_batches"]
        if trainer.global_step % steps or not any(name.startswith("val/") for name in found):
            trainer.validate(module, datamodule=data, verbose=False)
            metrics |= trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items()}


def _fit(trainer: Trainer, module: LightningModule, data: DataModule, checkpoint: Path | None) -> None:
    """Have Lightning train; what ends it is raised in our words."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:  # would exit with 0, as if the run were done
        raise Stopped(SIGNALS.received or signal.SIGTERM) from None
    except Exception as error:
        if _HIDES in str(error) and error.__context__ is not None:
            raise error.__context__ from None
        if (
            checkpoint is None or SIGNALS.deferred or isinstance(error, (UserError, OSError))
        ):  # deferred: steps had begun
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"resume: {checkpoint} does not fit this run ({reason}); go on from another checkpoint, or start anew"
        ) from error


def _settings(config: Config) -> dict[str, Any]:
    """What must not change while a run is stopped, besides the model; sizes of batches may, with the devices."""
    chosen = {name: getattr(config.sequences, name) for name in _SEQUENCES}
    return {
        "seed": config.seed,
        "optimizer.optimizer._target_": config.optimizer.optimizer["_target_"],
        "template.layout": config.template.layout,
        "template.loss": dict(config.template.loss),
        **{f"sequences.{name}": value for name, value in chosen.items()},
    }


def _trainer(config: Config, folder: RunFolder) -> Trainer:
    callbacks = [instantiate(node, f"callbacks.{name}") for name, node in config.callbacks.items()]
    callbacks.insert(
        0, StopAtStepEnd(lambda: SIGNALS.asked, SIGNALS.listen, _defer_signals)
    )  # the others log with its step
    if not config.logger:  # learning rates are for nobody to see, and their callback would refuse to run
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    loggers = [instantiate(node, f"logger.{name}") for name, node in config.logger.items()]
    try:
        return Trainer(
            **{**config.trainer, "val_check_interval": _validation_interval(config)},
            **config.precision,
            strategy=lightning_strategy(config),
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[DurableCheckpointIO()],
            gradient_clip_val=config.optimizer.gradient_clip,
            default_root_dir=str(folder.path),
            use_distributed_sampler=False,  # the data module deals samples out itself
            max_epochs=-1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar="progress" in config.callbacks,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"trainer, precision or strategy: {error}") from error


def _validation_interval(config: Config) -> int:
    interval = config.trainer["val_check_interval"] * config.trainer["accumulate_grad_batches"]
    return min(interval, config.trainer["max_steps"] * config.trainer["accumulate_grad_batches"])


def _defer_signals(deferred: bool) -> None:
    SIGNALS.deferred = deferred
