"""The fused GPU form gives the results of the model's own operations; on a CPU Triton's interpreter runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.generation.engine import fused_gpu
from cogview_pl.generation.engine.fused_gpu import FusedModel, can_fuse
from cogview_pl.transformer.config import LoRAConfig, LoRATarget
from cogview_pl.transformer.kv_cache import KVCache, StaticKVCache
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # the interpreter takes a minute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, POSITIONS = 50, 100
LENGTHS = (70, 3, 64)  # attention takes 64 positions at a time


def make(dtype: torch.dtype = torch.float32, **settings: Any) -> Transformer:
    """Biases and norms are not the zeros and ones that they start with."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 24,
        "num_heads": 3,
        "num_positions": POSITIONS,
        "init_std": 0.15,
    }
    model = make_transformer(vocab_size=VOCABULARY, **(sizes | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(DEVICE, dtype)


def near(found: Tensor, wanted: Tensor, error: float) -> bool:
    return bool((found.float() - wanted.float()).norm() <= error * wanted.float().norm())


def prompts_read(model: Transformer | FusedModel, cache: KVCache, lengths: Sequence[int]) -> list[Tensor]:
    """Hidden states of prompts, each up to its own end."""
    prompts = torch.arange(len(lengths) * max(lengths), device=DEVICE).view(len(lengths), -1) * 7 % VOCABULARY
    hidden = model.hidden(prompts, torch.arange(max(lengths), device=DEVICE).expand_as(prompts), cache)
    cache.advance(lengths)
    return [hidden[row, :length] for row, length in enumerate(lengths)]


def steps_read(model: Transformer | FusedModel, cache: KVCache, lengths: Sequence[int], steps: int) -> Tensor:
    """Hidden states `(steps, B, 1, D)` of single tokens after prompts."""
    static = StaticKVCache(cache, max(lengths) + steps)
    found = []
    for step in range(steps):
        tokens = torch.arange(len(lengths), device=DEVICE)[:, None] + 11 * step
        found.append(model.hidden(tokens, torch.tensor(lengths, device=DEVICE)[:, None] + step, static))
        static.advance(1)
    return torch.stack(found)


def new_cache(model: Transformer, rows: int) -> KVCache:
    cache = model.new_cache(rows, POSITIONS)
    assert isinstance(cache, KVCache)
    return cache


@pytest.mark.parametrize(("norm", "norm_scope"), [("sandwich", "token"), ("pre", "token"), ("sandwich", "none")])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:2], LENGTHS[:1]], ids=["three_rows", "two_rows", "one_row"])
@torch.no_grad()
def test_single_tokens_after_prompts(norm: str, norm_scope: str, lengths: Sequence[int]) -> None:
    model = make(norm=norm, norm_scope=norm_scope)
    assert can_fuse(model)
    caches = [new_cache(model, len(lengths)) for _ in range(2)]
    for cache in caches:
        prompts_read(model, cache, lengths)
    fused, plainly = steps_read(FusedModel(model), caches[0], lengths, 2), steps_read(model, caches[1], lengths, 2)
    torch.testing.assert_close(fused, plainly, atol=1e-5, rtol=1e-5)
    stored, wanted = (cache._stored for cache in caches)
    torch.testing.assert_close(stored, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("programs", [1, 20])  # a program takes all blocks of its row, or every second one
@torch.no_grad()
def test_attention_of_several_blocks_per_program(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_gpu, "_PROGRAMS_OF_ATTENTION", programs)
    monkeypatch.setattr(fused_gpu, "_POSITIONS", 16)
    model, lengths = make(), (70, 3, 64, 33)
    caches = [new_cache(model, len(lengths)) for _ in range(2)]
    for cache in caches:
        prompts_read(model, cache, lengths)
    fused, plainly = steps_read(FusedModel(model), caches[0], lengths, 2), steps_read(model, caches[1], lengths, 2)
    torch.testing.assert_close(fused, plainly, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts() -> None:
    model, lengths = make(), (9, 3, 7)
    fused, plainly = (prompts_read(way, new_cache(model, 3), lengths) for way in (FusedModel(model), model))
    for found, wanted in zip(fused, plainly, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_of_ranges() -> None:
    model = make()
    hidden = torch.randn(2, 3, 24, device=DEVICE)
    ids = [range(4, 9), range(30, 50)]
    for some in (hidden, hidden[:, 1], hidden[:1, 1]):  # of many rows, of few that do not lie side by side, of one
        torch.testing.assert_close(FusedModel(model).logits(some, ids), model.logits(some, ids))


@torch.no_grad()
def test_whole_sequences() -> None:
    model = make(num_layers=3)
    tokens = torch.arange(24, device=DEVICE).view(2, 12)
    places = torch.arange(12, device=DEVICE).expand_as(tokens)
    torch.testing.assert_close(FusedModel(model).hidden(tokens, places), model.hidden(tokens, places))


@torch.no_grad()
def test_fp16_is_as_near_to_fp32_as_single_operations_are() -> None:
    # A residual stream of 10⁴, as PB-Relax is for: its squares are beyond fp16.
    exact, half = make(), make(torch.float16)
    for model in (exact, half):
        model.token_embedding.weight.mul_(1e4)
    found = []
    for way, model in ((exact, exact), (half, half), (FusedModel(half), half)):
        cache = new_cache(model, 1)
        prompts_read(way, cache, [3])
        found.append(steps_read(way, cache, [3], 3))
    wanted, plainly, fused = found
    assert near(fused, wanted, 3e-3)
    assert near(plainly, wanted, 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [50, 3000])  # less than a program reads at once, and more
def test_cross_entropies(dtype: torch.dtype, vocabulary: int) -> None:
    from cogview_pl.kernels.transformer_triton import cross_entropies

    logits = (20 * torch.randn(4, vocabulary, device=DEVICE)).to(dtype)
    targets, weights = torch.tensor([0, 7, 49, 3], device=DEVICE), torch.tensor([1.0, 0.5, 0.0, 3.0], device=DEVICE)
    predicted = logits.float().requires_grad_()
    wanted = F.cross_entropy(predicted, targets, reduction="none")
    (weights * wanted).sum().backward()
    found = torch.empty(4, device=DEVICE)
    for gradients in (False, True):
        cross_entropies[(4,)](logits, targets, weights, found, vocabulary, GRADIENTS=gradients, BLOCK=1024)
        torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.float(), predicted.grad, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_weights_in_int8() -> None:
    pytest.importorskip("torchao")
    from cogview_pl.generation.config import Quantization
    from cogview_pl.generation.quantization import quantize

    model = make(hidden_size=32, num_heads=4)
    quantize(model, Quantization.int8)
    assert can_fuse(model)
    caches = [new_cache(model, 2) for _ in range(2)]
    for cache in caches:
        prompts_read(model, cache, [5, 4])
    fused, plainly = steps_read(FusedModel(model), caches[0], [5, 4], 2), steps_read(model, caches[1], [5, 4], 2)
    torch.testing.assert_close(fused, plainly, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"norm": "post"}, {"norm_scope": "tensor"}, {"attention": "pb_relax"}],
    ids=lambda value: str(*value.values()),
)
def test_what_the_kernels_do_not_do(settings: dict[str, str]) -> None:
    assert not can_fuse(make(**settings))


def test_adapters_are_not_in_the_kernels() -> None:
    model = make()
    add_lora(model, LoRAConfig(rank=2, alpha=2.0, targets=[LoRATarget.qkv], merge=False))
    assert not can_fuse(model)
