"""Super-resolution by centre-continuous sliding windows (paper §3.2): a grid of codes to one twice as large.

The super-resolution model turns a window of codes into one of twice its edge. Windows overlap by half; each keeps
the codes that earlier ones left in its region and fills the rest, and all but the last row of windows leave their
lowest rows open, so that a border always lies inside the next window.

Shapes: B images, g edge of the source grid, w edge of a window (g / 2), T codes of a target region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.decode import OPEN, fill
from cogview_pl.generation.engine.cuda_graph import can_capture
from cogview_pl.generation.sampling import Sampling
from cogview_pl.generation.super_resolution.parallel_windows import Wavefront
from cogview_pl.generation.super_resolution.parallel_windows_graph import StaticWavefront
from cogview_pl.generation.super_resolution.windows import ORDER, Window, windows
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import CodeSlot, Template, magnify_slots


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
    """Codes `(B, 2g, 2g)` of images twice as large as those of `codes` `(B, g, g)`; int64, on the CPU.

    Args:
        model: a super-resolution model.
        template: its layout: a text slot, a small grid, and the target grid of twice its edge.
        texts: text token ids of the B prompts.
        codes: int64 `(B, g, g)`; g is the edge of the target grid.
        seeds: one per image.
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
    prompts = [_prompts(template, texts, codes, window, (text, small)) for window in windows(codes.shape[1])]
    window_seeds = [[seed * len(ORDER) + number for seed in seeds] for number in range(len(ORDER))]
    if model.norm_scope == NormScope.tensor:
        return _in_order(model, template, prompts, window_seeds, codes.shape, sampling, on_window)
    kind = StaticWavefront if can_capture(model, template, sampling) else Wavefront
    front = kind(model, template, prompts, window_seeds, grid=codes.shape[1], sampling=sampling)
    return front.run(on_window).cpu()


def _prompts(
    template: Template, texts: Sequence[Sequence[int]], codes: Tensor, window: Window, slots: tuple[str, str]
) -> list[list[int]]:
    text, small = slots
    sources = codes[(slice(None), *window.source)].flatten(1).tolist()
    return [template.prompt({text: t, small: s}) for t, s in zip(texts, sources, strict=True)]


def _in_order(
    model: Transformer,
    template: Template,
    prompts: Sequence[Sequence[Sequence[int]]],
    seeds: Sequence[Sequence[int]],
    shape: torch.Size,
    sampling: Sampling,
    on_window: Callable[[], None],
) -> Tensor:
    """One window after the other, as the original does: with its LayerNorm, windows side by side would mix."""
    result = torch.full((shape[0], 2 * shape[1], 2 * shape[2]), OPEN)
    for number, window in enumerate(windows(shape[1])):
        region = (slice(None), *window.target)
        known = result[region].flatten(1)
        filled = fill(model, template, prompts[number], seeds=seeds[number], sampling=sampling, known=known)
        result[region] = torch.tensor(filled).view(result[region].shape)
        on_window()
    return result
