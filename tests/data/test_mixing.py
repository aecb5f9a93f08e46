"""Training sets of several parts."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.utils.data import Subset

from cogview_pl.data.mixing import mixed, sample_key


@pytest.mark.parametrize(("main", "other", "share"), [(100, 100, 0.3), (10, 1000, 0.3), (1000, 7, 0.3), (40, 60, 0.9)])
def test_shares_and_nothing_lost(main: int, other: int, share: float) -> None:
    names = [f"main {i}" for i in range(main)], [f"other {i}" for i in range(other)]
    data = mixed(*names, share)  # type: ignore[arg-type]
    counts = Counter(data[i] for i in range(len(data)))  # type: ignore[arg-type]
    assert counts.keys() == set(names[0]) | set(names[1])
    found = sum(count for name, count in counts.items() if name.startswith("other")) / len(data)  # type: ignore[arg-type]
    assert found == pytest.approx(share, abs=2 / len(data))  # type: ignore[arg-type]
    for part in names:  # repeats are dealt out evenly
        assert max(counts[name] for name in part) - min(counts[name] for name in part) <= 1


def test_share_zero_is_the_set_itself() -> None:
    main = [1, 2, 3]
    assert mixed(main, [], 0) is main  # type: ignore[arg-type]


def test_the_smaller_part_is_repeated_in_its_order() -> None:
    data = mixed(["a", "b"], list("vwxyz"), 0.5)  # type: ignore[arg-type]
    assert [data[i] for i in range(len(data))] == [*"ababa", *"vwxyz"]  # type: ignore[arg-type]
    data = mixed(list("abcdef"), ["y", "z"], 0.25)  # type: ignore[arg-type]
    assert [data[i] for i in range(len(data))] == [*"abcdef", *"yz"]  # type: ignore[arg-type]


class Named:
    """Samples that know their names."""

    def __init__(self, letter: str, size: int) -> None:
        self.letter, self.size = letter, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> str:
        return f"{self.letter}{index}"

    def key(self, index: int) -> str:
        return self[index]


def test_the_key_of_a_sample_is_that_in_the_part_it_comes_from() -> None:
    inner = mixed(Named("a", 3), Named("b", 2), 0.5)  # type: ignore[arg-type]
    assert [sample_key(inner, i) for i in range(6)] == ["a0", "a1", "a2", "b0", "b1", "b0"]
    outer = mixed(inner, Named("c", 12), 0.5)  # type: ignore[type-var]
    keys = [sample_key(outer, i) for i in range(len(outer))]  # type: ignore[arg-type]
    assert keys == [outer[i] for i in range(len(keys))]
    assert keys[4:8] == ["b1", "b0", "a0", "a1"] and keys[12:] == [f"c{i}" for i in range(12)]
    assert sample_key(Subset(inner, [5, 1]), 0) == "b0"
    assert sample_key(Named("d", 1), 0) == "d0"  # type: ignore[arg-type]
