"""Arithmetic of codebooks by hand-made examples, on one process and on two ranks.

Shapes: N vectors, D codebook_dim, K codes, M draws.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cogview_pl.vqvae import codebook
from cogview_pl.vqvae.codebook import (
    count_codes,
    divergence_from_uniform,
    draw_rows,
    gather_statistics,
    kmeans,
    nearest,
    relaxed_choice,
    rows_per_block,
    seed_centres,
    spread_quantiles,
    squared_distances,
    uniform_codebook,
    usage_and_perplexity,
)


def test_first_codebook_is_uniform_within_the_bound_of_the_released_program() -> None:
    torch.manual_seed(0)
    codes_DK = uniform_codebook(100, 500)
    assert codes_DK.shape == (100, 500)
    assert codes_DK.max().item() == pytest.approx(1 / 6, rel=1e-3)  # 5/3 · sqrt(6 / 600)
    assert codes_DK.min().item() == pytest.approx(-1 / 6, rel=1e-3)
    assert codes_DK.std().item() == pytest.approx(1 / 6 / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize(("codebook_size", "rows"), [(8192, 256), (3, 699_050), (2**21, 1), (2**24, 1)])
def test_a_block_of_distances_takes_8_mb_or_one_row(codebook_size: int, rows: int) -> None:
    assert rows_per_block(codebook_size) == rows


def test_nearest_in_blocks_of_two_rows_by_hand() -> None:
    codes_DK = torch.full((2, 2**20), 3.0)
    codes_DK[:, :3] = torch.tensor([[0.0, 2, 0], [0, 0, 3]])
    x_ND = torch.tensor([[1.0, 0], [2, 1], [0, 2], [0, 0], [5, 4]])  # the first is as near to code 0 as to code 1
    codes_N, distance_N = nearest(x_ND, codes_DK)
    assert codes_N.tolist() == [0, 1, 2, 0, 3]
    assert distance_N.tolist() == [1.0, 1.0, 1.0, 0.0, 5.0]
    assert (codes_N.dtype, distance_N.dtype) == (torch.int64, torch.float32)


def test_no_distance_is_negative_where_rounding_would_make_it_so() -> None:
    x_ND = 100 + torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    found_NN = x_ND.square().sum(1) - 2 * x_ND @ x_ND.T + x_ND.square().sum(1, keepdim=True)
    assert found_NN.diagonal().min() < 0  # what rounding does here
    assert nearest(x_ND, x_ND.T)[1].min() >= 0


def test_counts_usage_and_perplexity_by_hand() -> None:
    counts_K = count_codes(torch.tensor([0, 2, 0, 4]), 5)
    assert counts_K.tolist() == [2.0, 0.0, 1.0, 0.0, 1.0]
    usage, perplexity = usage_and_perplexity(counts_K)
    assert usage.item() == pytest.approx(3 / 5)
    assert perplexity.item() == pytest.approx(math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4)))
    usage, perplexity = usage_and_perplexity(torch.tensor([1.0, 0, 0, 0]))
    assert (usage.item(), perplexity.item()) == (0.25, 1.0)


def test_squared_distances_by_hand() -> None:
    found = squared_distances(torch.tensor([[0.0, 0], [1, 2]]), torch.tensor([[1.0, 3, 0], [0, 4, 0]]))
    assert found.tolist() == [[1.0, 25.0, 0.0], [4.0, 8.0, 5.0]]


def test_relaxed_choice_by_hand() -> None:
    # Scores 0 - log 1 and -log 2 - log 1/4 = log 2, divided by 1/2: odds of 1 to 4.
    found = relaxed_choice(torch.tensor([[0.0, math.log(2)]]), torch.tensor([[1.0, 0.25]]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.8]]))


def test_divergence_from_uniform_goes_from_0_to_log_k() -> None:
    far = 1e4  # softmax gives exactly 0 there
    distance_NK = torch.tensor([[7.0, 7, 7], [0, far, far], [0, 0, far]])
    expected = torch.tensor([0.0, math.log(3), math.log(1.5)])
    torch.testing.assert_close(divergence_from_uniform(distance_NK), expected, atol=1e-6, rtol=1e-6)


def test_statistics_by_hand() -> None:
    x_ND = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    counts_K, sums_KD = gather_statistics(x_ND.half(), torch.tensor([3, 0, 3]), 4)
    assert counts_K.tolist() == [1.0, 0.0, 0.0, 2.0]
    assert sums_KD.tolist() == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [6.0, 8.0]]
    assert counts_K.dtype == sums_KD.dtype == torch.float32


ROWS_ND = torch.tensor([[1.0, 10], [2, 20], [3, 30], [4, 40]])
WEIGHTS_N = torch.tensor([1.0, 2, 1, 4])  # cumulated 1, 3, 4, 8
QUANTILES = {0.0: 1, 0.124: 1, 0.125: 2, 0.37: 2, 0.375: 3, 0.49: 3, 0.5: 4, 0.99: 4, 1.0: 4}
"""Row of each quantile, counted from 1 as the rows are; a random number just below 1 may be rounded to 1."""


def test_rows_at_quantiles_of_the_weight() -> None:
    rows_MD = draw_rows(ROWS_ND.double(), WEIGHTS_N, torch.tensor(list(QUANTILES)))
    assert rows_MD.dtype == torch.float32
    assert rows_MD.tolist() == [[row, 10.0 * row] for row in QUANTILES.values()]


def test_rows_of_nothing_are_zero() -> None:
    assert draw_rows(torch.empty(0, 3), torch.empty(0), torch.tensor([0.0, 0.7])).tolist() == [[0.0] * 3] * 2


class Ranks:
    """`torch.distributed` for threads, one per rank, so that ranks need no processes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=10)
        self.thread = threading.local()
        self.given: list[Tensor] = [torch.empty(0)] * count

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return self.count

    def get_rank(self) -> int:
        return self.thread.rank

    def _exchange(self, values: Tensor) -> list[Tensor]:
        self.given[self.thread.rank] = values.clone()
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        return given

    def all_reduce(self, values: Tensor) -> None:
        values.copy_(torch.stack(self._exchange(values)).sum(0))

    def broadcast(self, values: Tensor, src: int) -> None:
        values.copy_(self._exchange(values)[src])

    def run(self, task: Callable[[int], object]) -> list:
        def on_rank(rank: int) -> object:
            self.thread.rank = rank
            return task(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return [future.result() for future in [pool.submit(on_rank, rank) for rank in range(self.count)]]


def ranks_for(shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Ranks, list[slice]]:
    """As many ranks as there are shares, and the rows of each."""
    ranks = Ranks(len(shares))
    monkeypatch.setattr(codebook, "dist", ranks)
    return ranks, [slice(sum(shares[:rank]), sum(shares[: rank + 1])) for rank in range(len(shares))]


@pytest.mark.parametrize("shares", [(3, 1), (0, 4), (4, 0), (1, 2, 1), (0, 3, 1), (2, 0, 2), (0, 0, 4)], ids=str)
def test_ranks_draw_the_rows_of_the_joined_batch(shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, rows = ranks_for(shares, monkeypatch)

    def draw(rank: int) -> list:
        quantile_M = torch.tensor(list(QUANTILES)) if rank == 0 else torch.rand(len(QUANTILES))  # rank 0's count
        return draw_rows(ROWS_ND[rows[rank]], WEIGHTS_N[rows[rank]], quantile_M).tolist()

    assert ranks.run(draw) == [[[row, 10.0 * row] for row in QUANTILES.values()]] * len(shares)


@pytest.mark.parametrize("shares", [(3, 1), (1, 3, 0)], ids=str)
def test_ranks_share_their_statistics(shares: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, rows = ranks_for(shares, monkeypatch)
    codes_N = torch.tensor([1, 0, 1, 2])
    found = ranks.run(lambda rank: gather_statistics(ROWS_ND[rows[rank]], codes_N[rows[rank]], 3))
    for counts_K, sums_KD in found:
        assert counts_K.tolist() == [1.0, 2.0, 1.0]
        assert sums_KD.tolist() == [[2.0, 20.0], [4.0, 40.0], [4.0, 40.0]]


def test_quantiles_are_spread_over_the_wanted_slots() -> None:
    torch.manual_seed(0)
    wanted_K = torch.tensor([True, False, True, True])
    found = torch.stack([spread_quantiles(wanted_K) for _ in range(300)])[:, wanted_K]
    third = 1 / 3
    for place in range(3):
        assert (found[:, place] >= place * third).all() and (found[:, place] <= (place + 1) * third).all()
        assert found[:, place].max() - found[:, place].min() > 0.9 * third
    one = torch.stack([spread_quantiles(torch.tensor([False, True])) for _ in range(300)])[:, 1]
    assert one.min() < 0.1 and one.max() > 0.9
    assert spread_quantiles(torch.tensor([False, False])).isfinite().all()


def test_first_centres_prefer_what_is_far() -> None:
    # A thousand vectors in one place, ten and one in two others: each place gets one of three centres.
    x_ND = torch.cat([torch.zeros(1000, 2), torch.tensor([[1.0, 0]]).expand(10, 2), torch.tensor([[0.0, 1]])])
    for seed in range(5):
        torch.manual_seed(seed)
        centres = seed_centres(x_ND, 3)
        assert sorted(centres.T.tolist()) == [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


def test_first_centres_of_equal_vectors_are_those() -> None:
    assert (seed_centres(torch.full((10, 3), 7.0), 4) == 7.0).all()


def test_first_centres_come_in_rounds() -> None:
    # In one round rows are drawn at evenly spread quantiles, without looking at distances.
    torch.manual_seed(0)
    x_ND = torch.arange(8.0)[:, None]
    assert seed_centres(x_ND, 8, rounds=1).flatten().tolist() == list(range(8))
    assert seed_centres(x_ND, 8, rounds=3).shape == (1, 8)


def test_kmeans_of_two_clusters_by_hand() -> None:
    x_ND = torch.tensor([[0.0, 0], [0, 2], [10, 0], [10, 2], [10, 4]])
    for seed in range(5):
        torch.manual_seed(seed)
        centres_DK, counts_K = kmeans(x_ND, 2, 5)
        order = centres_DK[0].argsort()
        assert centres_DK.T[order].tolist() == [[0.0, 1.0], [10.0, 2.0]]
        assert counts_K[order].tolist() == [2.0, 3.0]


def test_kmeans_counts_belong_to_the_final_centres() -> None:
    # Without iterations the centres are rows; with fewer rows than codes the rest own nothing.
    torch.manual_seed(0)
    centres_DK, counts_K = kmeans(torch.full((6, 2), 3.0), 4, 0)
    assert (centres_DK == 3.0).all()
    assert counts_K.tolist() == [6.0, 0.0, 0.0, 0.0]
