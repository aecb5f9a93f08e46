"""Fill the target slot of prompts, token by token, with a static KV cache.

Shapes: B rows (the model's are twice as many with guidance), P longest prompt, T capacity of the target slot, D width,
n allowed ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview_pl.errors import UserError
from cogview_pl.generation.filters import Sampling, draw, guide, probabilities
from cogview_pl.transformer import Cache, DecodingModel, Transformer
from cogview_pl.vocab import Template, TextSlot

OPEN = -1
"""Marks a token that is to be sampled."""


@torch.inference_mode()
def fill(
    model: Transformer,
    template: Template,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    unconditional: Sequence[Sequence[int]] | None = None,
    known: Tensor | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Sample the tokens of the target slot, one row per prompt.

    A row depends on its prompt and its seed only, not on the rows beside it. (Not so with `norm_scope="tensor"`:
    then prompts must be equally long, and the maximum of LayerNorm runs over all of them.)

    Args:
        model: the sequence model.
        template: its layout.
        prompts: token ids before the target slot; lengths may differ.
        seeds: one seed per prompt.
        sampling: temperature, filters and guidance.
        unconditional: for guidance, each prompt without its condition; they run beside the prompts, in a batch of
            2B rows. Without guidance they are not looked at.
        known: tokens of the slot that are given, int64 `(B, T)` with `OPEN` where one is to be sampled; the same
            places are open in all rows, and filling ends after T. None: all of the slot is open.
        on_step: called after every sampled token, for progress bars.

    Returns:
        Per prompt the ids of the slot: all codes of a grid, or the text up to (without) the token that closes it.

    Raises:
        UserError: guidance with `norm_scope="tensor"`.
    """
    device = model.token_embedding.weight.device
    slot = template.target
    if known is None:
        known = torch.full((len(prompts), slot.length), OPEN)
    known = known.to(device)
    is_open = _open_places(known)
    ranges = template.allowed(slot)
    ids_n = torch.cat([torch.arange(span.start, span.stop, device=device) for span in ranges])
    end = template.end_of_text(slot) if isinstance(slot, TextSlot) else None
    uniform_BT = torch.stack([uniform(s, p, known.shape[1]) for s, p in zip(seeds, prompts, strict=True)]).to(device)

    every = _prompts_to_run(model, prompts, unconditional, sampling)
    rows = _Rows(model, template, every, known.shape[1], ranges, sampling)
    filled: list[Tensor] = []
    read = 0  # tokens of the slot that the model has seen
    for step, to_sample in enumerate(is_open):
        if not to_sample:
            filled.append(known[:, step])
            continue
        if read < step:  # what came since the last sampled place goes in as one chunk
            rows.read(torch.stack(filled[read:step], 1))
            read = step
        columns_B = draw(probabilities(rows.logits(), sampling), uniform_BT[:, step])
        filled.append(ids_n[columns_B])
        on_step()
        if end is not None and all(end in row for row in torch.stack(filled, 1).tolist()):
            break
    slots = torch.stack(filled, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in slots]


def check_guidance(model: Transformer, sampling: Sampling) -> None:
    """Raises UserError for guidance of a model that cannot hold prompts of different lengths side by side."""
    if sampling.guided and model.norm_scope == "tensor":
        raise UserError(
            f"sampler.guidance={sampling.guidance:g} pairs prompts of different lengths, which norm_scope=tensor "
            "(compat=official) cannot hold in one batch; set sampler.guidance=1, or leave out compat=official"
        )


def _prompts_to_run(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[Sequence[int]] | None,
    sampling: Sampling,
) -> Sequence[Sequence[int]]:
    """The B prompts; with guidance the B without their condition behind them."""
    if not sampling.guided:
        return prompts
    check_guidance(model, sampling)
    if unconditional is None or len(unconditional) != len(prompts):
        raise ValueError("guidance needs one unconditional prompt for each prompt")
    return [*prompts, *unconditional]


class _Rows:
    """What the model has read, prompts and tokens of the slot, and what it says comes next.

    Args:
        model, template: as in `fill`.
        prompts: those of `_prompts_to_run`.
        capacity: most tokens of the slot that will be read.
        ids: id ranges of the tokens to choose from.
        sampling: guidance pairs the first half of the rows with the second, which reads the same tokens.
    """

    def __init__(
        self,
        model: Transformer,
        template: Template,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        ids: Sequence[range],
        sampling: Sampling,
    ) -> None:
        self._model = DecodingModel(model, len(prompts), ids)
        self._sampling = sampling
        self._cache = model.new_cache(len(prompts), max(map(len, prompts)) + capacity)
        self._hidden_BD, self._next_B = prefill(self._model, template, prompts, self._cache)

    def read(self, tokens_BL: Tensor) -> None:
        """L more tokens of the slot."""
        if self._sampling.guided:
            tokens_BL = tokens_BL.repeat(2, 1)
        length = tokens_BL.shape[1]
        places_BL = self._next_B[:, None] + torch.arange(length, device=tokens_BL.device)
        self._hidden_BD = self._model.hidden(tokens_BL, places_BL, self._cache)[:, -1]
        self._cache.advance(length)
        self._next_B = self._next_B + length

    def logits(self) -> Tensor:
        """Logits `(B, n)` of the next token."""
        logits = self._model.logits(self._hidden_BD)
        if not self._sampling.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self._sampling.guidance)


def _open_places(known: Tensor) -> list[bool]:
    """Per place of the slot, whether it is to be sampled; raises ValueError where rows differ in that."""
    open_BT = known == OPEN
    if bool((open_BT != open_BT[:1]).any()):
        raise ValueError("the same places must be open in all rows")
    return open_BT[0].tolist()


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


def uniform(seed: int, prompt: Sequence[int], count: int) -> Tensor:
    """`count` numbers in [0, 1) that follow from seed and prompt alone, the same on every device."""
    digest = hashlib.sha256(repr((seed, list(prompt))).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator)
