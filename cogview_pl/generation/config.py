"""Options of decoding: the schema of `conf/sampler`, and how weights are held."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cogview_pl.limits import MISSING, at_least_0, count, share_above_0


class Algorithm(Enum):
    """How many codes a pass of the model yields in generation."""

    sequential = "sequential"
    jacobi = "jacobi"


class Quantization(Enum):
    """How matrices are held for inference."""

    int8 = "int8"
    int4 = "int4"


@dataclass
class SamplerConfig:
    """How tokens are drawn in generation."""

    temperature: float = at_least_0()
    top_k: int = at_least_0()
    top_p: float = share_above_0()
    guidance: float = at_least_0()
    algorithm: Algorithm = MISSING
    drafts: int = count()
    cuda_graphs: bool = MISSING
    batch_size: int = count()
