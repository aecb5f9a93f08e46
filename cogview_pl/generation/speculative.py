"""Speculative Jacobi decoding (arXiv 2410.01699): several codes per pass of the model, from the same distribution.

Each pass runs over drafts of the next codes at once. A draft d that was sampled from q is accepted with probability
min(1, p(d) / q(d)), where p is the model's distribution after the codes before d. The first refused draft is replaced
by a sample from max(0, p - q), and the pass's distributions of the places after it give the next drafts. So every code
has the distribution p, as in decoding one code after the other, and each pass yields at least one code.

Shapes: B rows, W drafts, n ids of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.decode import stream
from cogview_pl.generation.engine.decode_state import DecodeState
from cogview_pl.generation.sampling import probabilities, sample
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import CodeSlot, Template


class _Drafts(NamedTuple):
    codes_BW: Tensor
    """int64."""
    from_BWn: Tensor
    """Probabilities that each draft was sampled from."""


class JacobiResult(NamedTuple):
    """Result of `decode_jacobi`."""

    rows: list[list[int]]
    """Per prompt the codes of the slot."""
    passes: int
    """Passes of the model over drafts; decoding one code after the other takes one pass per code, less one."""


@torch.inference_mode()
def decode_jacobi(
    model: Transformer,
    template: Template,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    unconditional: Sequence[Sequence[int]] | None = None,
    known: Sequence[Sequence[int]] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> JacobiResult:
    """Sample the codes of the target slot, one row per prompt.

    A row depends on its prompt, its seed and `sampling.drafts`. With temperature 0 it equals that of `decode`; else it
    is another sample from the same distribution.

    Args:
        model, template, prompts, seeds, unconditional: as in `decode`.
        sampling: temperature, filters and guidance; its `drafts` is W.
        known: per prompt the first codes of the slot, which are given, equally many and not all; None: all are sampled.
        on_step: called for every code that all rows have.

    Raises:
        UserError: `norm_scope="tensor"`.
        ValueError: the target slot is a text.
    """
    slot, num_drafts = template.target, sampling.drafts
    if not isinstance(slot, CodeSlot):
        raise ValueError(f"jacobi: slot {slot.name} is a text, whose length is not known; jacobi decodes codes")
    given = list(known or [[]] * len(prompts))
    length = slot.length - len(given[0])
    capacity = length + 2 * (num_drafts + 1)
    state, hidden_BD = DecodeState.after_prompts(
        model, template, prompts, unconditional, capacity, sampling, known=given
    )
    streams = [stream("jacobi", seed, list(prompt)) for seed, prompt in zip(seeds, prompts, strict=True)]
    device = model.token_embedding.weight.device

    def uniforms() -> Tensor:
        """Random numbers of one pass `(B, 3, W)`: to accept drafts, to sample new ones, to replace a refused one."""
        return torch.stack([torch.rand(3, num_drafts, generator=generator) for generator in streams]).to(device)

    first_Bn = probabilities(state.logits(hidden_BD), sampling)
    uniform_B3W = uniforms()
    last_B = sample(first_Bn, uniform_B3W[:, 0, 0])
    drafts = _new_drafts(first_Bn[:, None], torch.zeros_like(last_B), uniform_B3W[:, 1])
    rows = [[code] for code in last_B.tolist()]
    on_step()
    passes = 0
    while (shortest := min(map(len, rows))) < length:
        SIGNALS.check()
        logits_BLn = state.logits(state.step(torch.cat([last_B[:, None], drafts.codes_BW], 1)))
        target_BLn = probabilities(logits_BLn.flatten(0, 1), sampling).view(logits_BLn.shape)
        uniform_B3W = uniforms()
        accepted_B = _num_accepted(drafts, target_BLn, uniform_B3W[:, 0])
        last_B = _code_after(drafts, target_BLn, accepted_B, uniform_B3W[:, 2, 0])
        counts = [number + 1 for number in accepted_B.tolist()]
        for row, count, codes, last in zip(rows, counts, drafts.codes_BW.tolist(), last_B.tolist(), strict=True):
            row += [*codes[: count - 1], last]
        # A full row does not advance any more; its further samples are cut off below.
        state.advance([count if len(row) < length else 0 for row, count in zip(rows, counts, strict=True)])
        drafts = _new_drafts(target_BLn, accepted_B + 1, uniform_B3W[:, 1])
        passes += 1
        for _ in range(min(length, *map(len, rows)) - shortest):
            on_step()
    return JacobiResult([[*start, *row[:length]] for start, row in zip(given, rows, strict=True)], passes)


def _num_accepted(drafts: _Drafts, target_BLn: Tensor, uniform_BW: Tensor) -> Tensor:
    """Number of drafts of each row before the first refused one, int64 `(B,)`."""
    chosen_BW1 = drafts.codes_BW[..., None]
    wanted_BW = target_BLn[:, :-1].gather(-1, chosen_BW1)[..., 0]
    offered_BW = drafts.from_BWn.gather(-1, chosen_BW1)[..., 0]
    return (uniform_BW * offered_BW < wanted_BW).long().cumprod(-1).sum(-1)


def _code_after(drafts: _Drafts, target_BLn: Tensor, accepted_B: Tensor, uniform_B: Tensor) -> Tensor:
    """The code after the accepted drafts, int64 `(B,)`: it replaces the refused draft, or follows the last one."""
    rows_B = torch.arange(len(accepted_B), device=accepted_B.device)
    target_Bn = target_BLn[rows_B, accepted_B]
    num_drafts = drafts.codes_BW.shape[1]
    offered_Bn = drafts.from_BWn[rows_B, accepted_B.clamp(max=num_drafts - 1)]
    residual_Bn = (target_Bn - offered_Bn).clamp(min=0)
    # Where p and q are equal up to rounding, nothing is left; such a draft is almost never refused.
    refused_B1 = ((accepted_B < num_drafts) & (residual_Bn.sum(-1) > 0))[:, None]
    return sample(torch.where(refused_B1, residual_Bn, target_Bn), uniform_B)


def _new_drafts(target_BLn: Tensor, first_B: Tensor, uniform_BW: Tensor) -> _Drafts:
    """Drafts from the last pass's distributions of the places from `first` on; its last place serves for later ones."""
    width = uniform_BW.shape[1]
    places_BW = (first_B[:, None] + torch.arange(width, device=first_B.device)).clamp(max=target_BLn.shape[1] - 1)
    from_BWn = target_BLn.gather(1, places_BW[..., None].expand(-1, -1, target_BLn.shape[-1]))
    codes = sample(from_BWn.flatten(0, 1), uniform_BW.flatten())
    return _Drafts(codes.view(uniform_BW.shape), from_BWn)
