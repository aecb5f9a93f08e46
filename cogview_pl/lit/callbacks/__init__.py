"""What watches a run: throughput, activations, loss scale, pictures, skipped files, random state."""

from cogview_pl.lit.callbacks.activations import Activations
from cogview_pl.lit.callbacks.pictures import Reconstructions, Samples
from cogview_pl.lit.callbacks.precision import LossScale
from cogview_pl.lit.callbacks.run_state import RandomState, SkippedPictures
from cogview_pl.lit.callbacks.throughput import Throughput

__all__ = ["Activations", "LossScale", "RandomState", "Reconstructions", "Samples", "SkippedPictures", "Throughput"]
