"""Back-projection: what it leaves, what it takes from the small image."""

from __future__ import annotations

import torch

from cogview_pl.generation.super_resolution.consistency import consistent, resized


def test_a_share_of_the_difference_is_taken_back() -> None:
    torch.manual_seed(0)
    small = resized(0.2 + 0.6 * torch.rand(2, 3, 8, 8), 16)  # smooth, and far from black and white
    large = resized(small, 32) + 0.1  # too bright
    assert consistent(large, small, 0.0) is large
    whole, half = consistent(large, small, 1.0), consistent(large, small, 0.5)
    assert torch.allclose(half, (large + whole) / 2, atol=1e-6)
    before, after = ((resized(image, 16) - small).abs().mean() for image in (large, whole))
    assert before > 0.09 and after < 0.01


def test_detail_finer_than_the_small_image_stays() -> None:
    small = torch.full((1, 3, 8, 8), 0.5)
    stripes = 0.5 + 0.2 * torch.tensor([1.0, -1.0]).repeat(8).expand(1, 3, 16, 16)
    assert torch.allclose(consistent(stripes, small, 1.0)[..., 4:12, 4:12], stripes[..., 4:12, 4:12], atol=0.01)
    assert torch.allclose(consistent(stripes + 0.1, small, 1.0)[..., 4:12, 4:12], stripes[..., 4:12, 4:12], atol=0.01)


def test_pixels_stay_between_black_and_white() -> None:
    found = consistent(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 8, 8) * 2, 1.0)
    assert found.max() == 1
