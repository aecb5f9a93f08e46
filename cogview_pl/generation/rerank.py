"""Caption loss: how well a text fits an image, by the likelihood that a captioner gives it (paper §3.3).

Shapes: B pairs, L length, n ids that a text position may hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.generation.decode import decode
from cogview_pl.generation.engine.forms import keep_forms
from cogview_pl.generation.engine.fused_gpu import fused_model
from cogview_pl.generation.quantization import quantize
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, TextSlot, caption_slots
from cogview_pl.vocab.template import Ids


class Captioner:
    """Writes captions of images, and scores how well texts fit them.

    Args:
        loaded: a model whose layout writes text about an image.
        device, dtype: device and precision of the weights.
        quantization: see `quantize`.

    Raises:
        UserError: another layout, or a quantization that is not available.
    """

    def __init__(
        self, loaded: SequenceModel, device: str, dtype: torch.dtype, quantization: Quantization | None = None
    ) -> None:
        self._image = caption_slots(loaded.template)[1]
        self.template, self.text = loaded.template, loaded.text
        self.model = loaded.model.to(device, dtype)
        quantize(self.model, quantization)
        keep_forms(self.model)

    def losses(
        self,
        texts: Sequence[str],
        codes: Tensor,
        batch_size: int,
        on_pairs: Callable[[int], None] = lambda count: None,
    ) -> list[float]:
        """Caption loss of each pair of a text and codes `(B, y, x)`, in nats per text token.

        `on_pairs` is called with the number of pairs of each batch, for progress bars.

        Raises:
            UserError: a text is longer than the model's text slot.
        """
        text_tokens = self.tokenise(texts)
        found: list[float] = []
        for start in range(0, len(text_tokens), batch_size):
            SIGNALS.check()
            part = slice(start, start + batch_size)
            found += caption_losses(self.model, self.template, text_tokens[part], codes[part]).tolist()
            on_pairs(len(text_tokens[part]))
        return found

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids; raises UserError where a text is longer than the model's text slot."""
        text_tokens = [self.text.encode(text) for text in texts]
        _require_lengths(self.template, text_tokens)
        return text_tokens

    def captions(self, codes: Tensor, *, seeds: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """A caption for each image of `codes` `(B, y, x)`, in order."""
        first = self.template.vocabulary.text_tokens.start
        for start in range(0, len(codes), sampling.batch_size):
            part = slice(start, start + sampling.batch_size)
            prompts = [self.template.prompt({self._image: flat}) for flat in codes[part].flatten(1).tolist()]
            rows = decode(self.model, self.template, prompts, seeds=seeds[part], sampling=sampling)
            yield from (self.text.decode([token - first for token in row]) for row in rows)


@torch.inference_mode()
def caption_log_likelihoods(
    model: Transformer, template: Template, texts: Sequence[Sequence[int]], codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the log-likelihoods of each text given its image, float32, and number of tokens summed, both `(B,)`.

    The softmax runs over all ids except the image codes, as in the original: text tokens, command tokens and padding.
    The token that closes the text counts, where the layout has one.

    Args:
        model: a captioner.
        template: its layout: a grid, then the text.
        texts: text token ids.
        codes: int64 `(B, y, x)`.

    Raises:
        UserError: the layout does not write text about an image, or a text is longer than its slot.
    """
    text, image = caption_slots(template)
    assert isinstance(template.target, TextSlot)
    _require_lengths(template, texts)
    values = [{text: t, image: c} for t, c in zip(texts, codes.flatten(1).cpu().numpy(), strict=True)]
    starts = [len(template.prompt(value)) for value in values]
    closing = template.end_of_text(template.target) is not None
    device = model.token_embedding.weight.device
    rows = [template.build(value) for value in values]
    tokens = _padded([row.tokens for row in rows], template.vocabulary.pad).to(device)
    positions = _padded([row.positions for row in rows], 0).to(device)
    scored = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (start, text_tokens) in enumerate(zip(starts, texts, strict=True)):
        scored[row, start : start + len(text_tokens) + closing] = True
    scored = scored[:, 1:].to(device)  # per input position, whether its prediction counts
    form = fused_model(model) or model
    hidden = form.hidden(tokens[:, :-1], positions[:, :-1])
    ids = template.predicted(template.target)
    log_probabilities = form.logits(hidden[scored], [ids]).float().log_softmax(-1)
    targets = tokens[:, 1:][scored] - ids.start
    found = log_probabilities.gather(1, targets[:, None])[:, 0]
    sums = torch.zeros(len(texts), device=device).index_add_(0, scored.nonzero()[:, 0], found)
    return sums.cpu(), scored.sum(1).cpu()


def caption_losses(model: Transformer, template: Template, texts: Sequence[Sequence[int]], codes: Tensor) -> Tensor:
    """Caption loss `(B,)`: mean negative log-likelihood per text token in nats; arguments as above."""
    sums, counts = caption_log_likelihoods(model, template, texts, codes)
    return -sums / counts.clamp(min=1)


def _require_lengths(template: Template, texts: Sequence[Sequence[int]]) -> None:
    slot = template.target
    assert isinstance(slot, TextSlot)
    longest = max(map(len, texts), default=0)
    if longest > slot.length:
        raise UserError(f"rerank: a text has {longest} tokens, the model's {slot.name} slot holds {slot.length}")


def _padded(rows: Sequence[Ids], filler: int) -> Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=filler)
