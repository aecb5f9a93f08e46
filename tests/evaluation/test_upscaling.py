"""Metrics of upscaled images on cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from cogview_pl.evaluation.upscaling import compare_upscaled, judge_upscaling
from cogview_pl.generation.super_resolution.windows import owners, windows
from cogview_pl.vqvae.losses import psnr


@pytest.fixture
def truth() -> torch.Tensor:
    """White images with a black square off the middle."""
    images = torch.ones(2, 3, 64, 64)
    images[:, :, 10:50, 10:50] = 0
    return images


def test_psnr_of_a_constant_error() -> None:
    truth = torch.full((2, 3, 8, 8), 0.5)
    assert judge_upscaling(compare_upscaled(truth + 0.1, truth)).psnr == pytest.approx(20.0, abs=1e-4)


def test_an_error_counts_at_edges_only(truth: torch.Tensor) -> None:
    away, at_edge = truth.clone(), truth.clone()
    away[:, :, 25:35, 25:35] = 1  # inside the square
    at_edge[:, :, 9, 10:50] = 0  # the square is one row larger
    assert judge_upscaling(compare_upscaled(away, truth)).edge_error == 0
    assert judge_upscaling(compare_upscaled(at_edge, truth)).edge_error > 0
    assert judge_upscaling(compare_upscaled(away, truth)).psnr < judge_upscaling(compare_upscaled(at_edge, truth)).psnr


def test_seams_show_and_even_errors_do_not(truth: torch.Tensor) -> None:
    windows_yx = owners(4)
    even = judge_upscaling(compare_upscaled((truth - 0.1).abs(), truth, windows_yx))
    assert even.seam_ratio == pytest.approx(1.0, abs=1e-4)
    seamed = truth.clone()
    seamed[..., 31:33] = 1 - seamed[..., 31:33]  # the border between the first two columns of windows
    assert judge_upscaling(compare_upscaled(seamed, truth, windows_yx)).seam_ratio > 3
    assert math.isnan(judge_upscaling(compare_upscaled(truth, truth)).seam_ratio)


def test_a_set_is_judged_as_its_images_one_by_one(truth: torch.Tensor) -> None:
    images = (truth + torch.rand(truth.shape, generator=torch.Generator().manual_seed(0)) / 4).clamp(0, 1)
    every = compare_upscaled(images, truth, owners(4))
    assert every == [compare_upscaled(images[i : i + 1], truth[i : i + 1], owners(4))[0] for i in range(len(images))]
    error, edges = (images - truth).abs().mean(1), sum(image.seam_pixels + image.other_pixels for image in every)
    assert judge_upscaling(every).psnr == pytest.approx(float(psnr(images, truth)))
    assert 0 < judge_upscaling(every).edge_error < float(error.sum()) / edges


@pytest.mark.parametrize("grid", [4, 8, 32])
def test_owners_are_the_first_windows_that_cover_a_code(grid: int) -> None:
    found = owners(grid)
    assert found.shape == (2 * grid, 2 * grid)
    assert found.unique().tolist() == list(range(9))
    for number, window in enumerate(windows(grid)):
        assert (found[window.target] <= number).all()
