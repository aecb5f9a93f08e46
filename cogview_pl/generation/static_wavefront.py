"""Super-resolution windows side by side, by captured CUDA graphs: a `Wavefront` whose steps all do the same.

Nine tenths of the steps read one code per window. What such a step writes and where is known before the first one, so
it is laid out in tensors, and the step, on fixed memory, takes its line of them: all lanes read a token and draw a
code, and those that are not in the step draw theirs into the void. Prompts, and rows of codes that another window
has filled, are read in between, as in a `Wavefront`.

Shapes: B pictures, R rows (lanes · B, lane by lane), S steps, g edge of the source grid, T codes of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_pl.generation.filters import draw, probabilities
from cogview_pl.generation.static_step import Repeat, default_repeater
from cogview_pl.generation.wavefront import Turn, Wavefront
from cogview_pl.gpu import current
from cogview_pl.transformer import StaticKVCache


class _Lines(NamedTuple):
    """What every step does, per row of the cache."""

    active_SR: Tensor
    """int64, 1 where a code is drawn."""
    target_SR: Tensor
    """Index of the code among all codes."""
    uniform_SR: Tensor
    """The number that decides the draw."""


class StaticWavefront(Wavefront):
    """The codes of a `Wavefront`, by steps on fixed memory; arguments are the same."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        device, num_rows = self._model.device, len(self._cache.lengths)
        self._all_codes = torch.cat([self.codes.flatten(), self.codes.new_zeros(1)])  # the last cell is the void
        self.codes = self._all_codes[:-1].view(self.codes.shape)
        self._pending_R1 = torch.zeros(num_rows, 1, dtype=torch.long, device=device)  # tokens that are to be read next
        self._next_R = torch.zeros(num_rows, dtype=torch.long, device=device)  # their positions
        self._line_1 = torch.zeros(1, dtype=torch.long, device=device)  # of the next step
        self._lines = self._lines_of_steps()
        self._static = StaticKVCache(self._cache, self._cache.capacity)
        self._unsent: list[Sequence[Turn]] = []

    @torch.inference_mode()
    def run(self, on_window: Callable[[], None] = lambda: None) -> Tensor:
        """All steps; returns the codes. `on_window` is called when the steps of a window have been sent."""
        with current(self._model.device):
            repeat = default_repeater(self._model.device)(self._step)
            for turns in self._steps:
                ahead = [turn for turn in turns if not self._one_behind(turn)]
                if ahead:
                    self._send(repeat)
                for turn in ahead:
                    self._catch_up(turn)
                self._unsent.append(turns)
                for turn in turns:
                    self._running[turn.window].read = turn.place
                    if turn.last:
                        self._send(repeat)
                        del self._running[turn.window]
                        on_window()
            return self.codes.cpu()  # waits for the steps, whose graph goes here

    def _step(self) -> None:
        active_R, target_R, uniform_R = (line.index_select(0, self._line_1)[0] for line in self._lines)
        hidden_RD = self._model.hidden(self._pending_R1, self._next_R[:, None], self._static)[:, -1]
        self._static.lengths.add_(active_R)
        self._next_R.add_(active_R)
        drawn_R = draw(probabilities(self._model.logits(hidden_RD), self._sampling), uniform_R)
        self._all_codes.index_copy_(0, target_R, drawn_R)
        self._pending_R1.copy_(torch.where(active_R > 0, drawn_R, self._pending_R1[:, 0])[:, None])
        self._line_1.add_(1)

    def _send(self, repeat: Repeat) -> None:
        repeat(len(self._unsent), lambda: None)
        for turn in (turn for turns in self._unsent for turn in turns):
            self._cache.rows(self._rows(turn, turn)).stored_elsewhere(1)
        self._unsent.clear()

    def _one_behind(self, turn: Turn) -> bool:
        """Whether the window has read all codes before the turn's but the one that it has drawn last."""
        return turn.window in self._running and self._running[turn.window].read == turn.place - 1

    def _catch_up(self, turn: Turn) -> None:
        """Read prompt and codes before the turn's in one pass, but for the last of them: that the step will do.

        But at the start of a window nothing here waits for the device, which meanwhile runs the steps sent before.
        """
        rows = self._rows(turn, turn)
        if turn.window not in self._running:
            self._start(turn)
        else:
            self._running[turn.window].next_B = self._next_R[rows].clone()
            self._read([turn])
        window = self._running[turn.window]
        self._cache.rows(rows).advance(-1)
        self._next_R[rows] = window.next_B - 1
        if turn.place > 0:
            self._pending_R1[rows] = self._codes_of(window.region)[:, turn.place - 1, None]
        else:
            ends = [prompt[-1] for prompt in self._prompts[turn.window]]
            self._pending_R1[rows] = torch.tensor(ends, device=self._model.device)[:, None]

    def _lines_of_steps(self) -> _Lines:
        uniform_WBT = self._uniform_WBT.cpu()
        active_SR = torch.zeros(len(self._steps), len(self._cache.lengths), dtype=torch.long)
        target_SR = torch.full_like(active_SR, self.codes.numel())  # the void
        uniform_SR = torch.zeros(active_SR.shape)
        index = torch.arange(self.codes.numel()).view(self.codes.shape)
        regions = [index[(slice(None), *window.target)].flatten(1) for window in self._windows]
        for number, turns in enumerate(self._steps):
            for turn in turns:
                rows = self._rows(turn, turn)
                active_SR[number, rows] = 1
                target_SR[number, rows] = regions[turn.window][:, turn.place]
                uniform_SR[number, rows] = uniform_WBT[turn.window, :, turn.place]
        return _Lines(*(lines.to(self._model.device) for lines in (active_SR, target_SR, uniform_SR)))
