"""Dropout: at work in training and off in evaluation, in every form of attention, on branches and embeddings.

Shapes: B batch, H heads, L length, K head size, D hidden size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogview_pl.transformer.attention import ATTENTIONS
from cogview_pl.transformer.block import Attention, Block, Residual
from cogview_pl.transformer.config import AttentionForm
from tests.make_models import make_config, make_transformer

RATE = 0.25
SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_positions": 9}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", list(ATTENTIONS))
def test_each_form_drops_weights_of_attention(form: AttentionForm, masked: bool) -> None:
    """With the identity as values the result is the weights: each is 0 or 1 / (1 - rate) of what it was."""
    torch.manual_seed(0)
    length = 32
    q, k = torch.randn(2, 4, 3, length, length).unbind()
    v = torch.eye(length).expand(4, 3, length, length)
    mask = torch.ones(length, length, dtype=torch.bool).tril() if masked else None
    whole, dropped = (ATTENTIONS[form](q, k, v, mask, rate) for rate in (0.0, RATE))
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand_as(whole)
    assert ((whole > 0) == visible).all()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - RATE))
    # 6,336 visible weights: five standard deviations are 2.7 %.
    assert 1 - kept[visible].double().mean().item() == pytest.approx(RATE, abs=0.027)


def attention_of(form: AttentionForm, dropout: float) -> Attention:
    torch.manual_seed(0)
    return Attention(make_config(**SIZES, attention=form, dropout=dropout))


@pytest.mark.parametrize("form", list(ATTENTIONS))
@torch.no_grad()
def test_attention_drops_in_training_and_not_in_evaluation(form: AttentionForm) -> None:
    x_BLD = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    without = attention_of(form, 0.0)(x_BLD, None, None, 0)
    attention = attention_of(form, RATE).eval()
    assert torch.equal(attention(x_BLD, None, None, 0), without)
    attention.train()
    found = torch.stack([attention(x_BLD, None, None, 0) for _ in range(600)])
    assert (found - without).abs().amax((1, 2, 3)).min() > 0.01  # no pass is as in evaluation
    # Weights are blown up by what is dropped, so that the mean stays.
    assert (found.mean(0) - without).abs().max() < 0.1 * (found - without).abs().max()


def test_the_rate_that_attention_is_asked_for() -> None:
    rates: list[float] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        rates.append(dropout)
        return v

    attention, x_BLD = attention_of(AttentionForm.fused, RATE), torch.randn(1, 3, 32)
    attention.function = attend
    for training in (True, False):
        attention.train(training)(x_BLD, None, None, 0)
    assert rates == [RATE, 0.0]


def test_branches_are_dropped_before_they_join_the_stream() -> None:
    torch.manual_seed(0)
    residual = Residual(make_config(**{**SIZES, "hidden_size": 64}, norm="pre", dropout=RATE))
    x_BLD, branch_BLD = torch.randn(2, 4, 50, 64).unbind()
    added = residual.close(x_BLD, branch_BLD) - x_BLD
    kept = (added.abs() > 1e-6) | (branch_BLD.abs() < 1e-5)
    torch.testing.assert_close(added[kept], branch_BLD[kept] / (1 - RATE), atol=1e-5, rtol=1e-4)
    assert 1 - kept.double().mean().item() == pytest.approx(RATE, abs=0.02)
    assert torch.equal(residual.eval().close(x_BLD, branch_BLD), x_BLD + branch_BLD)


def test_every_place_of_a_block_drops_at_the_given_rate() -> None:
    block = Block(make_config(**SIZES, dropout=RATE))
    assert block.attention.dropout == RATE
    assert block.attention_residual.dropout.p == block.mlp_residual.dropout.p == RATE


@pytest.mark.parametrize("form", list(ATTENTIONS))
@torch.no_grad()
def test_whole_model(form: AttentionForm) -> None:
    torch.manual_seed(0)
    model = make_transformer(vocab_size=50, attention=form, dropout=RATE, **SIZES)
    plain = make_transformer(vocab_size=50, attention=form, **SIZES).eval()
    plain.load_state_dict(model.state_dict())
    tokens = torch.arange(9)[None]
    model.eval()
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    assert not torch.allclose(model(tokens), model(tokens), atol=1e-3)
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))  # without a rate training is evaluation


@torch.no_grad()
def test_embeddings_are_dropped_in_training() -> None:
    torch.manual_seed(0)
    model = make_transformer(vocab_size=500, num_layers=1, hidden_size=32, num_heads=4, num_positions=300, dropout=RATE)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.arange(300)[None]
    model(tokens)
    model.eval()(tokens)
    dropped, whole = seen
    torch.testing.assert_close(whole[0], model.token_embedding.weight[:300] + model.position_embedding.weight)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - RATE))
    assert 1 - kept.double().mean().item() == pytest.approx(RATE, abs=0.025)
