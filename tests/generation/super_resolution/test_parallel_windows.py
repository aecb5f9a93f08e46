"""Windows in parallel give the codes of windows one after the other, in half the steps."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from inspect import unwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS, Stopped
from cogview_pl.generation.config import Engine, Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode
from cogview_pl.generation.engine.cuda_graph import Capture, Step
from cogview_pl.generation.super_resolution.parallel_windows import timetable
from cogview_pl.generation.super_resolution.parallel_windows_graph import GraphedParallelWindows
from cogview_pl.generation.super_resolution.upscale import magnify
from cogview_pl.generation.super_resolution.windows import owners, windows
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary

from ..recorder import recorded
from ..small_model import small_model

CODES, TEXT_TOKENS = 40, 30
TEXTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]  # of different lengths


def make(grid: int) -> tuple[Transformer, Template]:
    vocabulary = Vocabulary(CODES, TEXT_TOKENS)
    template = Template(
        f"[ROI1] {{text}} [BASE] [BOI1] {{small:{grid // 2}x{grid // 2}}} [EOI1] [ROI2] [POS0] [BASE] [BOI2] "
        f"{{large:{grid}x{grid}}} [EOI2]",
        target="large",
        loss={"large": 1.0},
        vocabulary=vocabulary,
        text_length=6,
        restart_positions_at="[ROI2]",
    )
    return small_model(template, init_std=0.3), template


def in_order(
    model: Transformer, template: Template, texts: Sequence[Sequence[int]], codes: Tensor, sampling: Sampling
) -> Tensor:
    """Window after window, as the paper describes it."""
    grid = codes.shape[1]
    result = torch.full((len(codes), 2 * grid, 2 * grid), TO_SAMPLE)
    for number, window in enumerate(windows(grid)):
        sources = codes[(slice(None), *window.source)].flatten(1).tolist()
        region = (slice(None), *window.target)
        filled = decode(
            model,
            template,
            [template.prompt({"text": t, "small": s}) for t, s in zip(texts, sources, strict=True)],
            seeds=[9 * row + number for row in range(len(codes))],
            sampling=sampling,
            known=result[region].flatten(1),
        )
        result[region] = torch.tensor(filled).view(result[region].shape)
    return result


@pytest.mark.parametrize("grid", [4, 8, 12])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=10)], ids=["greedy", "sampled"])
def test_same_codes_as_in_order(grid: int, sampling: Sampling) -> None:
    model, template = make(grid)
    codes = torch.randint(CODES, (len(TEXTS), grid, grid), generator=torch.Generator().manual_seed(1))
    found = magnify(model, template, TEXTS, codes, seeds=range(len(TEXTS)), sampling=sampling)
    assert torch.equal(found, in_order(model, template, TEXTS, codes, sampling))
    assert len(found.unique()) > 5  # not the same code everywhere


def as_it_is(step: Step) -> Step:
    return step


@pytest.mark.parametrize("capture", [as_it_is, recorded], ids=["as_it_is", "recorded"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=10)], ids=["greedy", "sampled"])
def test_same_codes_by_steps_on_fixed_memory(
    capture: Capture, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where the steps are CUDA graphs.
    model, template = make(8)
    codes = torch.randint(CODES, (len(TEXTS), 8, 8), generator=torch.Generator().manual_seed(1))
    by_torch = replace(sampling, engine=Engine.torch)  # a GPU has no other
    arguments: dict[str, Any] = {"seeds": range(len(TEXTS)), "sampling": by_torch}
    plainly = magnify(model, template, TEXTS, codes, **arguments)
    monkeypatch.setattr("cogview_pl.generation.super_resolution.upscale.can_capture", lambda *_: True)
    monkeypatch.setattr("cogview_pl.generation.super_resolution.parallel_windows_graph.capture_on", lambda _: capture)
    with torch.no_grad():  # in inference mode the recorder would see composite operations
        monkeypatch.setattr(GraphedParallelWindows, "run", unwrap(GraphedParallelWindows.run))
        assert torch.equal(magnify(model, template, TEXTS, codes, **arguments), plainly)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_graphs_give_the_codes_of_single_operations() -> None:
    model, template = make(8)
    model.to("cuda")
    codes = torch.randint(CODES, (len(TEXTS), 8, 8), generator=torch.Generator().manual_seed(1))
    by_graphs, plainly = (
        magnify(model, template, TEXTS, codes, seeds=range(3), sampling=Sampling(top_k=10, cuda_graphs=graphs))
        for graphs in (True, False)
    )
    assert torch.equal(by_graphs, plainly)


def test_stops_between_two_steps_on_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, template = make(4)
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    done: list[int] = []

    def on_window() -> None:
        done.append(1)
        monkeypatch.setattr(SIGNALS, "received", signal.SIGTERM)

    with pytest.raises(Stopped):
        magnify(model, template, TEXTS[:1], codes, seeds=[0], sampling=Sampling(), on_window=on_window)
    assert len(done) == 1


def test_every_window_is_reported() -> None:
    model, template = make(4)
    codes = torch.zeros(2, 4, 4, dtype=torch.int64)
    done: list[int] = []
    magnify(model, template, TEXTS[:2], codes, seeds=[0, 1], sampling=Sampling(), on_window=lambda: done.append(1))
    assert len(done) == 9


class TestTimetable:
    @pytest.mark.parametrize("grid", [4, 8, 32])
    def test_code_y_x_is_sampled_in_step_grid_times_y_plus_x(self, grid: int) -> None:
        """Each row begins `grid` steps, half a row, after the row above it: no window waits without need."""
        found = windows(grid)
        sampled_in = torch.full((2 * grid, 2 * grid), -1)
        for number, step in enumerate(timetable(grid)):
            for turn in step:
                if turn.samples:
                    rows, columns = found[turn.window].target
                    sampled_in[rows.start + turn.place // grid, columns.start + turn.place % grid] = number
        assert torch.equal(sampled_in, grid * torch.arange(2 * grid)[:, None] + torch.arange(2 * grid))

    @pytest.mark.parametrize("grid", [4, 8, 32])
    def test_three_lanes_are_enough(self, grid: int) -> None:
        steps = timetable(grid)
        assert {turn.lane for step in steps for turn in step} == {0, 1, 2}
        assert [[turn.lane for turn in step] for step in steps] == [
            sorted(turn.lane for turn in step) for step in steps
        ]
        last = [turn.window for step in steps for turn in step if turn.last]
        assert last == [0, 1, 2, 4, 3, 5, 6, 7, 8]

    def test_critical_path_of_the_released_size(self) -> None:
        steps = timetable(32)
        assert len(steps) == 2080
        assert max(sum(turn.samples for turn in step) for step in steps) == 2
        assert max(map(len, steps)) == 3

    @pytest.mark.parametrize("grid", [4, 8, 32])
    def test_every_code_once_and_after_all_before_it_in_its_window(self, grid: int) -> None:
        owner, found = owners(grid), windows(grid)
        sampled_in = torch.full((2 * grid, 2 * grid), -1)
        for number, step in enumerate(timetable(grid)):
            assert len({turn.lane for turn in step}) == len(step)
            for turn in step:
                region = sampled_in[found[turn.window].target]
                before = region.flatten()[: turn.place]
                assert (before >= 0).all() and (before < number).all()
                own = owner[found[turn.window].target].flatten()[turn.place] == turn.window
                assert own == turn.samples
                if own:
                    row, column = divmod(turn.place, region.shape[1])
                    assert region[row, column] == -1
                    region[row, column] = number
        assert (sampled_in >= 0).all()

    @pytest.mark.parametrize("grid", [4, 8, 32])
    def test_a_window_holds_its_lane_and_reads_code_after_code_from_its_start_on(self, grid: int) -> None:
        running: dict[int, tuple[int, int]] = {}
        for step in timetable(grid):
            for turn in step:
                assert turn.starts == (turn.window not in running)
                if not turn.starts:
                    assert running[turn.window] == (turn.lane, turn.place - 1)
                running[turn.window] = (turn.lane, turn.place)
            lanes = [lane for lane, _ in running.values()]
            assert len(set(lanes)) == len(lanes)
            for turn in step:
                if turn.last:
                    del running[turn.window]
        assert not running
