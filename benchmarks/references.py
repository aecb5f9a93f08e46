"""What ours is measured against: Hugging Face's GPT-2, the original's decoding, bare products, reading the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.generation import Sampling, fill
from cogview_pl.transformer import Transformer
from cogview_pl.vocab import Template, Vocabulary

SHAPES = {"S1": (6, 384, 6), "S2": (12, 768, 12)}  # layers, width, heads
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGE_CODES, TEXT_PIECES = 8192, 50_000
PROMPT, TOP_K = 64, 200


def setting(shape: str, grid: int, *, norm_scope: str = "token") -> tuple[Transformer, Template]:
    """A model of one of the shapes with random weights and the released vocabulary, and a text-to-image layout."""
    layers, width, heads = SHAPES[shape]
    vocabulary = Vocabulary(IMAGE_CODES, TEXT_PIECES)
    template = Template(
        f"[ROI1] {{text}} [BASE] [BOI1] {{image:{grid}x{grid}}} [EOI1]",
        target="image",
        loss={"text": 1.0, "image": 1.0},
        vocabulary=vocabulary,
        text_length=PROMPT - 3,
    )
    model = Transformer(
        vocabulary_size=vocabulary.size,
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_positions=template.num_positions,
        norm_scope=norm_scope,
    )
    return model.eval().to(DEVICE), template


def ours(shape: str, dtype: str, batch: int, grid: int, *, norm_scope: str = "token") -> Callable[[], object]:
    """Paint `batch` grids of codes behind prompts of 64 tokens; `norm_scope="tensor"` decodes as the original does."""
    model, template = setting(shape, grid, norm_scope=norm_scope)
    model = model.to(DTYPES[dtype])
    prompts = [template.prompt({"text": list(range(PROMPT - 3))})] * batch
    return lambda: fill(model, template, prompts, seeds=range(batch), sampling=Sampling(top_k=TOP_K))


def hugging_face(shape: str, vocabulary: int) -> nn.Module:
    """GPT-2 of the same shape; needs transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads = SHAPES[shape]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=PROMPT + 1024 + 1,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).eval().to(DEVICE)  # type: ignore[no-any-return]


def hugging_face_decode(shape: str, dtype: str, batch: int, new: int, vocabulary: int) -> Callable[[], object]:
    """`generate` with its dynamic cache and the same sampling."""
    model = hugging_face(shape, vocabulary).to(DTYPES[dtype])
    prompt = torch.randint(0, vocabulary, (batch, PROMPT), device=DEVICE)
    arguments = dict(do_sample=True, top_k=TOP_K, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)  # type: ignore[operator]


def bare_linears(shape: str, dtype: str, batch: int, steps: int) -> Callable[[], object]:
    """The matrix products of the steps and nothing else, as eager torch does them."""
    weights = _weights(shape, dtype)
    narrow = torch.randn(batch, weights[0].shape[1]).to(DEVICE, DTYPES[dtype])
    wide = torch.randn(batch, 4 * narrow.shape[1]).to(DEVICE, DTYPES[dtype])

    @torch.inference_mode()
    def run() -> None:
        for _ in range(steps):
            for weight in weights:
                F.linear(narrow if weight.shape[1] == narrow.shape[1] else wide, weight)

    return run


def stream(shape: str, dtype: str, batch: int, new: int) -> Callable[[], object]:
    """Read what a step must read, weights and mean KV cache, once with all threads: the bound of one step."""
    layers, width, _ = SHAPES[shape]
    size = torch.finfo(DTYPES[dtype]).bits // 8
    cache = batch * 2 * layers * width * (PROMPT + new // 2) * size
    total = sum(weight.numel() * size for weight in _weights(shape, dtype)) + cache
    memory: Tensor = torch.ones(total // 4, device=DEVICE)
    return memory.sum


def _weights(shape: str, dtype: str) -> list[Tensor]:
    layers, width, _ = SHAPES[shape]
    sizes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
    return [torch.randn(size).to(DEVICE, DTYPES[dtype]) for size in [*sizes, (IMAGE_CODES, width)]]
