"""Speculative Jacobi decoding (arXiv 2410.01699): several codes per pass of the model, from the same distribution.

Each pass looks at drafts of the next codes at once. Draft d, which was drawn from q, is accepted with probability
min(1, p(d) / q(d)), where p is what the model says behind the codes before it; the first that is not is replaced by a
draw from max(0, p - q), and what the pass says about the places behind it gives the next drafts. So every code has the
distribution p, as if sampled one after the other, and each pass yields at least one.

Shapes: B rows, W drafts, n ids of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.decode import stream
from cogview_pl.generation.engine.decode_state import Rows
from cogview_pl.generation.sampling import Sampling, draw, probabilities
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import CodeSlot, Template


class _Drafts(NamedTuple):
    codes_BW: Tensor
    """int64."""
    from_BWn: Tensor
    """The probabilities that each was drawn from."""


class Filled(NamedTuple):
    """What `fill_jacobi` returns."""

    rows: list[list[int]]
    """Per prompt the codes of the slot."""
    passes: int
    """Passes of the model over drafts; one code after the other takes as many as the slot has codes, less one."""


@torch.inference_mode()
def fill_jacobi(
    model: Transformer,
    template: Template,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    unconditional: Sequence[Sequence[int]] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Filled:
    """Sample the codes of the target slot, one row per prompt.

    A row depends on its prompt, its seed and `sampling.drafts`. With temperature 0 it equals that of `fill`; else it is
    another draw from the same distribution.

    Args:
        model, template, prompts, seeds, unconditional: as in `fill`.
        sampling: temperature, filters and guidance; its `drafts` is W.
        on_step: called as often as the slowest row gets codes.

    Raises:
        UserError: `norm_scope="tensor"`.
        ValueError: the target slot is a text.
    """
    slot, num_drafts = template.target, sampling.drafts
    if not isinstance(slot, CodeSlot):
        raise ValueError(f"jacobi: slot {slot.name} is a text, which ends where it likes; it takes codes")
    rows = Rows(model, template, prompts, unconditional, slot.length + 2 * (num_drafts + 1), sampling)
    streams = [stream("jacobi", seed, list(prompt)) for seed, prompt in zip(seeds, prompts, strict=True)]
    device = model.token_embedding.weight.device

    def chances() -> Tensor:
        """For one pass, per row: to accept drafts, to draw new ones, to replace a refused one, `(B, 3, W)`."""
        return torch.stack([torch.rand(3, num_drafts, generator=generator) for generator in streams]).to(device)

    first_Bn = probabilities(rows.logits(), sampling)
    uniforms = chances()
    last_B = draw(first_Bn, uniforms[:, 0, 0])
    drafts = _redraw(first_Bn[:, None], torch.zeros_like(last_B), uniforms[:, 1])
    done = [[code] for code in last_B.tolist()]
    on_step()
    passes = 0
    while min(map(len, done)) < slot.length:
        SIGNALS.check()
        slowest = min(map(len, done))
        tokens_BL = torch.cat([last_B[:, None], drafts.codes_BW], 1)
        target_BLn = _each(rows.look(tokens_BL), sampling)
        uniforms = chances()
        accepted_B = _accepted(drafts, target_BLn, uniforms[:, 0])
        last_B = _behind(drafts, target_BLn, accepted_B, uniforms[:, 2, 0])
        counts = [number + 1 for number in accepted_B.tolist()]
        for row, count, codes, last in zip(done, counts, drafts.codes_BW.tolist(), last_B.tolist(), strict=True):
            row += [*codes[: count - 1], last]
        # A row that is full stays where it is, whatever it draws.
        rows.keep([count if len(row) < slot.length else 0 for row, count in zip(done, counts, strict=True)])
        drafts = _redraw(target_BLn, accepted_B + 1, uniforms[:, 1])
        passes += 1
        for _ in range(min(slot.length, *map(len, done)) - slowest):
            on_step()
    return Filled([row[: slot.length] for row in done], passes)


def _each(logits_BLn: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of all rows and places."""
    return probabilities(logits_BLn.flatten(0, 1), sampling).view(logits_BLn.shape)


def _accepted(drafts: _Drafts, target_BLn: Tensor, uniform_BW: Tensor) -> Tensor:
    """How many drafts of each row stand, int64 `(B,)`: those before the first that is refused."""
    chosen_BW1 = drafts.codes_BW[..., None]
    wanted_BW = target_BLn[:, :-1].gather(-1, chosen_BW1)[..., 0]
    offered_BW = drafts.from_BWn.gather(-1, chosen_BW1)[..., 0]
    return (uniform_BW * offered_BW < wanted_BW).long().cumprod(-1).sum(-1)


def _behind(drafts: _Drafts, target_BLn: Tensor, accepted_B: Tensor, uniform_B: Tensor) -> Tensor:
    """The code behind the accepted drafts, int64 `(B,)`: in place of the refused one, or behind the last."""
    rows_B = torch.arange(len(accepted_B), device=accepted_B.device)
    target_Bn = target_BLn[rows_B, accepted_B]
    num_drafts = drafts.codes_BW.shape[1]
    offered_Bn = drafts.from_BWn[rows_B, accepted_B.clamp(max=num_drafts - 1)]
    residual_Bn = (target_Bn - offered_Bn).clamp(min=0)
    # Nothing is left where both are equal but for rounding; such a draft is refused almost never.
    refused_B1 = ((accepted_B < num_drafts) & (residual_Bn.sum(-1) > 0))[:, None]
    return draw(torch.where(refused_B1, residual_Bn, target_Bn), uniform_B)


def _redraw(target_BLn: Tensor, first_B: Tensor, uniform_BW: Tensor) -> _Drafts:
    """Drafts from what the last pass said of their places, from place `first` on; behind its end from the last."""
    width = uniform_BW.shape[1]
    places_BW = (first_B[:, None] + torch.arange(width, device=first_B.device)).clamp(max=target_BLn.shape[1] - 1)
    from_BWn = target_BLn.gather(1, places_BW[..., None].expand(-1, -1, target_BLn.shape[-1]))
    codes = draw(from_BWn.flatten(0, 1), uniform_BW.flatten())
    return _Drafts(codes.view(uniform_BW.shape), from_BWn)
