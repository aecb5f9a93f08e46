"""Window geometry of super-resolution (paper §3.2): nine half-overlapping windows, for training and decoding.

Shapes: g edge of the source grid, w edge of a window (g / 2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors import UserError

ACROSS = 3
"""Windows along an edge."""
ORDER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))
"""Rows and columns of the windows in the order of decoding: centre-continuous."""
_MARGIN = 16  # a window of edge 2w leaves 2w / 16 rows open (at least one)
_NOBODY = -1


class Window(NamedTuple):
    """Regions of the two grids; each is an index pair for the last two axes."""

    source: tuple[slice, slice]
    target: tuple[slice, slice]


def window(grid: int, row: int, column: int) -> Window:
    """The window `(w, w)` in this row and column (0 … 2) of a `grid` x `grid` image, and its target `(2w, 2w)`.

    Raises:
        UserError: the grid is not a multiple of 4.
    """
    if grid % 4:
        raise UserError(
            f"template.layout: a grid of {grid}x{grid} codes has no half-overlapping windows; use a multiple of 4"
        )
    edge, top, left = grid // 2, row * grid // 4, column * grid // 4
    source = slice(top, top + edge), slice(left, left + edge)
    return Window(source, (slice(2 * top, 2 * (top + edge)), slice(2 * left, 2 * (left + edge))))


def windows(grid: int) -> list[Window]:
    """The nine windows of a `grid` x `grid` image in the order of decoding, with the rows that each decodes as target.

    A window keeps the codes that earlier windows decoded in its region. All but the last row of windows leave their
    lowest rows open, so that a border always lies inside the next window. With grid 32 these are the original's: 18
    rows for the first window, 30 for the others of the first two rows of windows, 32 for those of the last.

    Raises:
        UserError: the grid is not a multiple of 4.
    """
    edge = grid // 2
    margin = max(1, 2 * edge // _MARGIN)
    found = []
    for row, column in ORDER:
        height = edge + margin if (row, column) == (0, 0) else 2 * edge - margin if row < ACROSS - 1 else 2 * edge
        source, (rows, columns) = window(grid, row, column)
        found.append(Window(source, (slice(rows.start, rows.start + height), columns)))
    return found


def owners(grid: int) -> Tensor:
    """Number of the window that decodes each code of the enlarged grid, int64 `(2g, 2g)`."""
    found = torch.full((2 * grid, 2 * grid), _NOBODY)
    for number, (_, target) in enumerate(windows(grid)):
        region = found[target]
        region[region == _NOBODY] = number
    return found
