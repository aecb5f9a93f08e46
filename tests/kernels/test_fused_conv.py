"""The first convolution of the encoder as one matmul, as a GPU computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cogview_pl.kernels.fused_conv import convolution_as_product


@pytest.mark.parametrize(("edge", "stride", "margin"), [(4, 2, 1), (3, 1, 1), (2, 2, 0)])
@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_equals_the_convolution(edge: int, stride: int, margin: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 24, edge, stride, margin)
    images = torch.randn(2, 3, 16, 20)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    found = convolution_as_product(images, layer)
    torch.testing.assert_close(found, F.relu(layer(images)), atol=1e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    in_half = convolution_as_product(images.bfloat16(), layer)
    assert in_half.dtype == torch.bfloat16
    assert (in_half - found).norm() < 1e-2 * found.norm()
