"""What sequence models allocate while they write, token by token, and while they score.

Shapes: B rows, P prompt, S cached positions, n ids that a token is drawn from.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cogview_pl.generation.config import Algorithm, Sampling
from cogview_pl.generation.sampling import probabilities, sample
from cogview_pl.memory.model import Model
from cogview_pl.memory.sequence_step import ACTIVATIONS, LOGITS
from cogview_pl.memory.trace import LiveBytes
from cogview_pl.vocab import Template, TextSlot


@dataclass(frozen=True)
class Decoding:
    """A batch of prompts whose slot is filled.

    Attributes:
        model: what writes.
        rows: B, with guidance twice the images.
        prompt: P, the longest.
        positions: S, what the cache has room for.
        ids: n.
        on_gpu: the cache is in the precision of the weights there, on a CPU in fp32.
        drafts: codes looked at ahead in each pass; 0 for one code per pass.
        sampling: temperature and filters.
    """

    model: Model
    rows: int
    prompt: int
    positions: int
    ids: int
    on_gpu: bool
    drafts: int
    sampling: Sampling

    @classmethod
    def of(
        cls,
        model: Model,
        template: Template,
        rows: int,
        on_gpu: bool,
        sampling: Sampling,
        text_tokens: int | None = None,
    ) -> Decoding:
        """The target slot of a layout behind a prompt with texts of `text_tokens` (None: as long as their slots).

        Guidance doubles the rows.
        """
        texts = {
            slot.name: slot.length if text_tokens is None else min(text_tokens, slot.length) for slot in template.slots
        }
        lengths = {
            slot.name: texts[slot.name] if isinstance(slot, TextSlot) else slot.length for slot in template.slots
        }
        prompt = len(template.prompt({name: [0] * length for name, length in lengths.items()}))
        drafts = sampling.drafts if sampling.algorithm == Algorithm.jacobi else 0
        looked_at = 2 * (drafts + 1) if drafts else 0
        return cls(
            model=model,
            rows=rows * (2 if sampling.guided else 1),
            prompt=prompt,
            positions=prompt + template.target.length + looked_at,
            ids=sum(map(len, template.allowed(template.target))),
            on_gpu=on_gpu,
            drafts=drafts,
            sampling=sampling,
        )

    @property
    def cache_bytes(self) -> int:
        """A key and a value per layer, row and position; with `norm_scope=tensor` the input of every layer."""
        numbers = self.model.layers * self.model.hidden_size * self.positions * self.rows
        if dict(self.model.settings)["norm_scope"] == "tensor":
            return numbers * self.model.weights.itemsize
        size = self.model.weights.itemsize if self.on_gpu else torch.float32.itemsize
        return 2 * numbers * size // self.model.parts


def decoding_height(work: Decoding) -> Counter[str]:
    """Bytes on top of weights and cache at the height of reading the prompts or drawing a code."""
    return _decoding_height(work).copy()


@cache
def _decoding_height(work: Decoding) -> Counter[str]:
    return max(_prompts(work), _draw(work), key=lambda found: sum(found.values()))


def scoring_height(captioner: Model, *, rows: int, tokens: int, scored: int, ids: int) -> Counter[str]:
    """Bytes on top of the weights while a captioner scores `rows` pairs of `tokens`, `scored` of them among `ids`."""
    with FakeTensorMode(), torch.inference_mode():
        model = captioner.build(1).eval()
        with LiveBytes(ACTIVATIONS) as live:
            hidden = model.hidden(torch.zeros(rows, tokens, dtype=torch.long))
            with live.label(LOGITS):
                due = hidden.flatten(0, 1)[torch.zeros(rows * scored, dtype=torch.long)]
                model.logits(due, [range(ids)]).float().log_softmax(-1)
            return live.peak


def _prompts(work: Decoding) -> Counter[str]:
    with FakeTensorMode(), torch.inference_mode():
        model = work.model.build(1).eval()  # without gradients no block keeps anything
        with LiveBytes(ACTIVATIONS) as live:
            model.hidden(torch.zeros(work.rows, work.prompt, dtype=torch.long))
            return live.peak


def _draw(work: Decoding) -> Counter[str]:
    """Logits of all rows and drafts, filtered and drawn from."""
    looked_at = work.drafts + 1
    with FakeTensorMode(), torch.inference_mode(), LiveBytes(LOGITS) as live:
        logits = torch.zeros(work.rows * looked_at, work.ids, dtype=work.model.weights)
        first = probabilities(logits, work.sampling)
        if not work.drafts:
            _draw_one(first)
            return live.peak
        others = first + logits  # noqa: F841 - what drafts were drawn from, while the next are
        del logits
        _draw_one(first)
        return live.peak


def _draw_one(first: Tensor) -> None:
    sample(first, torch.zeros(len(first)))
