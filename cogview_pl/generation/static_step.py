"""Sampling on a GPU by captured CUDA graphs: one step is recorded and replayed for every code that follows.

A step of a small batch is some hundred short kernels, and the GPU waits for the host to send them one by one. A graph
sends all of them at once. It replays the same kernels on the same memory, so a step must not depend on anything that
the host would have to know: the last token, the place in the slot and the lengths of the rows are tensors that the
step itself moves on, attention runs over a fixed number of cached positions behind a mask, and no tensor's shape
depends on what was sampled.

Attention over the whole cache would read mostly unused positions in the beginning, hence a graph for every
`_REACH` positions: no step reads more than that in vain.

Shapes: B rows, T codes of the slot, n allowed ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.generation.filters import Sampling, draw, probabilities
from cogview_pl.generation.reading import Rows
from cogview_pl.transformer import Transformer
from cogview_pl.vocab import CodeSlot, Template

_REACH = 256

Run = Callable[[Callable[[], None], int, Callable[[], None]], None]
"""Repeats a step so many times, and calls the last after each."""


def can_capture(model: Transformer, template: Template, sampling: Sampling) -> bool:
    """Whether the steps that fill the target slot can be replayed, and are to be.

    Not texts, which stop as soon as all rows are closed; not `norm_scope="tensor"`, whose memory grows; not under
    autocast, whose cached casts of the weights may be gone when a graph is replayed; not on several devices.
    """
    return (
        sampling.cuda_graphs
        and model.token_embedding.weight.device.type == "cuda"
        and isinstance(template.target, CodeSlot)
        and model.norm_scope != "tensor"
        and not model.spread
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
    run: Run | None = None,
    width: int = _REACH,
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
        run: how a step is repeated; by default `replayed` on a GPU and `one_by_one` elsewhere.
        width: cached positions by which attention grows.
    """
    run = run or (replayed if first_B.device.type == "cuda" else one_by_one)
    filled_BT = first_B[:, None].repeat(1, uniform_BT.shape[1])
    last_B1 = first_B[:, None].clone()
    place_1 = torch.ones(1, dtype=torch.long, device=first_B.device)

    def step(rows: Rows) -> None:
        rows.read(last_B1)
        uniform_B = uniform_BT.index_select(1, place_1)[:, 0]
        last_B1.copy_(ids_n[draw(probabilities(rows.logits(), sampling), uniform_B)][:, None])
        filled_BT.index_copy_(1, place_1, last_B1)
        place_1.add_(1)

    for span in spans(rows.longest, uniform_BT.shape[1] - 1, width):
        run(partial(step, rows.static(span.reach)), span.steps, on_step)
    return filled_BT.tolist()


def one_by_one(step: Callable[[], None], count: int, on_step: Callable[[], None]) -> None:
    """The same without a graph."""
    for _ in range(count):
        step()
        on_step()


def replayed(step: Callable[[], None], count: int, on_step: Callable[[], None]) -> None:
    """`count` times the step, by a graph; the first runs as it is, for libraries allocate and load kernels in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    on_step()
    if count == 1:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()  # recorded, not run
    for _ in range(count - 1):
        graph.replay()
        on_step()
    torch.cuda.current_stream().synchronize()  # before the graph and its memory go
