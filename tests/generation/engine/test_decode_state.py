"""What rows say after reading and looking, against full forwards without a cache.

Shapes: B rows, L tokens, n allowed ids.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.engine.decode_state import Rows, check_sampling
from cogview_pl.generation.sampling import Sampling
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
    """Logits of the codes behind a prompt and the codes that follow it."""
    tokens = [*prompt, *codes]
    return model(torch.tensor([tokens]), torch.tensor([template.positions(tokens)]))[0, -1, : VOCABULARY.codebook_size]


class Reader:
    """Rows of TEXTS, and what they ought to say."""

    def __init__(self, template: Template, guidance: float, capacity: int = 9) -> None:
        self.template, self.guidance = template, guidance
        self.model = small_model(template, init_std=0.3)
        self.prompts, self.empty = (
            [template.prompt({"text": text, "small": [1, 2, 3, 4]}) for text in texts] for texts in (TEXTS, [[]] * 3)
        )
        sampling = Sampling(guidance=guidance)
        with torch.no_grad():
            self.rows = Rows(self.model, template, self.prompts, self.empty, capacity, sampling)

    def expected(self, codes: list[list[int]]) -> Tensor:
        """Logits `(B, n)` behind the codes of each row."""
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
def test_reading_looking_and_keeping(template: Template, guidance: float) -> None:
    reader = Reader(template, guidance)
    rows, codes = reader.rows, CODES_BL.tolist()
    assert rows.longest == max(map(len, reader.prompts))
    reader.check(rows.logits(), [[], [], []])
    rows.read(CODES_BL[:, :2])
    reader.check(rows.logits(), [row[:2] for row in codes])

    looked = rows.look(CODES_BL[:, 2:5])
    for ahead in range(3):
        reader.check(looked[:, ahead], [row[: 3 + ahead] for row in codes])
    rows.keep([2, 0, 3])  # of the three looked at
    read = [codes[0][:4], codes[1][:2], codes[2][:5]]
    following = torch.tensor([[33], [34], [35]])
    rows.read(following)
    reader.check(rows.logits(), [[*own, new] for own, new in zip(read, [33, 34, 35], strict=True)])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_looking_behind_the_end_of_the_sequence(guidance: float) -> None:
    reader = Reader(LAST, guidance, capacity=12)
    ahead = torch.cat([CODES_BL, CODES_BL[:, :3]], 1)  # the longest row ends with the ninth code
    looked = reader.rows.look(ahead)
    for place in range(9):
        reader.check(looked[:, place], [row[: place + 1] for row in CODES_BL.tolist()])


def test_what_a_maximum_over_the_whole_tensor_does_not_allow() -> None:
    model = small_model(LAST, init_std=0.3, norm_scope="tensor")
    check_sampling(model, Sampling())
    with pytest.raises(UserError, match=r"sampler\.guidance=2\.5 pairs prompts of different lengths"):
        check_sampling(model, Sampling(guidance=2.5))
    with pytest.raises(UserError, match=r"sampler\.algorithm=jacobi takes back keys"):
        check_sampling(model, Sampling(algorithm="jacobi"))
    with pytest.raises(UserError, match=r"sampler\.guidance=0 pairs"):
        Rows(model, LAST, [LAST.prompt({"text": []})], None, 9, Sampling(guidance=0.0))
    check_sampling(small_model(LAST, init_std=0.3), Sampling(guidance=2.5, algorithm="jacobi"))
