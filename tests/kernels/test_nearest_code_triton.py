"""Code search by the kernel for a GPU finds what the search in fp32 finds; on a CPU Triton's interpreter runs it."""

from __future__ import annotations

import pytest
import torch

from tests.make_models import make_vqvae

pytest.importorskip("triton")
from cogview_pl.kernels.nearest_code_triton import nearest_by_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not multiply bf16.
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden_size", "codebook_size"), [(64, 200), (24, 100)])
def test_the_nearest_code(dtype: torch.dtype, hidden_size: int, codebook_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(150, hidden_size, generator=generator).to(DEVICE, dtype)
    codebook = torch.randn(hidden_size, codebook_size, generator=generator).to(DEVICE)
    codes, distances = nearest_by_kernel(vectors, codebook)
    exact = torch.cdist(vectors.double(), codebook.T.double()).square()
    assert torch.equal(codes, exact.argmin(1))
    torch.testing.assert_close(distances.double(), exact.amin(1), atol=1e-4, rtol=1e-4)


def test_of_equally_near_codes_the_first() -> None:
    codebook = torch.ones(16, 130, device=DEVICE)
    codebook[:, :70] = 5.0
    codes, _ = nearest_by_kernel(torch.ones(3, 16, device=DEVICE, dtype=torch.float16), codebook)
    assert codes.tolist() == [70] * 3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA GPU")
@pytest.mark.parametrize("residual_blocks", [0, 1])
def test_encoding_on_a_gpu(residual_blocks: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "codebook_dim": 32, "codebook_size": 300, "residual_blocks": residual_blocks}
    model = make_vqvae("fixed", **sizes, std=[0.3] * 3).eval()
    images = torch.rand(4, 3, 64, 64)
    codes, latents = model.encode(images), model.latents(images).detach()
    model.to(DEVICE)
    with torch.no_grad():
        found = model.latents(images.to(DEVICE)).cpu()
        with torch.autocast("cuda", torch.bfloat16):
            in_half = model.latents(images.to(DEVICE)).cpu()
    assert (found - latents).norm() < 2e-3 * latents.norm()  # TF32
    assert in_half.dtype == torch.bfloat16
    assert (in_half - latents).norm() < 2e-2 * latents.norm()
    assert (model.encode(images.to(DEVICE)).cpu() == codes).float().mean() > 0.95
