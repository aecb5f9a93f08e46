"""The decode loop: samples the target slot of prompts, token by token.

Shapes: B rows, T tokens of the target slot, n allowed ids, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.engine.cuda_graph import can_capture, graphed_steps
from cogview_pl.generation.engine.decode_state import DecodeState
from cogview_pl.kernels.availability import current
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, TextSlot

TO_SAMPLE = -1
"""Marks a token that is not known yet."""
SCORED = 16
"""Known codes whose logits are computed at once."""


@torch.inference_mode()
def decode(
    model: Transformer,
    template: Template,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    unconditional: Sequence[Sequence[int]] | None = None,
    known: Tensor | None = None,
    on_known: Callable[[Tensor], None] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Sample the tokens of the target slot, one row per prompt.

    A row depends on its prompt and its seed only, except for rounding: matrix products of another number of rows sum
    in another order. (With `norm_scope="tensor"` prompts must be equally long, and the maximum of LayerNorm runs over
    all of them.)

    Args:
        model: the sequence model.
        template: its layout.
        prompts: token ids before the target slot; lengths may differ.
        seeds: one seed per prompt.
        sampling: temperature, filters and guidance.
        unconditional: for guidance, each prompt without its condition; they make the batch 2B rows. Ignored without
            guidance.
        known: given tokens of the slot, int64 `(B, T)`, and `TO_SAMPLE` where one is to be sampled, at the same places
            in all rows; decoding ends after T. None: all tokens of the slot are sampled.
        on_known: called with log-likelihoods, float32 `(B, L)`, of the known codes that follow a sampled one, in order:
            those of the model, guided if sampling is, without temperature and filters. None: none are computed.
        on_step: called after every sampled token, for progress bars.

    Returns:
        Per prompt the ids of the slot: all codes of a grid, or the text without the token that closes it.

    Raises:
        UserError: guidance with `norm_scope="tensor"`.
        ValueError: rows differ in the places to sample, or an unconditional prompt is missing.
    """
    device, slot = model.token_embedding.weight.device, template.target
    if known is None:
        known = torch.full((len(prompts), slot.length), TO_SAMPLE)
    places = _places_to_sample(known)
    tokens_BT = known.to(device, copy=True)
    uniform_BT = uniforms(seeds, prompts, known.shape[1]).to(device)
    ids_n = torch.cat([torch.arange(span.start, span.stop, device=device) for span in template.allowed(slot)])
    end = template.end_of_text(slot) if isinstance(slot, TextSlot) else None
    length = known.shape[1]
    first, after = (places[0], places[-1] + 1) if places else (length, length)  # of the sampled tokens
    graphed = len(places) == length - first > 0 and can_capture(model, template, sampling)
    read = first  # tokens of the slot that the model has read; known ones at its start are part of the prompt
    with current(device):
        state, hidden_BD = DecodeState.after_prompts(
            model, template, prompts, unconditional, length - first, sampling, known=known[:, :first].tolist()
        )
        rest = tokens_BT[:, first:], uniform_BT[:, first:]
        graphs = graphed_steps(state, *rest, ids_n, sampling) if graphed else []
        for place in places:
            SIGNALS.check()
            if graphed and place > first:
                graphs[place - first - 1]()
            else:
                if read < place:  # known tokens are read together with the last sampled one
                    hidden_BLD = state.step(tokens_BT[:, read:place])
                    if on_known is not None:
                        _score(state, hidden_BLD[:, :-1], tokens_BT[:, read + 1 : place] - ids_n[0], on_known)
                    hidden_BD = hidden_BLD[:, -1]
                    state.advance(place - read)
                    read = place
                columns_B = state.sample(hidden_BD, sampling, uniform_BT[:, place])
                tokens_BT[:, place] = ids_n[columns_B]
            on_step()
            if end is not None and bool((tokens_BT[:, : place + 1] == end).any(1).all()):
                break
        if on_known is not None and after < length:  # the last known codes are read for their likelihood alone
            hidden_BLD = state.step(tokens_BT[:, after - 1 : -1])
            _score(state, hidden_BLD, tokens_BT[:, after:] - ids_n[0], on_known)
        rows = tokens_BT.tolist()  # waits for the graphs, which must live until then
    return [row[: row.index(end)] if end in row else row for row in rows]


def _score(state: DecodeState, hidden_RLD: Tensor, columns_BL: Tensor, on_known: Callable[[Tensor], None]) -> None:
    """Report the log-likelihoods of codes, given as columns of the logits, after hidden states."""
    parts = zip(hidden_RLD.split(SCORED, 1), columns_BL.split(SCORED, 1), strict=True)
    for hidden, columns in parts if columns_BL.shape[1] else ():
        logs = state.logits(hidden).float().log_softmax(-1)
        on_known(logs.gather(-1, columns[..., None])[..., 0])


def _places_to_sample(known_BT: Tensor) -> list[int]:
    """Indices of the tokens to sample; raises ValueError where rows differ in them."""
    missing_BT = known_BT == TO_SAMPLE
    if bool((missing_BT != missing_BT[:1]).any()):
        raise ValueError("the same tokens must be known in all rows")
    return [place for place, missing in enumerate(missing_BT[0].tolist()) if missing]


def uniforms(seeds: Sequence[int], prompts: Sequence[Sequence[int]], count: int) -> Tensor:
    """Random numbers in [0, 1), float32 `(B, count)` on the CPU; those of a row follow from its seed and prompt."""
    streams = [stream(seed, list(prompt)) for seed, prompt in zip(seeds, prompts, strict=True)]
    return torch.stack([torch.rand(count, generator=generator) for generator in streams])


def stream(*key: object) -> torch.Generator:
    """Random numbers that follow from the key (plain values) alone, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
