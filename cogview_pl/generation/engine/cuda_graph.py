"""Sampling on a GPU by captured CUDA graphs: one step is recorded and replayed for every code that follows.

A step of a small batch is some hundred short kernels, and the GPU waits for the host to send them one by one. A graph
sends all of them at once. It replays the same kernels on the same memory, so a step must not depend on anything that
the host would have to know: the last token, the place in the slot and the lengths of the rows are tensors that the
step itself moves on, attention runs over a fixed number of cached positions behind a mask, and no tensor's shape
depends on what was sampled.

Where attention runs over the whole cache behind a mask it would read mostly unused positions in the beginning, hence a
graph for every `_REACH` positions: no step reads more than that in vain.

Shapes: B rows, T codes of the slot, n allowed ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.engine.decode_state import Rows
from cogview_pl.generation.sampling import Sampling, draw, probabilities
from cogview_pl.kernels.availability import current
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import CodeSlot, Template

_REACH = 256

Repeat = Callable[[int, Callable[[], None]], None]
"""Runs a step so many times, and calls the function after each."""
Repeater = Callable[[Callable[[], None]], Repeat]
"""How a step is repeated."""


def can_capture(model: Transformer, template: Template, sampling: Sampling) -> bool:
    """Whether the steps that fill the target slot can be replayed, and are to be.

    Not texts, which stop as soon as all rows are closed; not `norm_scope="tensor"`, whose memory grows; not under
    autocast, whose cached casts of the weights may be gone when a graph is replayed; not on several devices.
    """
    return (
        sampling.cuda_graphs
        and model.token_embedding.weight.device.type == "cuda"
        and isinstance(template.target, CodeSlot)
        and model.norm_scope != NormScope.tensor
        and not model.sharded
        and not torch.is_autocast_enabled("cuda")
    )


class Span(NamedTuple):
    """Steps whose attention runs over equally many cached positions."""

    reach: int
    """Positions."""
    steps: int


def spans(longest: int, steps: int, width: int) -> Iterator[Span]:
    """The steps that read one token each behind a prompt of `longest`, by how far they reach: multiples of `width`."""
    end = longest + steps
    while longest < end:
        reach = min((longest // width + 1) * width, end)
        yield Span(reach, reach - longest)
        longest = reach


def follow(
    rows: Rows,
    first_B: Tensor,
    *,
    ids_n: Tensor,
    uniform_BT: Tensor,
    sampling: Sampling,
    on_step: Callable[[], None] = lambda: None,
    repeater: Repeater | None = None,
    width: int | None = None,
) -> list[list[int]]:
    """All T codes of each row, of which the first is given; the same as sampling them one by one.

    On a GPU the host waits for it only when the last code has been drawn; `on_step` is called as steps are sent. On a
    CPU the same steps run as they are, which is slower than what `fill` does there.

    Args:
        rows: have read the prompts, and are not used any more afterwards.
        first_B: int64 ids of the first code.
        ids_n: the allowed ids.
        uniform_BT: the numbers in [0, 1) that decide each draw.
        sampling: temperature, filters and guidance.
        on_step: called for every code but the first.
        repeater: by default `by_graph` on a GPU and `one_by_one` elsewhere.
        width: cached positions by which attention grows; None: what the rows do well with.
    """
    repeater = repeater or default_repeater(first_B.device)
    filled_BT = first_B[:, None].repeat(1, uniform_BT.shape[1])
    last_B1 = first_B[:, None].clone()
    place_1 = torch.ones(1, dtype=torch.long, device=first_B.device)

    def step(rows: Rows) -> None:
        rows.read(last_B1)
        uniform_B = uniform_BT.index_select(1, place_1)[:, 0]
        last_B1.copy_(ids_n[draw(probabilities(rows.logits(), sampling), uniform_B)][:, None])
        filled_BT.index_copy_(1, place_1, last_B1)
        place_1.add_(1)

    steps = uniform_BT.shape[1] - 1
    if width is None:
        width = rows.longest + steps if rows.attend_to_their_ends else _REACH
    with current(first_B.device):
        parts = [(span, repeater(partial(step, rows.static(span.reach)))) for span in spans(rows.longest, steps, width)]
        for span, repeat in parts:
            repeat(span.steps, on_step)
        return filled_BT.tolist()  # waits for the steps, whose graphs go here


def default_repeater(device: torch.device) -> Repeater:
    """`by_graph` on a GPU, `one_by_one` elsewhere."""
    return by_graph if device.type == "cuda" else one_by_one


def one_by_one(step: Callable[[], None]) -> Repeat:
    """The step as it is."""

    def repeat(count: int, on_step: Callable[[], None]) -> None:
        for _ in range(count):
            SIGNALS.check()
            step()
            on_step()

    return repeat


def by_graph(step: Callable[[], None]) -> Repeat:
    """The step by a graph, but for the first time, in which libraries allocate and load kernels.

    It must be kept until the device has run the steps; they run on its memory.
    """
    stream = torch.cuda.Stream()
    graph: torch.cuda.CUDAGraph | None = None

    def repeat(count: int, on_step: Callable[[], None]) -> None:
        nonlocal graph
        for _ in range(count):
            SIGNALS.check()
            if graph is not None:
                graph.replay()
            else:
                graph = _run_and_record(step, stream)
            on_step()

    return repeat


def _run_and_record(step: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()  # recorded, not run
    return graph
