"""Training sets of several parts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cogview_pl.data.mixing import mixed


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
    inner: Any = mixed(Named("a", 3), Named("b", 2), 0.5)  # type: ignore[arg-type]
    assert [inner.key(i) for i in range(6)] == ["a0", "a1", "a2", "b0", "b1", "b0"]
    outer: Any = mixed(inner, Named("c", 12), 0.5)  # type: ignore[arg-type]
    keys = [outer.key(i) for i in range(len(outer))]
    assert keys == [outer[i] for i in range(len(keys))]
    assert keys[4:8] == ["b1", "b0", "a0", "a1"] and keys[12:] == [f"c{i}" for i in range(12)]


def test_an_index_beyond_the_end_is_refused() -> None:
    data = mixed(["a", "b"], ["c"], 0.5)  # type: ignore[arg-type]
    assert data[-1] == data[3] == "c"
    for index in (4, -5):
        with pytest.raises(IndexError):
            data[index]


def test_large_sets_are_mixed_by_arithmetic() -> None:
    """The samples are those of the tables of indices that earlier versions made."""
    many, few, share = 30_000_000, 1_000_003, 0.3
    data = mixed(range(many), range(-few, 0), share)  # type: ignore[arg-type]
    others = round(many / (1 - share) * share)
    assert len(data) == many + others  # type: ignore[arg-type]
    places = [0, many - 1, many, many + few - 1, many + few, many + others - 1]
    assert [data[i] for i in places] == [0, many - 1, -few, -1, -few, (others - 1) % few - few]
