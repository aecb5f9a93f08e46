"""Time of a decoding step by context length, batch and model size; and bytes of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.contest import Work, contest, repeated
from benchmarks.report import Curve, Result, Row, result
from benchmarks.settings import DEVICE, DTYPES, IMAGE_CODES, SHAPES
from cogview_pl.generation.config import Engine
from cogview_pl.generation.engine.forms import decoding_form
from cogview_pl.transformer.config import AttentionForm, Norm, NormScope, TransformerConfig
from cogview_pl.transformer.kv_cache import KVCache
from cogview_pl.transformer.model import Transformer

CONTEXTS = (64, 192, 320, 448, 576, 704, 832, 960, 1088)
BATCHES = (1, 2, 4, 8, 16)
SIZES = ((3, 192, 3), (6, 384, 6), (8, 512, 8), (12, 768, 12))  # layers, hidden size, heads
STEPS = 8
"""Number of steps per timed call."""


class Fit(NamedTuple):
    """A straight line through measured points."""

    slope: float
    intercept: float
    r_squared: float


def rows() -> list[Row]:
    """Three sweeps of S1 fp32, and the memory of KV caches."""
    return [
        Row("growth:context", measure_context),
        Row("growth:batch", measure_batch),
        Row("growth:model-size", measure_size),
        Row("growth:cache-memory", measure_cache),
    ]


def measure_context(contexts: Sequence[int] = CONTEXTS, batch: int = 8, rounds: int = 15) -> Result:
    """Milliseconds per step at several context lengths of one KV cache.

    The batch has several images, because the attention of a single image costs less than the spread.
    """
    model = _model(*SHAPES["S1"], positions=max(contexts))
    cache = _cache(model, batch, max(contexts))
    works = {str(context): _step(model, cache, batch, context) for context in contexts}
    return _sweep("context, tokens", works, contexts, rounds)


def measure_batch(batches: Sequence[int] = BATCHES, context: int = 320, rounds: int = 9) -> Result:
    """Milliseconds per step at several batch sizes."""
    model = _model(*SHAPES["S1"], positions=context)
    works = {str(batch): _step(model, _cache(model, batch, context), batch, context) for batch in batches}
    return _sweep("images in a batch", works, batches, rounds)


def measure_size(sizes: Sequence[tuple[int, int, int]] = SIZES, context: int = 320, rounds: int = 9) -> Result:
    """Milliseconds per token of models of (layers, hidden size, heads), over millions of weights in their matrices."""
    works: dict[str, Work] = {}
    millions = []
    for layers, hidden_size, heads in sizes:
        model = _model(layers, hidden_size, heads, positions=context)
        name = f"{layers} layers of {hidden_size}"
        works[name] = _step(model, _cache(model, 1, context), 1, context)
        millions.append((12 * layers * hidden_size**2 + IMAGE_CODES * hidden_size) / 1e6)
    return _sweep("million weights", works, millions, rounds)


def measure_cache() -> Result:
    """Megabytes of KV caches with 1,088 positions.

    Raises:
        RuntimeError: a KV cache has another size than its formula.
    """
    values = {}
    for shape, dtype, batch in (("S1", "fp32", 1), ("S1", "bf16", 16), ("S2", "fp32", 4)):
        layers, hidden_size, heads = SHAPES[shape]
        model = _model(layers, hidden_size, heads, positions=1).to(DTYPES[dtype])
        cache = _cache(model, batch, 1088)
        wanted = 2 * layers * batch * heads * 1088 * (hidden_size // heads) * cache.dtype.itemsize
        if cache.nbytes != wanted:
            raise RuntimeError(f"cache of {shape} {dtype} x{batch}: {cache.nbytes} bytes, by the formula {wanted}")
        values[f"{shape} {dtype} x{batch}"] = cache.nbytes / 1e6
    return Result("MB", values, {}, {"measured bytes - formula": 0})


def line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Line through points by least squares."""
    x_N, y_N = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    from_mean_N = x_N - x_N.mean()
    slope = (from_mean_N * y_N).sum() / from_mean_N.square().sum()
    residual_N = y_N - y_N.mean() - slope * from_mean_N
    r_squared = 1 - residual_N.square().sum() / (y_N - y_N.mean()).square().sum()
    return Fit(float(slope), float(y_N.mean() - slope * x_N.mean()), float(r_squared))


def _sweep(x_label: str, works: Mapping[str, Work], x: Sequence[float], rounds: int) -> Result:
    """Times of all works, and a line through them over `x`."""
    contenders = {name: repeated(work, STEPS) for name, work in works.items()}
    found = result("ms/step", contest(contenders, rounds), dict.fromkeys(contenders, STEPS))
    y = list(found.values.values())
    fit = line(x, y)
    found.facts["line, ms"] = f"{fit.intercept:.4g} + {fit.slope:.4g} · ({x_label})"
    found.facts["R²"] = fit.r_squared
    return found._replace(curve=Curve(x_label, list(x), "ms per step", y))


def _model(layers: int, hidden_size: int, heads: int, *, positions: int) -> Transformer:
    """A model in fp32 with a vocabulary of codes only, because decoding never multiplies the rest of the head."""
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden_size,
        num_heads=heads,
        num_positions=positions,
        norm=Norm.sandwich,
        norm_scope=NormScope.token,
        attention=AttentionForm.fused,
        dropout=0.0,
        init_std=0.02,
    )
    model = Transformer(config, vocab_size=IMAGE_CODES)
    return model.eval().to(DEVICE)


def _cache(model: Transformer, batch: int, capacity: int) -> KVCache:
    cache = model.new_cache(batch, capacity)
    assert isinstance(cache, KVCache)
    return cache


def _step(model: Transformer, cache: KVCache, batch: int, context: int) -> Work:
    """One decoding step after `context - 1` tokens, with logits; every call repeats the same step."""
    ids = [range(IMAGE_CODES)]
    form = decoding_form(model, batch, ids, Engine.torch)
    tokens_B1 = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    positions_B1 = torch.full_like(tokens_B1, context - 1)

    @torch.inference_mode()
    def run() -> None:
        cache.clear()
        cache.advance(context - 1)
        form.logits(form.hidden(tokens_B1, positions_B1, cache)[:, -1], ids)

    return run
