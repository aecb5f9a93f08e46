"""The loss over several devices by hand, other inputs than targets, batches without loss, blocks of a GPU's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview_pl.transformer.loss import SequenceLoss, linear_cross_entropy, over_devices, rows_at_once, sequence_loss
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer

VOCABULARY, SLOTS = 30, 2


def model_and_batch() -> tuple[Transformer, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = make_transformer(
        vocab_size=VOCABULARY, num_layers=1, hidden_size=16, num_heads=2, num_positions=8, init_std=0.3
    ).eval()
    tokens = torch.randint(VOCABULARY, (2, 8))
    slots = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1], [0, -1, 1, 1, 1, 0, 0, 1]])
    return model, tokens, torch.arange(8).expand(2, -1), torch.tensor([0.5, 2.0, 0.0])[slots], slots


def own_loss(loss: Tensor, weight: float, sums: list[float], counts: list[int]) -> SequenceLoss:
    return SequenceLoss(loss, torch.tensor(weight), torch.tensor(sums), torch.tensor(counts))


class TestOverDevices:
    def test_unequal_shares_by_hand(self) -> None:
        parameter = torch.tensor(2.0, requires_grad=True)
        # Of weight 3 a loss of 2 · p, of weight 1 one of 5 · p: all in all 11/4 · p.
        parts = [
            own_loss(2 * parameter, 3.0, [4.0, 1.0], [3, 0]),
            own_loss(5 * parameter, 1.0, [0.5, 2.0], [1, 2]),
        ]
        rows = [torch.cat([torch.stack([part.loss.detach() * part.weight, part.weight]), *part[2:]]) for part in parts]
        asked: list[Tensor] = []

        def total(own: Tensor) -> Tensor:
            asked.append(own)
            return torch.stack(rows).sum(0).double()

        found = [over_devices(part, total, 2) for part in parts]
        for own, row in zip(asked, rows, strict=True):
            torch.testing.assert_close(own.float(), row)
            assert own.dtype == torch.float64
            assert not own.requires_grad
        slopes = []
        for loss, weight, sums_S, counts_S in found:
            assert (loss.item(), weight.item()) == (5.5, 4.0)
            assert (sums_S.tolist(), counts_S.tolist()) == ([4.5, 3.0], [4, 2])
            slopes.append(torch.autograd.grad(loss, parameter)[0].item())
        assert slopes == [3.0, 2.5]  # their mean is 11/4

    def test_no_device_has_loss(self) -> None:
        parameter = torch.tensor(2.0, requires_grad=True)
        found = over_devices(own_loss(0 * parameter, 0.0, [0.0], [0]), lambda own: 2 * own, 2)
        assert found.loss.item() == 0.0
        (slope,) = torch.autograd.grad(found.loss, parameter)
        assert slope.item() == 0.0


class TestSequenceLoss:
    def test_reads_other_inputs_and_predicts_the_tokens(self) -> None:
        model, tokens, positions, weights, slots = model_and_batch()
        inputs = (tokens + 7) % VOCABULARY
        found = sequence_loss(model, tokens, positions, weights, slots, SLOTS, inputs=inputs)
        logits = model(inputs, positions)[:, :-1]
        entropy = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        torch.testing.assert_close(found.loss, (entropy * weights[:, 1:]).sum() / weights[:, 1:].sum())
        assert found.weight == weights[:, 1:].sum() == 5 * 0.5 + 6 * 2.0
        assert found.slot_counts_S.tolist() == [5, 6]

    def test_a_token_of_weight_0_is_not_counted(self) -> None:
        model, tokens, positions, weights, slots = model_and_batch()
        weights[slots == 0] = 0.0
        found = sequence_loss(model, tokens, positions, weights, slots, SLOTS)
        assert found.slot_counts_S.tolist() == [0, 6]
        assert found.slot_sums_S[0] == 0.0

    @pytest.mark.parametrize("slot_ids", [None, [range(0, 10), range(10, VOCABULARY)]], ids=["all", "own"])
    def test_a_batch_without_loss_has_loss_0(self, slot_ids: list[range] | None) -> None:
        model, tokens, positions, weights, slots = model_and_batch()
        found = sequence_loss(model, tokens, positions, 0 * weights, slots, SLOTS, slot_ids)
        assert (found.loss.item(), found.weight.item()) == (0.0, 0.0)
        assert found.slot_sums_S.tolist() == found.slot_counts_S.tolist() == [0, 0]

    def test_a_very_small_weight_is_divided_away(self) -> None:
        model, tokens, positions, weights, slots = model_and_batch()
        whole = sequence_loss(model, tokens, positions, weights, slots, SLOTS).loss
        small = sequence_loss(model, tokens, positions, 1e-8 * weights, slots, SLOTS).loss
        torch.testing.assert_close(small, whole)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize(
    ("device", "dtype", "rows"),
    [
        (None, torch.float32, 256),
        (None, torch.bfloat16, 1536),
        ("cpu", torch.float32, 256),
        ("cuda", torch.float32, 4096),
        ("cuda", torch.bfloat16, 4096),
    ],
    ids=str,
)
def test_no_more_logits_exist_than_those_of_a_block(device: str | None, dtype: torch.dtype, rows: int) -> None:
    hidden, head = torch.randn(5000, 4).to(dtype).requires_grad_(), torch.randn(300, 4).to(dtype).requires_grad_()
    targets = torch.randint(300, (5000,))
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, head, targets, torch.ones(5000), device)[0].backward()
    assert largest.numel == rows * 300
    assert rows_at_once(device or "cpu", dtype) == rows


@pytest.mark.filterwarnings("error")  # torch says so where a result does not fit the memory given for it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_much_at_a_time_as_on_a_gpu_gives_the_same(dtype: torch.dtype) -> None:
    """Rows of a block that a GPU makes at once, several parts of its softmax, and the head's gradient as a whole."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4500, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (4500,), generator=generator)
    weights = torch.rand(4500, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        loss, entropies = linear_cross_entropy(hidden, head, targets, weights, device)
        found.append((loss, entropies, *torch.autograd.grad(loss / 4500, [hidden, head])))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 0.01) * other.norm()
    entropies = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    torch.testing.assert_close(found[1][1], entropies, rtol=1e-5, atol=1e-5)
