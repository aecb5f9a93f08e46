"""Keyed permutations: they are permutations, look random, and are the same everywhere."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cogview_pl.data.permutation import Permutation


def permuted(size: int, key: str = "a") -> list[int]:
    return Permutation(size, key).of(np.arange(size)).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [*range(1, 130), 255, 256, 257, 1000, 4095, 4097, 65537, 300_007])
def test_every_index_once(size: int) -> None:
    assert sorted(permuted(size)) == list(range(size))


@pytest.mark.parametrize("size", [30_000_000, 2**32 + 1, 10**15, 2**62])
def test_large_sizes_neither_repeat_nor_leave_the_range(size: int) -> None:
    indices = np.unique(np.linspace(0, size - 1, 20_000, dtype=np.int64).clip(0, size - 1))
    places = Permutation(size, "a").of(indices)
    assert len(np.unique(places)) == len(indices)
    assert places.min() >= 0 and places.max() < size


def test_one_index_or_many_give_the_same() -> None:
    made = Permutation(1009, "a")
    assert [made.of(np.array([index])).item() for index in range(1009)] == permuted(1009)
    assert made.of(np.arange(12).reshape(3, 4)).tolist() == np.reshape(permuted(1009)[:12], (3, 4)).tolist()


def test_it_is_the_same_for_ever_and_on_every_platform() -> None:
    assert permuted(12, "3 0") == [8, 6, 7, 11, 5, 9, 10, 1, 4, 0, 3, 2]
    assert Permutation(30_000_000, "0 1").of(np.array([0, 1, 2, 29_999_999])).tolist() == [
        21954690,
        23742995,
        6098675,
        16179623,
    ]


def chi_square(counts: Counter[object], cells: int) -> float:
    """Excess of the statistic over its mean, in standard deviations."""
    expected = sum(counts.values()) / cells
    found = sum((count - expected) ** 2 / expected for count in counts.values())
    found += (cells - len(counts)) * expected
    return (found - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_all_permutations_of_few_are_equally_likely() -> None:
    for size in (2, 3, 5):
        counts: Counter[object] = Counter(tuple(permuted(size, f"key {key}")) for key in range(900))
        assert abs(chi_square(counts, math.factorial(size))) < 5


@pytest.mark.parametrize("size", [16, 100])
def test_places_and_neighbours_look_random(size: int) -> None:
    places: Counter[object] = Counter()
    distances: Counter[object] = Counter()
    for key in range(300):
        order = permuted(size, f"key {key}")
        places.update(enumerate(order))
        distances.update((b - a) % size for a, b in pairwise(order))
    assert abs(chi_square(places, size * size)) < 5
    assert abs(chi_square(distances, size - 1)) < 5


def test_a_large_order_has_no_trend() -> None:
    """Parts of an epoch cover the set evenly, and neighbours are as far apart as in a random order."""
    size = 1_000_003
    order = np.array(Permutation(size, "a").of(np.arange(200_000)))
    for part in np.split(order, 10):
        counts: Counter[object] = Counter((part * 100 // size).tolist())
        assert abs(chi_square(counts, 100)) < 5
    steps = np.abs(np.diff(order)) / size
    assert abs(steps.mean() - 1 / 3) < 5 * math.sqrt(1 / 18 / len(steps))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / math.sqrt(len(order))


def test_keys_have_nothing_in_common() -> None:
    first = Permutation(10_000, "0 1").of(np.arange(10_000))
    for key in ("1 0", "0 2", "0 11", ""):
        assert (first == Permutation(10_000, key).of(np.arange(10_000))).sum() < 10


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size must be"):
        Permutation(size, "a")
