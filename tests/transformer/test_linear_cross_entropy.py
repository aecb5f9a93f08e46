"""The loss that never holds all logits equals the one that does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.transformer.loss import linear_cross_entropy, rows_of

WIDTH, VOCABULARY = 16, 50


def inputs(count: int, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, WIDTH, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (count,), generator=generator)
    return hidden, head, targets, torch.rand(count, generator=generator)


def dense(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    entropies = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    return (weights * entropies).sum(), entropies


@pytest.mark.parametrize("count", [1, 256, 700])  # less than a block of rows, just one, two and a rest
def test_equals_the_dense_form(count: int) -> None:
    hidden, head, targets, weights = inputs(count)
    found, entropies = linear_cross_entropy(hidden, head, targets, weights)
    expected, expected_entropies = dense(hidden, head, targets, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(3 * found, [hidden, head]), torch.autograd.grad(3 * expected, [hidden, head]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_autocast_stays_as_near_to_fp32_as_the_dense_form() -> None:
    hidden, head, targets, weights = inputs(300)
    exact = torch.autograd.grad(dense(hidden, head, targets, weights)[0], [hidden, head])
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, weights)[0], [hidden, head])
        dense_bf16 = torch.autograd.grad(dense(hidden, head, targets, weights)[0], [hidden, head])
    for one, other, truth in zip(ours, dense_bf16, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - truth).norm() <= 1.2 * (other - truth).norm()


@pytest.mark.parametrize("vocabulary", [50, 5000])  # a block's softmax at once, and in parts; the head likewise
@pytest.mark.parametrize("count", [1, 1536, 3200])  # of rows: less than a block, just one, two and a rest
def test_blocks_in_half_precision_equal_the_dense_form(count: int, vocabulary: int) -> None:
    hidden, head, targets, weights = inputs(count, vocabulary)
    hidden_bf16, head_bf16 = (x.detach().bfloat16().requires_grad_() for x in (hidden, head))
    found, entropies = linear_cross_entropy(hidden_bf16, head_bf16, targets, weights)
    ours = torch.autograd.grad(found / count, [hidden_bf16, head_bf16])
    dense_bf16, expected_entropies = dense(hidden_bf16, head_bf16, targets, weights)
    theirs = torch.autograd.grad(dense_bf16 / count, [hidden_bf16, head_bf16])
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, dense_bf16, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    hidden, head, targets, weights = inputs(300)
    (wanted,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, weights)[0], [hidden])
    frozen = head.detach()
    loss, _ = linear_cross_entropy(hidden, frozen, targets, weights)
    loss.backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, wanted)
    (wanted,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets, weights)[0], [head])
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), head, targets, weights)[0], [head])
    assert torch.equal(found, wanted)


def test_small_gradients_survive_fp16() -> None:
    """The division by the batch's weight happens in fp32: in fp16 it would take slopes below the smallest number."""
    hidden, head, targets, _ = inputs(300)
    many = torch.tensor(1e6)
    total, _ = linear_cross_entropy(hidden.half(), head.half(), targets, torch.ones(300))
    (found,) = torch.autograd.grad(total / many * 65536, [head])
    total, _ = dense(hidden, head, targets, torch.ones(300))
    (expected,) = torch.autograd.grad(total / many * 65536, [head])
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_no_rows() -> None:
    hidden, head, targets, weights = inputs(1)
    total, entropies = linear_cross_entropy(hidden[:0], head, targets[:0], weights[:0])
    total.backward()
    assert total.item() == 0.0 and len(entropies) == 0
    assert head.grad is None
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("count", [1, 5000])  # of rows: less than a block, one and a rest
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_dense_form(count: int, dtype: torch.dtype) -> None:
    hidden, head, targets, weights = (x.detach().to("cuda") for x in inputs(count, 5000))
    hidden, head = (x.to(dtype).requires_grad_() for x in (hidden, head))
    found, entropies = linear_cross_entropy(hidden, head, targets, weights)
    ours = torch.autograd.grad(found / count, [hidden, head])
    expected, expected_entropies = dense(hidden, head, targets, weights)
    theirs = torch.autograd.grad(expected / count, [hidden, head])
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-4, atol=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < (1e-4 if dtype == torch.float32 else 0.01) * other.norm()


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, targets, weights = inputs(3)
    loss, _ = linear_cross_entropy(hidden, head, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_rows_of_a_head_get_the_gradient_of_slices() -> None:
    _, head, _, _ = inputs(1)
    ranges = [range(0, 20), range(15, 40), range(45, 50)]  # two share rows, some rows are in none
    slopes = [torch.randn(len(ids), WIDTH) for ids in ranges]
    slices = [head[ids.start : ids.stop] for ids in ranges]
    (wanted,) = torch.autograd.grad(slices, [head], slopes)
    found = rows_of(head, ranges)
    assert all(torch.equal(one, other) for one, other in zip(found, slices, strict=True))
    torch.testing.assert_close(torch.autograd.grad(found, [head], slopes)[0], wanted)
    (wanted,) = torch.autograd.grad([head[:20]], [head], slopes[:1])
    assert torch.equal(torch.autograd.grad(rows_of(head, ranges)[:1], [head], slopes[:1])[0], wanted)
    assert rows_of(head, [range(VOCABULARY)])[0] is head
