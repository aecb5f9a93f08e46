"""The nine half-overlapping windows of super-resolution (paper §3.2), and which of them fills which code."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.decode import OPEN

ORDER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))
_MARGIN = 16  # a window of edge 2w leaves 2w / 16 rows open (at least one)


class Window(NamedTuple):
    """One step: `source` and `target` are index pairs for the last two axes of a grid."""

    source: tuple[slice, slice]
    target: tuple[slice, slice]


def windows(grid: int) -> list[Window]:
    """The nine windows that magnify a `grid` x `grid` image, in the order in which they are filled.

    With grid 32 these are the original's: 18 rows for the first window, 30 for the others of the first two rows of
    windows, 32 for those of the last.

    Raises:
        UserError: the grid is not a multiple of 4.
    """
    if grid % 4:
        raise UserError(f"magnify: a grid of {grid}x{grid} codes has no half-overlapping windows; use a multiple of 4")
    edge, step = grid // 2, grid // 4
    margin = max(1, 2 * edge // _MARGIN)
    found = []
    for row, column in ORDER:
        rows = edge + margin if (row, column) == (0, 0) else 2 * edge - margin if row < 2 else 2 * edge
        source = (slice(row * step, row * step + edge), slice(column * step, column * step + edge))
        top, left = 2 * row * step, 2 * column * step
        found.append(Window(source, (slice(top, top + rows), slice(left, left + 2 * edge))))
    return found


def owners(grid: int) -> Tensor:
    """Number of the window that fills each code of the enlarged grid, int64 `(2 grid, 2 grid)`."""
    found = torch.full((2 * grid, 2 * grid), OPEN)
    for number, window in enumerate(windows(grid)):
        region = found[window.target]
        region[region == OPEN] = number
    return found
