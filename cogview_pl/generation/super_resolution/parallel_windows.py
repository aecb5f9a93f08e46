"""Super-resolution windows in parallel: every code is sampled as soon as the codes that it depends on are known.

In its window a code depends on the codes before it in raster order, some of which other windows sample. So a window can
run in parallel to another one and stay a few codes after it, as in a wavefront: a diagonal line of codes that moves
over the grid. In every step each running window reads one code, and samples the next one if that belongs to it. The
timetable follows from the windows alone: 2,080 steps instead of 4,096 for a grid of 32x32 codes, with the same
distribution of every code.

Shapes: B images, R rows of the cache (lanes · B, lane by lane), W windows, T codes of a window, g edge of the source
grid, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.decode import TO_SAMPLE, uniforms
from cogview_pl.generation.engine.decode_state import DecodeState
from cogview_pl.generation.super_resolution.windows import owners, windows
from cogview_pl.kernels.availability import current
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template


class Turn(NamedTuple):
    """A window's part in a step: it reads the code before a place, and samples the one at the place if it owns it."""

    window: int
    place: int
    """Index of the code in the window's region, in raster order."""
    lane: int
    """Which B rows of the cache the window uses while it runs."""
    starts: bool
    """Whether the window begins: it reads its prompt and all codes before the place, and owns the place."""
    samples: bool
    """Whether the window owns the code at the place."""
    last: bool
    """Whether this is the window's last own code, after which its lane is free."""


@cache
def timetable(grid: int) -> list[list[Turn]]:
    """Turns of the windows of a `grid` x `grid` image in each step, in the order of their lanes.

    Step `grid` · y + x samples the code (y, x). Rows of windows are `grid` codes wide, so each window reads code after
    code, one per step, from its first own code to its last, and all codes before them are known by then.

    Raises:
        UserError: the grid is not a multiple of 4.
    """
    owner = owners(grid)
    owned = [(owner[window.target] == number).flatten() for number, window in enumerate(windows(grid))]
    places = [range(int(own.nonzero()[0]), int(own.nonzero()[-1]) + 1) for own in owned]
    first_steps = [grid * rows.start + columns.start for _, (rows, columns) in windows(grid)]  # of place 0
    steps: list[list[Turn]] = [[] for _ in range(grid * (2 * grid - 1) + 2 * grid)]
    free_from: dict[int, int] = dict.fromkeys(range(len(owned)), 0)  # step in which each lane is free again
    for number in sorted(range(len(owned)), key=lambda number: first_steps[number] + places[number].start):
        own, first, last = owned[number].tolist(), places[number].start, places[number].stop - 1
        lane = min(lane for lane, step in free_from.items() if step <= first_steps[number] + first)
        free_from[lane] = first_steps[number] + last + 1
        for place in places[number]:
            turn = Turn(number, place, lane, place == first, own[place], place == last)
            steps[first_steps[number] + place].append(turn)
    return [sorted(turns, key=lambda turn: turn.lane) for turns in steps]


Stepper = Callable[[Sequence[Turn], dict[int, Tensor]], None]
"""Samples the codes of a step; the dictionary has the hidden states `(B, D)` of the lanes that start in it."""


class ParallelWindows:
    """Samples the enlarged grids of B images step by step.

    Args:
        model: a super-resolution model whose keys can be cached (any `norm_scope` except "tensor").
        template: its layout.
        prompts: for each window the tokens before its target slot, one row per image.
        seeds: for each window one seed per image.
        grid: g.
        sampling: temperature and filters.
    """

    def __init__(
        self,
        model: Transformer,
        template: Template,
        prompts: Sequence[Sequence[Sequence[int]]],
        seeds: Sequence[Sequence[int]],
        *,
        grid: int,
        sampling: Sampling,
    ) -> None:
        self._prompts, self._sampling = prompts, sampling
        self._windows = windows(grid)
        self._timetable = timetable(grid)
        self._num_images = len(prompts[0])
        self._device = model.token_embedding.weight.device
        num_rows = self._num_images * (1 + max(turn.lane for step in self._timetable for turn in step))
        longest = max(len(prompt) for of_window in prompts for prompt in of_window)
        self._state = DecodeState(model, template, num_rows, longest + template.target.length, engine=sampling.engine)
        numbers = [uniforms(own, p, template.target.length) for own, p in zip(seeds, prompts, strict=True)]
        self._uniform_WBT = torch.stack(numbers).to(self._device)
        """Random numbers that decide each sample."""
        self.codes = torch.full((self._num_images, 2 * grid, 2 * grid), TO_SAMPLE, device=self._device)
        """Codes `(B, 2g, 2g)`, `TO_SAMPLE` where none is known."""

    @torch.inference_mode()
    def run(self, on_window: Callable[[], None] = lambda: None) -> Tensor:
        """All steps; returns the codes on the CPU. `on_window` is called when the steps of a window have been sent."""
        with current(self._device):
            step = self._stepper()
            for turns in self._timetable:
                SIGNALS.check()
                step(turns, {turn.lane: self._start(turn) for turn in turns if turn.starts})
                for turn in turns:
                    if turn.last:
                        on_window()
            return self.codes.cpu()  # waits for the steps, whose graph must live until then

    def _stepper(self) -> Stepper:
        return self._step

    def _start(self, turn: Turn) -> Tensor:
        """Read the prompt and all codes before the first own one in one pass; returns hidden states `(B, D)`."""
        known = self._codes_of(turn)[:, : turn.place].tolist()
        return self._state.rows(self._rows(turn, turn)).prefill(self._prompts[turn.window], known)

    def _step(self, turns: Sequence[Turn], hidden: dict[int, Tensor]) -> None:
        """A `Stepper` by single operations."""
        if reading := [turn for turn in turns if not turn.starts]:
            hidden |= self._read(reading)
        if sampling := [turn for turn in turns if turn.samples]:
            self._sample(sampling, torch.cat([hidden[turn.lane] for turn in sampling]))

    def _read(self, turns: Sequence[Turn]) -> dict[int, Tensor]:
        """Read the code before each turn's place in one pass; lanes between those of the turns idle.

        Returns hidden states `(B, D)` per lane.
        """
        lanes = range(turns[0].lane, turns[-1].lane + 1)
        by_lane = {turn.lane: turn for turn in turns}
        idle_B = torch.zeros(self._num_images, dtype=torch.long, device=self._device)
        codes_R = torch.cat(
            [self._codes_of(by_lane[lane])[:, by_lane[lane].place - 1] if lane in by_lane else idle_B for lane in lanes]
        )
        state = self._state.rows(self._rows(turns[0], turns[-1]))
        hidden_RD = state.step(codes_R[:, None])[:, -1]
        state.advance([int(lane in by_lane) for lane in lanes for _ in range(self._num_images)])
        hidden = zip(lanes, hidden_RD.split(self._num_images), strict=True)
        return {lane: hidden_BD for lane, hidden_BD in hidden if lane in by_lane}

    def _sample(self, turns: Sequence[Turn], hidden_RD: Tensor) -> None:
        uniform_R = torch.cat([self._uniform_WBT[turn.window, :, turn.place] for turn in turns])
        sampled_R = self._state.sample(hidden_RD, self._sampling, uniform_R)
        for turn, codes_B in zip(turns, sampled_R.split(self._num_images), strict=True):
            rows, columns = self._windows[turn.window].target
            y, x = divmod(turn.place, columns.stop - columns.start)
            self.codes[:, rows.start + y, columns.start + x] = codes_B  # the allowed ids are the codes, from 0 on

    def _codes_of(self, turn: Turn) -> Tensor:
        """Codes `(B, T)` of the window's region, in raster order."""
        return self.codes[(slice(None), *self._windows[turn.window].target)].flatten(1)

    def _rows(self, first: Turn, last: Turn) -> slice:
        """Rows of the cache from the first turn's lane to the last turn's lane."""
        return slice(first.lane * self._num_images, (last.lane + 1) * self._num_images)
