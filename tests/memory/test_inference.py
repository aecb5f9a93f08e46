"""The arithmetic of inference against what the models allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_pl.assembly.model_specs import configured_images
from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.generation.sampling import Sampling, probabilities, sample
from cogview_pl.memory.inference import InferenceModel, decode_images, encode_images
from cogview_pl.memory.trace import LiveBytes, default_dtype
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary

from ..composed import composed

SIZES = {"vocab_size": 400, "num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_positions": 120}
FORMS = {"norm_scope": "token", "attention": "fused"}
ROWS, SIDE = 8, 8


def layout(target: str) -> Template:
    images, text = f"[BOI1] {{image:{SIDE}x{SIDE}}} [EOI1]", "[ROI1] {text} [BASE]"
    parts = f"{text} {images}" if target == "image" else f"{images} {text}"
    return Template(parts, target=target, loss={}, vocabulary=Vocabulary(128, 200), text_length=20)


def size(target: str, dtype: torch.dtype, **more: str) -> InferenceModel:
    settings: dict[str, Any] = {**SIZES, **FORMS, **more}
    return InferenceModel(settings, layout(target), vqvae={}, edge=0, dtype=dtype)


def transformer(dtype: torch.dtype, **more: str) -> Transformer:
    with default_dtype(dtype):
        return Transformer(**SIZES, **more).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["fused", "pb_relax"])
def test_prompts_take_what_the_model_allocates(attention: str, dtype: torch.dtype) -> None:
    model, prompt = transformer(dtype, attention=attention), 30
    with torch.inference_mode(), LiveBytes() as live:
        model.hidden(torch.zeros(ROWS, prompt, dtype=torch.long))
    assert size("image", dtype, attention=attention)._forward(ROWS, prompt) == pytest.approx(live.highest, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_takes_what_is_allocated(dtype: torch.dtype) -> None:
    model, template = transformer(dtype), layout("image")
    prompt = len(template.prompt({"text": [0] * 20}))
    with LiveBytes() as live:
        cache = model.new_cache(ROWS, prompt + SIDE**2)
        assert size("image", dtype).decode(ROWS)["kv_cache"] == pytest.approx(live.total, rel=0.001)
    del cache


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.9}])
def test_sampling_takes_what_is_allocated(options: dict[str, Any]) -> None:
    rows = 4000
    with LiveBytes() as live:
        logits = torch.zeros(rows, 128)
        sample(probabilities(logits, Sampling(**options)), torch.zeros(rows))
    model = size("image", torch.float32, attention="fused")
    found = model.decode(rows, sorts="top_p" in options)
    sampled = rows * 128 * (4 + (25 if "top_p" in options else 20))
    assert sampled == pytest.approx(live.highest, rel=0.02)
    assert max(found["logits"], found["activations"]) == max(sampled, model._forward(rows, 23))


def test_scores_take_what_the_model_allocates() -> None:
    model, template = transformer(torch.float32), layout("text")
    scored, ids = template.target.length + 1, template.predicted(template.target)
    with torch.inference_mode(), LiveBytes() as live:
        hidden = model.hidden(torch.zeros(ROWS, template.length - 1, dtype=torch.long))
        model.logits(hidden.flatten(0, 1)[: ROWS * scored].clone(), [ids]).float().log_softmax(-1)
    assert sum(size("text", torch.float32).score(ROWS).values()) == pytest.approx(live.highest, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_images_take_what_the_image_tokenizer_allocates(name: str) -> None:
    images = configured_images(composed("task=vqvae", f"image_tokenizer={name}"))
    model = build_vqvae(images.settings).eval()

    def decoded(codes: Tensor) -> Tensor:
        return (model.decode(codes).clamp(0, 1) * 255).round().to(torch.uint8)

    with torch.inference_mode(), LiveBytes() as live:
        model.encode(torch.zeros(ROWS, 3, images.edge, images.edge, dtype=torch.uint8) / 255)
        encoding = live.restart()["activations"]
        decoded(torch.zeros(ROWS, *images.grid, dtype=torch.long))
        decoding = live.highest
    found = [work(images.settings, batch=ROWS, edge=images.edge) for work in (encode_images, decode_images)]
    assert [sum(parts.values()) for parts in found] == pytest.approx([encoding, decoding], rel=0.07)
