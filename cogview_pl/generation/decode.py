"""Fill the target slot of prompts, token by token, with a static KV cache.

Shapes: B rows, T capacity of the target slot, n allowed ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.engine.cuda_graph import can_capture, follow
from cogview_pl.generation.engine.decode_state import Rows
from cogview_pl.generation.sampling import Sampling, draw, probabilities
from cogview_pl.transformer.model import Transformer
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

    A row depends on its prompt and its seed only, not on the rows beside it, but for rounding: products of another
    number of rows are summed in another order. (With `norm_scope="tensor"` prompts must be equally long, and the
    maximum of LayerNorm runs over all of them.)

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
    by_graphs = all(is_open) and can_capture(model, template, sampling)
    ranges = template.allowed(slot)
    ids_n = torch.cat([torch.arange(span.start, span.stop, device=device) for span in ranges])
    end = template.end_of_text(slot) if isinstance(slot, TextSlot) else None
    uniform_BT = uniforms(seeds, prompts, known.shape[1]).to(device)

    rows = Rows(model, template, prompts, unconditional, known.shape[1], sampling)
    filled: list[Tensor] = []
    read = 0  # tokens of the slot that the model has seen
    for step, to_sample in enumerate(is_open):
        SIGNALS.check()
        if not to_sample:
            filled.append(known[:, step])
            continue
        if read < step:  # what came since the last sampled place goes in as one chunk
            rows.read(torch.stack(filled[read:step], 1))
            read = step
        columns_B = draw(probabilities(rows.logits(), sampling), uniform_BT[:, step])
        filled.append(ids_n[columns_B])
        on_step()
        if by_graphs:  # what follows the first code is the same step again and again
            return follow(rows, filled[0], ids_n=ids_n, uniform_BT=uniform_BT, sampling=sampling, on_step=on_step)
        if end is not None and all(end in row for row in torch.stack(filled, 1).tolist()):
            break
    slots = torch.stack(filled, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in slots]


def _open_places(known: Tensor) -> list[bool]:
    """Per place of the slot, whether it is to be sampled; raises ValueError where rows differ in that."""
    open_BT = known == OPEN
    if bool((open_BT != open_BT[:1]).any()):
        raise ValueError("the same places must be open in all rows")
    return open_BT[0].tolist()


def uniforms(seeds: Sequence[int], prompts: Sequence[Sequence[int]], count: int) -> Tensor:
    """Numbers in [0, 1), `(B, count)` on the CPU; those of a row follow from its seed and prompt alone."""
    streams = [stream(seed, list(prompt)) for seed, prompt in zip(seeds, prompts, strict=True)]
    return torch.stack([torch.rand(count, generator=generator) for generator in streams])


def stream(*key: object) -> torch.Generator:
    """Random numbers that follow from the key (plain values) alone, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
