"""The adversarial loss: its parts by hand, and its gradients against two separate backward passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogview_pl.vqvae.adversarial import adaptive_weight, hinge_loss, lecam_penalty, r1_penalty
from cogview_pl.vqvae.config import DiscriminatorNorm, Regularisation
from cogview_pl.vqvae.discriminator import PatchDiscriminator, build_discriminator, smallest_edge

from ..lit.models import discriminated, image_batch, tokenizer

NORMS = list(DiscriminatorNorm)


def test_hinge_loss_by_hand() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, made).item() == pytest.approx(((0 + 0.5) / 2 + (0 + 1) / 2) / 2)


def test_lecam_penalty_by_hand() -> None:
    """Real logits count above the average of reconstructions, those of reconstructions below the average of real."""
    real, made = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 1.0])
    found = lecam_penalty(real, made, real_mean=torch.tensor(0.5), made_mean=torch.tensor(-0.5))
    assert found.item() == pytest.approx((2.5**2 + 0) / 2 + (3.5**2 + 0) / 2)


def test_r1_penalty_by_hand() -> None:
    """Two logits of each image, linear with the slopes 1 and 3, then squared: the slopes depend on the image."""
    images = torch.tensor([[1.0, 2.0], [0.0, -1.0]]).view(2, 1, 1, 2).requires_grad_()
    slope = torch.tensor(3.0, requires_grad=True)
    logits = torch.stack([images[..., 0], slope * images[..., 1].square()], 1)
    penalty = r1_penalty(images, logits)
    assert penalty.item() == pytest.approx(((1 + 12.0**2) + (1 + 6.0**2)) / 2 / 2)
    penalty.backward()  # squares of 2 s x: 8 s x² / 2 each, and the mean of two images
    assert slope.grad is not None
    assert slope.grad.item() == pytest.approx((8 * 3 * 4 + 8 * 3 * 1) / 2 / 2)


@pytest.mark.parametrize(("ours", "expected"), [([0.0, 0.5], 10.0), ([0.0, 0.001], 100.0), ([0.0, 0.0], 100.0)])
def test_adaptive_weight_by_hand(ours: list[float], expected: float) -> None:
    """Norm 5 over the norm of the other gradient, at most 100."""
    found = adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor(ours), largest=100.0)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_logit_sees_a_patch_of_its_own_image(layers: int, norm: DiscriminatorNorm) -> None:
    """16, 34, 70 pixels along an edge; with a group norm the statistics of the whole image too."""
    torch.manual_seed(0)
    tested = PatchDiscriminator(hidden_size=4, layers=layers, norm=norm)
    edge = smallest_edge(layers) * 4
    images = torch.rand(3, 3, edge, edge, requires_grad=True)
    logits = tested(images)
    assert logits.shape[:2] == (3, 1) and logits.shape[2] == edge // 2**layers - 2
    middle = logits.shape[2] // 2
    logits[1, 0, middle, middle].backward()
    assert images.grad is not None
    reached = images.grad.abs().sum(1) > 0
    assert not reached[0].any() and not reached[2].any()
    if norm == DiscriminatorNorm.none:
        patch = {1: 16, 2: 34, 3: 70}[layers]
        assert reached[1].any(0).sum() == min(patch, edge) and reached[1].any(1).sum() == min(patch, edge)
    alone = tested(images[1:2].detach())
    torch.testing.assert_close(alone, logits[1:2])


def test_the_smallest_images_give_one_logit() -> None:
    tested = PatchDiscriminator(hidden_size=2, layers=2, norm=DiscriminatorNorm.group)
    assert tested(torch.rand(1, 3, tested.smallest_edge, tested.smallest_edge)).shape == (1, 1, 1, 1)
    assert tested(torch.rand(0, 3, tested.smallest_edge, tested.smallest_edge)).shape == (0, 1, 1, 1)


def test_building_a_discriminator_draws_no_random_numbers_of_the_run() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first = build_discriminator(hidden_size=2, layers=1, norm=DiscriminatorNorm.none)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(3)
    second = build_discriminator(hidden_size=2, layers=1, norm=DiscriminatorNorm.none)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("regularisation", list(Regularisation))
@pytest.mark.parametrize("adaptive", [True, False])
def test_gradients_are_those_of_two_separate_backward_passes(adaptive: bool, regularisation: Regularisation) -> None:
    """The textbook form: the tokenizer against a frozen discriminator, then the discriminator on fixed images."""
    tested = discriminated(adaptive=adaptive, regularisation=regularisation)
    options = tested.config
    model, images = tokenizer(), image_batch(1, 3).images / 255
    theirs, other = copy.deepcopy(tested.discriminator), copy.deepcopy(model)

    reconstruction = model(images).reconstruction
    loss = 3 * (reconstruction - images).square().mean()
    last = model.decoder[-1].weight
    terms = tested(images, reconstruction, loss, last, join=lambda mean: mean, scale=64.0)
    (loss + terms.tokenizer + terms.discriminator).backward()

    theirs.requires_grad_(False)
    made = other(images).reconstruction
    error, deception = 3 * (made - images).square().mean(), -theirs(made).mean()
    weight: Any = options.weight
    if adaptive:
        norms = [
            torch.autograd.grad(part, other.decoder[-1].weight, retain_graph=True)[0].norm()
            for part in (error, deception)
        ]
        weight = weight * norms[0] / norms[1]
    (error + weight * deception).backward()

    theirs.requires_grad_(True)
    real = images.clone().requires_grad_()
    real_logits, made_logits = theirs(real), theirs(made.detach())
    expected = ((1 - real_logits).clamp(min=0).mean() + (1 + made_logits).clamp(min=0).mean()) / 2
    assert 0 < (real_logits < 1).float().mean() < 1 and 0 < (made_logits > -1).float().mean() < 1
    if regularisation == Regularisation.r1:
        slopes = torch.autograd.grad(real_logits.sum(), real, create_graph=True)[0]
        expected = expected + options.regularisation_weight * slopes.square().sum((1, 2, 3)).mean() / 2
    if regularisation == Regularisation.lecam:  # the first averages are the means of this batch
        above = (real_logits - made_logits.mean().detach()).clamp(min=0).square().mean()
        below = (real_logits.mean().detach() - made_logits).clamp(min=0).square().mean()
        expected = expected + options.regularisation_weight * (above + below)
    expected.backward()

    assert terms.tokenizer.item() == pytest.approx((weight * deception).item(), rel=1e-4)
    assert terms.discriminator.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms.figures["weight"].item() == pytest.approx(float(weight), rel=1e-4)
    for ours, separate in ((model, other), (tested.discriminator, theirs)):
        found, wanted = gradients(ours), gradients(separate)
        assert len(found) == len(wanted) > 0 and all(gradient.any() for gradient in found)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_averages_of_logits_begin_as_plain_means_and_stay_in_evaluation() -> None:
    tested, model = discriminated(lecam_decay=0.6), tokenizer()
    batches = [image_batch(seed, 2).images / 255 for seed in (1, 2, 3)]
    real, made = [], []
    for images in batches:
        reconstruction = model(images).reconstruction
        with torch.no_grad():
            real.append(tested.discriminator(images).mean().item())
            made.append(tested.discriminator(reconstruction).mean().item())
        loss, last = reconstruction.square().mean(), model.decoder[-1].weight
        tested(images, reconstruction, loss, last, join=lambda mean: mean, scale=1.0)
    for found, seen in ((tested.real_mean, real), (tested.made_mean, made)):
        assert found.item() == pytest.approx(0.6 * (seen[0] + seen[1]) / 2 + 0.4 * seen[2], rel=1e-5)
    before = tested.real_mean.item()
    tested.eval()
    tested(images, reconstruction, reconstruction.square().mean(), last, join=lambda mean: mean, scale=1.0)
    assert (tested.real_mean.item(), tested.updates.item()) == (before, 3)
