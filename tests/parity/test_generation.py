"""Greedy ids of all recorded runs, by our own templates and samplers, in `compat: official`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_pl.checkpoints.released import load_transformer
from cogview_pl.generation.config import Engine, Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode
from cogview_pl.generation.sampling import probabilities
from cogview_pl.generation.super_resolution.upscale import magnify
from cogview_pl.generation.super_resolution.windows import windows
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary

from .conftest import Records

GREEDY = Sampling(temperature=0)
SMALL = "sampling/cases.safetensors", "sampling/checkpoint", "sampling/meta.json"
FULL = "sampling/cases_full_vocab.safetensors", "transformer/checkpoint", "transformer/meta.json"
LAYOUTS = {  # restart token and target per layout; the text slot of a prompt is written out, so its length is free
    "text2image": ("[ROI1] {text} [BASE] [BOI1] {image:32x32} [EOI1]", "image", None),
    "image2text": ("[BASE] [BOI1] {image:32x32} [EOI1] [ROI1] {text}", "text", None),
    "low_level_sr": (
        "[ROI1] {text} [BASE] [BOI1] {small:16x16} [EOI1] [ROI2] [POS0] [BASE] [BOI2] {large:32x32} [EOI2]",
        "large",
        "[ROI2]",
    ),
}


def template(layout: str, vocabulary: Vocabulary, text_length: int) -> Template:
    text, target, restart = LAYOUTS[layout]
    return Template(
        text,
        target=target,
        loss={},
        vocabulary=vocabulary,
        text_length=text_length,
        restart_positions_at=restart,
        restart_after_token=restart is not None,
    )


def load(parity: Records, files: tuple[str, str, str], case: str, norm_scope: str) -> tuple[Transformer, Vocabulary]:
    """The model of a case; in the `outlier` cases one row of its table is made large."""
    meta = parity.json(files[2])
    sizes = meta["config"]
    model = load_transformer(
        parity / files[1], num_heads=sizes["num_attention_heads"], norm_scope=NormScope(norm_scope)
    )
    if case.startswith("outlier"):
        with torch.no_grad():
            model.token_embedding.weight[meta["outlier"]["id"]] *= meta["outlier"]["factor"]
    return model, Vocabulary(sizes["n_img"], sizes["n_text"])


def run(
    model: Transformer,
    vocabulary: Vocabulary,
    case: str,
    records: Mapping[str, Tensor],
    sampling: Sampling = GREEDY,
) -> tuple[Tensor, Tensor]:
    """What we generate for a recorded row, and what the original did, both `(B, T)`."""
    row, output = records[f"{case}.sequence"].flatten(), records[f"{case}.output"]
    start = int((row < 0).nonzero()[0])
    layout = template(next(name for name in LAYOUTS if name in case), vocabulary, len(row) - start)
    known = row[start:].clamp(min=TO_SAMPLE).repeat(len(output), 1)
    prompts = [row[:start].tolist()] * len(output)
    filled = decode(model, layout, prompts, seeds=[0] * len(output), sampling=sampling, known=known)
    return torch.tensor(filled), output[:, start:]


CASES = ["text2image", "text2image_beams", "image2text", "low_level_sr", "outlier_text2image", "outlier_low_level_sr"]
OF_FULL = ["text2image", "image2text"]


@pytest.mark.parametrize(
    "files, case",
    [
        *((SMALL, case) for case in CASES),
        *(pytest.param(FULL, case, marks=pytest.mark.all_records) for case in OF_FULL),
    ],
)
def test_greedy_ids(parity: Records, files: tuple[str, str, str], case: str) -> None:
    model, vocabulary = load(parity, files, case, "tensor")
    records = parity.tensors(files[0])
    found, recorded = run(model, vocabulary, case, records)
    assert torch.equal(found, recorded)


@pytest.mark.parametrize("case", ["outlier_text2image", "outlier_low_level_sr"])
def test_our_default_agrees_with_its_own_full_forward(parity: Records, case: str) -> None:
    """The original does not, where one position dwarfs the others; a maximum per token makes the difference."""
    model, vocabulary = load(parity, SMALL, case, "token")
    records = parity.tensors(SMALL[0])
    found, recorded = run(model, vocabulary, case, records)
    row = records[f"{case}.sequence"].flatten()
    start = len(row) - found.shape[1]
    whole = torch.cat([row[:start].repeat(len(found), 1), found], 1)
    layout = template(next(name for name in LAYOUTS if name in case), vocabulary, found.shape[1])
    positions = torch.tensor([layout.prompt_positions(ids) for ids in whole.tolist()])
    with torch.inference_mode():
        logits = model(whole, positions)[:, start - 1 : -1, : vocabulary.codes.stop]
    is_open = row[start:] < 0
    assert torch.equal(logits.argmax(-1)[:, is_open], found[:, is_open])
    assert not torch.equal(found, recorded)  # the record is one that can tell


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_step_gives_the_ids_of_torch(parity: Records, case: str) -> None:
    model, vocabulary = load(parity, SMALL, case, "token")
    records = parity.tensors(SMALL[0])
    by_torch, by_compiled = (
        run(model, vocabulary, case, records, Sampling(temperature=0, engine=engine))[0]
        for engine in (Engine.torch, Engine.compiled)
    )
    assert torch.equal(by_compiled, by_torch)


def test_restart_token_keeps_its_position_only_in_compat(parity: Records) -> None:
    recorded = parity.json("positions/meta.json")["generation_feed"]["roi2_in_context"]["calls"][0]
    layout = "[ROI1] {text} [BASE] [BOI1] {small:1x17} [EOI1] [ROI2] [POS0] [BASE] [BOI2] {large:2x34} [EOI2]"
    sizes = parity.json("transformer/meta.json")["config"]
    vocabulary = Vocabulary(sizes["n_img"], sizes["n_text"])
    if vocabulary.command("[ROI2]") not in recorded["tokens"]:
        pytest.skip("the feed is recorded with another vocabulary")
    options: dict[str, Any] = {"target": "large", "loss": {}, "vocabulary": vocabulary, "text_length": 64}
    theirs = Template(layout, **options, restart_positions_at="[ROI2]", restart_after_token=True)
    ours = Template(layout, **options, restart_positions_at="[ROI2]")
    assert theirs.prompt_positions(recorded["tokens"]) == recorded["position_ids"]
    restart = recorded["tokens"].index(vocabulary.command("[ROI2]"))
    assert ours.prompt_positions(recorded["tokens"])[restart] == 0
    assert ours.prompt_positions(recorded["tokens"]) == ours.positions(recorded["tokens"])


@pytest.mark.slow
def test_magnify(parity: Records) -> None:
    records = parity.tensors("sampling/magnify.safetensors")
    model, vocabulary = load(parity, SMALL, "magnify", "tensor")
    text = records["text_tokens"].flatten().tolist()
    text_tokens = [token - vocabulary.text_tokens.start for token in text if token in vocabulary.text_tokens]
    edge = int(records["codes"].numel() ** 0.5)
    layout = template("low_level_sr", vocabulary, len(text_tokens))
    found = magnify(model, layout, [text_tokens], records["codes"].view(1, edge, edge), seeds=[0], sampling=GREEDY)
    assert torch.equal(found.flatten(), records["output"].flatten())


def test_windows_are_those_of_the_original(parity: Records) -> None:
    records = parity.tensors("sampling/magnify.safetensors")
    edge = int(records["codes"].numel() ** 0.5)
    for number, window in enumerate(windows(edge)):
        rows, columns = window.target
        generated = records[f"window{number}.sequence"].flatten()
        region = (rows.stop - rows.start) * (columns.stop - columns.start)
        context = records["text_tokens"].numel() + (edge // 2) ** 2 + 5  # [EOI1] [ROI2] [POS0] [BASE] [BOI2]
        assert len(generated) == context + region


def test_filters(parity: Records) -> None:
    records = parity.tensors("sampling/filters.safetensors")
    for number, setting in enumerate(parity.json("sampling/meta.json")["filters"]):
        logits = records[f"filter{number}.logits"].clone()
        low, high = setting["forbidden"]
        logits[:, low:high] = float("-inf")
        sampling = Sampling(setting["temperature"], setting["top_k"], setting["top_p"] or 1.0)
        found = probabilities(logits, sampling)
        torch.testing.assert_close(found, records[f"filter{number}.probabilities"], atol=1e-6, rtol=0)
