"""Apple's GPUs have no float64: with a device type that stands for them, nothing on it is made in float64."""

from __future__ import annotations

import pytest
import torch

from cogview_pl.generation.sampling import sample

from .no_float64 import NoFloat64


def test_the_guard_sees_float64() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()
    assert torch.zeros(2).double().dtype == torch.float64


def test_samples_are_those_of_float64() -> None:
    """Also at the largest number below 1, whose product with a float32 total may be the total itself."""
    probabilities = torch.rand(400, 37, generator=torch.Generator().manual_seed(1))
    probabilities[:, 30:] = 0
    uniform = torch.rand(400, generator=torch.Generator().manual_seed(2))
    uniform[::2] = 1 - 2**-24
    wanted = sample(probabilities, uniform)
    with NoFloat64():
        found = sample(probabilities, uniform)
    assert found.max() < 30
    assert (found == wanted).float().mean() > 0.99
