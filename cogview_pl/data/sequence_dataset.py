"""Token store + template → batches of training sequences.

Shapes: B batch, L length of the longest sequence in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cogview_pl.errors import UserError
from cogview_pl.vocab import CodeSlot, Sequence, Template, TextSlot
from cogview_pl.vocab.template import NO_SLOT


class SequenceBatch(NamedTuple):
    """Training sequences, padded at the end with `[PAD]`, weight 0 and slot -1; all of shape `(B, L)`."""

    tokens: Tensor
    """int64 ids of the joint vocabulary."""
    positions: Tensor
    """int64 position ids."""
    weights: Tensor
    """float32 loss weight of each token as a prediction target."""
    slots: Tensor
    """int64 index of the slot of the layout."""


class TokenisedSamples(Protocol):
    """What a split of the token store looks like."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Seq[int], Tensor]:
        """Text token ids without padding, and codes int64 `(y, x)`."""
        ...

    def key(self, index: int) -> str:
        """What names a sample in a message."""
        ...


class SequenceDataset(Dataset[Sequence]):
    """Tokenised samples laid out by a template.

    Args:
        samples: a split of the token store.
        template: a layout with one text slot and one slot for the codes.
        grid: `(y, x)` of the store's codes.

    Raises:
        UserError: the layout's slots do not match what the store holds.
    """

    def __init__(self, samples: TokenisedSamples, template: Template, grid: tuple[int, int]) -> None:
        self.samples = samples
        self.template = template
        self._text = [slot.name for slot in template.slots if isinstance(slot, TextSlot)]
        self._codes = [slot.name for slot in template.slots if isinstance(slot, CodeSlot)]
        for slot in template.slots:
            if isinstance(slot, CodeSlot) and slot.grid != tuple(grid):
                raise UserError(
                    f"template.layout: slot {slot.name} holds {slot.grid[0]}x{slot.grid[1]} codes, the token store "
                    f"has {grid[0]}x{grid[1]}; choose the model that matches the image tokenizer"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sequence:
        text_tokens, codes = self.samples[index]
        flat = codes.flatten().tolist()
        values = {name: text_tokens for name in self._text} | {name: flat for name in self._codes}
        return self.template.build(values)

    def key(self, index: int) -> str:
        """What names a sample in a message."""
        return self.samples.key(index)


class SequenceCollator:
    """Pads sequences to the longest of the batch; no sequences at all become one row of padding, which has no loss.

    (A process that has run out of samples still goes through a model whose weights are spread over all.)

    Args:
        pad: id of `[PAD]`.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, sequences: list[Sequence]) -> SequenceBatch:
        """Stack a list of sequences."""
        sequences = sequences or [Sequence([self.pad] * 2, weights=[0.0] * 2, slots=[NO_SLOT] * 2, positions=[0] * 2)]
        length = max(len(sequence.tokens) for sequence in sequences)
        return SequenceBatch(
            tokens=_stack([s.tokens for s in sequences], length, self.pad),
            positions=_stack([s.positions for s in sequences], length, 0),
            weights=_stack([s.weights for s in sequences], length, 0.0),
            slots=_stack([s.slots for s in sequences], length, NO_SLOT),
        )


def _stack(rows: Seq[Seq[float]], length: int, fill: float) -> Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
