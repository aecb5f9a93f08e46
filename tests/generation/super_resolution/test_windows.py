"""The nine windows of super-resolution: the original's by recorded numbers, and small ones by hand."""

from __future__ import annotations

import pytest

from cogview_pl.errors import UserError
from cogview_pl.generation.super_resolution.windows import owners, windows


def test_windows_of_the_original() -> None:
    """Grid 32: a window reads 16 x 16 codes and decodes up to 32 x 32; windows move by 8 codes, 16 enlarged."""
    found = [(w.source[0].start, w.source[1].start, w.target[0].stop - w.target[0].start) for w in windows(32)]
    assert found == [
        *((0, 0, 18), (0, 8, 30), (0, 16, 30)),
        *((8, 8, 30), (8, 0, 30), (8, 16, 30)),
        *((16, 0, 32), (16, 8, 32), (16, 16, 32)),
    ]
    for window in windows(32):
        assert [axis.stop - axis.start for axis in window.source] == [16, 16]
        assert [axis.start for axis in window.target] == [2 * axis.start for axis in window.source]
        assert window.target[1].stop - window.target[1].start == 32


@pytest.mark.parametrize(("grid", "open_rows"), [(4, 1), (28, 1), (32, 2), (44, 2), (60, 3), (64, 4)])
def test_a_sixteenth_of_the_rows_stays_open_but_at_least_one(grid: int, open_rows: int) -> None:
    rows = [window.target[0].stop - window.target[0].start for window in windows(grid)]
    assert rows == [grid // 2 + open_rows, *[grid - open_rows] * 5, *[grid] * 3]


def test_owners_of_the_smallest_grid_by_hand() -> None:
    # Windows of 4 codes that move by 2, with one row left open; the first window decodes three rows.
    assert owners(4).tolist() == [
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 2, 2],
        [4, 4, 3, 3, 3, 3, 5, 5],
        [4, 4, 3, 3, 3, 3, 5, 5],
        [6, 6, 6, 6, 7, 7, 8, 8],
        [6, 6, 6, 6, 7, 7, 8, 8],
        [6, 6, 6, 6, 7, 7, 8, 8],
    ]


def test_owners_of_the_original() -> None:
    owner = owners(32)
    assert owner.shape == (64, 64)
    # By the numbers of rows above: 18 by 32, then 30 - 18 of the second window's and so on.
    counts = [18 * 32, 30 * 16 + 12 * 16, 30 * 16, 16 * 32, 28 * 16, 16 * 16, 18 * 32, 18 * 16, 18 * 16]
    assert owner[17, 31] == 0 and owner[18, 31] == 1 and owner[17, 32] == 1
    assert owner[18, 15] == 4 and owner[18, 16] == 1 and owner[29, 47] == 1 and owner[30, 47] == 3
    assert owner[30, 16] == 3 and owner[45, 15] == 4 and owner[46, 15] == 6 and owner[29, 48] == 2
    assert owner[30, 48] == 5 and owner[46, 32] == 7 and owner[46, 48] == 8
    assert [int((owner == number).sum()) for number in range(9)] == counts


@pytest.mark.parametrize("grid", [4, 12, 20])
def test_every_code_has_an_owner(grid: int) -> None:
    owner = owners(grid)
    assert owner.shape == (2 * grid, 2 * grid)
    assert sorted(owner.unique().tolist()) == list(range(9))


@pytest.mark.parametrize("grid", [6, 33])
def test_other_grids_are_refused(grid: int) -> None:
    with pytest.raises(UserError, match=f"a grid of {grid}x{grid} codes has no half-overlapping windows; .* of 4"):
        windows(grid)
