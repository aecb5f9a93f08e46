"""Caption losses against the model's own probabilities, one full forward for each pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.rerank import caption_log_likelihoods, caption_losses
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template

from .small_model import TWO_IMAGES, VOCABULARY, small_model

TEXTS: list[list[int]] = [[3, 1, 4], [], [9, 2, 6, 5, 3], [7]]  # the third is as long as its slot
CODES = torch.tensor([[[5, 0], [39, 2]], [[1, 1], [1, 1]], [[8, 30], [2, 3]], [[0, 1], [2, 3]]])


def layout(closing: str, restart: str | None = None) -> Template:
    return Template(
        f"[BASE] [BOI1] {{image:2x2}} [EOI1] [ROI1] {{text}} {closing}",
        target="text",
        loss={},
        vocabulary=VOCABULARY,
        text_length=5,
        restart_positions_at=restart,
    )


LAYOUTS = {"closed": layout("[SEP]"), "open": layout(""), "restarting": layout("[SEP]", "[ROI1]")}


@torch.no_grad()
def by_full_forward(model: Transformer, template: Template, text: list[int], codes: Tensor) -> tuple[float, int]:
    """Sum and number of the log-likelihoods of the text tokens, and of [SEP] where the layout has it."""
    tokens = [VOCABULARY.command(word) for word in ("[BASE]", "[BOI1]")] + codes.flatten().tolist()
    tokens += [VOCABULARY.command(word) for word in ("[EOI1]", "[ROI1]")]
    start = len(tokens)
    tokens += [VOCABULARY.codebook_size + text_token for text_token in text]
    if template.layout.endswith("[SEP]"):
        tokens.append(VOCABULARY.command("[SEP]"))
    logits = model(torch.tensor([tokens]), torch.tensor([template.positions(tokens)]))[0].double()
    logits[:, : VOCABULARY.codebook_size] = float("-inf")
    chances = logits.log_softmax(-1)
    return sum(chances[place - 1, tokens[place]].item() for place in range(start, len(tokens))), len(tokens) - start


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_full_forwards(name: str) -> None:
    template = LAYOUTS[name]
    model = small_model(template, init_std=0.3)
    expected = [by_full_forward(model, template, t, c) for t, c in zip(TEXTS, CODES, strict=True)]
    sums, counts = caption_log_likelihoods(model, template, TEXTS, CODES)
    torch.testing.assert_close(sums, torch.tensor([total for total, _ in expected]))
    assert counts.tolist() == [count for _, count in expected]
    assert counts.tolist() == [len(text) + (name != "open") for text in TEXTS]
    losses = caption_losses(model, template, TEXTS, CODES)
    wanted = [-total / max(count, 1) for total, count in expected]
    torch.testing.assert_close(losses, torch.tensor(wanted))
    assert (losses[[0, 2, 3]] > 0.5).all()  # texts that the model was not trained on


def test_a_text_without_tokens_costs_nothing() -> None:
    template = LAYOUTS["open"]
    assert caption_losses(small_model(template, init_std=0.3), template, [[]], CODES[:1]).tolist() == [0.0]


def test_a_text_longer_than_its_slot() -> None:
    template = LAYOUTS["closed"]
    with pytest.raises(UserError, match="rerank: a text has 6 tokens, the model's text slot holds 5"):
        caption_losses(small_model(template, init_std=0.3), template, [[1], [2] * 6], CODES[:2])


def test_a_layout_that_writes_no_text_about_an_image() -> None:
    with pytest.raises(UserError, match="does not write one text about one image"):
        caption_losses(small_model(TWO_IMAGES, init_std=0.3), TWO_IMAGES, [[1]], CODES[:1])


def test_as_many_texts_as_images() -> None:
    template = LAYOUTS["closed"]
    with pytest.raises(ValueError, match="zip"):
        caption_losses(small_model(template, init_std=0.3), template, [[1], [2]], CODES[:1])
