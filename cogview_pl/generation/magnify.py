"""Super-resolution by centre-continuous sliding windows (paper §3.2): a grid of codes to one twice as large.

The super-resolution model turns a window of codes into one of twice its edge. Windows overlap by half; each keeps
the codes that earlier ones left in its region and fills the rest, and all but the last row of windows leave their
lowest rows open, so that a border always lies inside the next window.

Shapes: B pictures, g edge of the source grid, w edge of a window (g / 2), T codes of a target region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.fill import OPEN, fill
from cogview_pl.generation.filters import Sampling
from cogview_pl.transformer import Transformer
from cogview_pl.vocab import CodeSlot, Template, magnify_slots

_ORDER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))
_MARGIN = 16  # a window of edge 2w leaves 2w / 16 rows open (at least one)


class Window(NamedTuple):
    """One step: `source` and `target` are index pairs for the last two axes of a grid."""

    source: tuple[slice, slice]
    target: tuple[slice, slice]


def windows(grid: int) -> list[Window]:
    """The nine windows that magnify a `grid` x `grid` picture, in the order in which they are filled.

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
    for row, column in _ORDER:
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


def magnify(
    model: Transformer,
    template: Template,
    texts: Sequence[Sequence[int]],
    codes: Tensor,
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    on_window: Callable[[], None] = lambda: None,
) -> Tensor:
    """Codes `(B, 2g, 2g)` of pictures twice as large as those of `codes` `(B, g, g)`; int64, on the CPU.

    Args:
        model: a super-resolution model.
        template: its layout: a text slot, a small grid, and the target grid of twice its edge.
        texts: piece ids of the B prompts.
        codes: int64 `(B, g, g)`; g is the edge of the target grid.
        seeds: one per picture.
        sampling: temperature and filters.
        on_window: called after each of the nine windows, for progress bars.

    Raises:
        UserError: the layout is not one of super-resolution, or the grid is not the model's.
    """
    text, small = magnify_slots(template)
    large = template.target
    assert isinstance(large, CodeSlot)
    if tuple(codes.shape[1:]) != large.grid:
        found = "x".join(map(str, codes.shape[1:]))
        raise UserError(f"magnify: codes of {found}, the model takes {large.grid[0]}x{large.grid[1]}")
    codes = codes.cpu()
    result = torch.full((len(codes), 2 * codes.shape[1], 2 * codes.shape[2]), OPEN)
    for number, window in enumerate(windows(codes.shape[1])):
        sources = codes[(slice(None), *window.source)].flatten(1).tolist()
        region = (slice(None), *window.target)
        filled = fill(
            model,
            template,
            [template.prompt({text: t, small: s}) for t, s in zip(texts, sources, strict=True)],
            seeds=[seed * len(_ORDER) + number for seed in seeds],
            sampling=sampling,
            known=result[region].flatten(1),
        )
        result[region] = torch.tensor(filled).view(result[region].shape)
        on_window()
    return result
