"""Super-resolution windows side by side: every code is sampled as soon as the codes that it depends on are known.

In its window a code depends on what stands before it in raster order. Some of that belongs to other windows, so a
window can run beside another, a little behind it. The timetable follows from the windows alone: 2,080 steps instead
of 4,096 for a grid of 32x32 codes, with the same distribution of every code.

Shapes: B pictures, W windows, T codes of a window, g edge of the source grid, L tokens fed at once, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.generation.fill import OPEN, uniforms
from cogview_pl.generation.filters import Sampling, draw, probabilities
from cogview_pl.generation.reading import prefill
from cogview_pl.generation.windows import owners, windows
from cogview_pl.stopping import STOP
from cogview_pl.transformer import DecodingModel, KVCache, Transformer
from cogview_pl.vocab import Template


class Turn(NamedTuple):
    """A window that samples a code in a step."""

    window: int
    place: int
    """Index of the code in the window's region, in raster order."""
    lane: int
    """Rows of the cache that the window holds while it runs."""
    last: bool
    """Whether it is the window's last code; its lane is free then."""


@cache
def timetable(grid: int) -> list[list[Turn]]:
    """Which windows sample which code in each step, for a `grid` x `grid` picture; lanes in order.

    Raises:
        UserError: the grid is not a multiple of 4.
    """
    owner = owners(grid)
    places = [_places(window.target) for window in windows(grid)]
    own_left = [sum(int(owner[place]) == number for place in region) for number, region in enumerate(places)]
    known = torch.zeros_like(owner, dtype=torch.bool)
    reached = [0] * len(places)  # in each window, the first place that is not known
    lanes: dict[int, int] = {}
    steps: list[list[Turn]] = []
    while any(own_left):
        turns = []
        for number, region in enumerate(places):
            while own_left[number] and known[region[reached[number]]]:
                reached[number] += 1
            if own_left[number] and owner[region[reached[number]]] == number:
                if number not in lanes:
                    lanes[number] = min(set(range(len(places))) - set(lanes.values()))
                turns.append(Turn(number, reached[number], lanes[number], own_left[number] == 1))
        for turn in turns:
            known[places[turn.window][turn.place]] = True
            own_left[turn.window] -= 1
            if turn.last:
                del lanes[turn.window]
        steps.append(sorted(turns, key=lambda turn: turn.lane))
    return steps


@dataclass
class _Running:
    """A window that has been started in its lane, for all B pictures."""

    region: tuple[slice, slice]
    hidden_BD: Tensor
    """Of the last token that the model has read."""
    next_B: Tensor
    """Position ids of the next."""
    read: int
    """Codes of the region that the model has seen."""


class Wavefront:
    """Fills the enlarged grids of B pictures step by step.

    Args:
        model: a super-resolution model whose keys can be kept (any `norm_scope` but "tensor").
        template: its layout.
        prompts: for each window the tokens before its target slot, one row per picture.
        seeds: for each window one per picture.
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
        self._num_pictures = num_pictures = len(prompts[0])
        num_lanes = 1 + max(turn.lane for step in self._steps for turn in step)
        self._model = DecodingModel(model, num_lanes * num_pictures, template.allowed(template.target))
        # Behind a shorter row of a step stands the padding of a longer one: at most one row of a window.
        longest = max(len(prompt) for of_window in prompts for prompt in of_window)
        cache = model.new_cache(num_lanes * num_pictures, longest + template.target.length + grid)
        assert isinstance(cache, KVCache)
        self._cache = cache
        self._running: dict[int, _Running] = {}
        numbers = [uniforms(own, p, template.target.length) for own, p in zip(seeds, prompts, strict=True)]
        self._uniform_WBT = torch.stack(numbers).to(self._model.device)  # per window, what decides each draw
        self.codes = torch.full((num_pictures, 2 * grid, 2 * grid), OPEN, device=self._model.device)
        """Codes `(B, 2g, 2g)`, `OPEN` where there is none yet."""

    @torch.inference_mode()
    def run(self, on_window: Callable[[], None] = lambda: None) -> Tensor:
        """All steps; returns the codes. `on_window` is called when a window is done."""
        for step in self._steps:
            STOP.look()
            for turn in step:
                if turn.window not in self._running:
                    self._start(turn)
            behind = [turn for turn in step if self._running[turn.window].read < turn.place]
            if behind:
                self._read(behind)
            self._sample(step)
            for turn in step:
                if turn.last:
                    del self._running[turn.window]
                    on_window()
        return self.codes

    def _start(self, turn: Turn) -> None:
        """Prompts and all codes before the first own one, in one pass."""
        region = self._windows[turn.window].target
        known = self._codes_of(region)[:, : turn.place].tolist()
        lane = self._cache.rows(self._rows(turn, turn))
        lane.clear()
        hidden_BD, next_B = prefill(self._model, self._template, self._prompts[turn.window], lane, known)
        self._running[turn.window] = _Running(region, hidden_BD, next_B, turn.place)

    def _read(self, turns: Sequence[Turn]) -> None:
        """One pass in which each of these windows reads its codes up to its place; lanes between them idle along."""
        lanes = range(turns[0].lane, turns[-1].lane + 1)
        by_lane = {turn.lane: turn for turn in turns}
        new = {turn.lane: turn.place - self._running[turn.window].read for turn in turns}
        longest, device = max(new.values()), self._model.device
        idle_BL = torch.zeros(self._num_pictures, longest, dtype=torch.long, device=device)
        tokens, positions = [idle_BL] * len(lanes), [idle_BL] * len(lanes)
        for row, lane in enumerate(lanes):
            if lane not in by_lane:
                continue
            turn, window = by_lane[lane], self._running[by_lane[lane].window]
            codes_BL = self._codes_of(window.region)[:, window.read : turn.place]
            tokens[row] = F.pad(codes_BL, (0, longest - new[lane]))
            # Padding needs some position that exists.
            positions[row] = window.next_B[:, None] + torch.arange(longest, device=device).clamp(max=new[lane] - 1)
        cache = self._cache.rows(self._rows(turns[0], turns[-1]))
        hidden = self._model.hidden(torch.cat(tokens), torch.cat(positions), cache)
        cache.advance([new.get(lane, 0) for lane in lanes for _ in range(self._num_pictures)])
        for lane, hidden_BLD in zip(lanes, hidden.split(self._num_pictures), strict=True):
            if lane in by_lane:
                window = self._running[by_lane[lane].window]
                window.hidden_BD = hidden_BLD[:, new[lane] - 1]
                window.next_B = window.next_B + new[lane]
                window.read = by_lane[lane].place

    def _sample(self, step: Sequence[Turn]) -> None:
        running = [self._running[turn.window] for turn in step]
        logits = self._model.logits(torch.cat([window.hidden_BD for window in running]))
        uniform_R = torch.cat([self._uniform_WBT[turn.window, :, turn.place] for turn in step])
        drawn = draw(probabilities(logits, self._sampling), uniform_R).split(self._num_pictures)
        for window, turn, codes_B in zip(running, step, drawn, strict=True):
            rows, columns = window.region
            y, x = divmod(turn.place, columns.stop - columns.start)
            self.codes[:, rows.start + y, columns.start + x] = codes_B  # the allowed ids are the codes, from 0 on

    def _codes_of(self, region: tuple[slice, slice]) -> Tensor:
        """Codes `(B, T)` of a window's region, in raster order."""
        return self.codes[(slice(None), *region)].flatten(1)

    def _rows(self, first: Turn, last: Turn) -> slice:
        return slice(first.lane * self._num_pictures, (last.lane + 1) * self._num_pictures)


def _places(region: tuple[slice, slice]) -> list[tuple[int, int]]:
    rows, columns = region
    return [(y, x) for y in range(rows.start, rows.stop) for x in range(columns.start, columns.stop)]
