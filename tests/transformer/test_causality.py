"""Who may see whom: no position a later one, no row another row, cached steps the same as the whole sequence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cogview_pl.transformer.config import ActivationCheckpointing, AttentionForm, Norm, NormScope
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer

VOCABULARY = 100
LENGTH = 9
LOUD = 7
"""Id of a token whose embedding is a thousand times larger, to be heard wherever it can be."""
QUIET = slice(LOUD + 1, None)
"""The ids behind it, whose logits are of ordinary size."""

VARIANTS = list(itertools.product(Norm, (NormScope.none, NormScope.token), AttentionForm))


def make(
    norm: Norm = Norm.sandwich, norm_scope: NormScope = NormScope.token, attention: AttentionForm = AttentionForm.fused
) -> Transformer:
    torch.manual_seed(0)
    model = make_transformer(
        vocab_size=VOCABULARY,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_positions=40,
        norm=norm,
        norm_scope=norm_scope,
        attention=attention,
        init_std=0.2,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms as after training
        model.token_embedding.weight[LOUD] *= 1000
    return model.eval()


def quiet_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(LOUD + 1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of_quiet_tokens(model: Transformer, tokens: Tensor) -> Tensor:
    return model(tokens)[..., QUIET]


@pytest.mark.parametrize(("norm", "norm_scope", "attention"), VARIANTS)
class TestCausality:
    def test_no_gradient_reaches_a_later_position(
        self, norm: Norm, norm_scope: NormScope, attention: AttentionForm
    ) -> None:
        model = make(norm, norm_scope, attention)
        embedded: list[Tensor] = []

        def leaf(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        handle = model.token_embedding.register_forward_hook(leaf)
        logits = model(quiet_tokens(2, LENGTH))
        handle.remove()
        direction = torch.randn(VOCABULARY)
        for t in range(LENGTH):
            (gradient,) = torch.autograd.grad((logits[:, t] @ direction).sum(), embedded[0], retain_graph=True)
            seen = gradient.abs().amax(-1)
            assert (seen[:, t + 1 :] == 0).all()
            assert (seen[:, : t + 1] > 0).all()

    def test_no_value_reaches_an_earlier_position(
        self, norm: Norm, norm_scope: NormScope, attention: AttentionForm
    ) -> None:
        # Stronger than the gradient, which the divisor of PB-Relax does not carry.
        model = make(norm, norm_scope, attention)
        tokens = quiet_tokens(2, LENGTH)
        before = logits_of_quiet_tokens(model, tokens)
        for t in range(LENGTH - 1):
            changed = tokens.clone()
            changed[:, t + 1 :] = LOUD
            after = logits_of_quiet_tokens(model, changed)
            torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-6, rtol=1e-5)
            assert (after[:, t + 1 :] - before[:, t + 1 :]).abs().amax(-1).min() > 1e-3

    def test_rows_do_not_see_each_other(self, norm: Norm, norm_scope: NormScope, attention: AttentionForm) -> None:
        model = make(norm, norm_scope, attention)
        tokens = quiet_tokens(3, LENGTH)
        tokens[1:] = LOUD
        together = logits_of_quiet_tokens(model, tokens)
        alone = logits_of_quiet_tokens(model, tokens[:1])
        torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", Norm)
class TestTensorScopeOfTheOriginal:
    """One maximum for the whole tensor: a loud token anywhere changes every position through the norm's epsilon."""

    def test_sees_later_positions(self, norm: Norm) -> None:
        model = make(norm, "tensor")
        tokens = quiet_tokens(1, LENGTH)
        changed = tokens.clone()
        changed[:, -1] = LOUD
        before, after = logits_of_quiet_tokens(model, tokens), logits_of_quiet_tokens(model, changed)
        assert (after - before)[:, :-1].abs().max() > 1e-3

    def test_sees_other_rows(self, norm: Norm) -> None:
        model = make(norm, "tensor")
        tokens = quiet_tokens(2, LENGTH)
        tokens[1] = LOUD
        together, alone = logits_of_quiet_tokens(model, tokens), logits_of_quiet_tokens(model, tokens[:1])
        assert (together[:1] - alone).abs().max() > 1e-3

    @torch.no_grad()
    def test_steps_that_keep_hidden_states_say_what_the_whole_sequence_says(self, norm: Norm) -> None:
        # But for epsilon: every call has a maximum of its own.
        model, tokens = make(norm, "tensor"), quiet_tokens(2, LENGTH)
        cache, found = model.new_cache(2, LENGTH), []
        for start, stop in ((0, 3), (3, 4), (4, 6), (6, LENGTH)):
            places = torch.arange(start, stop).expand(2, -1)
            found.append(model.logits(model.hidden(tokens[:, start:stop], places, cache)))
            cache.advance(stop - start)
        torch.testing.assert_close(torch.cat(found, 1)[..., QUIET], model(tokens)[..., QUIET], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("norm", "attention"), list(itertools.product(Norm, AttentionForm)))
class TestCache:
    @torch.no_grad()
    def test_ragged_prompts_continued_in_chunks(self, norm: Norm, attention: AttentionForm) -> None:
        model = make(norm, "token", attention)
        prompts, chunks = (5, 1, 8), (1, 3, 1, 2)
        total = max(prompts) + sum(chunks)
        tokens = quiet_tokens(len(prompts), total)
        full = model(tokens)[..., QUIET]  # row b is used up to prompts[b] + sum(chunks)

        cache = model.new_cache(len(prompts), total)
        places = torch.arange(max(prompts)).expand(len(prompts), -1)
        lengths = torch.tensor(prompts)
        padded = tokens[:, : max(prompts)].masked_fill(places >= lengths[:, None], LOUD)
        logits = model.logits(model.hidden(padded, places, cache))[..., QUIET]
        cache.advance(prompts)
        for row, length in enumerate(prompts):
            torch.testing.assert_close(logits[row, :length], full[row, :length], atol=1e-5, rtol=0)

        for chunk in chunks:
            places = lengths[:, None] + torch.arange(chunk)
            logits = model.logits(model.hidden(tokens.gather(1, places), places, cache))[..., QUIET]
            cache.advance(chunk)
            expected = full.gather(1, places[..., None].expand(-1, -1, full.shape[-1]))
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            lengths = lengths + chunk

    @torch.no_grad()
    def test_from_the_first_token_on(self, norm: Norm, attention: AttentionForm) -> None:
        model = make(norm, "token", attention)
        tokens = quiet_tokens(2, LENGTH)
        cache = model.new_cache(2, LENGTH)
        steps = []
        for t in range(LENGTH):
            hidden = model.hidden(tokens[:, t : t + 1], torch.full((2, 1), t), cache)
            steps.append(model.logits(hidden)[..., QUIET])
            cache.advance(1)
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens)[..., QUIET], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_model_that_trains_with_checkpointing_decodes_by_its_cache() -> None:
    """As it does while it generates images for the logs."""
    model, tokens = make(), quiet_tokens(2, LENGTH)
    expected = model(tokens)[..., QUIET]
    model.set_activation_checkpointing(ActivationCheckpointing.block)
    cache, steps = model.new_cache(2, LENGTH), []
    for t in range(LENGTH):
        steps.append(model.logits(model.hidden(tokens[:, t : t + 1], torch.full((2, 1), t), cache))[..., QUIET])
        cache.advance(1)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_precision_of_cached_keys() -> None:
    """On a CPU fp32, in whatever precision the weights are; under autocast that of autocast."""

    def precision(model: Transformer) -> torch.dtype:
        cache = model.new_cache(2, 3)
        cache.mask(1)
        keys_BHSK, values_BHSK = cache.store(0, torch.zeros(2, 2, 4, 1, 8))
        assert keys_BHSK.shape == values_BHSK.shape == (2, 4, 1, 8)
        assert keys_BHSK.dtype == values_BHSK.dtype
        return keys_BHSK.dtype

    assert precision(make()) == precision(make().bfloat16()) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert precision(make()) == torch.bfloat16


class TestPositions:
    @torch.no_grad()
    def test_none_counts_from_zero(self) -> None:
        model, tokens = make(), quiet_tokens(2, LENGTH)
        torch.testing.assert_close(model(tokens), model(tokens, torch.arange(LENGTH).expand(2, -1)), atol=0, rtol=0)

    @torch.no_grad()
    def test_restart_reuses_the_rows_of_the_table(self) -> None:
        model, tokens = make(), quiet_tokens(1, LENGTH)
        restarted = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        before = model(tokens, restarted)
        assert (before - model(tokens))[:, 4:].abs().amax(-1).min() > 1e-3
        torch.testing.assert_close(before[:, :4], model(tokens)[:, :4], atol=1e-6, rtol=1e-5)
        model.position_embedding.weight[5:] = float("nan")  # rows that no position id names
        torch.testing.assert_close(model(tokens, restarted), before, atol=0, rtol=0)

    @torch.no_grad()
    def test_rows_may_have_different_ones(self) -> None:
        model, tokens = make(), quiet_tokens(1, LENGTH).expand(2, -1)
        positions = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) + 20])
        logits = model(tokens, positions)
        for row in range(2):
            torch.testing.assert_close(
                logits[row], model(tokens[:1], positions[row : row + 1])[0], atol=1e-5, rtol=1e-5
            )
        assert (logits[0] - logits[1]).abs().max() > 1e-3
