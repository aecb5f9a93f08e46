"""Codebook arithmetic shared by the quantizers: nearest code, sums per code, draws over all ranks, k-means.

Shapes: N vectors, R vectors of a block, D codebook_dim, K codebook_size, M drawn rows. A codebook has the form of
the released file, `(D, K)`: column `j` is code `j`.

No N x K tensor is built: distances are computed in blocks of rows, sums are scattered. With `torch.distributed`, all
statistics of a codebook are summed over the ranks, so every rank has the codebook that one process would have with
the joined batch. Nothing here makes the host wait for a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from cogview_pl.kernels.availability import runs_kernels
from cogview_pl.kernels.cpu_linear import matmul

# Distances of a block, in float32 values (8 MB); two blocks exist for a moment.
BLOCK_VALUES = 2 * 1024 * 1024
_WIDEST_FOR_KERNEL = 256  # codebook_dim; tiles of wider codes do not fit on the chip


def uniform_codebook(codebook_dim: int, codebook_size: int) -> Tensor:
    """Initial codebook `(D, K)` of the released program: uniform in +-(5/3) sqrt(6 / (D + K))."""
    bound = 5 / 3 * math.sqrt(6 / (codebook_dim + codebook_size))
    return torch.empty(codebook_dim, codebook_size).uniform_(-bound, bound)


def rows_per_block(codebook_size: int) -> int:
    """Number of vectors in a block of distances."""
    return max(1, BLOCK_VALUES // codebook_size)


@torch.no_grad()
def nearest(x_ND: Tensor, codebook_DK: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code (int64, `(N,)`) and the squared distance to it (float32, `(N,)`).

    Distances have float32 precision also under autocast; of equally near codes the lowest index wins.
    """
    if x_ND.shape[1] <= _WIDEST_FOR_KERNEL and runs_kernels(x_ND.device):
        from cogview_pl.kernels.nearest_code_triton import nearest_by_kernel  # Triton is installed where a GPU is

        return nearest_by_kernel(x_ND, codebook_DK)
    num_rows, codebook_size = x_ND.shape[0], codebook_DK.shape[1]
    codes_N = torch.empty(num_rows, dtype=torch.int64, device=x_ND.device)
    distance_N = torch.empty(num_rows, dtype=torch.float32, device=x_ND.device)
    with torch.autocast(x_ND.device.type, enabled=False):
        codebook_DK = codebook_DK.float()
        norm_K = codebook_DK.square().sum(0)
        minus_twice_KD = (-2 * codebook_DK).T.contiguous()
        block = rows_per_block(codebook_size)
        for start in range(0, num_rows, block):
            x_RD = x_ND[start : start + block].float()
            rows = slice(start, start + x_RD.shape[0])
            # |x|^2 is the same for all codes, so it is added after the minimum.
            scores_RK = matmul(x_RD, minus_twice_KD, norm_K)
            torch.min(scores_RK, dim=1, out=(distance_N[rows], codes_N[rows]))
            distance_N[rows] += x_RD.square().sum(1)
    return codes_N, distance_N.clamp_(min=0)


def world_size() -> int:
    """Number of ranks that share the codebook; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks_(values: Tensor) -> Tensor:
    """Sum in place over all ranks; a no-op on one rank."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def count_codes(codes_N: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs on this rank: float32, `(K,)`."""
    # bincount would make the host wait for the largest code.
    counts_K = torch.zeros(codebook_size, device=codes_N.device)
    return counts_K.index_add_(0, codes_N, torch.ones_like(codes_N, dtype=torch.float32))


def usage_and_perplexity(counts_K: Tensor) -> tuple[Tensor, Tensor]:
    """Share of codes that occur, and exp(entropy) of their frequencies."""
    frequency_K = counts_K / counts_K.sum()
    return (counts_K > 0).float().mean(), torch.special.entr(frequency_K).sum().exp()


def squared_distances(x_ND: Tensor, codebook_DK: Tensor) -> Tensor:
    """Squared distances `(N, K)` with gradient; callers keep N small."""
    norm_K = codebook_DK.square().sum(0)
    return x_ND.square().sum(1, keepdim=True) + torch.addmm(norm_K, x_ND, codebook_DK, alpha=-2)


def relaxed_choice(distance_NK: Tensor, exponential_NK: Tensor, temperature: Tensor | float) -> Tensor:
    """Gumbel-softmax over codes `(N, K)`: `softmax((-distance - log E) / temperature)`, `E` exponential."""
    return ((-distance_NK - exponential_NK.log()) / temperature).softmax(1)


def divergence_from_uniform(distance_NK: Tensor) -> Tensor:
    """KL divergence from uniform, `(N,)`: `sum_k q log(K q + 1e-20)` with `q = softmax(-distance)`."""
    q_NK = (-distance_NK).softmax(1)
    return (q_NK * (distance_NK.shape[1] * q_NK + 1e-20).log()).sum(1)


@torch.no_grad()
def gather_statistics(x_ND: Tensor, codes_N: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Counts `(K,)` of each code and sums `(K, D)` of the vectors assigned to it, over all ranks; float32."""
    codebook_dim = x_ND.shape[1]
    joint = torch.zeros(codebook_size, codebook_dim + 1, device=x_ND.device)
    joint[:, :codebook_dim].index_add_(0, codes_N, x_ND.float())
    joint[:, codebook_dim] = count_codes(codes_N, codebook_size)
    sum_over_ranks_(joint)
    return joint[:, codebook_dim], joint[:, :codebook_dim]


@torch.no_grad()
def draw_rows(x_ND: Tensor, weight_N: Tensor, quantile_M: Tensor) -> Tensor:
    """Rows of the joined batch of all ranks, at quantiles of the cumulative weight: `(M, D)`, float32.

    All ranks use the random `quantile_M` in [0, 1) of rank 0 and return the rows that one process would take from the
    joined batch. Weights must be positive. A rank may have no rows.
    """
    cumulative_N = weight_N.float().cumsum(0)
    upper = torch.zeros(world_size(), device=x_ND.device)
    rank = dist.get_rank() if world_size() > 1 else 0
    upper[rank] = cumulative_N[-1:].sum()
    upper = sum_over_ranks_(upper).cumsum(0)
    if world_size() > 1:
        quantile_M = quantile_M.contiguous()
        dist.broadcast(quantile_M, src=0)
    target_M = quantile_M.clamp(0, 1 - 1e-6) * upper[-1]
    lower = upper[rank - 1] if rank > 0 else torch.zeros_like(upper[0])
    x_ND = x_ND if len(x_ND) else x_ND.new_zeros(1, x_ND.shape[1])
    index_M = torch.searchsorted(cumulative_N, target_M - lower, right=True).clamp_(max=x_ND.shape[0] - 1)
    mine_M = (target_M >= lower) & (target_M < upper[rank])
    return sum_over_ranks_(torch.where(mine_M[:, None], x_ND[index_M].float(), 0.0))


def spread_quantiles(wanted_K: Tensor) -> Tensor:
    """One random quantile per wanted code, spread evenly over [0, 1), so that few rows are drawn twice.

    `wanted_K` is boolean; the values of unwanted codes have no meaning.
    """
    place_K = wanted_K.cumsum(0) - 1 + torch.rand(wanted_K.shape[0], device=wanted_K.device)
    return place_K / wanted_K.sum().clamp(min=1)


@torch.no_grad()
def seed_centres(x_ND: Tensor, codebook_size: int, rounds: int = 16) -> Tensor:
    """Initial centres for k-means `(D, K)`: rows drawn in rounds, far rows preferred (k-means++ in bulk).

    After a uniform first round the weight of a row is its squared distance to the nearest centre.
    """
    weight_N = torch.ones(x_ND.shape[0], device=x_ND.device)
    distance_N = torch.full_like(weight_N, torch.inf)
    centres: list[Tensor] = []
    for wanted_M in torch.ones(codebook_size, dtype=torch.bool, device=x_ND.device).chunk(rounds):
        centres.append(draw_rows(x_ND, weight_N, spread_quantiles(wanted_M)).T)
        distance_N = torch.minimum(distance_N, nearest(x_ND, centres[-1])[1])
        weight_N = distance_N.clamp(min=1e-12)
    return torch.cat(centres, dim=1)


@torch.no_grad()
def kmeans(x_ND: Tensor, codebook_size: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm over the vectors of all ranks: centres `(D, K)` and the number of vectors of each, `(K,)`.

    An empty centre moves to a random vector, far vectors preferred. With fewer vectors than codes some centres
    coincide and stay empty.
    """
    centres_DK = seed_centres(x_ND, codebook_size)
    for _ in range(iterations):
        codes_N, distance_N = nearest(x_ND, centres_DK)
        counts_K, sums_KD = gather_statistics(x_ND, codes_N, codebook_size)
        empty_K = counts_K == 0
        far_KD = draw_rows(x_ND, distance_N.clamp(min=1e-12), spread_quantiles(empty_K))
        mean_KD = sums_KD / counts_K.clamp(min=1)[:, None]
        centres_DK = torch.where(empty_K[:, None], far_KD, mean_KD).T
    codes_N = nearest(x_ND, centres_DK)[0]
    return centres_DK, gather_statistics(x_ND, codes_N, codebook_size)[0]
