"""Base classes of vector quantizers: continuous latents -> codes and code vectors (paper section 3.2).

Shapes: B batch, D codebook_dim, y x the grid, N = B*y*x vectors, K codebook_size. Latents have shape `(B, D, y, x)`
in any memory layout; channels_last needs no copy. Arithmetic is float32, also under autocast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.vqvae.codebook import (
    count_codes,
    draw_rows,
    kmeans,
    nearest,
    spread_quantiles,
    sum_over_ranks_,
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

    def continuous(self, latents: Tensor) -> Tensor:
        """What the decoder gets in steps without quantization: `(B, D, y, x)`, here the latents themselves."""
        return latents

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


class UpkeptQuantizer(Quantizer):
    """A quantizer whose codebook starts by k-means and whose dead codes are revived.

    Args:
        decay: of the moving average of the use of a code, in [0, 1).
        kmeans_iters: Lloyd iterations that place the codebook on the first training batch; 0 keeps the uniform
            start.
        dead_threshold: a code is dead while its `cluster_size` is below this share of the mean `cluster_size`,
            in [0, 0.5); with 0 no code is dead.
        revive_every: updates between revivals; 0 counts dead codes but never revives them. A revived code starts at
            a random encoder vector of the current batch, with the mean cluster size. An unused code is dead after
            `log(dead_threshold) / log(decay)` updates, so short runs need a smaller decay.

    Several ranks act as one process with the joined batch: in counts, k-means and revivals, and in the `usage`,
    `perplexity` and `dead` of training. All state is in buffers (`revived_total` counts revived codes); random
    numbers come from torch's default generator of the device.
    """

    cluster_size: Tensor
    initialised: Tensor
    updates: Tensor
    revived_total: Tensor

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        decay: float,
        kmeans_iters: int,
        dead_threshold: float,
        revive_every: int,
    ) -> None:
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim)
        require(0 <= decay < 1, "decay", decay, "in [0, 1)")
        require(kmeans_iters >= 0, "kmeans_iters", kmeans_iters, "0 (off) or more")
        # A revival can double the mean, so from 0.5 on a code could be dead right after its revival.
        require(0 <= dead_threshold < 0.5, "dead_threshold", dead_threshold, "in [0, 0.5)")
        require(revive_every >= 0, "revive_every", revive_every, "0 (off) or more")
        self.decay = decay
        self.kmeans_iters = kmeans_iters
        self.dead_threshold = dead_threshold
        self.revive_every = revive_every
        # Copies on the host of two buffers, so that a branch does not wait for the device.
        self._needs_kmeans = kmeans_iters > 0
        self._updates_on_host = 0

    def register_upkeep(self) -> None:
        """Register the buffers of the upkeep."""
        # 1 leaves unused codes unchanged. The released program starts at 0: its first update divides their
        # embed_avg by about 1e-5, and soon every vector takes the same huge code.
        self.register_buffer("cluster_size", torch.ones(self.codebook_size))
        self.register_buffer("initialised", torch.tensor(self.kmeans_iters == 0))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("revived_total", torch.tensor(0))
        self.register_load_state_dict_post_hook(UpkeptQuantizer._read_host_state)

    @staticmethod
    def _read_host_state(module: nn.Module, _incompatible_keys: Any) -> None:
        assert isinstance(module, UpkeptQuantizer)
        module._needs_kmeans = not bool(module.initialised)
        module._updates_on_host = int(module.updates)

    def dead_codes(self) -> Tensor:
        """Which codes are dead: bool `(K,)`."""
        return self.cluster_size < self.dead_threshold * self.cluster_size.mean()

    def revival_is_due(self) -> bool:
        """Whether dead codes are revived after the updates so far."""
        return self.revive_every > 0 and self._updates_on_host % self.revive_every == 0

    @torch.no_grad()
    def start_from(self, x_ND: Tensor) -> None:
        """Place the codebook by k-means over the vectors of all ranks, if that is still to be done."""
        if not self._needs_kmeans:
            return
        centres_DK, counts_K = kmeans(x_ND, self.codebook_size, self.kmeans_iters)
        # A centre without vectors counts as one vector; with 0 the first EMA update would move it to the origin.
        self.cluster_size.copy_(counts_K.clamp(min=1))
        self.place(torch.ones_like(counts_K, dtype=torch.bool), centres_DK)
        self.initialised.fill_(True)
        self._needs_kmeans = False

    @torch.no_grad()
    def count_use(self, counts_K: Tensor) -> None:
        """Move the averages of use by the counts of a batch (of all ranks)."""
        self.cluster_size.mul_(self.decay).add_(counts_K, alpha=1 - self.decay)
        self.updates += 1
        self._updates_on_host += 1

    @torch.no_grad()
    def revive(self, dead_K: Tensor, x_ND: Tensor) -> None:
        """Move dead codes to vectors of the batch, with the mean cluster size."""
        weight_N = torch.ones(x_ND.shape[0], device=x_ND.device)
        rows_DK = draw_rows(x_ND, weight_N, spread_quantiles(dead_K)).T
        self.cluster_size.copy_(torch.where(dead_K, self.cluster_size.mean(), self.cluster_size))
        self.place(dead_K, rows_DK)
        self.revived_total += dead_K.sum()

    def place(self, which_K: Tensor, codes_DK: Tensor) -> None:
        """Replace some codes, those where `which_K` is true; their `cluster_size` is set already."""
        self.codebook.copy_(torch.where(which_K, codes_DK, self.codebook))


class GradientQuantizer(UpkeptQuantizer):
    """A quantizer whose codebook is a parameter. See `UpkeptQuantizer` for its arguments.

    Without k-means and `dead_threshold` it has no upkeep and no state of it: model folders of earlier versions.
    """

    def __init__(self, *, codebook_size: int, codebook_dim: int, **upkeep: Any) -> None:
        super().__init__(codebook_size=codebook_size, codebook_dim=codebook_dim, **upkeep)
        self.codebook = nn.Parameter(uniform_codebook(codebook_dim, codebook_size))
        self._upkept = self.kmeans_iters > 0 or self.dead_threshold > 0
        if self._upkept:
            self.register_upkeep()

    def prepare(self, x_ND: Tensor) -> Tensor:
        """Start or revive codes in training, before their use; returns the number of revived codes.

        A parameter must not change after its use: the backward pass reads it.
        """
        if self.training and self._upkept:
            self.start_from(x_ND)
            if self._updates_on_host and self.revival_is_due():
                dead_K = self.dead_codes()
                self.revive(dead_K, x_ND)
                return dead_K.sum()
        return torch.zeros((), dtype=torch.int64, device=x_ND.device)

    def count(self, output: QuantizerOutput, nearest_N: Tensor, revived: Tensor) -> QuantizerOutput:
        """The output of a step with dead and revived codes; in training it counts the use of the codes.

        Args:
            output: of the step.
            nearest_N: the nearest codes, which decide what is dead.
            revived: result of `prepare`.
        """
        if not self._upkept:
            return output
        if self.training:
            self.count_use(sum_over_ranks_(count_codes(nearest_N, self.codebook_size)))
        return output._replace(dead=self.dead_codes().sum(), revived=revived)


def straight_through(vectors_ND: Tensor, x_ND: Tensor) -> Tensor:
    """Exactly the code vectors, with the gradient of `x_ND`."""
    return vectors_ND.detach() + (x_ND - x_ND.detach())
