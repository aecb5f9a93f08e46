"""Quantizers of few dimensions: latents are projected down to be quantized, and code vectors are projected up again.

Shapes: N vectors, D codebook_dim (channels between encoder and decoder), d dimensions of the codes, K codebook_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.vqvae.quantizer import EMAQuantizer
from cogview_pl.vqvae.quantizer_base import Quantizer, QuantizerOutput, require, straight_through


class ProjectedQuantizer(Quantizer):
    """Base class: a codebook `(d, K)` between two learned linear maps, `D -> d` and `d -> D`."""

    def __init__(self, *, codebook_size: int, codebook_dim: int, projected_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim)
        self.projected_dim = projected_dim
        self.project = nn.Linear(codebook_dim, projected_dim)
        self.expand = nn.Linear(projected_dim, codebook_dim)

    def reduce(self, x_ND: Tensor) -> Tensor:
        """Points of the latents in the space of the codes: `(N, D)` -> `(N, d)`, float32, with gradient."""
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.float(), self.project.weight.float(), self.project.bias.float())

    def embed(self, codes: Tensor) -> Tensor:
        return self.expand(F.embedding(codes, self.codebook.T))

    def continuous(self, latents: Tensor) -> Tensor:
        """Latents through both maps and the bounds of the space, without quantization: `(B, D, y, x)` of both."""
        x_ByxD = latents.permute(0, 2, 3, 1)
        points = self.reduce(x_ByxD.flatten(0, 2))
        return self.expand(points).view(x_ByxD.shape).permute(0, 3, 1, 2)


class CosineQuantizer(ProjectedQuantizer):
    """Codes of few dimensions on the unit sphere, chosen by cosine (the idea of ViT-VQGAN).

    The codebook follows the normalised points as moving averages, k-means start and revival as in `EMAQuantizer`,
    whose arguments these are.

    Args:
        projected_dim: dimensions of a code, at least 2.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        projected_dim: int,
        commitment_weight: float,
        decay: float,
        kmeans_iters: int,
        dead_threshold: float,
        revive_every: int,
    ) -> None:
        require(projected_dim >= 2, "projected_dim", projected_dim, "2 or more")
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim, projected_dim=projected_dim)
        self.sphere = SphereQuantizer(
            codebook_size=codebook_size,
            codebook_dim=projected_dim,
            commitment_weight=commitment_weight,
            decay=decay,
            kmeans_iters=kmeans_iters,
            dead_threshold=dead_threshold,
            revive_every=revive_every,
        )

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        return self.sphere.codebook

    def reduce(self, x_ND: Tensor) -> Tensor:
        return F.normalize(super().reduce(x_ND), dim=1)

    def lookup(self, latents_ND: Tensor) -> Tensor:
        return self.sphere.lookup(self.reduce(latents_ND))

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        output = self.sphere.quantize(self.reduce(x_ND))
        return output._replace(quantized=self.expand(output.quantized))


class SphereQuantizer(EMAQuantizer):
    """An `EMAQuantizer` whose codes have length 1; its vectors must have it too."""

    def place(self, which_K: Tensor, codes_DK: Tensor) -> None:
        super().place(which_K, F.normalize(codes_DK, dim=0))

    def _update(self, counts_K: Tensor, sums_KD: Tensor) -> None:
        super()._update(counts_K, sums_KD)
        self.codebook.copy_(F.normalize(self.codebook, dim=0))


class FSQQuantizer(ProjectedQuantizer):
    """Finite scalar quantization (Mentzer et al. 2023): each dimension is rounded to one of few levels.

    The codebook is the grid of all combinations of levels; nothing about it is learned, and no code can die. Along a
    dimension of `L` levels the point `L/2 tanh(z)` (nearly) is rounded to a whole number, with straight-through
    gradient. Level numbers are digits of the code, the first dimension the lowest. There is no loss.

    Args:
        levels: number of levels of each dimension, at least 2; their product is codebook_size.
    """

    codebook: Tensor

    def __init__(self, *, codebook_size: int, codebook_dim: int, levels: list[int]) -> None:
        require(len(levels) > 0 and min(levels, default=0) >= 2, "levels", levels, "a list of numbers, each 2 or more")
        require(
            math.prod(levels) == codebook_size,
            "levels",
            levels,
            f"numbers with the product image_tokenizer.codebook_size={codebook_size}; change them, or set "
            f"image_tokenizer.codebook_size={math.prod(levels)}",
        )
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim, projected_dim=len(levels))
        self.levels = levels
        self.register_buffer("codebook", _grid(levels))

    def reduce(self, x_ND: Tensor) -> Tensor:
        """Bounded points, in units in which levels are -1 … 1: `(N, D)` -> `(N, d)`."""
        return torch.stack(
            [_bounded(z_N, levels) / (levels // 2) for z_N, levels in self._by_dimension(super().reduce(x_ND))], dim=1
        )

    def lookup(self, latents_ND: Tensor) -> Tensor:
        return self._codes(self.reduce(latents_ND))

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        points_ND = self.reduce(x_ND)
        codes_N = self._codes(points_ND)
        vectors_ND = F.embedding(codes_N, self.codebook.T)
        quantized_ND = self.expand(straight_through(vectors_ND, points_ND))
        distance = F.mse_loss(points_ND.detach(), vectors_ND)
        return self.output(quantized_ND, codes_N, torch.zeros_like(distance), distance)

    def _codes(self, points_ND: Tensor) -> Tensor:
        """Codes of bounded points: `(N, d)` -> int64 `(N,)`."""
        codes_N = torch.zeros(len(points_ND), dtype=torch.int64, device=points_ND.device)
        place = 1
        for z_N, levels in self._by_dimension(points_ND):
            codes_N += (z_N * (levels // 2)).round().long().add_(levels // 2).clamp_(0, levels - 1) * place
            place *= levels
        return codes_N

    def _by_dimension(self, points_ND: Tensor) -> Sequence[tuple[Tensor, int]]:
        return list(zip(points_ND.unbind(1), self.levels, strict=True))


_BEYOND = 1e-3
"""Share by which bounds lie beyond the outermost levels; with 0 a dimension of two levels has an infinite shift."""


def _bounded(z_N: Tensor, levels: int) -> Tensor:
    """Numbers between the outermost of the levels `-(L//2) … (L-1)//2`, by a shifted tanh that maps 0 to 0."""
    half = (levels - 1) * (1 + _BEYOND) / 2
    offset = 0.0 if levels % 2 else 0.5
    return (z_N + math.atanh(offset / half)).tanh() * half - offset


def _grid(levels: Sequence[int]) -> Tensor:
    """Codebook `(d, K)` of all combinations of levels; the first dimension counts fastest."""
    rest = torch.arange(math.prod(levels))
    rows = []
    for count in levels:
        rows.append((rest % count - count // 2) / (count // 2))
        rest = rest // count
    return torch.stack(rows)
