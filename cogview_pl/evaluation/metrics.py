"""Metrics over streams of images, computed by torchmetrics: FID, IS, and reconstruction metrics of a VQ-VAE.

Shapes: B images, F features, K codes or classes.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.evaluation.lpips import LPIPS
from cogview_pl.vqvae.codebook import count_codes, usage_and_perplexity
from cogview_pl.vqvae.external import AnyTokenizer
from cogview_pl.vqvae.losses import psnr

try:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.ssim import StructuralSimilarityIndexMeasure
except ImportError as error:
    raise UserError('task=evaluate needs torchmetrics; pip install "cogview_pl[eval]"') from error


class _Given(nn.Module):
    """Passes features through; it replaces the feature network of torchmetrics, because features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FID:
    """Fréchet distance between the Gaussians fitted to two sets of features `(B, F)`, given batch by batch.

    |m₁ − m₂|² + Tr(C₁ + C₂ − 2 (C₁ C₂)^½), in float64, with unbiased covariances.
    """

    def __init__(self, num_features: int) -> None:
        self._metric = FrechetInceptionDistance(_Given(num_features))

    def add_real(self, features: Tensor) -> None:
        """Add features of reference images."""
        self._metric.update(features.double(), real=True)

    def add_generated(self, features: Tensor) -> None:
        """Add features of generated images."""
        self._metric.update(features.double(), real=False)

    def compute(self) -> float:
        """The distance; each set needs at least two images."""
        return float(self._metric.compute())


def inception_score(logits: Tensor, splits: int, seed: int) -> float:
    """Mean over `splits` random parts of exp of the mean KL divergence of p(class | image) from p(class).

    Args:
        logits: `(B, K)`, at least `splits` images.
        splits: number of parts.
        seed: seed of the random parts.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # about memory of logits, and the deviation of a single split
        torch.manual_seed(seed)
        metric = InceptionScore(nn.Identity(), splits=splits)
        metric.update(logits.double())
        return float(metric.compute()[0])


class Comparison(NamedTuple):
    """Sums over a batch of B images and their reconstructions."""

    images: int
    psnr: float
    ssim: Tensor
    """Scalar, on the CPU."""
    distance: float
    """LPIPS; 0 without it."""
    counts_K: Tensor
    """Number of times that each code is used, float32, on the CPU."""


class ReconstructionMetrics:
    """PSNR, SSIM, LPIPS and use of the codebook, over images given batch by batch.

    Args:
        model: image tokenizer on its device.
        lpips: LPIPS on the same device; None leaves it out.
    """

    def __init__(self, model: AnyTokenizer, lpips: LPIPS | None = None) -> None:
        self._model = model
        self._lpips = lpips
        self._distance = self._psnr = 0.0
        self._ssim = torch.tensor(0.0)
        self._counts = torch.zeros(model.codebook_size)
        self._seen = 0

    @torch.no_grad()
    def compare(self, images: Tensor) -> tuple[Tensor, Comparison]:
        """Reconstructions, clipped to 0 … 1, of images, float `(B, 3, Y, X)` in 0 … 1, and how they differ."""
        device = next(self._model.parameters()).device
        images = images.to(device)
        codes = self._model.encode(images)
        decoded = self._model.decode(codes).clamp(0, 1)
        ssim = StructuralSimilarityIndexMeasure(data_range=1.0).to(device)
        ssim.update(decoded, images)
        return decoded, Comparison(
            len(images),
            float(psnr(decoded, images)) * len(images),
            torch.as_tensor(ssim.similarity).cpu(),
            0.0 if self._lpips is None else float(self._lpips(decoded, images).sum()),
            count_codes(codes.flatten(), len(self._counts)).cpu(),
        )

    def add(self, found: Comparison) -> None:
        """Add the sums of a batch."""
        self._counts += found.counts_K
        self._psnr += found.psnr
        self._distance += found.distance
        self._ssim += found.ssim
        self._seen += found.images

    def compute(self) -> dict[str, float]:
        """Means over the images: `eval/psnr` (dB), `eval/ssim`, `codebook/usage`, `codebook/perplexity`.

        With LPIPS `eval/lpips` as well.
        """
        usage, perplexity = usage_and_perplexity(self._counts)
        distance = {} if self._lpips is None else {"eval/lpips": self._distance / self._seen}
        return distance | {
            "eval/psnr": self._psnr / self._seen,
            "eval/ssim": float(self._ssim / self._seen),
            "codebook/usage": float(usage),
            "codebook/perplexity": float(perplexity),
        }
