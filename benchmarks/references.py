"""References: Hugging Face's GPT-2, decoding of the original program, bare matrix products, and reading the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import Work
from benchmarks.settings import DEVICE, DTYPES, IMAGE_CODES, PROMPT, SHAPES, TEXT, TOP_K, text_to_image
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.sampling import probabilities


def hugging_face(shape: str, vocabulary: int) -> nn.Module:
    """GPT-2 of the same shape; needs transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, hidden_size, heads = SHAPES[shape]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=PROMPT + 1024 + 1,
        n_embd=hidden_size,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    return GPT2LMHeadModel(config).eval().to(DEVICE)  # type: ignore[no-any-return]


def hugging_face_decode(shape: str, dtype: str, batch: int, new: int, vocabulary: int) -> Work:
    """`generate` with its dynamic cache and the same sampling."""
    model = hugging_face(shape, vocabulary).to(DTYPES[dtype])
    prompt = torch.randint(0, vocabulary, (batch, PROMPT), device=DEVICE)
    arguments = dict(do_sample=True, top_k=TOP_K, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)  # type: ignore[operator]


def original_decode(shape: str, dtype: str, batch: int, grid: int) -> Work:
    """Decoding of the original program: every step recomputes keys and values of the context, and samples from all ids.

    Hidden states are cached. Logits, top-k and softmax run over the whole vocabulary, and all ids except codes are
    masked. Matrix products run through this project's `Linear`, so this is faster than the original program.
    """
    model, template = text_to_image(shape, grid, norm_scope="tensor")
    model = model.to(DTYPES[dtype])
    prompt_BL = torch.tensor([template.prompt({"text": TEXT})] * batch, device=DEVICE)
    sampling = Sampling(top_k=TOP_K)

    @torch.inference_mode()
    def run() -> Tensor:
        memory = model.new_cache(batch, 0)
        tokens_BL, start, drawn = prompt_BL, 0, []
        for _ in range(grid * grid):
            positions_BL = torch.arange(start, start + tokens_BL.shape[1], device=DEVICE).expand_as(tokens_BL)
            logits_BV = model.logits(model.hidden(tokens_BL, positions_BL, memory)[:, -1])
            memory.advance(tokens_BL.shape[1])
            start += tokens_BL.shape[1]
            logits_BV[:, IMAGE_CODES:] = float("-inf")
            tokens_BL = torch.multinomial(probabilities(logits_BV, sampling), 1)
            drawn.append(tokens_BL)
        return torch.cat(drawn, 1)

    return run


def bare_linears(shape: str, dtype: str, batch: int) -> Work:
    """Only the matrix products of a step, in eager torch."""
    weights = _weights(shape, dtype)
    narrow = torch.randn(batch, weights[0].shape[1]).to(DEVICE, DTYPES[dtype])
    wide = torch.randn(batch, 4 * narrow.shape[1]).to(DEVICE, DTYPES[dtype])

    @torch.inference_mode()
    def run() -> None:
        for weight in weights:
            F.linear(narrow if weight.shape[1] == narrow.shape[1] else wide, weight)

    return run


def stream(shape: str, dtype: str, batch: int, new: int, *, int8: bool = False) -> Work:
    """Read all data of a step once with all threads: a lower bound for the time of a step."""
    memory: Tensor = torch.ones(step_bytes(shape, dtype, batch, new, int8=int8) // 4, device=DEVICE)
    return memory.sum


def step_bytes(shape: str, dtype: str, batch: int, new: int, *, int8: bool = False) -> int:
    """Fewest bytes that a step reads: matrices (1 byte per weight with `int8`), head of the codes, mean KV cache."""
    layers, hidden_size, _ = SHAPES[shape]
    size = DTYPES[dtype].itemsize
    matrices = 12 * layers * hidden_size**2 * (1 if int8 else size)
    cache = batch * 2 * layers * hidden_size * (PROMPT + new // 2)
    return matrices + (IMAGE_CODES * hidden_size + cache) * size


def _weights(shape: str, dtype: str) -> list[Tensor]:
    layers, hidden_size, _ = SHAPES[shape]
    sizes = [
        (3 * hidden_size, hidden_size),
        (hidden_size, hidden_size),
        (4 * hidden_size, hidden_size),
        (hidden_size, 4 * hidden_size),
    ] * layers
    return [torch.randn(size).to(DEVICE, DTYPES[dtype]) for size in [*sizes, (IMAGE_CODES, hidden_size)]]
