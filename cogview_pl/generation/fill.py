"""Fill the target slot of prompts, token by token, with a static KV cache.

Shapes: B rows, P longest prompt, T capacity of the target slot, D width, n allowed ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview_pl.generation.filters import Sampling, draw, probabilities
from cogview_pl.transformer import KVCache, Transformer
from cogview_pl.vocab import Template, TextSlot


@torch.inference_mode()
def fill(
    model: Transformer,
    template: Template,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Sample the tokens of the target slot, one row per prompt.

    A row depends on its prompt and its seed only, not on the rows beside it.

    Args:
        model: the sequence model.
        template: its layout.
        prompts: token ids before the target slot; lengths may differ.
        seeds: one seed per prompt.
        sampling: temperature and filters.
        on_step: called after every token, for progress bars.

    Returns:
        Per prompt the ids of the slot: all codes of a grid, or the text up to (without) the token that closes it.
    """
    device = model.token_embedding.weight.device
    slot = template.target
    ranges = template.allowed(slot)
    ids_n = torch.cat([torch.arange(span.start, span.stop, device=device) for span in ranges])
    end = template.end_of_text(slot) if isinstance(slot, TextSlot) else None
    uniform_BT = torch.stack([_uniform(s, p, slot.length) for s, p in zip(seeds, prompts, strict=True)]).to(device)

    cache = model.new_cache(len(prompts), max(map(len, prompts)) + slot.length)
    hidden_BD, positions_B = _prefill(model, template, prompts, cache)
    drawn: list[Tensor] = []
    for step in range(slot.length):
        if step:
            hidden_BD = model.hidden(drawn[-1][:, None], positions_B[:, None], cache)[:, -1]
            cache.advance(1, extent=1)
            positions_B = positions_B + 1
        columns_B = draw(probabilities(model.logits(hidden_BD, ranges), sampling), uniform_BT[:, step])
        drawn.append(ids_n[columns_B])
        on_step()
        if end is not None and all(end in row for row in torch.stack(drawn, 1).tolist()):
            break
    rows = torch.stack(drawn, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _prefill(
    model: Transformer, template: Template, prompts: Sequence[Sequence[int]], cache: KVCache
) -> tuple[Tensor, Tensor]:
    """Run all prompts in one pass; returns the hidden state at each prompt's end and the position that follows.

    Prompts are padded behind their end, where a causal model cannot look; the padding's keys are overwritten
    before any token could see them.
    """
    device = model.token_embedding.weight.device
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = max(map(len, prompts))
    positions = [template.positions(prompt) for prompt in prompts]

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
