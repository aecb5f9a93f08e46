"""Stage 1 under Lightning: its steps, what it logs, and validation figures, against plain training and counting."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor

from cogview_pl.data.bad_samples import ImageBatch
from cogview_pl.data.samples import Skipped
from cogview_pl.lit.image_tokenizer import _scaled, reconstruction_grid, to_unit_range
from cogview_pl.vqvae.model import VQVAE

from .fitting import fit, loader, trainer, validate
from .models import CODES, MOMENTUM, images
from .models import RECONSTRUCTION_WEIGHT as WEIGHT
from .models import TOKENIZER_LR as LR
from .models import image_batch as batch
from .models import tokenizer as model
from .models import tokenizer_module as module

EMPTY = batch(0, 0)


def figures(tested: VQVAE, images: Tensor, reconstruction: str) -> tuple[Tensor, Tensor, Tensor, Counter[int]]:
    """Per image the error, the squared distance to the codes and the PSNR; and how often a code occurs."""
    scaled = images.double() / 255
    latents = tested.latents(scaled.float())
    distances = (latents.permute(0, 2, 3, 1)[..., None] - tested.quantizer.codebook).square().sum(3)
    codes = distances.argmin(-1)
    vectors = tested.quantizer.codebook.T[codes].permute(0, 3, 1, 2)
    decoded = (tested.decoder(vectors) * tested.std + tested.mean).double()
    difference = decoded - scaled
    assert decoded.min() < 0 or decoded.max() > 1
    errors = difference.abs() if reconstruction == "l1" else difference.square()
    clipped = (decoded.clamp(0, 1) - scaled).square().mean((1, 2, 3))
    distance = (latents - vectors).square().mean((1, 2, 3))
    return errors.mean((1, 2, 3)), distance, -10 * clipped.log10(), Counter(codes.flatten().tolist())


def usage(counts: Counter[int]) -> tuple[float, float]:
    """Share of the codes that occur, and the exponential of the entropy of how often they do."""
    share = torch.tensor(list(counts.values())) / sum(counts.values())
    return len(counts) / CODES, (share**-share).prod().item()


@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
@torch.no_grad()
def test_validation_means_are_over_all_images_of_batches_of_different_size(reconstruction: str) -> None:
    """Also a second time; a batch without a readable image changes nothing."""
    tested = module(reconstruction=reconstruction)
    for batches in ([batch(1, 3), EMPTY, batch(2, 1), batch(3, 5)], [batch(4, 2)]):
        images = torch.cat([given.images for given in batches if len(given.images)])
        errors, distances, decibels, counts = figures(tested.model, images, reconstruction)
        assert 1 < len(counts) < CODES
        share, perplexity = usage(counts)
        expected = {
            "val/loss_reconstruction": errors.mean().item(),
            "val/loss_commitment": distances.mean().item(),
            "eval/psnr": decibels.mean().item(),
            "codebook/usage": share,
            "codebook/perplexity": perplexity,
        }
        assert validate(tested, batches) == pytest.approx(expected, rel=1e-4)


def test_a_validation_without_a_readable_image_logs_nothing() -> None:
    tested = module()
    assert trainer(1).validate(tested, torch.utils.data.DataLoader([EMPTY], batch_size=None), verbose=False) == [{}]  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_steps_and_logs_are_those_of_plain_training(clip: float | None) -> None:
    """Two steps as a plain autoencoder, then with codes; the step of a batch without images changes nothing."""
    tested = module(quantize_after_steps=3)
    reference = copy.deepcopy(tested.model)
    batches = [batch(1, 3), EMPTY, batch(2, 1), batch(3, 5), batch(4, 2)]
    log = fit(tested, batches, gradient_clip_val=clip)
    optimizer = torch.optim.SGD(reference.parameters(), lr=LR, momentum=MOMENTUM)
    expected: dict[str, dict[int, float]] = {"train/gradient_norm": {1: 0.0}}
    for step, given in enumerate(batches):
        if step == 1:
            continue
        images = given.images / 255
        optimizer.zero_grad()
        logged = {}
        if step < 3:
            error = (reference.reconstruct_continuous(images) - images).square().mean()
            loss = WEIGHT * error
        else:
            with torch.no_grad():
                _, distances, decibels, counts = figures(reference, given.images, "l2")
            output = reference(images)
            error = (output.reconstruction - images).square().mean()
            loss = WEIGHT * error + output.quantized.loss
            share, perplexity = usage(counts)
            logged = {
                "train/loss": loss,
                "train/loss_commitment": distances.mean(),
                "train/psnr": decibels.mean(),
                "codebook/batch_usage": share,
                "codebook/batch_perplexity": perplexity,
                "codebook/dead": CODES - len(counts),
                "codebook/revived": 0,
            }
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]).norm()
        if clip:
            assert norm > clip
            torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        optimizer.step()
        for name, value in {**logged, "train/loss_reconstruction": error, "train/gradient_norm": norm}.items():
            expected.setdefault(name, {})[step] = float(value)
    expected["train/loss_reconstruction"][1] = expected["train/loss_reconstruction"][0]  # written again
    for name, values in expected.items():
        assert log.series(name) == pytest.approx(values, rel=1e-3), name
    for ours, wanted in zip(tested.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_image_adds_nothing_to_the_gradient_of_a_step() -> None:
    """The batches of a step are averaged: with an empty batch, the other one moves the weights half as far."""
    with_empty, alone, start = module(), module(), model().state_dict()
    trainer(1, accumulate_grad_batches=2).fit(with_empty, loader([batch(1, 3), EMPTY]))
    fit(alone, [batch(1, 3)])
    whole = dict(alone.model.named_parameters())
    for name, weight in with_empty.model.named_parameters():
        torch.testing.assert_close(weight - start[name], (whole[name] - start[name]) / 2, atol=1e-7, rtol=1e-3)


def test_the_quantizers_schedule_follows_the_share_of_steps_done() -> None:
    tested = module("gumbel")
    tested.model.quantizer.temperature_end = 1 / 16
    fit(tested, [batch(seed, 1) for seed in range(4)])
    assert tested.model.quantizer.temperature.item() == pytest.approx(16 ** -(3 / 4))


def test_no_weight_decays_and_filters_are_what_muon_is_for() -> None:
    tested = module()
    tested.trainer = trainer(1)
    groups = tested.configure_optimizers()["optimizer"].param_groups
    assert [(g["name"], g["matrices"], g["weight_decay"]) for g in groups] == [
        ("filters", True, 0.0),
        ("vectors", False, 0.0),
    ]
    convolutions = {id(layer.weight) for layer in tested.modules() if hasattr(layer, "kernel_size")}
    assert {id(p) for p in groups[0]["params"]} == convolutions
    assert sum(len(group["params"]) for group in groups) == len(list(tested.parameters()))


def test_a_loss_that_is_not_finite_stays_so_unless_no_image_made_it() -> None:
    lost = torch.tensor(torch.nan)
    assert _scaled(lost, 1.0).isnan()
    assert _scaled(lost, 0.0) == 0
    assert _scaled(torch.tensor(3.0), 0.5) == 1.5


def test_images_go_in_from_black_0_to_white_1() -> None:
    given = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    found = to_unit_range(given)
    assert found[0, :, 1, 1].tolist() == pytest.approx([0, 0.2, 1])
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_grid_shows_the_first_readable_images_above_their_reconstructions() -> None:
    tested = model()
    given = images(1, 4)
    rows = [given[0], Skipped("lost", "why"), *given[1:]]
    found = reconstruction_grid(tested, rows, 4)  # type: ignore[arg-type]
    assert found.shape == (3, 22, 32)  # two rows of three images of 8, with 2 pixels around
    for column, sample in enumerate(given[:3]):
        left = 2 + 10 * column
        image = sample.image / 255
        torch.testing.assert_close(found[:, 2:10, left : left + 8], image)
        decoded = tested.decode(tested.encode(image[None])).clamp(0, 1)[0]
        torch.testing.assert_close(found[:, 12:20, left : left + 8], decoded, rtol=1e-4, atol=1e-5)
    assert reconstruction_grid(tested, rows, 9).shape == (3, 22, 42)  # type: ignore[arg-type]
    assert torch.equal(reconstruction_grid(tested, rows[1:2], 4), torch.zeros(3, 1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "mean", "error", "decibels"), [(51, 0.2, 0.0, 100.0), (0, 1.0, 1.0, 0.0)])
def test_a_figure_of_zero_is_one_like_others(value: int, mean: float, error: float, decibels: float) -> None:
    """A model without weights gives its mean for every image."""
    tested = module()
    for parameter in tested.model.parameters():
        parameter.data.zero_()
    tested.model.mean.fill_(mean)
    given = ImageBatch(torch.full((2, 3, 8, 8), value, dtype=torch.uint8), [], [], [])
    expected = {
        "val/loss_reconstruction": error,
        "val/loss_commitment": 0.0,
        "eval/psnr": decibels,
        "codebook/usage": 1 / CODES,
        "codebook/perplexity": 1.0,
    }
    assert validate(tested, [given]) == pytest.approx(expected, abs=1e-6)
