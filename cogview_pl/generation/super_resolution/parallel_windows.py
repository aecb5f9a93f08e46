"""Super-resolution windows side by side: every code is sampled as soon as the codes that it depends on are known.

In its window a code depends on what stands before it in raster order. Some of that belongs to other windows, so a
window can run beside another, a little behind it: in every step each running window reads one code, and samples the
next one where that is its own. The timetable follows from the windows alone: 2,080 steps instead of 4,096 for a grid
of 32x32 codes, with the same distribution of every code.

Shapes: B images, R rows of the lanes of a step, W windows, T codes of a window, g edge of the source grid, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.decode import OPEN, uniforms
from cogview_pl.generation.engine.decode_state import prefill
from cogview_pl.generation.engine.packed_cpu import DecodingModel
from cogview_pl.generation.sampling import Sampling, draw, probabilities
from cogview_pl.generation.super_resolution.windows import owners, windows
from cogview_pl.transformer.kv_cache import KVCache
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template


class Turn(NamedTuple):
    """What a window does in a step: it reads the code before a place, and samples the one there if it is its own."""

    window: int
    place: int
    """Index of the code in the window's region, in raster order."""
    lane: int
    """Rows of the cache that the window holds while it runs."""
    starts: bool
    """Whether the window begins: it reads its prompt and all codes before the place, which is its own."""
    samples: bool
    """Whether the code at the place is the window's own."""
    last: bool
    """Whether it is the window's last own code; its lane is free then."""


@cache
def timetable(grid: int) -> list[list[Turn]]:
    """What the windows of a `grid` x `grid` image do in each step; lanes in order.

    A window begins with its first own code, as soon as all codes before that are known. A step uses only codes that
    earlier steps have sampled.

    Raises:
        UserError: the grid is not a multiple of 4.
    """
    owner = owners(grid)
    places = [_places(window.target) for window in windows(grid)]
    own_left = [sum(int(owner[place]) == number for place in region) for number, region in enumerate(places)]
    known = torch.zeros_like(owner, dtype=torch.bool)
    next_place = [0] * len(places)
    lanes: dict[int, int] = {}
    steps: list[list[Turn]] = []
    while any(own_left):
        turns = []
        for number, region in enumerate(places):
            if not own_left[number]:
                continue
            starts = number not in lanes
            while starts and known[region[next_place[number]]]:
                next_place[number] += 1
            place = next_place[number]
            own = int(owner[region[place]]) == number
            if not (own if starts else known[region[place - 1]]):
                continue
            if starts:
                lanes[number] = min(set(range(len(places))) - set(lanes.values()))
            turns.append(Turn(number, place, lanes[number], starts, own, own and own_left[number] == 1))
        for turn in turns:
            next_place[turn.window] += 1
            if turn.samples:
                known[places[turn.window][turn.place]] = True
                own_left[turn.window] -= 1
            if turn.last:
                del lanes[turn.window]
        steps.append(sorted(turns, key=lambda turn: turn.lane))
    return steps


class Wavefront:
    """Fills the enlarged grids of B images step by step.

    Args:
        model: a super-resolution model whose keys can be kept (any `norm_scope` but "tensor").
        template: its layout.
        prompts: for each window the tokens before its target slot, one row per image.
        seeds: for each window one per image.
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
        self._template, self._prompts, self._sampling = template, prompts, sampling
        self._windows = windows(grid)
        self._steps = timetable(grid)
        self._num_images = num_images = len(prompts[0])
        num_lanes = 1 + max(turn.lane for step in self._steps for turn in step)
        self._model = DecodingModel(model, num_lanes * num_images, template.allowed(template.target))
        longest = max(len(prompt) for of_window in prompts for prompt in of_window)
        cache = model.new_cache(num_lanes * num_images, longest + template.target.length)
        assert isinstance(cache, KVCache)
        self._cache = cache
        self._next_R = torch.zeros(num_lanes * num_images, dtype=torch.long, device=self._model.device)
        """Position ids of what is read next."""
        numbers = [uniforms(own, p, template.target.length) for own, p in zip(seeds, prompts, strict=True)]
        self._uniform_WBT = torch.stack(numbers).to(self._model.device)  # per window, what decides each draw
        self.codes = torch.full((num_images, 2 * grid, 2 * grid), OPEN, device=self._model.device)
        """Codes `(B, 2g, 2g)`, `OPEN` where there is none yet."""

    @torch.inference_mode()
    def run(self, on_window: Callable[[], None] = lambda: None) -> Tensor:
        """All steps; returns the codes. `on_window` is called when a window is done."""
        for step in self._steps:
            SIGNALS.check()
            hidden = {turn.lane: self._start(turn) for turn in step if turn.starts}
            if reading := [turn for turn in step if not turn.starts]:
                hidden |= self._read(reading)
            if sampling := [turn for turn in step if turn.samples]:
                self._sample(sampling, torch.cat([hidden[turn.lane] for turn in sampling]))
            for turn in step:
                if turn.last:
                    on_window()
        return self.codes

    def _start(self, turn: Turn) -> Tensor:
        """Prompts and all codes before the first own one, in one pass; returns hidden states `(B, D)` behind them."""
        known = self._codes_of(turn)[:, : turn.place].tolist()
        rows = self._rows(turn, turn)
        lane = self._cache.rows(rows)
        lane.clear()
        hidden_BD, self._next_R[rows] = prefill(self._model, self._template, self._prompts[turn.window], lane, known)
        return hidden_BD

    def _read(self, turns: Sequence[Turn]) -> dict[int, Tensor]:
        """The code before each turn's place, in one pass in which lanes between them idle along.

        Returns hidden states `(B, D)` per lane.
        """
        lanes = range(turns[0].lane, turns[-1].lane + 1)
        by_lane = {turn.lane: turn for turn in turns}
        idle_B = torch.zeros(self._num_images, dtype=torch.long, device=self._model.device)
        codes_R = torch.cat(
            [self._codes_of(by_lane[lane])[:, by_lane[lane].place - 1] if lane in by_lane else idle_B for lane in lanes]
        )
        rows = self._rows(turns[0], turns[-1])
        cache, next_R = self._cache.rows(rows), self._next_R[rows]
        hidden_RD = self._model.hidden(codes_R[:, None], next_R[:, None], cache)[:, -1]
        new = [int(lane in by_lane) for lane in lanes for _ in range(self._num_images)]
        cache.advance(new)
        next_R += torch.tensor(new, device=self._model.device)
        hidden = zip(lanes, hidden_RD.split(self._num_images), strict=True)
        return {lane: hidden_BD for lane, hidden_BD in hidden if lane in by_lane}

    def _sample(self, turns: Sequence[Turn], hidden_RD: Tensor) -> None:
        logits = self._model.logits(hidden_RD)
        uniform_R = torch.cat([self._uniform_WBT[turn.window, :, turn.place] for turn in turns])
        drawn = draw(probabilities(logits, self._sampling), uniform_R).split(self._num_images)
        for turn, codes_B in zip(turns, drawn, strict=True):
            rows, columns = self._windows[turn.window].target
            y, x = divmod(turn.place, columns.stop - columns.start)
            self.codes[:, rows.start + y, columns.start + x] = codes_B  # the allowed ids are the codes, from 0 on

    def _codes_of(self, turn: Turn) -> Tensor:
        """Codes `(B, T)` of the window's region, in raster order."""
        return self.codes[(slice(None), *self._windows[turn.window].target)].flatten(1)

    def _rows(self, first: Turn, last: Turn) -> slice:
        return slice(first.lane * self._num_images, (last.lane + 1) * self._num_images)


def _places(region: tuple[slice, slice]) -> list[tuple[int, int]]:
    rows, columns = region
    return [(y, x) for y in range(rows.start, rows.stop) for x in range(columns.start, columns.stop)]
