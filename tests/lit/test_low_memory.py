"""Optimizers in less memory: how little it is, that they train like AdamW, and that bf16 weights do not stall."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cogview_pl.errors import UserError
from cogview_pl.lit.low_memory import adamw_8bit, adamw_bf16, adamw_offload
from cogview_pl.transformer.loss import sequence_loss
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer

pytest.importorskip("torchao")

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8}
VOCABULARY, LENGTH = 60, 24


def make(dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "hidden_size": 64, "num_heads": 4, "num_positions": LENGTH, "init_std": 0.125}
    return make_transformer(vocab_size=VOCABULARY, **sizes).to(dtype)  # type: ignore[arg-type]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": matrices, "weight_decay": 0.04}, {"params": vectors, "weight_decay": 0.0}]


def train(model: Transformer, optimizer: Optimizer, steps: range) -> list[float]:
    """Losses of steps on rows that count up and down, which a small model learns in a hundred steps."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(VOCABULARY, (8, 1), generator=generator)
        direction = torch.randint(2, (8, 1), generator=generator) * 2 - 1
        ids = (start + direction * torch.arange(LENGTH)) % VOCABULARY
        positions, slots = torch.arange(LENGTH).expand_as(ids), torch.zeros_like(ids)

        def closure(ids: Tensor = ids, positions: Tensor = positions, slots: Tensor = slots) -> Tensor:
            optimizer.zero_grad()
            loss = sequence_loss(model, ids, positions, torch.ones(ids.shape), slots, 1).loss
            loss.backward()
            return loss.detach()

        losses.append(float(optimizer.step(closure)))  # type: ignore[arg-type]
    return losses


def state_bytes(optimizer: Optimizer) -> int:
    """Memory of the moments."""
    found = 0
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            found += moment.codes.nbytes + moment.scale.nbytes if hasattr(moment, "codes") else moment.nbytes
    return found


def test_moments_of_matrices_are_held_in_8_bits() -> None:
    model = make()
    optimizer = adamw_8bit(groups(model), **SETTINGS)
    train(model, optimizer, range(1))
    matrices = [parameter for parameter in model.parameters() if parameter.numel() >= 4096]
    assert len(matrices) == 4
    for parameter in matrices:
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[parameter][name].codes.dtype == torch.uint8
    held = sum(optimizer.state[p][name].codes.nbytes for p in matrices for name in ("exp_avg", "exp_avg_sq"))
    assert held == 2 * sum(parameter.numel() for parameter in matrices)
    assert state_bytes(optimizer) < 0.35 * 8 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_trains_as_adamw_does() -> None:
    makers: dict[str, tuple[Callable[..., Optimizer], torch.dtype]] = {
        "adamw": (AdamW, torch.float32),
        "8bit": (adamw_8bit, torch.float32),
        "8bit, bf16 weights": (adamw_8bit, torch.bfloat16),
        "bf16": (adamw_bf16, torch.bfloat16),
    }
    last = {}
    for name, (maker, dtype) in makers.items():
        model = make(dtype)
        losses = train(model, maker(groups(model), **SETTINGS), range(60))
        assert losses[0] > 3.5
        last[name] = sum(losses[-10:]) / 10
    assert last["adamw"] < 1.5
    for name, loss in last.items():
        assert loss == pytest.approx(last["adamw"], rel=0.15), (name, last)


@pytest.mark.parametrize("maker", [adamw_8bit, adamw_bf16])
def test_steps_too_small_for_bf16_count_on_average(maker: Callable[..., Optimizer]) -> None:
    """Near 1 two bf16 numbers lie 2⁻⁷ apart above and 2⁻⁸ below; steps here are a tenth of that."""
    count, steps, lr = 64 * 256, 20, 4e-4
    weights = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    optimizer = maker([{"params": [weights], "weight_decay": 0.0}], **{**SETTINGS, "lr": lr})
    nearest = nn.Parameter(torch.ones(count, dtype=torch.bfloat16))
    plain = AdamW([nearest], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        weights.grad, nearest.grad = torch.ones_like(weights), torch.ones_like(nearest)
        optimizer.step()
        plain.step()
    assert (nearest == 1).all()  # what rounding to the nearest makes of them
    moved = 1 - weights.detach().float()
    # A step is lr, and leaves a weight at one of two neighbours 2⁻⁸ apart: variance at most 2⁻¹⁶ / 4 for each step.
    error = (steps * 2**-18 / count) ** 0.5
    assert abs(float(moved.mean()) - steps * lr) < 4 * error
    assert moved.std() > 0


@pytest.mark.parametrize(("maker", "dtype"), [(adamw_8bit, torch.float32), (adamw_bf16, torch.bfloat16)])
def test_a_restored_optimizer_goes_on_as_if_never_stopped(maker: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    model = make(dtype)
    optimizer = maker(groups(model), **SETTINGS)
    train(model, optimizer, range(3))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(saved, buffer := BytesIO())
    whole = train(model, optimizer, range(3, 6))
    buffer.seek(0)
    read = torch.load(buffer, map_location=lambda storage, location: storage, weights_only=True)  # as Lightning does
    again = make(dtype)
    again.load_state_dict(read["model"])
    restored = maker(groups(again), **SETTINGS)
    restored.load_state_dict(read["optimizer"])
    torch.set_rng_state(read["random"])
    assert train(again, restored, range(3, 6)) == whole
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_offloading_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="adamw_offload moves state off a CUDA GPU and none was found"):
        adamw_offload(groups(make()), **SETTINGS, offload_gradients=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_offloaded_state_trains_as_adamw_does(offload_gradients: bool) -> None:
    with torch.device("cuda"):
        model, reference = make(), make()
    reference.load_state_dict(model.state_dict())
    optimizer = adamw_offload(groups(model), **SETTINGS, offload_gradients=offload_gradients)
    plain = AdamW(groups(reference), **SETTINGS)
    ids = torch.arange(LENGTH, device="cuda").expand(8, -1) % VOCABULARY
    arguments = (ids, ids, torch.ones(ids.shape, device="cuda"), torch.zeros_like(ids), 1)
    sequence_loss(model, *arguments).loss.backward()  # libraries take memory of their own once
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        for trained, stepped in ((model, optimizer), (reference, plain)):
            sequence_loss(trained, *arguments).loss.backward()
            stepped.step()
            stepped.zero_grad()
    for (name, one), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        # Attention does not depend on the biases of keys: their gradients are rounding, which Adam makes steps of.
        parts = (0, 2) if name.endswith("qkv.bias") else (0, 1, 2)
        for part in parts:
            torch.testing.assert_close(one.chunk(3)[part], other.chunk(3)[part], atol=1e-4, rtol=1e-3)
    moments = 2 * sum(parameter.nbytes for parameter in reference.parameters())
    assert torch.cuda.memory_allocated() - before < 1.5 * moments  # of the reference alone
