"""A step played through without memory against the same step on real tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cogview_pl.memory.model import Model
from cogview_pl.memory.sequence_step import Heights, Predicted, SequenceStep, heights
from cogview_pl.memory.trace import LiveBytes
from cogview_pl.transformer.config import ActivationCheckpointing, LoRATarget
from cogview_pl.transformer.loss import sequence_loss
from tests.make_models import transformer_settings

TEXT, CODES = range(96, 160), range(96)
SETTINGS = {"vocab_size": 160, "hidden_size": 64, "num_heads": 4, "num_positions": 48, "dropout": 0.1}


def step(
    layers: int, recompute: str, arithmetic: torch.dtype, lora: dict[str, Any] | None = None, **more: object
) -> SequenceStep:
    defaults: dict[str, object] = {"accumulates": False, "on_gpu": False}
    return SequenceStep(
        model=Model.of(transformer_settings(**SETTINGS, num_layers=layers), torch.float32, lora),
        batch=8,
        tokens=40,
        predicted=(Predicted(8, TEXT), Predicted(32, CODES)),
        recompute=recompute,
        arithmetic=arithmetic,
        **(defaults | more),  # type: ignore[arg-type]
    )


def real(wanted: SequenceStep) -> Heights:
    model = wanted.model.build().train()
    model.set_activation_checkpointing(ActivationCheckpointing(wanted.recompute))
    if wanted.accumulates:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        shape = wanted.batch, wanted.tokens + 1
        tokens, slots = torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.long)
        tokens[:, :9], slots[:, :9] = TEXT.start, 0
        positions, ones = torch.zeros_like(tokens), torch.ones(shape)
        with torch.autocast("cpu", wanted.arithmetic, enabled=wanted.arithmetic != torch.float32):
            loss = sequence_loss(model, tokens, positions, ones, slots, 2, [TEXT, CODES]).loss
        forward = live.restart()
        loss.backward()
        return Heights(forward, live.restart())


def total(found: Heights) -> tuple[int, int]:
    return sum(found.forward.values()), sum(found.backward.values())


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_heights_are_those_of_a_real_step(layers: int, recompute: str, arithmetic: torch.dtype) -> None:
    wanted = step(layers, recompute, arithmetic)
    assert total(heights(wanted)) == pytest.approx(total(real(wanted)), rel=0.02)


def test_large_batches_follow_a_straight_line() -> None:
    wanted = replace(step(2, "none", torch.float32), batch=150)
    assert total(heights(wanted)) == pytest.approx(total(real(wanted)), rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradients_of_the_batch_before_are_not_allocated_again(recompute: str) -> None:
    wanted = step(4, recompute, torch.float32, accumulates=True)
    assert total(heights(wanted)) == pytest.approx(total(real(wanted)), rel=0.02)


@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("targets", [tuple(LoRATarget), tuple(LoRATarget)[:-1]], ids=["with_tokens", "blocks"])
def test_adapters_are_counted_as_they_train(
    targets: Sequence[LoRATarget], recompute: str, arithmetic: torch.dtype
) -> None:
    lora = {"rank": 4, "alpha": 4, "targets": targets, "held": arithmetic}
    wanted = step(4, recompute, arithmetic, lora)
    assert total(heights(wanted)) == pytest.approx(total(real(wanted)), rel=0.02)


def test_a_gpu_keeps_less_of_attention_and_dropout() -> None:
    cpu, gpu = (heights(step(4, "none", torch.float32, on_gpu=on_gpu)).forward["activations"] for on_gpu in (0, 1))
    scores = 4 * 8 * 4 * 40 * 40 * 4  # layers, sequences, heads, queries, keys, bytes: kept once at least on a CPU
    assert cpu - gpu > scores
