"""Decoding after a prompt of 64 tokens: milliseconds per step, compared with the references."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from benchmarks import references
from benchmarks.contest import Work, contest, repeated
from benchmarks.report import Result, Row, result
from benchmarks.settings import DTYPES, IMAGE_CODES, TEXT, TOP_K, text_to_image
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.generation.decode import decode
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
    """Vocabulary of the reference; ours computes logits of the codes alone."""

    @property
    def title(self) -> str:
        """`decode:S1-fp32-x1-256-v8192`: shape, precision, images, new tokens, the peer's vocabulary."""
        return f"decode:{self.shape}-{self.dtype}-x{self.batch}-{self.new}-v{self.peer_vocabulary}"


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
)


def rows() -> list[Row]:
    """One row per case."""
    return [Row(case.title, partial(measure, case)) for case in CASES]


def measure(case: Case, rounds: int = 3) -> Result:
    """Milliseconds per step of all contenders, timed in the same rounds."""
    shape, dtype, batch, new, vocabulary = case
    grid = round(new**0.5)
    contenders = {
        "ours": ours(shape, dtype, batch, grid),
        "Hugging Face": references.hugging_face_decode(shape, dtype, batch, new, vocabulary),
        "bare linears": repeated(references.bare_linears(shape, dtype, batch), REPEATS),
        "stream bound": repeated(references.stream(shape, dtype, batch, new), REPEATS),
    }
    if new > 256:
        contenders["original's scheme"] = references.original_decode(shape, dtype, batch, grid)
    steps = dict.fromkeys(contenders, new) | {"bare linears": REPEATS, "stream bound": REPEATS}
    found = result("ms/step", contest(contenders, rounds), steps)
    found.facts["share of the stream bound"] = found.values["stream bound"] / found.values["ours"]
    return found


def ours(shape: str, dtype: str, batch: int, grid: int, quantization: Quantization | None = None) -> Work:
    """Decode `batch` grids of `grid` x `grid` codes after prompts of 64 tokens."""
    model, template = text_to_image(shape, grid)
    model = model.to(DTYPES[dtype])
    quantize(model, quantization)
    prompts = [template.prompt({"text": TEXT})] * batch
    return lambda: decode(model, template, prompts, seeds=range(batch), sampling=Sampling(top_k=TOP_K))
