"""Super-resolution windows in parallel by a CUDA graph: `ParallelWindows` with a step on fixed memory.

The timetable is known before the first step, so it is laid out in tensors, and every step takes its line of them: all
lanes read a code and sample one, and lanes without a code of their own write theirs to an unused cell. Only where a
window starts, its prompt and the codes before its own are read between two steps, as in `ParallelWindows`.

Shapes: B images, R rows of the cache (lanes · B, lane by lane), S steps, T codes of a window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_pl.generation.engine.cuda_graph import capture_on
from cogview_pl.generation.sampling import sample_logits
from cogview_pl.generation.super_resolution.parallel_windows import ParallelWindows, Stepper, Turn


class _Lines(NamedTuple):
    """Inputs of every step per row of the cache."""

    active_SR: Tensor
    """int64, 1 where a token is read, else 0."""
    source_SR: Tensor
    """Index of the token to read in `_tokens`."""
    target_SR: Tensor
    """Index of the sampled code in `_tokens`."""
    uniform_SR: Tensor
    """Random number that decides the sample."""


class GraphedParallelWindows(ParallelWindows):
    """The codes of `ParallelWindows`, by steps on fixed memory; arguments are the same."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        num_rows = len(self._state.next_R)
        unused_and_ends = self.codes.new_zeros(1 + num_rows)
        self._tokens = torch.cat([self.codes.flatten(), unused_and_ends])
        """All codes, an unused cell, and per row the end of a prompt."""
        self.codes = self._tokens[: -len(unused_and_ends)].view(self.codes.shape)
        self._ends_R = self._tokens[-num_rows:]
        self._line_1 = torch.zeros(1, dtype=torch.long, device=self._device)  # of the next step
        self._lines = self._lines_of_steps()
        self._static = self._state.static()

    def _stepper(self) -> Stepper:
        step = capture_on(self._device)(self._step_on_fixed_memory)
        return lambda turns, hidden: step()

    def _step_on_fixed_memory(self) -> None:
        active_R, source_R, target_R, uniform_R = (line.index_select(0, self._line_1)[0] for line in self._lines)
        hidden_RD = self._static.step(self._tokens.index_select(0, source_R)[:, None])[:, -1]
        self._static.advance(active_R)
        sampled_R = sample_logits(self._static.logits(hidden_RD), self._sampling, uniform_R)
        self._tokens.index_copy_(0, target_R, sampled_R)
        self._line_1.add_(1)

    def _start(self, turn: Turn) -> Tensor:
        """Read prompt and codes in one pass; the next step reads the last of them once more."""
        hidden_BD = super()._start(turn)
        rows = self._rows(turn, turn)
        self._state.rows(rows).advance(-1)
        ends = [prompt[-1] for prompt in self._prompts[turn.window]]
        self._ends_R[rows] = torch.tensor(ends, device=self._device)
        return hidden_BD

    def _lines_of_steps(self) -> _Lines:
        uniform_WBT = self._uniform_WBT.cpu()
        num_rows, unused = len(self._state.next_R), self.codes.numel()
        active_SR = torch.zeros(len(self._timetable), num_rows, dtype=torch.long)
        source_SR, target_SR = torch.full_like(active_SR, unused), torch.full_like(active_SR, unused)
        uniform_SR = torch.zeros(active_SR.shape)
        index = torch.arange(unused).view(self.codes.shape)
        end_R = unused + 1 + torch.arange(num_rows)
        regions = [index[(slice(None), *window.target)].flatten(1) for window in self._windows]
        for number, turns in enumerate(self._timetable):
            for turn in turns:
                rows, region_BT = self._rows(turn, turn), regions[turn.window]
                active_SR[number, rows] = 1
                source_SR[number, rows] = region_BT[:, turn.place - 1] if turn.place else end_R[rows]
                if turn.samples:
                    target_SR[number, rows] = region_BT[:, turn.place]
                    uniform_SR[number, rows] = uniform_WBT[turn.window, :, turn.place]
        lines = (active_SR, source_SR, target_SR, uniform_SR)
        return _Lines(*(line.to(self._device) for line in lines))
