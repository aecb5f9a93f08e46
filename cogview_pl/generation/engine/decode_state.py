"""Decoding state: KV cache and position ids of B rows, and the form of the model that decodes fastest.

Shapes: B rows of the batch (R = 2B rows of the model with guidance, else R = B), L new tokens, P longest prompt, D
hidden size, n allowed ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Algorithm, Engine, Sampling
from cogview_pl.generation.engine.compiled_cpu import CompiledModel
from cogview_pl.generation.engine.forms import decoding_form
from cogview_pl.generation.engine.threads import torch_threads
from cogview_pl.generation.sampling import guide, sample_logits
from cogview_pl.transformer.block import Cache
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.kv_cache import KVCache, StaticKVCache
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template


def check_sampling(model: Transformer, sampling: Sampling) -> None:
    """Raises UserError for guidance or jacobi with `norm_scope="tensor"`, where rows must be equally long."""
    if model.norm_scope != NormScope.tensor:
        return
    if sampling.guided:
        raise UserError(
            f"sampler.guidance={sampling.guidance:g} pairs prompts of different lengths, which norm_scope=tensor "
            "(compat=official) cannot hold in one batch; set sampler.guidance=1, or leave out compat=official"
        )
    if sampling.algorithm == Algorithm.jacobi:
        raise UserError(
            "sampler.algorithm=jacobi takes back keys of refused codes, and norm_scope=tensor (compat=official) keeps "
            "none; set sampler.algorithm=sequential, or leave out compat=official"
        )


class DecodeState:
    """KV cache and position ids of R rows, with the model that extends them.

    `prefill` reads prompts, `step` runs the model over L more tokens, and `advance` counts them as read. Tokens that
    are not counted are overwritten by the next step, which is how drafts are refused.

    Args:
        model: the sequence model.
        template: its layout.
        rows: R.
        capacity: most positions of a row.
        guidance: factor of classifier-free guidance; unless it is 1, the second half of the rows is unconditional and
            reads the same tokens as the first.
        engine: what decodes on a CPU.
    """

    def __init__(
        self,
        model: Transformer,
        template: Template,
        rows: int,
        capacity: int,
        *,
        guidance: float = 1.0,
        engine: Engine = Engine.auto,
    ) -> None:
        self._template, self._guidance = template, guidance
        self._ids = template.allowed(template.target)
        self.model = decoding_form(model, rows, self._ids, engine)
        self._last_position = model.num_positions - 1
        self.cache: Cache = model.new_cache(rows, capacity)
        self.next_R = torch.zeros(rows, dtype=torch.long, device=model.token_embedding.weight.device)
        """Position id of each row's next token, int64 `(R,)`."""
        self.longest = 0
        """Tokens of the longest prompt."""

    @classmethod
    def after_prompts(
        cls,
        model: Transformer,
        template: Template,
        prompts: Sequence[Sequence[int]],
        unconditional: Sequence[Sequence[int]] | None,
        capacity: int,
        sampling: Sampling,
        *,
        known: Sequence[Sequence[int]] | None = None,
    ) -> tuple[DecodeState, Tensor]:
        """State of B prompts, with room for `capacity` more tokens, and the last hidden states `(R, D)`.

        `known` continues each prompt, and each unconditional one, with the first tokens of the slot.

        Raises:
            UserError: see `check_sampling` and `engine_of`.
            ValueError: guidance lacks an unconditional prompt for a prompt.
        """
        check_sampling(model, sampling)
        every, starts = list(prompts), list(known or [[]] * len(prompts))
        if sampling.guided:
            if unconditional is None or len(unconditional) != len(prompts):
                raise ValueError("guidance needs one unconditional prompt for each prompt")
            every += unconditional
            starts *= 2
        state = cls(
            model,
            template,
            len(every),
            max(map(len, every)) + max(map(len, starts)) + capacity,
            guidance=sampling.guidance,
            engine=sampling.engine,
        )
        return state, state.prefill(every, starts)

    def prefill(self, prompts: Sequence[Sequence[int]], known: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Read one prompt per row from its start in one pass; returns hidden states `(R, D)` at the end of each row.

        Shorter rows are padded at their end, which a causal model cannot see; later tokens overwrite the padding's
        keys. `known` continues each prompt with the first tokens of the slot.
        """
        assert not isinstance(self.cache, StaticKVCache)
        if isinstance(self.cache, KVCache):
            self.cache.clear()
        rows, positions = [], []
        for prompt, more in zip(prompts, known or [[]] * len(prompts), strict=True):
            before = self._template.prompt_positions(prompt)
            rows.append([*prompt, *more])
            positions.append([*before, *range(before[-1] + 1, before[-1] + 1 + len(more))])
        lengths = [len(row) for row in rows]
        self.longest, device = max(lengths), self.next_R.device

        def padded(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
            return torch.tensor([[*row, *[filler] * (self.longest - len(row))] for row in lists], device=device)

        pad = self._template.vocabulary.pad
        hidden_RPD = self.model.hidden(padded(rows, pad), padded(positions, 0), self.cache)
        self.cache.advance(lengths)
        self.next_R.copy_(torch.tensor([row[-1] + 1 for row in positions]))
        ends_R = torch.tensor(lengths, device=device) - 1
        return hidden_RPD[torch.arange(len(rows), device=device), ends_R]

    def step(self, tokens_BL: Tensor) -> Tensor:
        """Hidden states `(R, L, D)` of the next L tokens of every row."""
        if self._guidance != 1:
            tokens_BL = tokens_BL.repeat(2, 1)
        places_RL, length = self.next_R[:, None], tokens_BL.shape[1]
        if length > 1:  # drafts may pass the end of the sequence
            places_RL = places_RL + torch.arange(length, device=tokens_BL.device)
            places_RL = places_RL.clamp(max=self._last_position)
        return self.model.hidden(tokens_BL, places_RL, self.cache)

    def advance(self, counts: Sequence[int] | Tensor | int) -> None:
        """Count tokens of the last step as read: one number for all rows, or one for each of the B rows.

        A tensor, int64 `(R,)`, is for `static` states.
        """
        if isinstance(counts, Sequence) and self._guidance != 1:
            counts = [*counts, *counts]
        self.cache.advance(counts)  # type: ignore[arg-type]
        self.next_R += torch.tensor(counts, device=self.next_R.device) if isinstance(counts, Sequence) else counts

    def logits(self, hidden: Tensor) -> Tensor:
        """Guided logits `(B, …, n)` of hidden states `(R, …, D)` over the ids that the slot allows."""
        logits = self.model.logits(hidden, self._ids)
        if self._guidance == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self._guidance)

    def sample(self, hidden: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
        """Sampled index among the allowed ids, int64 `(B,)`, of hidden states `(R, D)`; see `sample_logits`."""
        with torch_threads(self.model.threads if isinstance(self.model, CompiledModel) else None):
            return sample_logits(self.logits(hidden), sampling, uniform_B)

    def rows(self, part: slice) -> DecodeState:
        """Some of the rows as a state of their own on the same memory."""
        assert isinstance(self.cache, KVCache)
        view = copy(self)
        view.cache, view.next_R = self.cache.rows(part), self.next_R[part]
        return view

    def static(self, reach: int | None = None) -> DecodeState:
        """These rows for steps of one token on fixed memory, while no row is longer than `reach` (None: the capacity).

        The memory is shared; from the first step on only static states of these rows may be used.
        """
        assert isinstance(self.cache, KVCache)
        view = copy(self)
        view.cache = StaticKVCache(self.cache, reach or self.cache.capacity)
        return view
