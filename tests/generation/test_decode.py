"""Decoding a slot gives the ids that full forwards give, independent of the other rows of the batch."""

from __future__ import annotations

import signal

import pytest
import torch

from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode, stream, uniforms
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, TextSlot
from tests.make_models import make_transformer

from .small_model import TWO_IMAGES, VOCABULARY

LAYOUTS = {
    "text_image": Template(
        "[ROI1] {text} [BASE] [BOI1] {image:4x4} [EOI1]",
        target="image",
        loss={},
        vocabulary=VOCABULARY,
        text_length=8,
    ),
    "two_images": TWO_IMAGES,
    "image_to_image": Template(
        "[ROI1] {text} [BASE] [BOI1] {source:2x2} [EOI1] [ROI2] [BASE] [BOI2] {image:2x2} [EOI2]",
        target="image",
        loss={},
        vocabulary=VOCABULARY,
        text_length=8,
        restart_positions_at="[ROI2]",
    ),
    "image_text": Template(
        "[BASE] [BOI1] {image:2x2} [EOI1] [ROI1] {text} [SEP]",
        target="text",
        loss={},
        vocabulary=VOCABULARY,
        text_length=12,
    ),
    "text_last": Template(
        "[BASE] [BOI1] {image:2x2} [EOI1] [ROI1] {text}",
        target="text",
        loss={},
        vocabulary=VOCABULARY,
        text_length=12,
    ),
}
TEXTS: tuple[list[int], ...] = ([3, 1, 4, 1, 5], [], [9, 2, 6, 5, 3, 5, 8, 9], [7])


def make(**changes: object) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_positions": 40, "init_std": 0.3}
    return make_transformer(vocab_size=VOCABULARY.size, **{**sizes, **changes}).eval()  # type: ignore[arg-type]


def prompts_of(template: Template) -> list[list[int]]:
    """One per entry of TEXTS: different lengths where text comes first, different images otherwise."""
    return [
        template.prompt({"text": text, "small": small, "source": small, "image": [i, 2 * i, 3, 39 - i]})
        for i, text in enumerate(TEXTS)
        for small in [[(5 * i + j) % 40 for j in range(4)]]
    ]


@torch.no_grad()
def greedy(model: Transformer, template: Template, prompt: list[int]) -> list[int]:
    """Argmax over the allowed ids, one full forward without a cache per token."""
    allowed = [i for span in template.allowed(template.target) for i in span]
    end = template.end_of_text(template.target) if isinstance(template.target, TextSlot) else None
    tokens = list(prompt)
    for _ in range(template.target.length):
        logits = model(torch.tensor([tokens]), torch.tensor([template.positions(tokens)]))[0, -1, allowed]
        if allowed[logits.argmax()] == end:
            break
        tokens.append(allowed[logits.argmax()])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", list(LAYOUTS))
class TestEveryLayout:
    @pytest.mark.parametrize("attention", ["fused", "pb_relax"])
    def test_greedy_equals_full_forwards(self, name: str, attention: str) -> None:
        template, model = LAYOUTS[name], make(attention=attention)
        prompts = prompts_of(template)
        rows = decode(model, template, prompts, seeds=[0] * 4, sampling=Sampling(temperature=0))
        assert rows == [greedy(model, template, prompt) for prompt in prompts]

    def test_a_row_depends_on_its_prompt_and_seed_only(self, name: str) -> None:
        template, model = LAYOUTS[name], make()
        prompts, seeds = prompts_of(template), [11, 12, 13, 14]
        together = decode(model, template, prompts, seeds=seeds, sampling=Sampling())
        alone = [
            decode(model, template, [prompt], seeds=[seed], sampling=Sampling())[0]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        assert together == alone
        order = [2, 0, 3, 1]
        shuffled = decode(
            model, template, [prompts[i] for i in order], seeds=[seeds[i] for i in order], sampling=Sampling()
        )
        assert shuffled == [together[i] for i in order]

    def test_seeds(self, name: str) -> None:
        template, model = LAYOUTS[name], make()
        prompts = [prompts_of(template)[0]] * 3
        first = decode(model, template, prompts, seeds=[5, 6, 5], sampling=Sampling())
        assert first[0] == first[2] != first[1]
        assert decode(model, template, prompts, seeds=[5, 6, 5], sampling=Sampling()) == first

    def test_prompts_of_one_seed_are_sampled_independently(self, name: str) -> None:
        # At a high temperature all candidates are alike: only the random numbers tell the rows apart.
        template, model = LAYOUTS[name], make()
        rows = decode(model, template, prompts_of(template), seeds=[5] * 4, sampling=Sampling(temperature=1e6))
        assert len({tuple(row) for row in rows}) == 4

    def test_only_allowed_ids(self, name: str) -> None:
        template, model = LAYOUTS[name], make()
        slot_ids = template.allowed(template.target)[0]  # without the closing token of a text
        with torch.no_grad():  # forbidden ids are by far the most likely
            forbidden = [
                i for i in range(VOCABULARY.size) if not any(i in r for r in template.allowed(template.target))
            ]
            model.token_embedding.weight[forbidden] *= 30
        rows = decode(model, template, prompts_of(template) * 8, seeds=range(32), sampling=Sampling(temperature=3.0))
        sampled = {token for row in rows for token in row}
        assert sampled <= set(slot_ids)
        assert len(sampled) > len(slot_ids) // 2

    def test_length_of_rows(self, name: str) -> None:
        template, model = LAYOUTS[name], make()
        rows = decode(model, template, prompts_of(template) * 4, seeds=range(16), sampling=Sampling(temperature=5.0))
        lengths = {len(row) for row in rows}
        if name == "image_text":
            assert max(lengths) <= template.target.length
            assert len(lengths) > 2  # closed at different places
        else:
            assert lengths == {template.target.length}


class TestText:
    template = LAYOUTS["image_text"]

    def decode_with_likely_end(self, gain: float) -> tuple[list[list[int]], int]:
        model = make()
        with torch.no_grad():  # the closing token's row points along the final norm's bias
            end = VOCABULARY.command("[SEP]")
            model.final_norm.bias.copy_(torch.nn.functional.normalize(torch.randn(32), dim=0))
            model.token_embedding.weight[end] = gain * model.final_norm.bias
        steps = []
        rows = decode(
            model,
            self.template,
            prompts_of(self.template),
            seeds=range(4),
            sampling=Sampling(),
            on_step=lambda: steps.append(1),
        )
        return rows, len(steps)

    def test_stops_at_the_closing_token(self) -> None:
        rows, _ = self.decode_with_likely_end(gain=1000.0)
        assert any(len(row) < self.template.target.length for row in rows)
        assert all(token in VOCABULARY.text_tokens for row in rows for token in row)

    def test_stops_computing_when_all_rows_are_closed(self) -> None:
        rows, steps = self.decode_with_likely_end(gain=20.0)
        assert max(map(len, rows)) < self.template.target.length
        assert steps == max(map(len, rows)) + 1

    def test_closed_rows_do_not_disturb_open_ones(self) -> None:
        model, prompts = make(), prompts_of(self.template)
        for seeds in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]):
            together = decode(model, self.template, prompts, seeds=seeds, sampling=Sampling(temperature=3.0))
            for prompt, seed, row in zip(prompts, seeds, together, strict=True):
                alone = decode(model, self.template, [prompt], seeds=[seed], sampling=Sampling(temperature=3.0))
                assert alone == [row]


def test_frequencies_of_the_first_token() -> None:
    # Many seeds of one prompt against the model's own probabilities.
    model = make(init_std=0.15)
    template = Template(
        "[ROI1] {text} [BASE] [BOI1] {image:1x1} [EOI1]", target="image", loss={}, vocabulary=VOCABULARY, text_length=8
    )
    prompt = template.prompt({"text": [1, 2]})
    rows = decode(model, template, [prompt] * 8000, seeds=range(8000), sampling=Sampling())
    observed = torch.bincount(torch.tensor(rows)[:, 0], minlength=40)
    with torch.no_grad():
        expected = 8000 * model(torch.tensor([prompt]))[0, -1, :40].double().softmax(-1)
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 72.1  # 99.9 % quantile, 39 degrees of freedom


def test_every_step_is_reported() -> None:
    steps = []
    template = LAYOUTS["text_image"]
    decode(make(), template, prompts_of(template), seeds=range(4), sampling=Sampling(), on_step=lambda: steps.append(1))
    assert len(steps) == 16


def test_as_many_seeds_as_prompts() -> None:
    template = LAYOUTS["text_image"]
    with pytest.raises(ValueError, match="zip"):
        decode(make(), template, prompts_of(template), seeds=[1], sampling=Sampling())


class TestKnownTokens:
    template = LAYOUTS["text_image"]

    def decoded(self, known_BT: torch.Tensor) -> list[list[int]]:
        prompts = prompts_of(self.template)
        return decode(make(), self.template, prompts, seeds=range(4), sampling=Sampling(), known=known_BT)

    def test_decoding_ends_with_them(self) -> None:
        # Each place has the random number that it has when the whole slot is decoded.
        whole = self.decoded(torch.full((4, 16), TO_SAMPLE))
        assert self.decoded(torch.full((4, 5), TO_SAMPLE)) == [row[:5] for row in whole]
        known_BT = torch.tensor(whole)
        known_BT[:, [0, 3, 4, 9, 15]] = TO_SAMPLE
        assert self.decoded(known_BT) == whole

    def test_all_of_them(self) -> None:
        known_BT = torch.arange(32).view(4, 8)
        assert self.decoded(known_BT) == known_BT.tolist()

    @pytest.mark.parametrize("row", [0, 3])
    def test_other_places_in_one_row_are_refused(self, row: int) -> None:
        known_BT = torch.full((4, 16), TO_SAMPLE)
        known_BT[:, 0] = 0  # an id, not a mark
        known_BT[row, 1] = 0
        with pytest.raises(ValueError, match="the same tokens must be known in all rows"):
            self.decoded(known_BT)


def test_random_numbers_are_those_of_every_version() -> None:
    """A seed gives the same image in years and on other machines: recorded numbers."""
    found = uniforms([5, 6, 5], [[1, 2], [1, 2], [3]], 3)
    recorded = [
        [0.5491594076156616, 0.4179961681365967, 0.12811875343322754],
        [0.7665547132492065, 0.216977059841156, 0.5464600324630737],
    ]
    assert found[:2].tolist() == recorded
    assert not (found[2] == found[0]).any()
    assert uniforms([5], [(1, 2)], 2).tolist() == [recorded[0][:2]]
    assert stream(5, [1, 2]).initial_seed() == 9318014781254493890


def test_stops_between_two_tokens_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    template, steps = LAYOUTS["text_image"], []

    def third_step() -> None:
        steps.append(1)
        if len(steps) == 3:
            monkeypatch.setattr(SIGNALS, "received", signal.SIGTERM)

    with pytest.raises(Stopped):
        decode(make(), template, prompts_of(template), seeds=range(4), sampling=Sampling(), on_step=third_step)
    assert len(steps) == 3
