"""Super-resolution windows side by side, by captured CUDA graphs: a `Wavefront` whose steps all do the same.

What a step reads and writes and where is known before the first one, so it is laid out in tensors, and the step, on
fixed memory, takes its line of them: all lanes read a code and draw one, and those that have none to draw draw it into
the void. Only where a window starts are its prompt and the codes before its own read in between, as in a `Wavefront`.

Shapes: B images, R rows (lanes · B, lane by lane), S steps, g edge of the source grid, T codes of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_pl.generation.engine.cuda_graph import default_repeater
from cogview_pl.generation.sampling import draw, probabilities
from cogview_pl.generation.super_resolution.parallel_windows import Turn, Wavefront
from cogview_pl.kernels.availability import current
from cogview_pl.transformer.kv_cache import StaticKVCache


class _Lines(NamedTuple):
    """What every step does, per row of the cache."""

    active_SR: Tensor
    """int64, 1 where a token is read."""
    source_SR: Tensor
    """Index of the token among all tokens."""
    target_SR: Tensor
    """Index of the code that is drawn among all tokens."""
    uniform_SR: Tensor
    """The number that decides the draw."""


class StaticWavefront(Wavefront):
    """The codes of a `Wavefront`, by steps on fixed memory; arguments are the same."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        device, num_rows = self._model.device, len(self._cache.lengths)
        void_and_ends = self.codes.new_zeros(1 + num_rows)
        self._tokens = torch.cat([self.codes.flatten(), void_and_ends])
        """All codes, a cell that nobody reads, and per row the end of a prompt."""
        self.codes = self._tokens[: -len(void_and_ends)].view(self.codes.shape)
        self._ends_R = self._tokens[-num_rows:]
        self._line_1 = torch.zeros(1, dtype=torch.long, device=device)  # of the next step
        self._lines = self._lines_of_steps()
        self._static = StaticKVCache(self._cache, self._cache.capacity)

    @torch.inference_mode()
    def run(self, on_window: Callable[[], None] = lambda: None) -> Tensor:
        """All steps; returns the codes. `on_window` is called when the steps of a window have been sent."""
        with current(self._model.device):
            repeat = default_repeater(self._model.device)(self._step)
            for turns in self._steps:
                for turn in turns:
                    if turn.starts:
                        self._start(turn)
                repeat(1, lambda: None)
                for turn in turns:
                    if turn.last:
                        on_window()
            return self.codes.cpu()  # waits for the steps, whose graph goes here

    def _step(self) -> None:
        active_R, source_R, target_R, uniform_R = (line.index_select(0, self._line_1)[0] for line in self._lines)
        read_R1 = self._tokens.index_select(0, source_R)[:, None]
        hidden_RD = self._model.hidden(read_R1, self._next_R[:, None], self._static)[:, -1]
        self._static.lengths.add_(active_R)
        self._next_R.add_(active_R)
        drawn_R = draw(probabilities(self._model.logits(hidden_RD), self._sampling), uniform_R)
        self._tokens.index_copy_(0, target_R, drawn_R)
        self._line_1.add_(1)

    def _start(self, turn: Turn) -> Tensor:
        """Read prompt and codes in one pass; the last of them the step reads once more."""
        hidden_BD = super()._start(turn)
        rows = self._rows(turn, turn)
        self._cache.rows(rows).advance(-1)
        self._next_R[rows] -= 1
        ends = [prompt[-1] for prompt in self._prompts[turn.window]]
        self._ends_R[rows] = torch.tensor(ends, device=self._model.device)
        return hidden_BD

    def _lines_of_steps(self) -> _Lines:
        uniform_WBT = self._uniform_WBT.cpu()
        num_rows, void = len(self._cache.lengths), self.codes.numel()
        active_SR = torch.zeros(len(self._steps), num_rows, dtype=torch.long)
        source_SR, target_SR = torch.full_like(active_SR, void), torch.full_like(active_SR, void)
        uniform_SR = torch.zeros(active_SR.shape)
        index = torch.arange(void).view(self.codes.shape)
        end_R = void + 1 + torch.arange(num_rows)
        regions = [index[(slice(None), *window.target)].flatten(1) for window in self._windows]
        for number, turns in enumerate(self._steps):
            for turn in turns:
                rows, region_BT = self._rows(turn, turn), regions[turn.window]
                active_SR[number, rows] = 1
                source_SR[number, rows] = region_BT[:, turn.place - 1] if turn.place else end_R[rows]
                if turn.samples:
                    target_SR[number, rows] = region_BT[:, turn.place]
                    uniform_SR[number, rows] = uniform_WBT[turn.window, :, turn.place]
        lines = (active_SR, source_SR, target_SR, uniform_SR)
        return _Lines(*(line.to(self._model.device) for line in lines))
