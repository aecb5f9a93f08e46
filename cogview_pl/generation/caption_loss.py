"""Caption loss: how well a text fits a image, in the eyes of a captioner (paper §3.3, self-reranking).

Shapes: B pairs, L length, n ids that a text position may hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogview_pl.errors import UserError
from cogview_pl.generation.engine.fused_gpu import fused_model
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, TextSlot, caption_slots


@torch.inference_mode()
def caption_log_likelihoods(
    model: Transformer, template: Template, texts: Sequence[Sequence[int]], codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the log-likelihoods of each text given its image, and the number of tokens summed, both `(B,)`.

    The softmax runs over all ids but the image codes, as in the original: text tokens, command tokens and padding.
    The token that closes the text counts, where the layout has one.

    Args:
        model: a captioner.
        template: its layout: a grid, then the text.
        texts: text token ids.
        codes: int64 `(B, y, x)`.

    Raises:
        UserError: the layout does not write text about a image, or a text is longer than its slot.
    """
    text, image = caption_slots(template)
    assert isinstance(template.target, TextSlot)
    for text_tokens in texts:
        if len(text_tokens) > template.target.length:
            raise UserError(
                f"rerank: a text has {len(text_tokens)} tokens, the model's {text} slot holds {template.target.length}"
            )
    values = [{text: t, image: c} for t, c in zip(texts, codes.flatten(1).tolist(), strict=True)]
    starts = [len(template.prompt(value)) for value in values]
    closing = template.end_of_text(template.target) is not None
    device = model.token_embedding.weight.device
    rows = [template.build(value) for value in values]
    tokens = _padded([row.tokens for row in rows], template.vocabulary.pad).to(device)
    positions = _padded([row.positions for row in rows], 0).to(device)
    due = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (start, text_tokens) in enumerate(zip(starts, texts, strict=True)):
        due[row, start : start + len(text_tokens) + closing] = True
    due = due[:, 1:].to(device)  # of each input, whether what it predicts is scored
    reader = fused_model(model) or model
    hidden = reader.hidden(tokens[:, :-1], positions[:, :-1])
    words = template.predicted(template.target)
    log_probabilities = reader.logits(hidden[due], [words]).float().log_softmax(-1)
    targets = tokens[:, 1:][due] - words.start
    scored = log_probabilities.gather(1, targets[:, None])[:, 0]
    sums = torch.zeros(len(texts), device=device).index_add_(0, due.nonzero()[:, 0], scored)
    return sums.cpu(), due.sum(1).cpu()


def caption_losses(model: Transformer, template: Template, texts: Sequence[Sequence[int]], codes: Tensor) -> Tensor:
    """Caption loss `(B,)`: mean negative log-likelihood per text token (nats); arguments as above."""
    sums, counts = caption_log_likelihoods(model, template, texts, codes)
    return -sums / counts.clamp(min=1)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)
