"""Options of the toy world as a data set: the schema of `conf/data/toy.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cogview_pl.data.config import DataConfig
from cogview_pl.limits import MISSING, at_least_0, count, seed_number


class Pairs(Enum):
    """What differs between the images of a pair."""

    styles = "styles"
    edits = "edits"


@dataclass
class ToyDataConfig(DataConfig):
    """Coloured shapes, rendered when they are read (`ToyDataset`)."""

    train_size: int = count()
    val_size: int = count()
    seed: int = seed_number()
    language: str = MISSING
    styles: list[str] = MISSING
    style_patterns: list[str] = MISSING
    pairs: Pairs = MISSING
    object_probabilities: list[float] = at_least_0()
    cache_mb: float = at_least_0()
