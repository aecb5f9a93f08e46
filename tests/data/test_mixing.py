"""Training sets of several parts."""

from __future__ import annotations

from collections import Counter

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
