"""Stage 1 with a perceptual loss: its value by hand, its part in a step, and checkpoints without its network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from .fitting import fit, loader, trainer
from .models import RECONSTRUCTION_WEIGHT as WEIGHT
from .models import TOKENIZER_LR, discriminated, perceptual_loss, tokenizer_module
from .models import image_batch as batch

BATCHES = [batch(1, 3), batch(2, 2), batch(3, 4)]


def by_hand(images: torch.Tensor, others: torch.Tensor) -> float:
    """The distance in float64, position by position."""
    network = copy.deepcopy(perceptual_loss().distance).double()
    first, norm, _, second, _ = network.features  # type: ignore[misc, union-attr]
    total = 0.0
    for image, other in zip(images.double(), others.double(), strict=True):
        x = torch.stack([image, other]) * 2 - 1
        x = (x - torch.tensor([0.1, 0.0, -0.1])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
        one = F.conv2d(x.double(), first.weight, first.bias)
        one = (one / (1 + norm.eps) ** 0.5).relu()  # a fresh batch norm in evaluation
        two = F.conv2d(one, second.weight, second.bias).relu()
        for maps, weight in ((one, 1.0), (two, 0.5)):
            places = maps.shape[2] * maps.shape[3]
            for row in range(maps.shape[2]):
                for column in range(maps.shape[3]):
                    a, b = maps[0, :, row, column], maps[1, :, row, column]
                    a, b = a / a.norm().clamp(min=1e-10), b / b.norm().clamp(min=1e-10)
                    total += weight * float((a - b).square().sum()) / places
    return total / len(images)


def test_the_distance_by_hand() -> None:
    images, others = batch(1, 2).images / 255, batch(2, 2).images / 255
    tested = perceptual_loss().train()
    assert tested(images, others).item() == pytest.approx(by_hand(images, others), rel=1e-4)
    assert tested(images, images).item() == 0


def test_a_step_follows_the_weighted_sum_and_leaves_the_network() -> None:
    tested = tokenizer_module(perceptual=perceptual_loss())
    reference, loss = copy.deepcopy(tested.model), perceptual_loss()
    log = fit(tested, BATCHES[:1])
    images = BATCHES[0].images / 255
    output = reference(images)
    distance = loss(images, output.reconstruction)
    error = (output.reconstruction - images).square().mean()
    total = WEIGHT * error + 1.5 * distance + output.quantized.loss
    total.backward()
    torch.optim.SGD(reference.parameters(), lr=TOKENIZER_LR).step()
    assert log.series("train/loss_perceptual")[0] == pytest.approx(distance.item(), rel=1e-4)
    assert log.series("train/loss")[0] == pytest.approx(total.item(), rel=1e-4)
    for ours, wanted in zip(tested.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert tested.perceptual is not None
    for ours, wanted in zip(
        (*tested.perceptual.distance.parameters(), *tested.perceptual.distance.buffers()),
        (*loss.distance.parameters(), *loss.distance.buffers()),
        strict=True,
    ):
        assert torch.equal(ours, wanted)


def test_the_adaptive_weight_compares_with_the_perceptual_loss_too() -> None:
    tested = tokenizer_module(perceptual=perceptual_loss(), adversarial=discriminated(weight=1.0))
    reference, adversarial, loss = copy.deepcopy(tested.model), discriminated(weight=1.0), perceptual_loss()
    log = fit(tested, BATCHES[:1])
    images = BATCHES[0].images / 255
    made = reference(images).reconstruction
    others = WEIGHT * (made - images).square().mean() + 1.5 * loss(images, made)
    deception = -adversarial.discriminator(made).mean()
    last = reference.decoder[-1].weight
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (others, deception)]
    assert log.series("adversarial/weight")[0] == pytest.approx((norms[0] / norms[1]).item(), rel=1e-4)


def test_checkpoints_do_not_hold_the_network_and_go_on_with_it(tmp_path: Path) -> None:
    whole = tokenizer_module("ema", perceptual=perceptual_loss())
    fit(whole, BATCHES)
    given = trainer(1)
    given.fit(tokenizer_module("ema", perceptual=perceptual_loss()), loader(BATCHES))
    given.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved and not any("perceptual" in name for name in saved)
    second = tokenizer_module("ema", perceptual=perceptual_loss())
    rest = loader([*BATCHES[1:], *BATCHES[:1]])
    trainer(3).fit(second, rest, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    with pytest.raises(RuntimeError, match=r"encoder\.0\.weight"):  # other weights must be there
        second.load_state_dict({name: value for name, value in saved.items() if name != "model.encoder.0.weight"})
