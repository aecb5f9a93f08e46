"""Speculative Jacobi decoding has the distribution of decoding one code after the other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Algorithm, Sampling
from cogview_pl.generation.decode import decode
from cogview_pl.generation.sampling import probabilities
from cogview_pl.generation.speculative import decode_jacobi
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary

from .small_model import small_model

TEXT_TOKENS = 12
PROMPT, OTHER = [1, 2], [3, 4, 5, 6]


def make(codes: int, grid: int, norm_scope: str = "token") -> tuple[Transformer, Template]:
    vocabulary = Vocabulary(codes, TEXT_TOKENS)
    template = Template(
        f"[ROI1] {{text}} [BASE] [BOI1] {{image:{grid}x{grid}}} [EOI1]",
        target="image",
        loss={"image": 1.0},
        vocabulary=vocabulary,
        text_length=6,
    )
    return small_model(template, init_std=0.4, norm_scope=norm_scope), template


def prompt(template: Template, text_tokens: list[int]) -> list[int]:
    return template.prompt({"text": text_tokens})


def exact_distribution(model: Transformer, template: Template, sampling: Sampling, codes: int, length: int) -> Tensor:
    """Probability of every possible grid, `(codes ** length,)`, from forward passes over all of them."""
    grids = torch.tensor(list(itertools.product(range(codes), repeat=length)))
    start = torch.tensor(prompt(template, PROMPT))
    tokens = torch.cat([start.expand(len(grids), -1), grids], 1)
    with torch.no_grad():
        logits = model(tokens)[:, len(start) - 1 : -1, :codes]
    each = probabilities(logits.flatten(0, 1), sampling).view(logits.shape)
    return each.gather(-1, grids[..., None])[..., 0].double().prod(1)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(drafts=2), Sampling(top_k=2, temperature=1.5, drafts=3)])
def test_same_distribution(sampling: Sampling) -> None:
    """Chi-squared test over all 81 grids of 2x2 codes out of three; the threshold is passed by chance once in 10⁵."""
    codes, length, count = 3, 4, 20_000
    model, template = make(codes, 2)
    expected = exact_distribution(model, template, sampling, codes, length) * count
    rows = decode_jacobi(
        model, template, [prompt(template, PROMPT)] * count, seeds=range(count), sampling=sampling
    ).rows
    numbers = (torch.tensor(rows) * torch.tensor([27, 9, 3, 1])).sum(1)
    found = torch.bincount(numbers, minlength=len(expected)).double()
    assert not found[expected == 0].any()
    likely = expected >= 5
    statistic = ((found - expected) ** 2 / expected)[likely].sum()
    freedom = int(likely.sum()) - 1
    assert freedom > 5
    assert statistic < freedom + 4.3 * (2 * freedom) ** 0.5 + 8


@pytest.mark.parametrize("drafts", [1, 5, 40])
def test_greedy_equals_one_after_the_other(drafts: int) -> None:
    model, template = make(30, 6)
    prompts = [prompt(template, PROMPT), prompt(template, OTHER), prompt(template, [])]
    sampling = Sampling(temperature=0, drafts=drafts)
    found = decode_jacobi(model, template, prompts, seeds=[0, 1, 2], sampling=sampling)
    assert found.rows == decode(model, template, prompts, seeds=[0, 1, 2], sampling=sampling)
    assert 1 <= found.passes <= 35


def test_guided_greedy_equals_one_after_the_other() -> None:
    model, template = make(30, 4)
    prompts, empty = [prompt(template, PROMPT), prompt(template, OTHER)], [prompt(template, [])] * 2
    sampling = Sampling(temperature=0, guidance=2.5, drafts=4)
    found = decode_jacobi(model, template, prompts, seeds=[0, 1], sampling=sampling, unconditional=empty)
    assert found.rows == decode(model, template, prompts, seeds=[0, 1], sampling=sampling, unconditional=empty)


def test_row_does_not_depend_on_its_neighbours() -> None:
    model, template = make(30, 4)
    prompts = [prompt(template, PROMPT), prompt(template, OTHER), prompt(template, [7])]
    sampling = Sampling(drafts=4)
    together = decode_jacobi(model, template, prompts, seeds=[5, 6, 7], sampling=sampling).rows
    for row, (one, seed) in enumerate(zip(prompts, [5, 6, 7], strict=True)):
        assert decode_jacobi(model, template, [one], seeds=[seed], sampling=sampling).rows == [together[row]]


def test_certain_model_needs_few_passes() -> None:
    """Where all drafts are right, a pass yields drafts + 1 codes."""
    model, template = make(30, 6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all codes are equally likely after any codes: p = q
    found = decode_jacobi(model, template, [prompt(template, PROMPT)], seeds=[0], sampling=Sampling(drafts=6))
    assert found.passes == 5  # the first code comes with the prompt; 35 others, 7 in a pass


def test_steps_are_counted_once_per_code() -> None:
    model, template = make(30, 4)
    steps: list[None] = []
    prompts = [prompt(template, PROMPT), prompt(template, OTHER)]
    decode_jacobi(
        model, template, prompts, seeds=[0, 1], sampling=Sampling(drafts=3), on_step=lambda: steps.append(None)
    )
    assert len(steps) == 16


def test_models_without_a_cache_of_keys_are_refused() -> None:
    model, template = make(30, 4, norm_scope="tensor")
    with pytest.raises(UserError, match=r"sampler\.algorithm=sequential"):
        decode_jacobi(
            model, template, [prompt(template, PROMPT)], seeds=[0], sampling=Sampling(algorithm=Algorithm.jacobi)
        )
