"""Decoding after a prompt of 64 tokens: milliseconds per step, compared with the references."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

from benchmarks import peers, references
from benchmarks.contest import Work, busy_neighbour, contest, repeated, threads
from benchmarks.report import Result, Row, result
from benchmarks.settings import DTYPES, IMAGE_CODES, TEXT, TOP_K, text_to_image
from cogview_pl.generation.config import Engine, Quantization, Sampling
from cogview_pl.generation.decode import decode
from cogview_pl.generation.engine.forms import keep_forms
from cogview_pl.generation.quantization import quantize

REPEATS = 20
"""Calls of the short contenders per round."""


class Case(NamedTuple):
    """Model and batch of a measurement."""

    shape: str
    dtype: str
    batch: int = 1
    new: int = 256
    peer_vocabulary: int = IMAGE_CODES
    """Vocabulary of the peers; ours computes logits of the codes alone."""
    quantization: Quantization | None = None
    """Of this project and CTranslate2; Hugging Face decodes in `dtype`."""
    threads: int | None = None
    """Threads of every contender; None: torch's choice, one per core."""
    neighbour: bool = False
    """Whether another process keeps one core busy."""

    @property
    def title(self) -> str:
        """`decode:S1-fp32-x1-256-v8192`: shape, precision, images, new tokens, the peers' vocabulary, and the rest."""
        rest = [f"threads{self.threads}"] if self.threads else []
        rest += ["neighbour"] if self.neighbour else []
        precision = f"{self.dtype}-{self.quantization.value}" if self.quantization else self.dtype
        named = [self.shape, precision, f"x{self.batch}", str(self.new), f"v{self.peer_vocabulary}", *rest]
        return "decode:" + "-".join(named)


CASES = (
    Case("S1", "fp32"),
    Case("S1", "bf16"),
    Case("S2", "fp32"),
    Case("S2", "bf16"),
    Case("S1", "fp32", peer_vocabulary=58_240),
    Case("S2", "fp32", peer_vocabulary=58_240),
    Case("S1", "fp32", batch=4),
    Case("S1", "fp32", batch=16),
    Case("S1", "fp32", new=1024),
    Case("S1", "fp32", quantization=Quantization.int8),
    Case("S1", "fp32", threads=1),
    Case("S2", "fp32", threads=1),
    Case("S1", "fp32", quantization=Quantization.int8, threads=1),
    Case("S1", "fp32", neighbour=True),
    Case("S1", "fp32", threads=1, neighbour=True),
)


def rows() -> list[Row]:
    """One row per case."""
    return [Row(case.title, partial(measure, case)) for case in CASES]


def measure(case: Case, rounds: int = 3) -> Result:
    """Milliseconds per step of all contenders, timed in the same rounds."""
    with threads(case.threads), busy_neighbour() if case.neighbour else nullcontext():
        contenders = _contenders(case)
        steps = dict.fromkeys(contenders, case.new) | {"bare linears": REPEATS, "stream bound": REPEATS}
        found = result("ms/step", contest(contenders, rounds), steps)
    found.facts["share of the stream bound"] = found.values["stream bound"] / found.values["ours"]
    return found


def _contenders(case: Case) -> dict[str, Work]:
    shape, dtype, batch, new, vocabulary, quantization = case[:6]
    grid = round(new**0.5)
    contenders = {
        "ours": ours(shape, dtype, batch, grid, quantization),
        "ours, engine=torch": ours(shape, dtype, batch, grid, quantization, Engine.torch),
        "Hugging Face": references.hugging_face_decode(shape, dtype, batch, new, vocabulary),
    }
    if peers.ctranslate2_runs(dtype):
        contenders["CTranslate2"] = peers.ctranslate2_decode(shape, batch, new, vocabulary, quantization)
    contenders["bare linears"] = repeated(references.bare_linears(shape, dtype, batch), REPEATS)
    contenders["stream bound"] = repeated(
        references.stream(shape, dtype, batch, new, int8=quantization == Quantization.int8), REPEATS
    )
    if new > 256:
        contenders["original's scheme"] = references.original_decode(shape, dtype, batch, grid)
    return contenders


def ours(
    shape: str,
    dtype: str,
    batch: int,
    grid: int,
    quantization: Quantization | None = None,
    engine: Engine = Engine.auto,
) -> Work:
    """Decode `batch` grids of `grid` x `grid` codes after prompts of 64 tokens."""
    model, template = text_to_image(shape, grid)
    model = model.to(DTYPES[dtype])
    quantize(model, quantization)
    keep_forms(model)
    prompts, sampling = [template.prompt({"text": TEXT})] * batch, Sampling(top_k=TOP_K, engine=engine)
    return lambda: decode(model, template, prompts, seeds=range(batch), sampling=sampling)
