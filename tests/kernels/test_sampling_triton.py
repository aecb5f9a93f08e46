"""Sampling by the kernel for a GPU gives the samples of single operations; on a CPU Triton's interpreter runs it."""

from __future__ import annotations

import pytest
import torch

from cogview_pl.generation.config import Sampling
from cogview_pl.generation.sampling import probabilities, sample

pytest.importorskip("triton")
from cogview_pl.kernels.sampling_triton import sample_by_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = 50


def rows_of_logits() -> torch.Tensor:
    """Random ones, few possible ones, both zeros, and ties at the threshold."""
    logits = 3 * torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0))
    logits[1, 3:] = float("-inf")
    logits[2, :10], logits[2, 10:] = -0.0, 0.0
    logits[3] = logits[3].round()
    return logits


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.0, 1), (0.3, 7), (2.0, 49), (1.0, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_samples_of_single_operations(temperature: float, top_k: int, dtype: torch.dtype) -> None:
    logits = rows_of_logits().to(DEVICE, dtype)
    sampling = Sampling(temperature=temperature, top_k=top_k)
    for uniform in (0.37, 1 - 2**-24):
        numbers = torch.full((len(logits),), uniform, device=DEVICE)
        wanted = sample(probabilities(logits, sampling), numbers)
        assert torch.equal(sample_by_kernel(logits, numbers, temperature=temperature, top_k=top_k), wanted)


def test_top_k_keeps_ties_and_nothing_else() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0]]).repeat(16, 1).to(DEVICE)
    uniform = (torch.arange(16, device=DEVICE) + 0.5) / 16
    found = sample_by_kernel(logits, uniform, temperature=1.0, top_k=2)
    assert found.unique().tolist() == [0, 1, 2, 4]
    assert torch.equal(found, sample(probabilities(logits, Sampling(top_k=2)), uniform))
