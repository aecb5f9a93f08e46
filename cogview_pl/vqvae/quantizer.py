"""Vector quantizers: continuous latents -> codes and code vectors (paper section 3.2, "Image Tokenizer").

Shapes: B batch, D codebook_dim, y x the grid, N = B*y*x vectors, R vectors of a block, K codebook_size. Latents
have shape `(B, D, y, x)` in any memory layout; channels_last needs no copy. Arithmetic is float32, also under
autocast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogview_pl.errors import UserError
from cogview_pl.vqvae.codebook import (
    count_codes,
    divergence_from_uniform,
    draw_rows,
    gather_statistics,
    kmeans,
    nearest,
    relaxed_choice,
    rows_per_block,
    spread_quantiles,
    squared_distances,
    uniform_codebook,
    usage_and_perplexity,
)


class QuantizerOutput(NamedTuple):
    """Result of a quantizer. Scalars are 0-dim tensors on the latents' device.

    quantized: `(B, D, y, x)`, dtype of the latents; carries the gradient to the encoder (straight-through).
    codes: `(B, y, x)` int64 in `[0, codebook_size)`.
    loss: term of the training loss, already weighted.
    commitment: mean of `(code vector - latent)^2`, unweighted.
    usage: share of the codes that occur in this batch, 0..1.
    perplexity: exp of the entropy of the code frequencies in this batch, 1..codebook_size.
    dead: number of codes considered dead (see the quantizer).
    revived: number of codes that this step replaced.
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor
    commitment: Tensor
    usage: Tensor
    perplexity: Tensor
    dead: Tensor
    revived: Tensor


def require(condition: bool, key: str, found: object, wanted: str) -> None:
    """Raise a one-line `UserError` about a setting of the quantizer."""
    if not condition:
        raise UserError(f"image_tokenizer.quantizer.{key} is {found}: it must be {wanted}")


class Quantizer(nn.Module, ABC):
    """Base class: a codebook of `codebook_size` vectors of size `codebook_dim`, lookup and embedding.

    A subclass registers `codebook`, a buffer or parameter `(D, K)` as in the released file (column j is code j),
    and defines `quantize`. Its constructor takes `codebook_size`, `codebook_dim` and arguments of its own, all by
    keyword; `image_tokenizer.quantizer` gives them.
    """

    codebook: Tensor

    def __init__(self, *, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim

    def lookup(self, latents_ND: Tensor) -> Tensor:
        """Nearest code of each vector: `(N, D)` -> int64 `(N,)`. Memory does not grow with N x K."""
        return nearest(latents_ND, self.codebook)[0]

    def embed(self, codes: Tensor) -> Tensor:
        """Code vectors of codes of any shape: `(...)` int64 -> `(..., D)`."""
        return F.embedding(codes, self.codebook.T)

    def set_progress(self, fraction: float) -> None:
        """Schedule hook: the trainer calls it before every step with the share of training done, 0..1."""

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `(B, D, y, x)`."""
        with torch.autocast(latents.device.type, enabled=False):
            x_ByxD = latents.float().permute(0, 2, 3, 1)
            x_ND = x_ByxD.reshape(-1, self.codebook_dim)
            flat = self.quantize(x_ND)
        quantized = flat.quantized.view(x_ByxD.shape).permute(0, 3, 1, 2).to(latents.dtype)
        return flat._replace(quantized=quantized, codes=flat.codes.view(x_ByxD.shape[:-1]))

    @abstractmethod
    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        """Quantize float32 vectors; `quantized` is `(N, D)` and `codes` is `(N,)`."""

    def output(self, quantized_ND: Tensor, codes_N: Tensor, loss: Tensor, commitment: Tensor) -> QuantizerOutput:
        """Output of a quantizer without running statistics: codes that do not occur in the batch are dead."""
        counts_K = count_codes(codes_N, self.codebook_size)
        dead = (counts_K == 0).sum()
        usage, perplexity = usage_and_perplexity(counts_K)
        revived = torch.zeros_like(dead)
        return QuantizerOutput(quantized_ND, codes_N, loss, commitment.detach(), usage, perplexity, dead, revived)


def straight_through(vectors_ND: Tensor, x_ND: Tensor) -> Tensor:
    """Exactly the code vectors, with the gradient of `x_ND`."""
    return vectors_ND.detach() + (x_ND - x_ND.detach())


class EMAQuantizer(Quantizer):
    """Codes follow the encoder as exponential moving averages (the released tokenizer; paper section 3.2).

    In training each call moves the codebook after its use: with counts `c` and sums `s` of the batch,
    `cluster_size <- decay cluster_size + (1 - decay) c`, `embed_avg <- decay embed_avg + (1 - decay) s`,
    `codebook <- embed_avg / size` where `size` is `cluster_size` with Laplace smoothing `eps`. Evaluation
    changes nothing. `loss` is `commitment_weight * commitment`.

    Args:
        decay: of the moving averages, in [0, 1).
        commitment_weight: at least 0.
        kmeans_iters: Lloyd iterations that place the codebook on the first training batch; 0 keeps the uniform
            start.
        dead_threshold: a code is dead while its `cluster_size` is below this share of the mean `cluster_size`,
            in [0, 0.5); with 0 no code is dead.
        revive_every: updates between revivals; 0 counts dead codes but never revives them. A revived code starts at
            a random encoder vector of the current batch, with the mean cluster size. An unused code is dead after
            `log(dead_threshold) / log(decay)` updates, so short runs need a smaller decay.

    Several ranks act as one process with the joined batch: in counts, sums, k-means and revivals, and in the `usage`,
    `perplexity` and `dead` of training. All state is in buffers (`revived_total` counts revived codes); random
    numbers come from torch's default generator of the device.
    """

    eps = 1e-5

    codebook: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initialised: Tensor
    updates: Tensor
    revived_total: Tensor

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
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim)
        require(0 <= decay < 1, "decay", decay, "in [0, 1)")
        require(commitment_weight >= 0, "commitment_weight", commitment_weight, "0 or more")
        require(kmeans_iters >= 0, "kmeans_iters", kmeans_iters, "0 (off) or more")
        # A revival can double the mean, so from 0.5 on a code could be dead right after its revival.
        require(0 <= dead_threshold < 0.5, "dead_threshold", dead_threshold, "in [0, 0.5)")
        require(revive_every >= 0, "revive_every", revive_every, "0 (off) or more")
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.kmeans_iters = kmeans_iters
        self.dead_threshold = dead_threshold
        self.revive_every = revive_every
        self.register_buffer("codebook", uniform_codebook(codebook_dim, codebook_size))
        # 1 leaves unused codes unchanged. The released program starts at 0: its first update divides their
        # embed_avg by about 1e-5, and soon every vector takes the same huge code.
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("embed_avg", self.codebook.clone())
        self.register_buffer("initialised", torch.tensor(kmeans_iters == 0))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("revived_total", torch.tensor(0))
        # Copies on the host of two buffers, so that a branch does not wait for the device.
        self._needs_kmeans = kmeans_iters > 0
        self._updates_on_host = 0
        self.register_load_state_dict_post_hook(EMAQuantizer._read_host_state)

    @staticmethod
    def _read_host_state(module: nn.Module, _incompatible_keys: Any) -> None:
        assert isinstance(module, EMAQuantizer)
        module._needs_kmeans = not bool(module.initialised)
        module._updates_on_host = int(module.updates)

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        if self.training and self._needs_kmeans:
            self._start_from(x_ND.detach())
        codes_N = self.lookup(x_ND)
        vectors_ND = self.embed(codes_N)
        commitment = F.mse_loss(x_ND, vectors_ND)
        revived = torch.zeros_like(self.updates)
        if self.training:
            counts_K, sums_KD = gather_statistics(x_ND.detach(), codes_N, self.codebook_size)
            self._update(counts_K, sums_KD)
        else:
            counts_K = count_codes(codes_N, self.codebook_size)
        dead_K = self.cluster_size < self.dead_threshold * self.cluster_size.mean()
        if self.training and self.revive_every and self._updates_on_host % self.revive_every == 0:
            self._revive(dead_K, x_ND.detach())
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
    def _start_from(self, x_ND: Tensor) -> None:
        centres_DK, counts_K = kmeans(x_ND, self.codebook_size, self.kmeans_iters)
        self.codebook.copy_(centres_DK)
        # A centre without vectors counts as one vector; with 0 the first update would move it to the origin.
        self.cluster_size.copy_(counts_K.clamp(min=1))
        self.embed_avg.copy_(self.codebook * self.cluster_size)
        self.initialised.fill_(True)
        self._needs_kmeans = False

    @torch.no_grad()
    def _update(self, counts_K: Tensor, sums_KD: Tensor) -> None:
        self.cluster_size.mul_(self.decay).add_(counts_K, alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(sums_KD.T, alpha=1 - self.decay)
        total = self.cluster_size.sum()
        size_K = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        self.codebook.copy_(self.embed_avg / size_K)
        self.updates += 1
        self._updates_on_host += 1

    @torch.no_grad()
    def _revive(self, dead_K: Tensor, x_ND: Tensor) -> None:
        weight_N = torch.ones(x_ND.shape[0], device=x_ND.device)
        rows_DK = draw_rows(x_ND, weight_N, spread_quantiles(dead_K)).T
        # All three move together: the next update divides embed_avg by cluster_size.
        self.cluster_size.copy_(torch.where(dead_K, self.cluster_size.mean(), self.cluster_size))
        self.codebook.copy_(torch.where(dead_K, rows_DK, self.codebook))
        self.embed_avg.copy_(torch.where(dead_K, rows_DK * self.cluster_size, self.embed_avg))
        self.revived_total += dead_K.sum()


class LearnedQuantizer(Quantizer):
    """Codebook learned by gradient: `loss = |sg(x) - e|^2 + commitment_weight |x - sg(e)|^2`.

    Means are over elements; `sg` stops the gradient. The first term moves the codes, the second the encoder.
    """

    def __init__(self, *, codebook_size: int, codebook_dim: int, commitment_weight: float) -> None:
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim)
        require(commitment_weight >= 0, "commitment_weight", commitment_weight, "0 or more")
        self.commitment_weight = commitment_weight
        self.codebook = nn.Parameter(uniform_codebook(codebook_dim, codebook_size))

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        codes_N = self.lookup(x_ND)
        vectors_ND = self.embed(codes_N)
        commitment = F.mse_loss(x_ND, vectors_ND.detach())
        loss = F.mse_loss(vectors_ND, x_ND.detach()) + self.commitment_weight * commitment
        return self.output(straight_through(vectors_ND, x_ND), codes_N, loss, commitment)


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


class GumbelQuantizer(Quantizer):
    """Relaxed choice of a code: `y = softmax((-distance - log E) / temperature)`, `E` from exponential(1).

    In training the code is the largest `y`. Evaluation has no noise and takes the nearest code. The codebook is
    learned by gradient. The probabilities are computed in blocks of vectors and recomputed in the backward pass, so
    memory does not grow with N x K.

    Args:
        hard: False gives the mixture `sum_k y_k e_k`. True gives the code vector of the largest `y`; its gradient is
            that of the mixture (straight-through) and reaches the encoder. (The hard mode of the released program
            passes no gradient.)
        kl_weight: `loss` is this times the mean over vectors of `sum_k q_k log(K q_k + 1e-20)`, with
            `q = softmax(-distance)`: the divergence of the choice from uniform. At least 0.
        temperature_start, temperature_end: the temperature goes exponentially from one to the other as
            `set_progress` goes from 0 to 1. Above 0.
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
    ) -> None:
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim)
        require(kl_weight >= 0, "kl_weight", kl_weight, "0 or more")
        require(temperature_start > 0, "temperature_start", temperature_start, "greater than 0")
        require(temperature_end > 0, "temperature_end", temperature_end, "greater than 0")
        self.hard = hard
        self.kl_weight = kl_weight
        self.temperature_start = temperature_start
        self.temperature_end = temperature_end
        self.codebook = nn.Parameter(uniform_codebook(codebook_dim, codebook_size))
        self.register_buffer("temperature", torch.tensor(float(temperature_start)))

    def set_progress(self, fraction: float) -> None:
        """Set the temperature for the share of training done, clamped to 0..1."""
        fraction = min(max(fraction, 0.0), 1.0)
        ratio = self.temperature_end / self.temperature_start
        self.temperature.fill_(self.temperature_start * ratio**fraction)

    def quantize(self, x_ND: Tensor) -> QuantizerOutput:
        blocks = x_ND.split(rows_per_block(self.codebook_size))
        if self.training:
            parts = [checkpoint(self._relax_block, x_RD, use_reentrant=False) for x_RD in blocks]
            mixture_ND, codes_N, divergence_N = (torch.cat(part) for part in zip(*parts, strict=True))
        else:
            codes_N = self.lookup(x_ND)
            divergence_N = torch.cat([self._divergence_block(x_RD) for x_RD in blocks])
        vectors_ND = self.embed(codes_N)
        if not self.training:
            quantized_ND = straight_through(vectors_ND, x_ND)
        elif self.hard:
            quantized_ND = vectors_ND + (mixture_ND - mixture_ND.detach())
        else:
            quantized_ND = mixture_ND
        loss = self.kl_weight * divergence_N.mean()
        return self.output(quantized_ND, codes_N, loss, F.mse_loss(x_ND, vectors_ND))

    def _relax_block(self, x_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distance_RK = squared_distances(x_RD, self.codebook)
        # A draw of exactly 0 would be infinite noise.
        exponential_RK = torch.empty_like(distance_RK).exponential_().clamp_(min=1e-30)
        y_RK = relaxed_choice(distance_RK, exponential_RK, self.temperature)
        # In hard mode the gradient of the codebook comes from the chosen code, not from the mixture.
        codebook_DK = self.codebook.detach() if self.hard else self.codebook
        return y_RK @ codebook_DK.T, y_RK.argmax(1), divergence_from_uniform(distance_RK)

    def _divergence_block(self, x_RD: Tensor) -> Tensor:
        return divergence_from_uniform(squared_distances(x_RD, self.codebook))
