"""Fill the target slot of prompts, token by token, with a static KV cache.

Shapes: B rows, P longest prompt, T capacity of the target slot, D width, n allowed ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview_pl.generation.filters import Sampling, draw, probabilities
from cogview_pl.transformer import Cache, Transformer
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
        sampling: temperature and filters.
        known: tokens of the slot that are given, int64 `(B, T)` with `OPEN` where one is to be sampled; the same
            places are open in all rows, and filling ends after T. None: all of the slot is open.
        on_step: called after every sampled token, for progress bars.

    Returns:
        Per prompt the ids of the slot: all codes of a grid, or the text up to (without) the token that closes it.
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
    uniform_BT = torch.stack([_uniform(s, p, known.shape[1]) for s, p in zip(seeds, prompts, strict=True)]).to(device)

    cache = model.new_cache(len(prompts), max(map(len, prompts)) + known.shape[1])
    hidden_BD, positions_B = _prefill(model, template, prompts, cache)
    filled: list[Tensor] = []
    fed = 0  # tokens of the slot that the model has seen
    for step, to_sample in enumerate(is_open):
        if not to_sample:
            filled.append(known[:, step])
            continue
        if fed < step:  # what came since the last sampled place goes in as one chunk
            chunk_BL = torch.stack(filled[fed:step], 1)
            places_BL = positions_B[:, None] + torch.arange(fed, step, device=device)
            hidden_BD = model.hidden(chunk_BL, places_BL, cache)[:, -1]
            cache.advance(step - fed, extent=step - fed)
            fed = step
        columns_B = draw(probabilities(model.logits(hidden_BD, ranges), sampling), uniform_BT[:, step])
        filled.append(ids_n[columns_B])
        on_step()
        if end is not None and all(end in row for row in torch.stack(filled, 1).tolist()):
            break
    rows = torch.stack(filled, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _open_places(known: Tensor) -> list[bool]:
    """Per place of the slot, whether it is to be sampled; raises ValueError where rows differ in that."""
    open_BT = known == OPEN
    if bool((open_BT != open_BT[:1]).any()):
        raise ValueError("the same places must be open in all rows")
    return open_BT[0].tolist()


def _prefill(
    model: Transformer, template: Template, prompts: Sequence[Sequence[int]], cache: Cache
) -> tuple[Tensor, Tensor]:
    """Run all prompts in one pass; returns the hidden state at each prompt's end and the position that follows.

    Prompts are padded behind their end, where a causal model cannot look; the padding's keys are overwritten
    before any token could see them.
    """
    device = model.token_embedding.weight.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    positions = [template.prompt_positions(prompt) for prompt in prompts]

    def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], device=device)

    hidden_BPD = model.hidden(padded(prompts, template.vocabulary.pad), padded(positions, 0), cache)
    cache.advance(lengths_B, extent=longest)
    hidden_BD = hidden_BPD[torch.arange(len(prompts), device=device), lengths_B - 1]
    return hidden_BD, torch.tensor([row[-1] + 1 for row in positions], device=device)


def _uniform(seed: int, prompt: Sequence[int], count: int) -> Tensor:
    """`count` numbers in [0, 1) that follow from seed and prompt alone, the same on every device."""
    digest = hashlib.sha256(repr((seed, list(prompt))).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, generator=generator)
