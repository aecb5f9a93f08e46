"""Sampling: filters, filling a slot, and the pipeline from prompts to pictures."""

from cogview_pl.generation.fill import fill
from cogview_pl.generation.filters import Sampling
from cogview_pl.generation.pipeline import CogView

__all__ = ["CogView", "Sampling", "fill"]
