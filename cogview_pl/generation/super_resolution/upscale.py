"""Super-resolution by centre-continuous sliding windows (paper §3.2): a grid of codes to one twice as large.

The super-resolution model turns a window of codes into one of twice its edge; `windows.py` says which windows.

Shapes: B images, g edge of the source grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode
from cogview_pl.generation.engine.cuda_graph import can_capture
from cogview_pl.generation.engine.forms import keep_forms
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.super_resolution.parallel_windows import ParallelWindows
from cogview_pl.generation.super_resolution.parallel_windows_graph import GraphedParallelWindows
from cogview_pl.generation.super_resolution.windows import ORDER, windows
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import CodeSlot, Template, magnify_slots


class Upscaler:
    """Doubles the edge of images by super-resolution in sliding windows (paper §3.2).

    Args:
        loaded: a model whose layout has a grid and then one of twice its edge.
        device, dtype: device and precision of the weights.
        quantization: see `quantize`.

    Raises:
        UserError: another layout, or a quantization that is not available.
    """

    def __init__(
        self, loaded: SequenceModel, device: str, dtype: torch.dtype, quantization: Quantization | None = None
    ) -> None:
        magnify_slots(loaded.template)
        self.template, self.text = loaded.template, loaded.text
        self.model = loaded.model.to(device, dtype)
        quantize(self.model, quantization)
        keep_forms(self.model)

    @property
    def grid(self) -> tuple[int, int]:
        """`(y, x)` codes of the images that it takes."""
        assert isinstance(self.template.target, CodeSlot)
        return self.template.target.grid

    def double(
        self,
        texts: Sequence[str],
        codes: Tensor,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        on_window: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Codes `(B, 2g, 2g)`, int64 on the CPU, of images twice as large as those of `codes` `(B, g, g)`.

        `on_window` is called `num_steps` times.

        Raises:
            UserError: the grid is not the model's, or a text is longer than its slot.
        """
        text_tokens = [self.text.encode(text) for text in texts]
        doubled = [
            magnify(
                self.model,
                self.template,
                text_tokens[part],
                codes[part],
                seeds=seeds[part],
                sampling=sampling,
                on_window=on_window,
            )
            for part in self._batches(len(text_tokens), sampling.batch_size)
        ]
        return torch.cat(doubled)

    def num_steps(self, num_images: int, batch_size: int) -> int:
        """Windows that `double` decodes; a window of all images of a batch counts once."""
        return len(self._batches(num_images, batch_size)) * len(ORDER)

    def _batches(self, num_images: int, batch_size: int) -> list[slice]:
        """One image at a time with `norm_scope=tensor`, as in the original."""
        step = 1 if self.model.norm_scope == NormScope.tensor else batch_size
        return [slice(start, start + step) for start in range(0, num_images, step)]


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
    """Codes `(B, 2g, 2g)`, int64 on the CPU, of images twice as large as those of `codes` `(B, g, g)`.

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
    prompts, window_seeds = [], []  # per window, one row per image
    for number, window in enumerate(windows(codes.shape[1])):
        sources = codes[(slice(None), *window.source)].flatten(1).tolist()
        prompts.append([template.prompt({text: t, small: s}) for t, s in zip(texts, sources, strict=True)])
        window_seeds.append([seed * len(ORDER) + number for seed in seeds])
    if model.norm_scope == NormScope.tensor:
        return _in_order(model, template, prompts, window_seeds, codes.shape, sampling, on_window)
    kind = GraphedParallelWindows if can_capture(model, template, sampling) else ParallelWindows
    return kind(model, template, prompts, window_seeds, grid=codes.shape[1], sampling=sampling).run(on_window)


def _in_order(
    model: Transformer,
    template: Template,
    prompts: Sequence[Sequence[Sequence[int]]],
    seeds: Sequence[Sequence[int]],
    shape: torch.Size,
    sampling: Sampling,
    on_window: Callable[[], None],
) -> Tensor:
    """One window after the other, as in the original; its LayerNorm would mix windows of one batch."""
    result = torch.full((shape[0], 2 * shape[1], 2 * shape[2]), TO_SAMPLE)
    for number, window in enumerate(windows(shape[1])):
        region = (slice(None), *window.target)
        known = result[region].flatten(1)
        rows = decode(model, template, prompts[number], seeds=seeds[number], sampling=sampling, known=known)
        result[region] = torch.tensor(rows).view(result[region].shape)
        on_window()
    return result
