"""Callbacks of Lightning: checkpoints, averages of the weights, throughput, images, bad samples, and others."""

from cogview_pl.lit.callbacks.activations import Activations
from cogview_pl.lit.callbacks.checkpoints import Checkpoints
from cogview_pl.lit.callbacks.ema import EMA
from cogview_pl.lit.callbacks.hyperparameters import Hyperparameters
from cogview_pl.lit.callbacks.images import Reconstructions, Samples
from cogview_pl.lit.callbacks.nan_guard import NanGuard
from cogview_pl.lit.callbacks.precision import LossScale
from cogview_pl.lit.callbacks.run_state import BadSamples, RandomState
from cogview_pl.lit.callbacks.stop_at_step_end import StopAtStepEnd
from cogview_pl.lit.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "Activations",
    "BadSamples",
    "Checkpoints",
    "Hyperparameters",
    "LossScale",
    "NanGuard",
    "RandomState",
    "Reconstructions",
    "Samples",
    "StopAtStepEnd",
    "Throughput",
]
