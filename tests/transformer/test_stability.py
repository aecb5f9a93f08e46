"""PB-Relax (paper §2.4): the same function as the plain forms, without their overflow in fp16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.transformer.attention import ATTENTIONS, fused_attention, naive_attention, pb_relax_attention
from cogview_pl.transformer.block import LayerNorm
from cogview_pl.transformer.config import AttentionForm, NormScope
from tests.make_models import make_transformer

FP16_MAX = 65504.0


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(QKᵀ/√K) V in fp64."""
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~causal_mask(q.shape[-2]), float("-inf")).softmax(-1) @ v.double()


def queries_keys_values(scale: float, head_size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 4, 24, head_size, generator=generator).unbind(0)
    return scale * q, scale * k, v


class TestAttention:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
    @pytest.mark.parametrize("form", list(ATTENTIONS))
    def test_fp32_equals_the_formula(self, form: AttentionForm, scale: float, masked: bool) -> None:
        q, k, v = queries_keys_values(scale)
        mask = causal_mask(24)[None, None] if masked else None
        result = ATTENTIONS[form](q, k, v, mask, 0.0)
        # Scores reach ~40·scale²: their rounding is what remains.
        torch.testing.assert_close(result.double(), exact_attention(q, k, v), atol=2e-6 * max(1, scale**2), rtol=1e-5)

    @pytest.mark.parametrize("form", list(ATTENTIONS))
    def test_gradients_equal_those_of_the_formula(self, form: AttentionForm) -> None:
        # The subtracted maximum is a constant; softmax does not depend on it, so nothing is lost.
        leaves = q, k, v = tuple(x.double().requires_grad_() for x in queries_keys_values(1.0))
        direction = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = torch.autograd.grad((exact_attention(q, k, v) * direction).sum(), leaves)
        found = torch.autograd.grad((ATTENTIONS[form](q, k, v, None, 0.0) * direction).sum(), leaves)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)

    @pytest.mark.parametrize("form", [fused_attention, pb_relax_attention])
    def test_fp16_ordinary_scores(self, form) -> None:  # type: ignore[no-untyped-def]
        q, k, v = (x.half() for x in queries_keys_values(1.0))
        torch.testing.assert_close(form(q, k, v, None, 0.0).double(), exact_attention(q, k, v), atol=3e-3, rtol=2e-3)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("head_size", [16, 64])
    def test_fp16_scores_beyond_its_range(self, head_size: int, masked: bool) -> None:
        q, k, v = (x.half() for x in queries_keys_values(200.0, head_size))
        # The last two keys are twins: their equal scores must give the mean of their values.
        k[..., -2, :] = k[..., -1, :] = q[..., -1, :]
        products = (q.double() @ k.double().transpose(-2, -1)).masked_fill(~causal_mask(24), float("-inf"))
        assert products.max() > FP16_MAX
        mask = causal_mask(24)[None, None] if masked else None
        assert not naive_attention(q, k, v, mask, 0.0).isfinite().all()

        exact = exact_attention(q, k, v)
        torch.testing.assert_close(exact[..., -1, :], v.double()[..., -2:, :].mean(-2), atol=1e-6, rtol=0)
        fused, relaxed = fused_attention(q, k, v, mask, 0.0), pb_relax_attention(q, k, v, mask, 0.0)
        assert fused.dtype == relaxed.dtype == torch.float16
        torch.testing.assert_close(fused.double(), exact, atol=2e-3, rtol=2e-3)  # scores in fp32
        # PB-Relax keeps scores in fp16: it knows the winner where the lead exceeds the spacing of fp16 numbers.
        assert relaxed.isfinite().all()
        first, second = (products / math.sqrt(head_size)).topk(2).values.unbind(-1)
        clear = first - second > 20 + first.abs() / 2**9
        clear[..., -1] = True
        assert clear.double().mean() > 0.9
        torch.testing.assert_close(relaxed.double()[clear], exact[clear], atol=2e-3, rtol=2e-3)

    @pytest.mark.parametrize("form", [fused_attention, pb_relax_attention])
    def test_fp16_large_common_offset(self, form) -> None:  # type: ignore[no-untyped-def]
        # All scores near 2¹⁷/8, apart by multiples of 2⁷/8 = 16: exact in fp16 after the division by 256.
        length, size = 8, 64
        q = torch.full((1, 1, length, size), 32.0).half()
        k = torch.full((1, 1, length, size), 64.0).half()
        k[0, 0, :, 0] += 4 * torch.tensor([0, 1, 1, 0, 3, 2, 3, 1])
        v = torch.randn(1, 1, length, size, generator=torch.Generator().manual_seed(0)).half()
        assert not naive_attention(q, k, v, None, 0.0).isfinite().all()
        torch.testing.assert_close(form(q, k, v, None, 0.0).double(), exact_attention(q, k, v), atol=2e-3, rtol=2e-3)

    @pytest.mark.parametrize("form", list(ATTENTIONS))
    def test_zero_queries_give_the_mean_of_what_is_visible(self, form: AttentionForm) -> None:
        _, k, v = (x.half() for x in queries_keys_values(1.0))
        result = ATTENTIONS[form](torch.zeros_like(k), k, v, None, 0.0)
        mean = v.double().cumsum(-2) / torch.arange(1, 25).view(-1, 1)
        torch.testing.assert_close(result.double(), mean, atol=2e-3, rtol=2e-3)

    @pytest.mark.parametrize("form", list(ATTENTIONS))
    def test_without_a_mask_one_query_sees_all_keys_and_two_do_not(self, form: AttentionForm) -> None:
        q, k, v = queries_keys_values(1.0)
        found = ATTENTIONS[form](q[..., -1:, :], k, v, None, 0.0)
        torch.testing.assert_close(found.double(), exact_attention(q, k, v)[..., -1:, :], atol=1e-5, rtol=1e-5)
        found = ATTENTIONS[form](q[..., :2, :], k[..., :2, :], v[..., :2, :], None, 0.0)
        torch.testing.assert_close(found.double(), exact_attention(q, k, v)[..., :2, :], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("form", list(ATTENTIONS))
    def test_more_keys_than_queries_follow_the_mask(self, form: AttentionForm) -> None:
        q, k, v = queries_keys_values(1.0)
        found = ATTENTIONS[form](q[..., 20:, :], k, v, causal_mask(24)[None, None, 20:], 0.0)
        torch.testing.assert_close(found.double(), exact_attention(q, k, v)[..., 20:, :], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("attention", list(ATTENTIONS))
    def test_whole_model_in_fp16(self, attention: AttentionForm) -> None:
        torch.manual_seed(0)
        model = make_transformer(
            vocab_size=100,
            num_layers=2,
            hidden_size=32,
            num_heads=2,
            num_positions=16,
            attention=attention,
            init_std=0.2,
        ).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("qkv.weight"):
                    parameter[:64] *= 300  # queries and keys
            logits = model.half()(torch.arange(16)[None])
        assert logits.isfinite().all() == (attention != AttentionForm.naive)


def squared_in_fp16(x: Tensor) -> Tensor:
    """LayerNorm with every step in the precision of its input."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + 1e-5).sqrt()


def fresh_norm(scope: NormScope, hidden_size: int = 32) -> LayerNorm:
    norm = LayerNorm(hidden_size, scope)
    torch.manual_seed(1)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.2)
        norm.bias.normal_()
    return norm


def plain_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    """The LayerNorm of this weight and bias in fp64."""
    return F.layer_norm(x.double(), (x.shape[-1],), norm.weight.double(), norm.bias.double(), 1e-5)


@pytest.mark.parametrize("scope", NormScope)
class TestLayerNorm:
    @pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
    def test_fp32_equals_the_plain_form(self, scope: NormScope, scale: float) -> None:
        norm, x = fresh_norm(scope), scale * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        # The variance after the division is ~10, so epsilon, 1e-5, shifts results by less than 1e-5 of their size.
        torch.testing.assert_close(norm(x).double(), plain_norm(norm, x), atol=5e-5, rtol=5e-5)

    def test_fp16_squares_beyond_its_range(self, scope: NormScope) -> None:
        norm = fresh_norm(scope)
        x = (1e4 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))).half()
        assert x.isfinite().all()
        # Squares overflow: the plain form in fp16 divides by infinity and answers 0 throughout.
        assert (squared_in_fp16(x) == 0).all()
        result = norm.half()(x)
        assert result.dtype == torch.float16
        torch.testing.assert_close(result.double(), plain_norm(norm, x), atol=5e-3, rtol=5e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_largest_and_smallest_numbers(self, scope: NormScope, dtype: torch.dtype) -> None:
        norm = fresh_norm(scope).to(dtype)
        for value in (torch.finfo(torch.float16).max, 1e-3, 6e-5, 6e-8):
            x = torch.zeros(3, 32, dtype=dtype)
            x[:, ::2], x[:, 1::2] = value, -value
            assert norm(x).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_zeros_give_the_bias(self, scope: NormScope, dtype: torch.dtype) -> None:
        norm = fresh_norm(scope).to(dtype)
        x = torch.zeros(2, 3, 32, dtype=dtype, requires_grad=True)
        result = norm(x)
        result.sum().backward()
        torch.testing.assert_close(result, norm.bias.expand_as(result), atol=0, rtol=0)
        if dtype != torch.float16:  # there 1/ε exceeds its range
            assert x.grad is not None
            assert x.grad.isfinite().all()

    def test_a_vector_of_zeros_beside_others(self, scope: NormScope) -> None:
        norm = fresh_norm(scope)
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
        x[0, 1] = 0.0
        result = norm(x)
        assert torch.equal(result[0, 1], norm.bias)
        torch.testing.assert_close(result.double(), plain_norm(norm, x), atol=5e-5, rtol=5e-5)


class TestSmallVectors:
    """The divisor of a token is never below 8e-4; that of a tensor is, as in the original. Epsilon makes it visible."""

    @pytest.mark.parametrize(
        ("scope", "maximum", "divisor"),
        [
            *((NormScope.token, maximum, max(maximum, 8e-4)) for maximum in (1.0, 1e-3, 8e-4, 7e-4, 1e-6)),
            *((NormScope.tensor, maximum, maximum) for maximum in (1.0, 1e-3, 7e-4, 1e-6, 1e-30)),
        ],
    )
    def test_divisor(self, scope: NormScope, maximum: float, divisor: float) -> None:
        noise = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = 1 + 1e-3 * noise
        x = maximum * x / x.abs().amax(-1, keepdim=True)
        norm = fresh_norm(scope).double()
        torch.testing.assert_close(norm(x), plain_norm(norm, 8 * x / divisor), atol=1e-8, rtol=1e-8)

    def test_the_smallest_tensors_are_scaled_like_others(self) -> None:
        norm, x = LayerNorm(4, NormScope.tensor), torch.tensor([[1.0, 0.5, -0.75, 0.25]])
        assert torch.equal(norm(x * 2.0**-100), norm(x))
        assert torch.equal(norm(torch.zeros(1, 4)), torch.zeros(1, 4))


class TestScopes:
    def test_maximum_per_token_or_for_all(self) -> None:
        # Every token constant but for a small part, so that epsilon makes the divisor visible.
        x = torch.tensor([1.0, 10.0, 100.0]).double().view(1, 3, 1) * (
            1 + 1e-3 * torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )
        for scope, maximum in ((NormScope.token, x.abs().amax(-1, keepdim=True)), (NormScope.tensor, x.abs().max())):
            norm = fresh_norm(scope).double()
            torch.testing.assert_close(norm(x), plain_norm(norm, 8 * x / maximum), atol=1e-10, rtol=1e-10)
        norm = fresh_norm(NormScope.none).double()
        torch.testing.assert_close(norm(x), plain_norm(norm, x), atol=1e-10, rtol=1e-10)

    @pytest.mark.parametrize("scope", [NormScope.token, NormScope.tensor])
    def test_divisor_is_a_constant_for_the_gradient(self, scope: NormScope) -> None:
        norm = fresh_norm(scope).double()
        generator = torch.Generator().manual_seed(0)
        noise, direction = torch.randn(2, 2, 3, 32, dtype=torch.float64, generator=generator)
        x = (3 * (1 + 1e-3 * noise)).requires_grad_()
        (found,) = torch.autograd.grad((norm(x) * direction).sum(), x)

        # y = w·z/σ + b with z = u − mean(u), σ² = mean(z²) + ε, u = x/c, c constant:
        # dx = (g − mean(g) − (z/σ)·mean(g·z/σ)) / (σ c) with g = w·dy.
        with torch.no_grad():
            c = (x.abs().amax(-1, keepdim=True) if scope == NormScope.token else x.abs().max()) / 8
            z = x / c - (x / c).mean(-1, keepdim=True)
            sigma = ((z * z).mean(-1, keepdim=True) + 1e-5).sqrt()
            g, unit = norm.weight * direction, z / sigma
            projected = g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True)
            expected = projected / (sigma * c)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)

        # The test can tell: with the divisor inside the graph the gradient is another.
        magnitude = x.abs()
        c = (magnitude.amax(-1, keepdim=True) if scope == NormScope.token else magnitude.max()) / 8
        (through,) = torch.autograd.grad((plain_norm(norm, x / c) * direction).sum(), x)
        assert (through - expected).abs().max() > 0.1  # a thousand times the tolerance above

    def test_unknown_scope(self) -> None:
        with pytest.raises(ValueError, match="'batch' is not a valid NormScope"):
            LayerNorm(8, "batch")  # type: ignore[arg-type]
