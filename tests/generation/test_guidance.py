"""Classifier-free guidance agrees with two full forward passes, with and without the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel, build_vqvae
from cogview_pl.errors import UserError
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode
from cogview_pl.generation.pipeline import ImageGenerator
from cogview_pl.generation.sampling import guide
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary
from tests.make_models import make_transformer, quantizer_options

from ..texts import learned_text

NUM_CODES = 40
VOCABULARY = Vocabulary(NUM_CODES, text_vocab_size=12)
TEXTS: tuple[list[int], ...] = ([3, 1, 4, 1, 5], [], [9, 2, 6, 5, 3, 5, 8, 9], [7])
CAPTIONS = ["红色的圆形", "蓝色的心形", "一个绿色的三角形"]
GREEDY = 0.0  # temperature
SOME = slice(2, 9)  # given tokens in the middle of the slot


def make_template(vocabulary: Vocabulary = VOCABULARY, grid: str = "4x4") -> Template:
    layout = f"[ROI1] {{text}} [BASE] [BOI1] {{image:{grid}}} [EOI1]"
    return Template(layout, target="image", loss={}, vocabulary=vocabulary, text_length=8)


TEMPLATE = make_template()
EMPTY = TEMPLATE.prompt({"text": []})
PROMPTS = [TEMPLATE.prompt({"text": text}) for text in TEXTS]


def make(vocabulary: Vocabulary = VOCABULARY, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_positions": 40, "init_std": 0.3}
    return make_transformer(vocab_size=vocabulary.size, **{**sizes, **changes}).eval()


def guided(
    model: Transformer,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    seeds: list[int] | None = None,
    known: Tensor | None = None,
) -> list[list[int]]:
    return decode(
        model,
        TEMPLATE,
        prompts,
        seeds=seeds or list(range(len(prompts))),
        sampling=sampling,
        unconditional=[EMPTY] * len(prompts),
        known=known,
    )


@torch.no_grad()
def by_full_forwards(model: Transformer, prompt: list[int], guidance: float, known: list[int]) -> list[int]:
    """Greedy codes, both sequences anew at every token, without a cache."""
    codes: list[int] = []
    for given in known:
        if given != TO_SAMPLE:
            codes.append(given)
            continue
        with_text, without = (
            model(torch.tensor([start + codes]), torch.tensor([TEMPLATE.positions(start + codes)]))[0, -1, :NUM_CODES]
            for start in (prompt, EMPTY)
        )
        codes.append(int((without + guidance * (with_text - without)).argmax()))
    return codes


def some_known() -> Tensor:
    """Given tokens, other ones in every row, at the start and in the middle of the slot."""
    known_BT = torch.full((len(PROMPTS), TEMPLATE.target.length), TO_SAMPLE)
    known_BT[:, 0] = torch.tensor([5, 6, 7, 8])
    known_BT[:, SOME] = torch.arange(4 * 7).view(4, 7)
    return known_BT


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0, 8.0])
def test_greedy_equals_full_forwards(guidance: float) -> None:
    model = make()
    rows = guided(model, PROMPTS, Sampling(GREEDY, guidance=guidance))
    nothing_known = [TO_SAMPLE] * TEMPLATE.target.length
    assert rows == [by_full_forwards(model, prompt, guidance, nothing_known) for prompt in PROMPTS]
    if guidance > 1:
        assert rows != guided(model, PROMPTS, Sampling(GREEDY))  # a model on which guidance can be seen


def test_filters_come_after_guidance() -> None:
    model = make()
    likeliest = guided(model, PROMPTS, Sampling(GREEDY, guidance=3.0))
    assert guided(model, PROMPTS, Sampling(top_k=1, guidance=3.0)) == likeliest


def test_given_tokens() -> None:
    model, known_BT = make(), some_known()
    rows = guided(model, PROMPTS, Sampling(GREEDY, guidance=3.0), known=known_BT)
    assert [row[SOME] for row in rows] == known_BT[:, SOME].tolist()
    assert rows == [by_full_forwards(model, p, 3.0, k) for p, k in zip(PROMPTS, known_BT.tolist(), strict=True)]


def test_frequencies_of_the_first_token() -> None:
    # Many seeds against the probabilities that both sequences give together.
    model, template = make(init_std=0.15), make_template(grid="1x1")
    prompt = PROMPTS[0]
    sampling = Sampling(temperature=2.0, guidance=2.0)
    rows = decode(model, template, [prompt] * 4000, seeds=range(4000), sampling=sampling, unconditional=[EMPTY] * 4000)
    observed = torch.bincount(torch.tensor(rows)[:, 0], minlength=NUM_CODES)
    with torch.no_grad():
        with_text, without = (model(torch.tensor([ids]))[0, -1, :NUM_CODES].double() for ids in (prompt, EMPTY))
    expected = 4000 * ((2 * with_text - without) / 2).softmax(-1)
    plain = 4000 * (with_text / 2).softmax(-1)
    assert expected.min() > 5
    limit = 72.1  # 99.9 % quantile of chi-square, 39 degrees of freedom
    assert ((observed - expected) ** 2 / expected).sum() < limit
    assert ((observed - plain) ** 2 / plain).sum() > limit


def test_guidance_of_1_is_none() -> None:
    model, sampling = make(), Sampling(top_k=20, guidance=1.0)
    none = decode(model, TEMPLATE, PROMPTS, seeds=range(4), sampling=Sampling(top_k=20))
    assert guided(model, PROMPTS, sampling) == none


def test_guidance_of_0_samples_from_the_prompt_without_text() -> None:
    # The twin embeds token a as the model embeds token b, so the twin's first prompt is the model's second one. Random
    # numbers follow from the first prompt, so both must sample the same codes.
    prompt, other = (TEMPLATE.prompt({"text": [text_token]}) for text_token in (4, 7))
    model, twin = make(), make()
    with torch.no_grad():
        a, b = prompt[1], other[1]
        twin.token_embedding.weight[a] = model.token_embedding.weight[b]
    seeds = [1, 2, 3]
    ignoring = decode(
        model,
        TEMPLATE,
        [prompt] * 3,
        seeds=seeds,
        sampling=Sampling(guidance=0.0),
        unconditional=[other] * 3,
    )
    assert ignoring == decode(twin, TEMPLATE, [prompt] * 3, seeds=seeds, sampling=Sampling())
    assert ignoring != decode(model, TEMPLATE, [prompt] * 3, seeds=seeds, sampling=Sampling())


def test_an_empty_text_is_not_guided() -> None:
    model, empty = make(), [EMPTY] * 3
    plain = decode(model, TEMPLATE, empty, seeds=range(3), sampling=Sampling())
    assert guided(model, empty, Sampling(guidance=5.0)) == plain


def test_a_row_depends_on_its_prompt_and_seed_only() -> None:
    model, sampling, seeds = make(), Sampling(guidance=3.0), [11, 12, 13, 14]
    together = guided(model, PROMPTS, sampling, seeds=seeds)
    alone = [guided(model, [p], sampling, seeds=[s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    order = [2, 0, 3, 1]
    shuffled = guided(model, [PROMPTS[i] for i in order], sampling, seeds=[seeds[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_half_precision_is_guided_in_fp32() -> None:
    # The product with a large guidance must not be rounded to the eight bits of bf16 again.
    with_text, without = (3.0 * torch.randn(4, 50, generator=torch.Generator().manual_seed(i)) for i in range(2))
    halves = with_text.bfloat16(), without.bfloat16()
    found = guide(*halves, 5.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), 5 * halves[0].double() - 4 * halves[1].double())


def test_a_prompt_without_text_is_needed_for_each() -> None:
    for unconditional in (None, [EMPTY]):
        with pytest.raises(ValueError, match="one unconditional prompt for each prompt"):
            decode(
                make(),
                TEMPLATE,
                PROMPTS,
                seeds=range(4),
                sampling=Sampling(guidance=2.0),
                unconditional=unconditional,
            )


def images_of(generator: ImageGenerator, sampling: Sampling) -> list[Image.Image]:
    """Two images of a prompt."""
    return [image for codes in generator.codes(["红色"], 2, sampling=sampling) for image in generator.images(codes)]


@pytest.fixture(scope="module")
def generator() -> ImageGenerator:
    """Random weights; guidance shows all the same, since texts change the logits."""
    return ImageGenerator(sequence_model())


def sequence_model(**changes: Any) -> SequenceModel:
    text = learned_text(CAPTIONS, vocab_size=290)
    vocabulary = Vocabulary(NUM_CODES, text.vocab_size)
    vqvae = {
        "hidden_size": 8,
        "codebook_dim": 4,
        "codebook_size": NUM_CODES,
        "downsampling": 4,
        "residual_blocks": 0,
        "quantizer": quantizer_options("fixed"),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    return SequenceModel(
        model=make(vocabulary, **changes),
        template=make_template(vocabulary),
        text=text,
        image_tokenizer=ImageTokenizer(build_vqvae(vqvae), {**vqvae, "image_size": 16}),
        settings={},
    )


class TestImages:
    def test_depend_on_guidance(self, generator: ImageGenerator) -> None:
        images = [
            [np.asarray(image) for image in images_of(generator, sampling)]
            for sampling in (Sampling(guidance=4.0), Sampling(guidance=4.0), Sampling())
        ]
        assert images[0][0].shape == (16, 16, 3)
        assert all(map(np.array_equal, images[0], images[1]))
        assert not any(map(np.array_equal, images[0], images[2]))

    def test_the_prompt_without_text_is_that_of_training(self, generator: ImageGenerator) -> None:
        # Guidance of 0 ignores the text, and the likeliest codes are then the same for every prompt.
        sampling = Sampling(GREEDY, guidance=0.0)
        codes = torch.cat(list(generator.codes(["红色", "蓝色的心形"], sampling=replace(sampling, batch_size=2))))
        (empty,) = generator.codes([""], sampling=Sampling(GREEDY))
        assert generator.tokenise([""]) == [generator.template.prompt({"text": []})]
        assert torch.equal(codes, empty.expand_as(codes))

    def test_refused_where_lengths_must_agree(self) -> None:
        compat = ImageGenerator(sequence_model(norm_scope="tensor"))
        with pytest.raises(UserError, match=r"sampler\.guidance=2 .*compat=official"):
            images_of(compat, Sampling(guidance=2.0))
        assert len(images_of(compat, Sampling())) == 2
