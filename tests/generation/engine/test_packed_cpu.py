"""Packed weights: the results of plain ones, whichever of the two this machine decodes with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogview_pl.generation.config import Engine
from cogview_pl.generation.engine.forms import decoding_form
from cogview_pl.generation.engine.packed_cpu import PackedLinear, can_pack
from tests.make_models import make_transformer

needs_bf16 = pytest.mark.skipif(
    not can_pack(torch.empty(0, dtype=torch.bfloat16), 4), reason="oneDNN has no bf16 on this processor"
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 30])  # packed for four
def test_product(rows: int, gelu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(2, rows, 24)
    weight, bias, x = weight.to(dtype), bias.to(dtype), x.to(dtype)
    with torch.inference_mode():
        found = PackedLinear(weight, bias, 4, gelu=gelu)(x)
        wanted = F.linear(x.double(), weight.double(), bias.double())
        if gelu:
            wanted = F.gelu(wanted, approximate="tanh")
    assert found.dtype == dtype
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < TOLERANCES[dtype]


@needs_bf16
def test_a_model_decodes_as_it_reads() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_positions": 20}
    model = make_transformer(**sizes, dropout=0.3).bfloat16().eval()
    tokens, positions = torch.randint(60, (2, 20)), torch.arange(20).expand(2, -1)
    with torch.inference_mode():
        wanted = model.logits(model.hidden(tokens, positions), [range(10, 40)])
        decoding, cache = decoding_form(model, 2, [range(10, 40)], Engine.torch), model.new_cache(2, 20)
        found = []
        for place in range(20):
            step = slice(place, place + 1)
            found.append(decoding.logits(decoding.hidden(tokens[:, step], positions[:, step], cache), [range(10, 40)]))
            cache.advance(1)
    assert (torch.cat(found, 1) - wanted).abs().max() < 0.05 * wanted.abs().max()
