"""Logits of decoding states after steps, against full forwards without a cache.

Shapes: B rows, L tokens, n allowed ids.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Algorithm, Sampling
from cogview_pl.generation.engine.decode_state import DecodeState, check_sampling
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template

from ..small_model import TWO_IMAGES, VOCABULARY, small_model

LAST = Template(
    "[ROI1] {text} [BASE] [BOI1] {image:3x3}", target="image", loss={}, vocabulary=VOCABULARY, text_length=5
)
"""The slot ends with the last position."""
TEXTS: tuple[list[int], ...] = ([3, 1, 4, 1, 5], [], [9, 2])
CODES_BL = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [30, 1, 2, 3, 4, 5, 6, 7, 8], [39] * 4 + [0] * 5])


@torch.no_grad()
def full_logits(model: Transformer, template: Template, prompt: list[int], codes: list[int]) -> Tensor:
    """Logits of the next code after a prompt and its codes."""
    tokens = [*prompt, *codes]
    return model(torch.tensor([tokens]), torch.tensor([template.positions(tokens)]))[0, -1, : VOCABULARY.codebook_size]


class Reader:
    """A decoding state of TEXTS, and the logits that it ought to give."""

    def __init__(self, template: Template, guidance: float, capacity: int = 9) -> None:
        self.template, self.guidance = template, guidance
        self.model = small_model(template, init_std=0.3)
        self.prompts, self.empty = (
            [template.prompt({"text": text, "small": [1, 2, 3, 4]}) for text in texts] for texts in (TEXTS, [[]] * 3)
        )
        sampling = Sampling(guidance=guidance)
        with torch.no_grad():
            self.state, hidden_RD = DecodeState.after_prompts(
                self.model, template, self.prompts, self.empty, capacity, sampling
            )
            self.first_logits = self.state.logits(hidden_RD)

    def read(self, tokens_BL: Tensor) -> Tensor:
        """Logits `(B, n)` after L more tokens."""
        hidden_RD = self.state.step(tokens_BL)[:, -1]
        self.state.advance(tokens_BL.shape[1])
        return self.state.logits(hidden_RD)

    def expected(self, codes: list[list[int]]) -> Tensor:
        """Logits `(B, n)` after the codes of each row."""
        found = []
        for prompt, empty, own in zip(self.prompts, self.empty, codes, strict=True):
            with_text = full_logits(self.model, self.template, prompt, own)
            without = full_logits(self.model, self.template, empty, own)
            found.append(without + self.guidance * (with_text - without))
        return torch.stack(found)

    def check(self, logits: Tensor, codes: list[list[int]]) -> None:
        torch.testing.assert_close(logits, self.expected(codes), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("template", [LAST, TWO_IMAGES], ids=["one_image", "restarting"])
@torch.no_grad()
def test_steps_and_advances(template: Template, guidance: float) -> None:
    reader = Reader(template, guidance)
    state, codes = reader.state, CODES_BL.tolist()
    assert state.longest == max(map(len, reader.prompts))
    reader.check(reader.first_logits, [[], [], []])
    reader.check(reader.read(CODES_BL[:, :2]), [row[:2] for row in codes])

    drafts = state.logits(state.step(CODES_BL[:, 2:5]))
    for ahead in range(3):
        reader.check(drafts[:, ahead], [row[: 3 + ahead] for row in codes])
    state.advance([2, 0, 3])  # of the three drafts
    read = [codes[0][:4], codes[1][:2], codes[2][:5]]
    following = torch.tensor([[33], [34], [35]])
    reader.check(reader.read(following), [[*own, new] for own, new in zip(read, [33, 34, 35], strict=True)])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_drafts_after_the_end_of_the_sequence(guidance: float) -> None:
    reader = Reader(LAST, guidance, capacity=12)
    ahead = torch.cat([CODES_BL, CODES_BL[:, :3]], 1)  # the longest row ends with the ninth code
    drafts = reader.state.logits(reader.state.step(ahead))
    for place in range(9):
        reader.check(drafts[:, place], [row[: place + 1] for row in CODES_BL.tolist()])


def test_what_a_maximum_over_the_whole_tensor_excludes() -> None:
    model = small_model(LAST, init_std=0.3, norm_scope="tensor")
    check_sampling(model, Sampling())
    with pytest.raises(UserError, match=r"sampler\.guidance=2\.5 pairs prompts of different lengths"):
        check_sampling(model, Sampling(guidance=2.5))
    with pytest.raises(UserError, match=r"sampler\.algorithm=jacobi takes back keys"):
        check_sampling(model, Sampling(algorithm=Algorithm.jacobi))
    with pytest.raises(UserError, match=r"sampler\.guidance=0 pairs"):
        DecodeState.after_prompts(model, LAST, [LAST.prompt({"text": []})], None, 9, Sampling(guidance=0.0))
    check_sampling(small_model(LAST, init_std=0.3), Sampling(guidance=2.5, algorithm=Algorithm.jacobi))
