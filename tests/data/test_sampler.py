"""The order of samples: complete epochs, exact continuation, any world size."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cogview_pl.data.sampler import ORDER, BatchesInOrder, EndlessSampler


def drawn(
    count: int, *, size: int = 7, seed: int = 3, consumed: int = 0, rank: int = 0, world: int = 1, order: int = ORDER
) -> list[int]:
    sampler = EndlessSampler(size, seed, rank=rank, world_size=world, order=order)
    sampler.consumed = consumed
    return list(islice(sampler, count))


def test_every_epoch_is_a_new_permutation() -> None:
    order = drawn(70)
    epochs = [tuple(order[start : start + 7]) for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 10


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert drawn(40) == drawn(40)
    assert drawn(40) != drawn(40, seed=4)
    # Neighbouring seeds do not share epochs.
    epochs = [tuple(drawn(30, size=30, seed=s, consumed=30 * e)) for s in range(8) for e in range(8)]
    assert len(set(epochs)) == 64
    assert all(type(index) is int for index in drawn(3))


def test_it_goes_on_exactly_from_any_position() -> None:
    order = drawn(40)
    for consumed in range(25):
        assert drawn(15, consumed=consumed) == order[consumed : consumed + 15]


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_share_one_order(size: int, world: int) -> None:
    order = drawn(12 * world, size=size)
    for steps in range(6):  # each rank has drawn so many before
        consumed = steps * world
        for rank in range(world):
            mine = drawn(6, size=size, consumed=consumed, rank=rank, world=world)
            assert mine == order[consumed + rank :: world][:6]


def test_another_world_size_goes_on_without_a_gap() -> None:
    order = drawn(40)
    two = [drawn(5, rank=rank, world=2) for rank in range(2)]
    assert sorted(two[0] + two[1]) == sorted(order[:10])
    assert drawn(10, consumed=10) == order[10:20]


@pytest.mark.parametrize("size", [3, 7, 24])
def test_blocks_of_all_ranks_are_the_batch_of_one_process(size: int) -> None:
    def batches(world: int, block: int, consumed: int = 0) -> list[list[int]]:
        """Five batches of all ranks, one rank's share behind the other's."""
        shares = []
        for rank in range(world):
            sampler = EndlessSampler(size, seed=3, rank=rank, world_size=world, block=block)
            sampler.consumed = consumed
            taken = list(islice(sampler, 5 * block))
            shares.append([taken[start : start + block] for start in range(0, 5 * block, block)])
        return [[index for share in step for index in share] for step in zip(*shares, strict=True)]

    alone = batches(1, 6)
    assert batches(2, 3) == batches(3, 2) == batches(6, 1) == alone
    assert batches(2, 3, consumed=12)[:3] == alone[2:]


def test_iterating_does_not_count_as_consuming() -> None:
    sampler = EndlessSampler(7, seed=3)
    ahead = iter(sampler)
    assert [next(ahead) for _ in range(5)] == drawn(5)
    assert sampler.consumed == 0
    sampler.consumed = 2
    assert next(ahead) == drawn(6)[5]  # what has begun goes on
    assert list(islice(sampler, 3)) == drawn(5)[2:]


def test_without_shuffling() -> None:
    assert list(islice(EndlessSampler(3, seed=0, shuffle=False), 8)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert list(islice(EndlessSampler(3, seed=0, shuffle=False, rank=1, world_size=2), 5)) == [1, 0, 2, 1, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_over_the_end_of_an_epoch_and_continue_in_a_loader(workers: int) -> None:
    def batches(consumed: int, count: int) -> list[list[int]]:
        sampler = EndlessSampler(7, seed=3)
        sampler.consumed = consumed
        loader = DataLoader(TensorDataset(torch.arange(7)), 4, sampler=sampler, num_workers=workers)
        return [batch.tolist() for (batch,) in islice(loader, count)]

    order = drawn(24)
    whole = batches(0, 6)
    assert whole == [order[start : start + 4] for start in range(0, 24, 4)]
    assert batches(8, 4) == whole[2:]


def test_it_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(EndlessSampler(7, seed=3))  # type: ignore[arg-type]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        EndlessSampler(0, seed=0)
    with pytest.raises(ValueError, match="rank"):
        EndlessSampler(3, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="order"):
        EndlessSampler(3, seed=0, order=3)


def test_the_order_is_fixed_for_ever() -> None:
    """A run that was stopped goes on with any later version."""
    assert drawn(14, order=1) == [5, 4, 3, 1, 2, 6, 0, 6, 2, 3, 5, 0, 1, 4]
    assert drawn(14) == [3, 6, 5, 4, 1, 0, 2, 2, 3, 4, 6, 5, 0, 1]


def test_an_earlier_order_goes_on_exactly() -> None:
    order = drawn(40, order=1)
    assert all(drawn(15, consumed=consumed, order=1) == order[consumed : consumed + 15] for consumed in range(25))


def test_the_place_costs_nothing_in_a_large_set() -> None:
    """A set that no table could hold, in a late epoch; ranks agree on its order."""
    size = 10**15
    alone = drawn(600, size=size, consumed=7 * size - 5)
    assert len(set(alone[5:])) == 595 and max(alone) < size
    for rank in range(2):
        assert drawn(300, size=size, consumed=7 * size - 5, rank=rank, world=2) == alone[rank::2]


@pytest.mark.parametrize(("size", "batch_size", "world"), [(0, 4, 2), (9, 4, 2), (16, 4, 2), (1, 1, 3)])
def test_batches_in_order_are_those_of_a_list(size: int, batch_size: int, world: int) -> None:
    for rank in range(world):
        own = list(range(size))[rank::world]
        batches = BatchesInOrder(range(size), batch_size, rank, world)
        expected = [own[start : start + batch_size] for start in range(0, -(-size // world), batch_size)]
        assert [list(batch) for batch in batches] == expected and len(batches) == len(expected)


def test_what_is_possible_at_the_edges_is_taken() -> None:
    assert drawn(3, size=1) == [0, 0, 0]
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), not -1"):
        EndlessSampler(3, seed=0, rank=-1, world_size=2)
