"""Weights in 8 and 4 bits: close to the original model, and decoded correctly."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.generation.decode import decode
from cogview_pl.generation.quantization import matrix_bytes, quantize
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary
from tests.make_models import make_transformer

VOCABULARY = Vocabulary(codebook_size=40, text_vocab_size=12)
TEMPLATE = Template(
    "[ROI1] {text} [BASE] [BOI1] {image:4x4} [EOI1]", target="image", loss={}, vocabulary=VOCABULARY, text_length=8
)
PROMPTS = [TEMPLATE.prompt({"text": text}) for text in ([3, 1, 4, 1, 5], [], [9, 2])]


def make(hidden_size: int = 64) -> Transformer:
    torch.manual_seed(0)
    sizes = {
        "num_layers": 2,
        "hidden_size": hidden_size,
        "num_heads": 4,
        "num_positions": TEMPLATE.num_positions,
        "init_std": hidden_size**-0.5,
    }
    return make_transformer(vocab_size=VOCABULARY.size, **sizes).eval()  # type: ignore[arg-type]


@pytest.fixture
def quantized() -> tuple[Transformer, Transformer]:
    """A model and the same in int8."""
    pytest.importorskip("torchao")
    model = make()
    small = deepcopy(model)
    quantize(small, Quantization.int8)
    return model, small


@pytest.mark.parametrize(
    "length", [4, 400], ids=["few_rows", "many_rows"]
)  # many are oneDNN's in `cogview_pl.kernels.cpu_linear`
@torch.no_grad()
def test_int8_is_near_fp32(quantized: tuple[Transformer, Transformer], length: int) -> None:
    model, small = quantized
    tokens = torch.arange(length).remainder(VOCABULARY.size)[None]
    positions = torch.arange(length).remainder(TEMPLATE.num_positions)[None]
    exact, found = model(tokens, positions), small(tokens, positions)
    error = (found - exact).norm() / exact.norm()
    assert 0 < error < 0.03  # one product is off by 0.006 of its norm, and eight follow each other


def test_int8_holds_the_blocks_in_one_byte_and_leaves_the_rest(quantized: tuple[Transformer, Transformer]) -> None:
    model, small = quantized
    for (name, plain), (_, part) in zip(model.named_modules(), small.named_modules(), strict=True):
        if isinstance(part, nn.Linear):
            assert part.weight.qdata.dtype == torch.int8, name
        elif isinstance(part, nn.Embedding):
            assert torch.equal(part.weight, plain.weight)


@torch.no_grad()
def test_decoding_takes_the_quantized_weights(quantized: tuple[Transformer, Transformer]) -> None:
    # Decoding with cache and packed weights agrees with a full forward pass of the quantized model.
    _, small = quantized
    rows = decode(small, TEMPLATE, PROMPTS, seeds=[0] * 3, sampling=Sampling(temperature=0))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens = prompt + row
        logits = small(torch.tensor([tokens]), torch.tensor([TEMPLATE.positions(tokens)]))[
            0, :, : VOCABULARY.codebook_size
        ]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row


def test_none_changes_nothing() -> None:
    model = make()
    before = deepcopy(model.state_dict())
    quantize(model, None)
    torch.testing.assert_close(model.state_dict(), before)


def test_unavailable_formats() -> None:
    with pytest.raises(UserError, match="int4 needs a CUDA GPU"):
        quantize(make(), Quantization.int4)
    with pytest.raises(UserError, match=r"fp16.*bf16"):
        quantize(make().half(), Quantization.int8)


def test_torchao_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r'needs torchao; pip install "cogview_pl\[quant\]"'):
        quantize(make(), Quantization.int8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@torch.no_grad()
def test_int4_is_near_bf16() -> None:
    pytest.importorskip("torchao")
    model = make(hidden_size=256).to("cuda", torch.bfloat16)
    small = deepcopy(model)
    quantize(small, Quantization.int4)
    tokens = torch.arange(20, device="cuda")[None]
    exact = model(tokens).float()
    assert 0 < (small(tokens).float() - exact).norm() / exact.norm() < 0.3


def test_bytes_of_a_block() -> None:
    assert matrix_bytes(Quantization.int8, 96) == 12 * 96**2
    assert matrix_bytes(Quantization.int4, 2048) == 12 * 2048**2 * (0.5 + 4 / 128)
    assert matrix_bytes(Quantization.int4, 2560) == 2560 * (8 * 3072 + 4 * 2560) * (
        0.5 + 4 / 128
    )  # 2560 inputs are padded to 3072
