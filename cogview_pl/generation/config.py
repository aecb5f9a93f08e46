"""Options of generation: how tokens are sampled (`conf/sampler`), and how weights are held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeVar

from cogview_pl.errors import UserError
from cogview_pl.limits import GUIDANCE, TEMPERATURE, TOP_P, count, limited, out_of_range, share, whole

_Choice = TypeVar("_Choice", bound=Enum)


class Algorithm(Enum):
    """How many codes one pass of the model yields."""

    sequential = "sequential"
    jacobi = "jacobi"


class Quantization(Enum):
    """Number format of the blocks' matrices for inference."""

    int8 = "int8"
    int4 = "int4"


class Engine(Enum):
    """What decodes on a CPU: kernels of this project, torch, or the one that `engine.forms.engine_of` chooses."""

    auto = "auto"
    torch = "torch"
    compiled = "compiled"


@dataclass(unsafe_hash=True)
class Sampling:
    """How tokens are sampled: the argument at run time and the schema of `conf/sampler`, whose values are the defaults.

    Args:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: the k most likely candidates stay, and ties at the threshold; 0 keeps all.
        top_p: the most likely candidates stay until their probabilities pass p, the one that passes included; 1 keeps
            all.
        guidance: logits are those without the text plus `guidance` times the difference that the text makes. 1 leaves
            the model as it is, 0 ignores the text, larger values follow the text more.
        algorithm: `sequential` samples one code per pass; `jacobi` several, from the same distribution
            (`speculative.py`). Only images from text use it.
        drafts: number of codes that a pass of `jacobi` looks ahead.
        cuda_graphs: on a GPU, `sequential` replays captured steps (`engine/cuda_graph.py`).
        batch_size: images that are decoded together.
        engine: what decodes on a CPU.
        consistency: share of the difference to the small image that an enlarged one takes back
            (`super_resolution/consistency.py`).

    Raises:
        UserError: a value is outside its range.
    """

    temperature: float = limited(TEMPERATURE, 1.0)
    top_k: int = whole(200)
    top_p: float = limited(TOP_P, 1.0)
    guidance: float = limited(GUIDANCE, 1.0)
    algorithm: Algorithm = Algorithm.sequential
    drafts: int = count(16)
    cuda_graphs: bool = True
    batch_size: int = count(64)
    engine: Engine = Engine.auto
    consistency: float = share(0.0)

    def __post_init__(self) -> None:
        self.algorithm = _choice("algorithm", self.algorithm, Algorithm)
        self.engine = _choice("engine", self.engine, Engine)
        for key, value, words in out_of_range(self):
            raise UserError(f"sampler.{key}={value} must be {words}")

    @property
    def guided(self) -> bool:
        """Whether sampling needs a second prompt without the text."""
        return self.guidance != 1

    def plain(self) -> Sampling:
        """The same without guidance and with one token per pass, for captioner and upscaler."""
        return replace(self, guidance=1.0, algorithm=Algorithm.sequential)


@dataclass
class CompletionConfig:
    """Schema of `complete`: which part of given images is kept; the rest is generated.

    Args:
        keep: top, bottom, left, right or border, and its share of the edge: `top:0.5`, `border:0.25`.
        mask: image file, white where pixels are generated and black where they are kept; see `completion.mask_of`.
    """

    keep: str | None = None
    mask: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether images are completed."""
        return self.keep is not None or self.mask is not None


def _choice(key: str, given: _Choice | str, choices: type[_Choice]) -> _Choice:
    """The member of an enum, whose name Python users may give; raises UserError for another name."""
    names = [choice.value for choice in choices]
    if isinstance(given, str) and given not in names:
        raise UserError(f"sampler.{key}={given} must be one of {', '.join(names)}")
    return choices(given)
