"""Vector quantizers: continuous latents -> codes and code vectors (paper section 3.2, "Image Tokenizer").

Shapes: N = B*y*x vectors, D codebook_dim, K codebook_size, R vectors of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cogview_pl.vqvae.codebook import (
    count_codes,
    divergence_from_uniform,
    gather_statistics,
    nearest,
    relaxed_choice,
    rows_per_block,
    squared_distances,
    sum_over_ranks_,
    uniform_codebook,
    usage_and_perplexity,
)
from cogview_pl.vqvae.quantizer_base import (
    GradientQuantizer,
    Quantizer,
    QuantizerOutput,
    UpkeptQuantizer,
    require,
    straight_through,
)

_SMALLEST_SCALE = 1e-12  # of squared distances, where all vectors lie on their codes


class EMAQuantizer(UpkeptQuantizer):
    """Codes follow the encoder as exponential moving averages (the released tokenizer; paper section 3.2).

    In training each call moves the codebook after its use: with counts `c` and sums `s` of the batch,
    `cluster_size <- decay cluster_size + (1 - decay) c`, `embed_avg <- decay embed_avg + (1 - decay) s`,
    `codebook <- embed_avg / size` where `size` is `cluster_size` with Laplace smoothing `eps`. Evaluation
    changes nothing. `loss` is `commitment_weight * commitment`. See `UpkeptQuantizer` for the upkeep of the codes; the
    sums, and the `usage`, `perplexity` and `dead` of training are of all ranks too.

    Args:
        commitment_weight: at least 0.
    """

    eps = 1e-5

    codebook: Tensor
    embed_avg: Tensor

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        decay: float,
        commitment_weight: float,
        kmeans_iters: int,
        dead_threshold: float,
        revive_every: int,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            decay=decay,
            kmeans_iters=kmeans_iters,
            dead_threshold=dead_threshold,
            revive_every=revive_every,
        )
        require(commitment_weight >= 0, "commitment_weight", commitment_weight, "0 or more")
        self.commitment_weight = commitment_weight
        self.register_buffer("codebook", uniform_codebook(codebook_dim, codebook_size))
        self.register_upkeep()
        self.register_buffer("embed_avg", self.codebook.clone())

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        if self.training:
            self.start_from(x_ND.detach())
        codes_N = self.lookup(x_ND)
        vectors_ND = self.embed(codes_N)
        commitment = F.mse_loss(x_ND, vectors_ND)
        revived = torch.zeros_like(self.updates)
        if self.training:
            counts_K, sums_KD = gather_statistics(x_ND.detach(), codes_N, self.codebook_size)
            self._update(counts_K, sums_KD)
        else:
            counts_K = count_codes(codes_N, self.codebook_size)
        dead_K = self.dead_codes()
        if self.training and self.revival_is_due():
            self.revive(dead_K, x_ND.detach())
            revived = dead_K.sum()
        usage, perplexity = usage_and_perplexity(counts_K)
        return QuantizerOutput(
            quantized=straight_through(vectors_ND, x_ND),
            codes=codes_N,
            loss=self.commitment_weight * commitment,
            commitment=commitment.detach(),
            usage=usage,
            perplexity=perplexity,
            dead=dead_K.sum(),
            revived=revived,
        )

    @torch.no_grad()
    def _update(self, counts_K: Tensor, sums_KD: Tensor) -> None:
        self.count_use(counts_K)
        self.embed_avg.mul_(self.decay).add_(sums_KD.T, alpha=1 - self.decay)
        total = self.cluster_size.sum()
        size_K = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        self.codebook.copy_(self.embed_avg / size_K)

    def place(self, which_K: Tensor, codes_DK: Tensor) -> None:
        super().place(which_K, codes_DK)
        # The next update divides embed_avg by cluster_size.
        self.embed_avg.copy_(torch.where(which_K, self.codebook * self.cluster_size, self.embed_avg))


class LearnedQuantizer(GradientQuantizer):
    """Codebook learned by gradient: `loss = |sg(x) - e|^2 + commitment_weight |x - sg(e)|^2`.

    Means are over elements; `sg` stops the gradient. The first term moves the codes, the second the encoder. See
    `UpkeptQuantizer` for the upkeep of the codes.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        commitment_weight: float,
        decay: float = 0.0,
        kmeans_iters: int = 0,
        dead_threshold: float = 0.0,
        revive_every: int = 0,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            decay=decay,
            kmeans_iters=kmeans_iters,
            dead_threshold=dead_threshold,
            revive_every=revive_every,
        )
        require(commitment_weight >= 0, "commitment_weight", commitment_weight, "0 or more")
        self.commitment_weight = commitment_weight

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        revived = self.prepare(x_ND.detach())
        codes_N = self.lookup(x_ND)
        vectors_ND = self.embed(codes_N)
        commitment = F.mse_loss(x_ND, vectors_ND.detach())
        loss = F.mse_loss(vectors_ND, x_ND.detach()) + self.commitment_weight * commitment
        output = self.output(straight_through(vectors_ND, x_ND), codes_N, loss, commitment)
        return self.count(output, codes_N, revived)


class FixedQuantizer(Quantizer):
    """A random codebook that never changes; the encoder adapts. `loss = commitment_weight * commitment`."""

    def __init__(self, *, codebook_size: int, codebook_dim: int, commitment_weight: float) -> None:
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim)
        require(commitment_weight >= 0, "commitment_weight", commitment_weight, "0 or more")
        self.commitment_weight = commitment_weight
        self.register_buffer("codebook", uniform_codebook(codebook_dim, codebook_size))

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        codes_N = self.lookup(x_ND)
        vectors_ND = self.embed(codes_N)
        commitment = F.mse_loss(x_ND, vectors_ND)
        return self.output(straight_through(vectors_ND, x_ND), codes_N, self.commitment_weight * commitment, commitment)


class GumbelQuantizer(GradientQuantizer):
    """Relaxed choice of a code: `y = softmax((-distance / scale - log E) / temperature)`, `E` from exponential(1).

    In training the code is the largest `y`. Evaluation has no noise and takes the nearest code. The codebook is
    learned by gradient. The probabilities are computed in blocks of vectors and recomputed in the backward pass, so
    memory does not grow with N x K. See `UpkeptQuantizer` for the upkeep of the codes.

    Args:
        hard: False gives the mixture `sum_k y_k e_k`. True gives the code vector of the largest `y`; its gradient is
            that of the mixture (straight-through) and reaches the encoder. (The hard mode of the released program
            passes no gradient.)
        kl_weight: `loss` is this times the mean over vectors of `sum_k q_k log(K q_k + 1e-20)`, with
            `q = softmax(-distance / scale)`: the divergence of the choice from uniform. At least 0.
        temperature_start, temperature_end: the temperature goes exponentially from one to the other as
            `set_progress` goes from 0 to 1. Above 0.
        scale_distances: True divides distances by their mean to the nearest code, so that the noise chooses among the
            near codes, whatever the size of the latents. False: scale 1, as in the released program.
        commitment_weight: `loss` also has this times the mean of `(nearest code - latent)^2`. At least 0.
    """

    temperature: Tensor

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        hard: bool,
        kl_weight: float,
        temperature_start: float,
        temperature_end: float,
        scale_distances: bool = False,
        commitment_weight: float = 0.0,
        decay: float = 0.0,
        kmeans_iters: int = 0,
        dead_threshold: float = 0.0,
        revive_every: int = 0,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            decay=decay,
            kmeans_iters=kmeans_iters,
            dead_threshold=dead_threshold,
            revive_every=revive_every,
        )
        require(kl_weight >= 0, "kl_weight", kl_weight, "0 or more")
        require(temperature_start > 0, "temperature_start", temperature_start, "greater than 0")
        require(temperature_end > 0, "temperature_end", temperature_end, "greater than 0")
        require(commitment_weight >= 0, "commitment_weight", commitment_weight, "0 or more")
        self.hard = hard
        self.kl_weight = kl_weight
        self.temperature_start = temperature_start
        self.temperature_end = temperature_end
        self.scale_distances = scale_distances
        self.commitment_weight = commitment_weight
        self.register_buffer("temperature", torch.tensor(float(temperature_start)))

    def set_progress(self, fraction: float) -> None:
        """Set the temperature for the share of training done, clamped to 0..1."""
        fraction = min(max(fraction, 0.0), 1.0)
        ratio = self.temperature_end / self.temperature_start
        self.temperature.fill_(self.temperature_start * ratio**fraction)

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        revived = self.prepare(x_ND.detach())
        nearest_N, distance_N = nearest(x_ND, self.codebook)
        scale = self._scale(distance_N)
        blocks = x_ND.split(rows_per_block(self.codebook_size))
        if self.training:
            parts = [checkpoint(self._relax_block, x_RD, scale, use_reentrant=False) for x_RD in blocks]
            mixture_ND, codes_N, divergence_N = (torch.cat(part) for part in zip(*parts, strict=True))
        else:
            codes_N = nearest_N
            divergence_N = torch.cat([self._divergence_block(x_RD, scale) for x_RD in blocks])
        vectors_ND = self.embed(codes_N)
        if not self.training:
            quantized_ND = straight_through(vectors_ND, x_ND)
        elif self.hard:
            quantized_ND = vectors_ND + (mixture_ND - mixture_ND.detach())
        else:
            quantized_ND = mixture_ND
        loss = self.kl_weight * divergence_N.mean()
        if self.commitment_weight:
            loss = loss + self.commitment_weight * F.mse_loss(x_ND, self.embed(nearest_N).detach())
        output = self.output(quantized_ND, codes_N, loss, F.mse_loss(x_ND, vectors_ND))
        return self.count(output, nearest_N, revived)

    def _scale(self, distance_N: Tensor) -> Tensor:
        """Scale of distances, a scalar: in training that of the vectors of all ranks."""
        if not self.scale_distances:
            return torch.ones((), device=distance_N.device)
        total = torch.stack([distance_N.sum(), torch.full((), len(distance_N), device=distance_N.device)])
        if self.training:
            sum_over_ranks_(total)
        return (total[0] / total[1].clamp(min=1)).clamp(min=_SMALLEST_SCALE)

    def _relax_block(self, x_RD: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distance_RK = squared_distances(x_RD, self.codebook) / scale
        # A draw of exactly 0 would be infinite noise.
        exponential_RK = torch.empty_like(distance_RK).exponential_().clamp_(min=1e-30)
        y_RK = relaxed_choice(distance_RK, exponential_RK, self.temperature)
        # In hard mode the gradient of the codebook comes from the chosen code, not from the mixture.
        codebook_DK = self.codebook.detach() if self.hard else self.codebook
        return y_RK @ codebook_DK.T, y_RK.argmax(1), divergence_from_uniform(distance_RK)

    def _divergence_block(self, x_RD: Tensor, scale: Tensor) -> Tensor:
        return divergence_from_uniform(squared_distances(x_RD, self.codebook) / scale)
