"""What the model has read of prompts and slots, with a static KV cache, and what it says comes next.

Shapes: B rows (the model's are twice as many with guidance), L new tokens, P longest prompt, D hidden size, n
allowed ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.engine.packed_cpu import DecodingModel
from cogview_pl.generation.sampling import Sampling, guide
from cogview_pl.transformer.block import Cache
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.kv_cache import KVCache, StaticKVCache
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template


def check_sampling(model: Transformer, sampling: Sampling) -> None:
    """Raises UserError for what a model with `norm_scope="tensor"` cannot do: rows of different lengths in a batch."""
    if model.norm_scope != NormScope.tensor:
        return
    if sampling.guided:
        raise UserError(
            f"sampler.guidance={sampling.guidance:g} pairs prompts of different lengths, which norm_scope=tensor "
            "(compat=official) cannot hold in one batch; set sampler.guidance=1, or leave out compat=official"
        )
    if sampling.algorithm == "jacobi":
        raise UserError(
            "sampler.algorithm=jacobi takes back keys of refused codes, and norm_scope=tensor (compat=official) keeps "
            "none; set sampler.algorithm=sequential, or leave out compat=official"
        )


def _prompts_to_run(
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[Sequence[int]] | None,
    sampling: Sampling,
) -> Sequence[Sequence[int]]:
    """The B prompts; with guidance the B without their condition behind them."""
    if not sampling.guided:
        return prompts
    if unconditional is None or len(unconditional) != len(prompts):
        raise ValueError("guidance needs one unconditional prompt for each prompt")
    return [*prompts, *unconditional]


class Rows:
    """What the model has read, prompts and tokens of the slot, and what it says comes next.

    Args:
        model: the sequence model.
        template: its layout.
        prompts: token ids before the target slot; lengths may differ.
        unconditional: for guidance each prompt without its condition; these rows read the same tokens.
        capacity: most tokens of the slot that will be read or looked at.
        sampling: for its guidance.

    Raises:
        UserError: see `check_sampling`.
    """

    def __init__(
        self,
        model: Transformer,
        template: Template,
        prompts: Sequence[Sequence[int]],
        unconditional: Sequence[Sequence[int]] | None,
        capacity: int,
        sampling: Sampling,
    ) -> None:
        check_sampling(model, sampling)
        every = _prompts_to_run(prompts, unconditional, sampling)
        self._model = DecodingModel(model, len(every), template.allowed(template.target))
        self._sampling = sampling
        self._last_position = model.num_positions - 1
        self.longest = max(map(len, every))
        """Tokens of the longest prompt."""
        self._cache = model.new_cache(len(every), self.longest + capacity)
        self._hidden_BD, self._next_B = prefill(self._model, template, every, self._cache)

    def read(self, tokens_BL: Tensor) -> None:
        """L more tokens of the slot."""
        self._hidden_BD = self._hidden(tokens_BL)[:, -1]
        self._count(tokens_BL.shape[1])

    def logits(self) -> Tensor:
        """Logits `(B, n)` of the next token over the ids that the slot allows."""
        return self._guided(self._model.logits(self._hidden_BD))

    def look(self, tokens_BL: Tensor) -> Tensor:
        """Logits `(B, L, n)` behind each of L possible next tokens; none of them counts as read."""
        return self._guided(self._model.logits(self._hidden(tokens_BL)))

    def keep(self, counts: Sequence[int]) -> None:
        """So many of the tokens last looked at are read, in each row."""
        self._count([*counts, *counts] if self._sampling.guided else counts)

    @property
    def attend_to_their_ends(self) -> bool:
        """Whether each row of `static` attends as far as it is filled; else all do over `reach` positions."""
        return self._model.by_kernels

    def static(self, reach: int) -> Rows:
        """These rows for reading one token at a time on fixed memory, while none is longer than `reach`.

        It shares the memory; from the first `read` on, only it and others made by this method may be used.
        """
        assert isinstance(self._cache, KVCache)
        rows = copy(self)
        rows._cache = StaticKVCache(self._cache, reach)
        return rows

    def _hidden(self, tokens_BL: Tensor) -> Tensor:
        if self._sampling.guided:
            tokens_BL = tokens_BL.repeat(2, 1)
        places_BL = self._next_B[:, None] + torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        # Tokens that are only looked at may lie behind the end of the sequence.
        return self._model.hidden(tokens_BL, places_BL.clamp(max=self._last_position), self._cache)

    def _count(self, new: Sequence[int] | int) -> None:
        self._cache.advance(new)
        self._next_B += new if isinstance(new, int) else torch.tensor(new, device=self._next_B.device)

    def _guided(self, logits: Tensor) -> Tensor:
        if not self._sampling.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self._sampling.guidance)


def prefill(
    model: DecodingModel,
    template: Template,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    known: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run all prompts in one pass; returns the hidden state at each row's end and the position that follows.

    Rows are padded behind their end, where a causal model cannot look; the padding's keys are overwritten before any
    token could see them. `known` continues each prompt with the first tokens of the slot.
    """
    rows, positions = [], []
    for prompt, more in zip(prompts, known or [[]] * len(prompts), strict=True):
        before = template.prompt_positions(prompt)
        rows.append([*prompt, *more])
        positions.append([*before, *range(before[-1] + 1, before[-1] + 1 + len(more))])
    lengths = [len(row) for row in rows]
    longest, device = max(lengths), model.device

    def padded(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in lists], device=device)

    hidden_BPD = model.hidden(padded(rows, template.vocabulary.pad), padded(positions, 0), cache)
    cache.advance(lengths)
    ends_B = torch.tensor(lengths, device=device) - 1
    hidden_BD = hidden_BPD[torch.arange(len(rows), device=device), ends_B]
    return hidden_BD, torch.tensor([row[-1] + 1 for row in positions], device=device)
