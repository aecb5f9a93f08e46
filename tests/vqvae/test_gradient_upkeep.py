"""Upkeep of codebooks that are parameters: k-means start, revival before use, earlier model folders.

Shapes: N vectors, D codebook_dim, K codes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.make_models import make_quantizer

UPKEEP: dict[str, Any] = {"decay": 0.5, "kmeans_iters": 5, "dead_threshold": 0.3, "revive_every": 2}
KINDS = ["learned", "gumbel"]


def as_latents(x_ND: Tensor) -> Tensor:
    """Vectors as a one-row grid `(1, D, 1, N)`."""
    return x_ND.T[None, :, None, :]


@pytest.mark.parametrize("kind", KINDS)
def test_without_upkeep_there_is_only_what_earlier_folders_hold(kind: str) -> None:
    quantizer = make_quantizer(kind, codebook_size=4, codebook_dim=2)
    assert set(quantizer.state_dict()) - {"temperature"} == {"codebook"}
    before = quantizer.codebook.detach().clone()
    for _ in range(3):
        assert quantizer(as_latents(torch.randn(9, 2))).revived == 0
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_start_at_the_clusters_of_the_first_training_batch(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer(kind, codebook_size=2, codebook_dim=2, **UPKEEP).eval()
    x_ND = torch.tensor([[0.0, 0], [0, 2], [10, 0], [10, 2], [10, 4]])
    before = quantizer.codebook.detach().clone()
    quantizer(as_latents(x_ND))
    assert torch.equal(quantizer.codebook, before)
    quantizer.train()(as_latents(x_ND))
    order = quantizer.codebook[0].argsort()
    assert quantizer.codebook.T[order].tolist() == [[0.0, 1.0], [10.0, 2.0]]
    assert quantizer.cluster_size[order].tolist() == [2.0, 3.0]  # and an update by the same counts
    quantizer(as_latents(x_ND + 100))
    assert quantizer.codebook.T[order].tolist() == [[0.0, 1.0], [10.0, 2.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_dead_codes_move_to_vectors_before_their_use(kind: str) -> None:
    """Four vectors at 0 a step halve the averages of three codes: 1/4 after two steps, below 0.3 of the mean 1."""
    settings = UPKEEP | {"kmeans_iters": 0}
    quantizer = make_quantizer(kind, codebook_size=4, codebook_dim=1, **settings)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 1e3, 2e3, 3e3]]))  # farther than any noise
    outputs = [quantizer(as_latents(torch.zeros(4, 1))) for _ in range(2)]
    assert [(int(output.dead), int(output.revived)) for output in outputs] == [(0, 0), (3, 0)]
    assert quantizer.codebook.tolist() == [[0.0, 1e3, 2e3, 3e3]]
    x_ND = torch.tensor([[50.0], [60], [70], [80]], requires_grad=True)
    output = quantizer(as_latents(x_ND))
    assert (int(output.dead), int(output.revived)) == (0, 3)
    assert quantizer.codebook[0, 0] == 0 and set(quantizer.codebook[0, 1:].tolist()) < {50.0, 60.0, 70.0, 80.0}
    assert quantizer.revived_total == 3
    (output.quantized.sum() + output.loss).backward()  # what the backward pass reads has not changed since its use
    assert x_ND.grad is not None and quantizer.codebook.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_state_resumes_exactly(kind: str) -> None:
    torch.manual_seed(0)
    batches = [as_latents(torch.randn(40, 3) + i) for i in range(8)]

    def training(quantizer: Any, batches: list[Tensor]) -> None:
        for batch in batches:
            output = quantizer(batch.clone().requires_grad_())
            (gradient,) = torch.autograd.grad(output.quantized.square().sum() + output.loss, quantizer.codebook)
            with torch.no_grad():
                quantizer.codebook -= 0.01 * gradient

    straight, resumed = (make_quantizer(kind, codebook_size=16, codebook_dim=3, **UPKEEP) for _ in range(2))
    training(straight, batches[:5])
    state = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    random_state = torch.get_rng_state()
    training(straight, batches[5:])
    resumed.load_state_dict(state)
    torch.set_rng_state(random_state)
    training(resumed, batches[5:])
    assert straight.revived_total > state["revived_total"]
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_noise_and_divergence_do_not_depend_on_the_size_of_scaled_distances() -> None:
    x_ND = torch.randn(50, 3)
    outputs = []
    for factor in (1.0, 64.0):
        torch.manual_seed(0)
        quantizer = make_quantizer("gumbel", codebook_size=8, codebook_dim=3, scale_distances=True)
        with torch.no_grad():
            quantizer.codebook.mul_(factor)
        outputs.append(quantizer(as_latents(factor * x_ND)))
    assert torch.equal(outputs[0].codes, outputs[1].codes)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].quantized * 64, outputs[1].quantized)


def test_distances_are_scaled_by_their_mean_to_the_nearest_code() -> None:
    quantizer = make_quantizer("gumbel", codebook_size=2, codebook_dim=1, kl_weight=1.0, scale_distances=True).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 10.0]]))
    # Squared distances (1, 81) and (49, 9): the mean to the nearest is 5.
    q_NK = (-torch.tensor([[1.0, 81], [49, 9]]) / 5).softmax(1)
    expected = (q_NK * (2 * q_NK + 1e-20).log()).sum(1).mean()
    torch.testing.assert_close(quantizer(as_latents(torch.tensor([[1.0], [7.0]]))).loss.detach(), expected)


def test_gumbel_pulls_the_encoder_to_the_nearest_code() -> None:
    quantizer = make_quantizer("gumbel", codebook_size=2, codebook_dim=1, kl_weight=0.0, commitment_weight=0.5)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 10.0]]))
    x_ND = torch.tensor([[1.0], [7.0]], requires_grad=True)
    output = quantizer(as_latents(x_ND))
    assert output.loss.item() == 0.5 * (1 + 9) / 2
    output.loss.backward()
    assert x_ND.grad.tolist() == [[0.5], [-1.5]]
    assert quantizer.codebook.grad is None or not quantizer.codebook.grad.any()
