"""fp16 under planted outliers: Sandwich-LN with PB-Relax keeps training where plain pre-LN overflows (paper §2.4).

Both forms start from weights with one very large channel in the queries and keys of every head, so that their products
leave the range of fp16. Large models develop such channels after days; here they exist from the first step.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.report import Result, Row
from benchmarks.settings import DEVICE, SHAPES
from cogview_pl.transformer.config import AttentionForm, Norm, NormScope, TransformerConfig
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.transformer.model import Transformer

FORMS = {
    "sandwich with PB-Relax": {
        "norm": Norm.sandwich,
        "norm_scope": NormScope.token,
        "attention": AttentionForm.pb_relax,
    },
    "plain pre-LN": {"norm": Norm.pre, "norm_scope": NormScope.none, "attention": AttentionForm.naive},
}
_SCORE = 1.5 * torch.finfo(torch.float16).max
"""QKᵀ of the planted channels before the division by √d."""
_LR = 1e-4


class Stability(NamedTuple):
    """Result of a run in fp16."""

    steps: int
    finite_losses: int
    skipped: int
    """Number of steps that the loss scaler skipped, because a gradient was not finite."""
    first_overflow: int | None
    """The first step whose loss was not finite; None if all were finite."""


def rows(shape: str, steps: int, batch: int, length: int) -> list[Row]:
    """Rows of both forms at one size."""
    return [
        Row(f"gpu:fp16-{name.replace(' ', '-')}-{shape}", partial(_measure, shape, steps, batch, length, name))
        for name in FORMS
    ]


def train(
    *,
    form: str,
    layers: int,
    hidden_size: int,
    heads: int,
    vocabulary: int,
    batch: int,
    length: int,
    steps: int,
    device: torch.device,
) -> Stability:
    """Train on random tokens in fp16 with fp32 weights and dynamic loss scaling, as `precision=fp16` does.

    Args:
        form: one of `FORMS`.
        layers, hidden size, heads, vocabulary: of the model.
        batch, length: of the sequences.
        steps: number of steps; training continues after an overflow.
        device: a GPU, or the CPU for small sizes.
    """
    torch.manual_seed(0)
    with device:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=hidden_size,
            num_heads=heads,
            num_positions=length,
            dropout=0.0,
            init_std=hidden_size**-0.5,
            **FORMS[form],  # type: ignore[arg-type]
        )
        model = Transformer(config, vocab_size=vocabulary)
        plant_outliers(model)
        positions = torch.arange(length).expand(batch, -1)
        ones, slots = torch.ones(batch, length), torch.zeros(batch, length, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    scaler = torch.amp.GradScaler(device.type)
    finite, skipped, first = 0, 0, None
    for step in range(steps):
        tokens = torch.randint(vocabulary, (batch, length), device=device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = sequence_loss(model, tokens, positions, ones, slots, 1).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        if bool(loss.isfinite()):
            finite += 1
        elif first is None:
            first = step
    return Stability(steps, finite, skipped, first)


@torch.no_grad()
def plant_outliers(model: Transformer) -> None:
    """Make one channel of queries and of keys, in every head and layer, very large."""
    hidden_size = model.token_embedding.weight.shape[1]
    head = hidden_size // model.num_heads
    size = _SCORE**0.5
    for block in model.blocks:
        attention = block.attention
        assert isinstance(attention, nn.Module)
        bias = attention.qkv.bias  # type: ignore[union-attr]
        bias[: 2 * hidden_size : head] = size  # the first channel of every head of queries, then of keys  # type: ignore[index]


def _measure(shape: str, steps: int, batch: int, length: int, form: str) -> Result:
    layers, hidden_size, heads = SHAPES[shape]
    found = train(
        form=form,
        layers=layers,
        hidden_size=hidden_size,
        heads=heads,
        vocabulary=8192,
        batch=batch,
        length=length,
        steps=steps,
        device=DEVICE,
    )
    facts: dict[str, float | int | str] = {
        "of them with a finite loss": found.finite_losses,
        "steps that the scaler skipped": found.skipped,
        "first step that overflowed": "none" if found.first_overflow is None else found.first_overflow,
    }
    return Result("steps", {form: float(found.steps)}, {}, facts)
