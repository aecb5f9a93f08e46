"""Quantizers of few dimensions by hand-made examples: cosine codes on the sphere, and finite scalar quantization.

Shapes: N vectors, D codebook_dim, d dimensions of the codes, K codes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_pl.errors import UserError
from tests.make_models import make_quantizer

KINDS = ["cosine", "fsq"]


def as_latents(x_ND: Tensor) -> Tensor:
    """Vectors as a one-row grid `(1, D, 1, N)`."""
    return x_ND.T[None, :, None, :]


def without_maps(quantizer: Any) -> Any:
    """The quantizer with identities in place of its linear maps; `d` must be `D`."""
    with torch.no_grad():
        for layer in (quantizer.project, quantizer.expand):
            layer.weight.copy_(torch.eye(len(layer.weight)))
            layer.bias.zero_()
    return quantizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_forward_lookup_and_embedding_agree(kind: str, training: bool) -> None:
    quantizer = make_quantizer(kind, codebook_size=32, codebook_dim=6)
    latents = torch.randn(2, 6, 5, 4)
    quantizer(latents)  # k-means
    quantizer.train(training)
    codes_N = quantizer.lookup(latents.permute(0, 2, 3, 1).flatten(0, 2))
    vectors = quantizer.embed(codes_N).view(2, 5, 4, 6).permute(0, 3, 1, 2)
    output = quantizer(latents)
    assert torch.equal(output.codes.flatten(), codes_N)
    torch.testing.assert_close(output.quantized, vectors)
    counts_K = torch.bincount(codes_N, minlength=32)
    assert output.usage.item() == pytest.approx((counts_K > 0).float().mean().item())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_codes_in_float32(kind: str) -> None:
    quantizer = make_quantizer(kind, codebook_size=32, codebook_dim=6).eval()
    latents = torch.randn(2, 6, 9, 9)
    x_ND = latents.permute(0, 2, 3, 1).flatten(0, 2)
    expected = quantizer(latents).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(latents).codes, expected)
        assert torch.equal(quantizer.lookup(x_ND), expected.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_quantization_train_both_maps(kind: str) -> None:
    quantizer = make_quantizer(kind, codebook_size=32, codebook_dim=6)
    latents = torch.randn(1, 6, 4, 4)
    decoded = quantizer.continuous(latents)
    points_Nd = quantizer.reduce(latents.permute(0, 2, 3, 1).flatten(0, 2))
    torch.testing.assert_close(decoded.permute(0, 2, 3, 1).flatten(0, 2), quantizer.expand(points_Nd))
    decoded.square().sum().backward()
    assert all(p.grad is not None for layer in (quantizer.project, quantizer.expand) for p in layer.parameters())


# Cosine codes


def test_cosine_chooses_by_angle_and_gives_codes_of_length_1() -> None:
    quantizer = without_maps(make_quantizer("cosine", codebook_size=2, codebook_dim=2, projected_dim=2, kmeans_iters=0))
    quantizer.sphere.codebook.copy_(torch.tensor([[1.0, 0.6], [0.0, 0.8]]))
    x_ND = torch.tensor([[0.1, 0.01], [9.0, 9.0], [-1.0, -0.1]])  # cosines (0.995, 0.68), (0.71, 0.99), (-1.0, -0.68)
    output = quantizer.eval()(as_latents(x_ND))
    assert output.codes.flatten().tolist() == [0, 1, 1]
    torch.testing.assert_close(output.quantized[0, :, 0].T, torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]))


def test_cosine_codes_follow_normalised_points() -> None:
    torch.manual_seed(0)
    settings = {"projected_dim": 2, "kmeans_iters": 3, "decay": 0.5, "dead_threshold": 0.0}
    quantizer = without_maps(make_quantizer("cosine", codebook_size=2, codebook_dim=2, **settings))
    right, up = torch.tensor([[3.0, 0.3], [0.1, -0.01]]), torch.tensor([[0.0, 0.5]])
    for _ in range(4):
        quantizer(as_latents(torch.cat([right, up])))
    order = quantizer.codebook[1].argsort()
    torch.testing.assert_close(quantizer.codebook.T[order], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_cosine_revives_codes_onto_the_sphere() -> None:
    settings = {"projected_dim": 2, "kmeans_iters": 0, "decay": 0.5, "dead_threshold": 0.3, "revive_every": 1}
    quantizer = without_maps(make_quantizer("cosine", codebook_size=16, codebook_dim=2, **settings))
    revived = [int(quantizer(as_latents(torch.tensor([[5.0, 0.1], [4.0, -0.1]]))).revived) for _ in range(6)]
    assert sum(revived) >= 14
    torch.testing.assert_close(quantizer.codebook.norm(dim=0), torch.ones(16))
    assert quantizer.codebook[0].min() > 0.99


def test_cosine_passes_the_gradient_through_normalisation_and_maps() -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer("cosine", codebook_size=8, codebook_dim=4, projected_dim=3, commitment_weight=0.5).eval()
    x_ND, cotangent_ND = torch.randn(7, 4, requires_grad=True), torch.randn(7, 4)
    output = quantizer(as_latents(x_ND))
    points_Nd = torch.nn.functional.normalize(quantizer.project(x_ND), dim=1)
    codes_Nd = quantizer.codebook.T[output.codes.flatten()]
    torch.testing.assert_close(output.loss, 0.5 * (points_Nd - codes_Nd).square().mean())
    (expected,) = torch.autograd.grad(quantizer.expand(points_Nd), x_ND, cotangent_ND, retain_graph=True)
    (found,) = torch.autograd.grad(output.quantized[0, :, 0].T, x_ND, cotangent_ND)
    torch.testing.assert_close(found, expected)


# Finite scalar quantization


def test_fsq_codebook_is_the_grid_of_levels() -> None:
    quantizer = make_quantizer("fsq", codebook_size=6, codebook_dim=4, levels=[2, 3])
    assert quantizer.codebook.T.tolist() == [[-1, -1], [0, -1], [-1, 0], [0, 0], [-1, 1], [0, 1]]
    assert not any(name == "codebook" for name, _ in quantizer.named_parameters())


@pytest.mark.parametrize("levels", [[2], [3], [8, 5, 5, 5], [4, 4, 2, 3]], ids=str)
def test_fsq_looks_up_each_of_its_own_codes(levels: list[int]) -> None:
    size = math.prod(levels)
    quantizer = make_quantizer("fsq", codebook_size=size, codebook_dim=4, levels=levels)
    assert quantizer._codes(quantizer.codebook.T).tolist() == list(range(size))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_fsq_rounds_bounded_numbers_to_the_nearest_level(count: int) -> None:
    """All levels are reached, none beyond them, in the order of the numbers; 0 is a level."""
    quantizer = without_maps(make_quantizer("fsq", codebook_size=count, codebook_dim=1, levels=[count]))
    x_N1 = torch.cat([torch.tensor([-1e4, 0.0, 1e4]), torch.linspace(-5, 5, 4001)])[:, None]
    points_N1, codes_N = quantizer.reduce(x_N1), quantizer.lookup(x_N1)
    assert codes_N[:3].tolist() == [0, count // 2, count - 1]
    assert codes_N.unique().tolist() == list(range(count))
    assert (codes_N[3:].diff() >= 0).all()
    assert points_N1[1].item() == pytest.approx(0, abs=1e-6)
    nearest_N = (points_N1 - quantizer.codebook).abs().argmin(1)
    between = ((points_N1 * (count // 2)) % 1 - 0.5).abs()[:, 0] < 1e-3
    assert torch.equal(codes_N[~between], nearest_N[~between])


def test_fsq_passes_the_gradient_through_the_bounds() -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer("fsq", codebook_size=15, codebook_dim=4, levels=[3, 5])
    x_ND, cotangent_ND = torch.randn(7, 4, requires_grad=True), torch.randn(7, 4)
    output = quantizer(as_latents(x_ND))
    assert output.loss == 0 and output.revived == 0
    z_Nd = quantizer.project(x_ND)  # odd numbers of levels have no shift
    points_Nd = torch.stack([z_Nd[:, 0].tanh() * 1.001, z_Nd[:, 1].tanh() * 2.002 / 2], dim=1)
    torch.testing.assert_close(quantizer.reduce(x_ND), points_Nd)
    (expected,) = torch.autograd.grad(quantizer.expand(points_Nd), x_ND, cotangent_ND, retain_graph=True)
    (found,) = torch.autograd.grad(output.quantized[0, :, 0].T, x_ND, cotangent_ND)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("fsq", {"levels": [8, 8]}, r"levels is \[8, 8\]: it must be numbers with the product .*codebook_size=32;"),
        ("fsq", {"levels": [8, 8]}, r"or set image_tokenizer\.codebook_size=64$"),
        ("fsq", {"levels": [32, 1]}, r"levels is \[32, 1\]: it must be a list of numbers, each 2 or more"),
        ("fsq", {"levels": []}, r"levels is \[\]: it must be a list"),
        ("cosine", {"projected_dim": 1}, "projected_dim is 1: it must be 2 or more"),
        ("cosine", {"decay": 1.0}, r"decay is 1\.0: it must be in \[0, 1\)"),
    ],
)
def test_refused_settings(kind: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"image_tokenizer\.quantizer\..*{words}"):
        make_quantizer(kind, codebook_size=32, codebook_dim=4, **settings)
