"""Token store + template → batches of training sequences.

Shapes: B batch, L length of the longest sequence in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cogview_pl.errors import UserError
from cogview_pl.vocab import CodeSlot, Sequence, Template, TextSlot
from cogview_pl.vocab.roles import CAPTION
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
    """int64 index of the slot in the layout."""


class TokenisedSamples(Protocol):
    """A split of a token store."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Mapping[str, Seq[int]], Tensor]:
        """Text token ids without padding by text field, and codes int64 `(y, x)`."""
        ...

    def others(self, index: int) -> Mapping[str, Tensor]:
        """Codes int64 `(y, x)` of the further images, by name."""
        ...

    def key(self, index: int) -> str:
        """The name of a sample in a message."""
        ...


def fields_of_slots(template: Template, text_fields: Seq[str]) -> dict[str, str]:
    """The text field of a token store that fills each text slot of a layout.

    A slot takes the field of its name. If there is one slot and one field, their names may differ.

    Raises:
        UserError: a slot has no field.
    """
    slots = [slot.name for slot in template.slots if isinstance(slot, TextSlot)]
    if len(slots) == len(text_fields) == 1:
        return {slots[0]: text_fields[0]}
    missing = next((slot for slot in slots if slot not in text_fields), None)
    if missing is not None:
        raise UserError(
            f"template.layout: the token store has no text for slot {missing}, only for {', '.join(text_fields)}; "
            "run task=tokenize with this template"
        )
    return {slot: slot for slot in slots}


def require_images(slots: Iterable[str], image_fields: Seq[str]) -> None:
    """Raises UserError for an image slot that no further image of a token store fills."""
    missing = next((slot for slot in slots if slot not in image_fields), None)
    if missing is not None:
        raise UserError(
            f"template.layout: the token store has no images for slot {missing}; run task=tokenize with this template, "
            "or set sequences.source=images without data.token_store"
        )


class SequenceDataset(Dataset[Sequence]):
    """Tokenised samples in the layout of a template.

    Args:
        samples: a split of the token store.
        template: a layout with text slots and one slot for the codes, or the target and slots of the same size, which
            take the further images of their names.
        grid: `(y, x)` of the store's codes.
        text_fields: names of the store's texts.
        image_fields: names of its further images.

    Raises:
        UserError: the slots of the layout do not match the store.
    """

    def __init__(
        self,
        samples: TokenisedSamples,
        template: Template,
        grid: tuple[int, int],
        text_fields: Seq[str] = (CAPTION,),
        image_fields: Seq[str] = (),
    ) -> None:
        self.samples = samples
        self.template = template
        self._fields = fields_of_slots(template, text_fields)
        grids = [slot.name for slot in template.slots if isinstance(slot, CodeSlot)]
        self._own = [template.target.name] if len(grids) > 1 else grids
        self._others = [name for name in grids if name not in self._own]
        require_images(self._others, image_fields)
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
        others = self.samples.others(index) if self._others else {}
        grids = {**dict.fromkeys(self._own, codes), **{name: others[name] for name in self._others}}
        flat = {name: grid.flatten().numpy() for name, grid in grids.items()}
        texts = {slot: text_tokens[field] for slot, field in self._fields.items()}
        return self.template.build({**texts, **flat})

    def key(self, index: int) -> str:
        """The name of a sample in a message."""
        return self.samples.key(index)


class SequenceCollator:
    """Pads sequences to the longest of the batch.

    An empty batch becomes one row of padding, which has no loss: where the weights are sharded over processes, a
    process without samples must run the model too.

    Args:
        pad: id of `[PAD]`.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, sequences: list[Sequence]) -> SequenceBatch:
        """Stack sequences."""
        sequences = sequences or [_padding(self.pad)]
        length = max(len(sequence.tokens) for sequence in sequences)
        return SequenceBatch(
            tokens=_stack([s.tokens for s in sequences], length, self.pad),
            positions=_stack([s.positions for s in sequences], length, 0),
            weights=_stack([s.weights for s in sequences], length, 0.0),
            slots=_stack([s.slots for s in sequences], length, NO_SLOT),
        )


def _padding(pad: int) -> Sequence:
    """A sequence of an input and its target, without a loss."""
    nothing = np.zeros(2, np.int64)
    return Sequence(nothing + pad, np.zeros(2, np.float32), nothing + NO_SLOT, nothing)


def _stack(rows: Seq[NDArray[Any]], length: int, fill: float) -> Tensor:
    stacked = np.full((len(rows), length), fill, rows[0].dtype)
    for place, row in zip(stacked, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(stacked)
