"""Decoding steps as CUDA graphs: a step on fixed memory is captured once and replayed for every further token.

A step of a small batch is some hundred short kernels, and a GPU would wait for the host to launch each of them. A
graph launches all of them at once. It replays the same kernels on the same memory, so a step must not depend on
numbers that the host knows: the last token, its place in the slot and the lengths of the rows are tensors that the
step itself updates, attention runs over a fixed number of cached positions with a mask, and no shape depends on the
sampled tokens.

Masked attention over the whole cache would mostly read unused positions at the beginning. So each graph serves `_REACH`
positions, and no step reads more unused positions than that.

Shapes: B rows, T tokens of the slot, n allowed ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cogview_pl.generation.config import Sampling
from cogview_pl.generation.engine.decode_state import DecodeState
from cogview_pl.generation.engine.fused_gpu import FusedModel
from cogview_pl.generation.sampling import sample_logits
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import CodeSlot, Template

_REACH = 256

Step = Callable[[], None]
"""A step on fixed memory: it takes its input from tensors and writes its result into tensors."""
Capture = Callable[[Step], Step]
"""Turns a step into one that does the same each time that it is called."""


def can_capture(model: Transformer, template: Template, sampling: Sampling) -> bool:
    """Whether the steps that decode the target slot are to be CUDA graphs.

    Excluded are texts, which stop as soon as all rows are closed; `norm_scope="tensor"`, whose cache grows; autocast,
    whose cached casts of the weights may be gone when a graph is replayed; and models on several devices.
    """
    return (
        sampling.cuda_graphs
        and model.token_embedding.weight.device.type == "cuda"
        and isinstance(template.target, CodeSlot)
        and model.norm_scope != NormScope.tensor
        and not model.sharded
        and not torch.is_autocast_enabled("cuda")
    )


def spans(longest: int, steps: int, width: int) -> Iterator[tuple[int, int]]:
    """Steps of one token each after a prompt of `longest` tokens: pairs of reach, a multiple of `width`, and steps.

    The reach is the number of cached positions that attention runs over.
    """
    end = longest + steps
    while longest < end:
        reach = min((longest // width + 1) * width, end)
        yield reach, reach - longest
        longest = reach


def graphed_steps(
    state: DecodeState,
    tokens_BT: Tensor,
    uniform_BT: Tensor,
    ids_n: Tensor,
    sampling: Sampling,
    *,
    capture: Capture | None = None,
    width: int | None = None,
) -> list[Step]:
    """T - 1 steps that, called in order, read each token of the slot and sample the next one into `tokens_BT`.

    The host launches them and does not wait; the graphs must be kept until the device has run them.

    Args:
        state: has read the prompts; nothing else may use it from the first step on.
        tokens_BT: int64; the first token of each row must be there when the first step is called.
        uniform_BT: random numbers in [0, 1) that decide each sample.
        ids_n: the allowed ids.
        sampling: temperature, filters and guidance.
        capture: None: `capture_on` the device.
        width: cached positions per graph. None: `_REACH`, or all with `FusedModel`, which attends up to row ends.
    """
    capture = capture or capture_on(tokens_BT.device)
    place_1 = torch.zeros(1, dtype=torch.long, device=tokens_BT.device)  # of the token that is read
    next_BT, next_uniform_BT = tokens_BT[:, 1:], uniform_BT[:, 1:]
    num_steps = next_BT.shape[1]
    if width is None:
        width = state.longest + num_steps if isinstance(state.model, FusedModel) else _REACH

    def step(state: DecodeState) -> None:
        hidden_BD = state.step(tokens_BT.index_select(1, place_1))[:, -1]
        state.advance(1)
        uniform_B = next_uniform_BT.index_select(1, place_1)[:, 0]
        columns_B = sample_logits(state.logits(hidden_BD), sampling, uniform_B)
        next_BT.index_copy_(1, place_1, ids_n[columns_B][:, None])
        place_1.add_(1)

    steps: list[Step] = []
    for reach, count in spans(state.longest, num_steps, width):
        steps += [capture(partial(step, state.static(reach)))] * count
    return steps


def capture_on(device: torch.device) -> Capture:
    """`CapturedStep` on a GPU; elsewhere a step is called as it is."""
    return CapturedStep if device.type == "cuda" else lambda step: step


class CapturedStep:
    """A step as a CUDA graph; the first call runs it by itself, since libraries allocate and load kernels there.

    The graph runs on memory of this object, which must be kept until the device has run the steps.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run the step once."""
        if self._graph is not None:
            self._graph.replay()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            self._step()  # captured, not run
