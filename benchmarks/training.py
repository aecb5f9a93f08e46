"""A training step of 4 x 1,088 tokens at vocabulary 58,240 with fused AdamW, and steps of the quickstart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import gemm, memory, quickstart, references
from benchmarks.contest import Work, contest
from benchmarks.report import Result, Row, result
from benchmarks.settings import DEVICE, DTYPES, IMAGE_CODES, PROMPT, SHAPES, text_to_image, vocab_size
from cogview_pl.transformer.config import ActivationCheckpointing
from cogview_pl.transformer.loss import sequence_loss

CASES = (("S1", "fp32"), ("S1", "bf16"), ("S2", "fp32"), ("S2", "bf16"))
BATCH, GRID = 4, 32
TOKENS = PROMPT + GRID * GRID
"""Tokens of a sequence that the model reads."""


def rows() -> list[Row]:
    """Time and peak memory of every case, and times of the quickstart's steps."""
    times = [Row(f"train:{shape}-{dtype}", partial(measure, shape, dtype)) for shape, dtype in CASES]
    peaks = [Row(f"train:{shape}-{dtype}-memory", partial(measure_memory, shape, dtype)) for shape, dtype in CASES]
    if DEVICE.type != "cpu":
        return times
    return times + (peaks if memory.MEASURABLE else []) + quickstart.rows()


def measure(shape: str, dtype: str, rounds: int = 3) -> Result:
    """Milliseconds per step; the floor is for a loss over the whole vocabulary."""
    layers, hidden_size, _ = SHAPES[shape]
    linears = gemm.linears_of_step(layers, hidden_size, vocab_size(), BATCH * TOKENS)
    contenders = {
        "ours": our_step(shape, dtype, "vocabulary"),
        "ours, loss over the slot": our_step(shape, dtype, "slot"),
        "Hugging Face": hugging_face_step(shape, dtype),
        "GEMM floor": gemm.floor(linears, dtype),
    }
    found = result("ms", contest(contenders, rounds), {})
    found.facts["share of the GEMM floor"] = found.values["GEMM floor"] / found.values["ours"]
    found.facts["TFLOP of the floor"] = gemm.training_flops(linears) / 1e12
    found.facts["TFLOP/s"] = gemm.training_flops(linears) / found.values["ours"] / 1e9
    found.facts["parameters"] = parameters(shape)
    return found


def parameters(shape: str) -> int:
    """Approximate number of parameters (matrices of blocks and embeddings), to find a model of similar size."""
    layers, hidden_size, _ = SHAPES[shape]
    return 12 * layers * hidden_size**2 + vocab_size() * hidden_size


def measure_memory(shape: str, dtype: str) -> Result:
    """Peak growth of resident memory, counted from the state before the model is built."""
    ours = memory.growth_apart("benchmarks.training:our_step", shape, dtype, "vocabulary", with_inputs=True)
    peer = memory.growth_apart("benchmarks.training:hugging_face_step", shape, dtype, with_inputs=True)
    return Result("MB", {"ours": ours / 1e6, "Hugging Face": peer / 1e6}, {}, {"Hugging Face / ours": peer / ours})


def our_step(
    shape: str,
    dtype: str,
    loss_over: str,
    batch: int = BATCH,
    grid: int = GRID,
    hold: str = "fp32",
    recompute: ActivationCheckpointing = ActivationCheckpointing.none,
    compiled: bool = False,
) -> Work:
    """A training step of this project, with Sandwich-LN and PB-Relax.

    Args:
        shape, dtype: size; bf16 over weights in fp32 is autocast, as in training.
        loss_over: `vocabulary`, or `slot` for the ids that a slot may hold.
        batch, grid: sequences, and edge of their grids.
        hold: precision of the weights and of AdamW's moments.
        recompute: activation checkpointing.
        compiled: whether torch.compile compiles the blocks.
    """
    model, template = text_to_image(shape, grid)
    model.set_activation_checkpointing(recompute, compiled=compiled)
    by_slot = [template.predicted(slot) for slot in template.slots]
    tokens_BL = torch.randint(0, IMAGE_CODES, (batch, template.length), device=DEVICE)
    tokens_BL[:, :PROMPT] += by_slot[0].start
    positions_BL = torch.arange(template.length, device=DEVICE).expand_as(tokens_BL)
    slots_BL = (positions_BL >= PROMPT).long()
    weights_BL = torch.ones(tokens_BL.shape, device=DEVICE)
    ids = by_slot if loss_over == "slot" else None
    return step(
        model.to(DTYPES[hold]).train(),
        lambda: sequence_loss(model, tokens_BL, positions_BL, weights_BL, slots_BL, len(by_slot), ids).loss,
        dtype,
    )


def hugging_face_step(shape: str, dtype: str) -> Work:
    """A training step of GPT-2 over the same number of tokens."""
    model = references.hugging_face(shape, vocab_size()).train()
    tokens_BL = torch.randint(0, IMAGE_CODES, (BATCH, TOKENS), device=DEVICE)
    return step(model, lambda: model(tokens_BL, labels=tokens_BL).loss, dtype)


def step(model: nn.Module, loss: Callable[[], Tensor], dtype: str) -> Work:
    """Forward pass (under autocast if weights are fp32 and `dtype` is bf16), backward pass, AdamW."""
    by_autocast = dtype == "bf16" and next(model.parameters()).dtype == torch.float32
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=by_autocast):
            value = loss()
        value.backward()
        optimizer.step()

    return run
