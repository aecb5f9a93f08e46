"""Templates: one layout string, from which everything that depends on the order of a sequence follows.

    "[ROI1] {text} [BASE] [BOI1] {image:32x32} [EOI1]"

A word in brackets is a command token, `{name}` a text slot (variable length), `{name:YxX}` a slot for a grid of codes
in raster order. Training sequences, prompts, loss weights, position ids and the ids that may be sampled all follow from
this layout, so training and generation always agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogview_pl.errors import UserError
from cogview_pl.vocab.vocabulary import COMMANDS, Vocabulary

_ELEMENT = re.compile(r"(?P<command>\[[A-Z]+[0-9]*\])|\{(?P<name>[a-z_]+)(?::(?P<y>[1-9]\d*)x(?P<x>[1-9]\d*))?\}")

NO_SLOT = -1
"""Slot index of tokens that belong to no slot: command tokens and padding."""


@dataclass(frozen=True)
class TextSlot:
    """A place for at most `length` text tokens."""

    name: str
    length: int


@dataclass(frozen=True)
class CodeSlot:
    """A place for a grid of codes in raster order."""

    name: str
    grid: tuple[int, int]

    @property
    def length(self) -> int:
        """Number of codes."""
        return self.grid[0] * self.grid[1]


Slot = TextSlot | CodeSlot
Ids: TypeAlias = NDArray[np.int64]
"""Ids in order, `(L,)`."""


class Sequence(NamedTuple):
    """One training sequence of L tokens; the arrays have the shape `(L,)`."""

    tokens: Ids
    """Ids of the joint vocabulary, int64."""
    weights: NDArray[np.float32]
    """Loss weight of each token as a prediction target, float32."""
    slots: Ids
    """Index into `Template.slots` of the slot that the token belongs to, or `NO_SLOT`, int64."""
    positions: Ids
    """Position ids, int64."""


class Template:
    """A parsed layout, bound to a vocabulary.

    The loss weight of a slot applies to the predictions *of* its tokens. The command token after a text slot closes the
    slot and belongs to it: the model learns from it where the text ends. Other command tokens follow from the layout
    and carry no loss.

    Args:
        layout: command tokens and slots, separated by spaces.
        target: name of the slot that generation fills; all tokens before it are the prompt.
        loss: weight by slot name; a slot without a weight carries no loss.
        vocabulary: the ids.
        text_length: capacity of text slots in text tokens.
        restart_positions_at: command token at which position ids start from 0 again, or None.
        restart_after_token: a quirk of the original when it samples: the restart token keeps its absolute position,
            and the next token has position 1. (In training the restart token has position 0.)
        loss_by_input: a quirk of the original: the weight of a prediction follows from its input token. So the first
            code counts as text, the token after the last code as image, and command tokens carry loss.

    Raises:
        UserError: the layout cannot be parsed, `target` or `loss` name a slot that it lacks, or `loss_by_input` is set
            and it has several text slots.
    """

    def __init__(
        self,
        layout: str,
        *,
        target: str,
        loss: Mapping[str, float],
        vocabulary: Vocabulary,
        text_length: int,
        restart_positions_at: str | None = None,
        restart_after_token: bool = False,
        loss_by_input: bool = False,
    ) -> None:
        self.layout = layout
        self.vocabulary = vocabulary
        self.elements = _parse(layout, text_length)
        self.slots = _slots(self.elements)
        self.target = self.slot(target, key="template.target")
        if self.elements[0] == self.target:
            raise UserError(f"template.layout: nothing stands before the target {target}; begin with a command token")
        self.weights = [float(loss.get(slot.name, 0.0)) for slot in self.slots]
        for name in loss:
            self.slot(name, key="template.loss")
        if restart_positions_at is not None and restart_positions_at not in self.elements:
            raise UserError(f"template.restart_positions_at={restart_positions_at} is not in template.layout")
        self._restart = None if restart_positions_at is None else vocabulary.command(restart_positions_at)
        self._restart_after_token = restart_after_token
        self._loss_by_input = loss_by_input
        if loss_by_input and sum(isinstance(slot, TextSlot) for slot in self.slots) > 1:
            raise UserError("compat.loss_by_input=true: this layout has several text slots; set it to false")
        self._commands = [vocabulary.command(part) if isinstance(part, str) else None for part in self.elements]
        self._slot_of_part = self._slots_of_parts()
        self._weight_of_slot = np.array([*self.weights, 0.0], np.float32)  # the last one is that of `NO_SLOT`

    @property
    def length(self) -> int:
        """Length of the longest sequence."""
        return sum(1 if isinstance(element, str) else element.length for element in self.elements)

    @property
    def num_positions(self) -> int:
        """Number of different position ids that the longest sequence needs."""
        before = 0
        for element in self.elements:
            if isinstance(element, str) and self._restart == self.vocabulary.command(element):
                break
            before += 1 if isinstance(element, str) else element.length
        return max(before, self.length - before)

    def slot(self, name: str, key: str = "slot") -> Slot:
        """The slot of this name; raises UserError naming `key` if the layout has no such slot."""
        for slot in self.slots:
            if slot.name == name:
                return slot
        names = ", ".join(slot.name for slot in self.slots)
        raise UserError(f"{key}: the layout has no slot {name}; it has {names}")

    def build(self, values: Mapping[str, ArrayLike]) -> Sequence:
        """The training sequence of one sample.

        Args:
            values: by slot name, text token ids (cut to the length of the slot) or codes in raster order; integers
                `(N,)`. An array is much faster than a list.

        Raises:
            ValueError: a grid has the wrong number of codes.
        """
        parts = [
            np.array([command]) if isinstance(element, str) else self._slot_tokens(element, values[element.name])
            for element, command in zip(self.elements, self._commands, strict=True)
        ]
        counts = [len(part) for part in parts]
        tokens = np.concatenate(parts)
        slots = np.repeat(self._slot_of_part, counts)
        if self._loss_by_input:
            slots = self._by_input(tokens, slots)
        start = 0 if self._restart is None else sum(counts[: self._commands.index(self._restart)])
        positions = np.concatenate([np.arange(start), np.arange(len(tokens) - start)])
        return Sequence(tokens, self._weight_of_slot[slots], slots, positions)

    def _slots_of_parts(self) -> Ids:
        """The slot that the tokens of each element of the layout belong to."""
        found: list[int] = []
        for place, element in enumerate(self.elements):
            before = self.elements[place - 1] if place else ""
            owner = before if isinstance(element, str) and isinstance(before, TextSlot) else element
            found.append(NO_SLOT if isinstance(owner, str) else self.slots.index(owner))
        return np.array(found, np.int64)

    def _by_input(self, tokens: Ids, slots: Ids) -> Ids:
        """Slots of the original: a prediction from a code belongs to that grid, any other to the text."""
        text = next(index for index, slot in enumerate(self.slots) if isinstance(slot, TextSlot))
        codes = self.vocabulary.codes
        by_input = np.where((tokens >= codes.start) & (tokens < codes.stop), slots, text)
        return np.concatenate([[NO_SLOT], by_input[:-1]])

    def prompt(self, values: Mapping[str, Seq[int]]) -> list[int]:
        """The tokens before the target slot: a prefix of the result of `build` for the same values.

        Raises:
            UserError: a text is longer than its slot. (Training cuts captions; a user's prompt is never cut.)
        """
        tokens: list[int] = []
        for element in self.elements:
            if element == self.target:
                break
            if isinstance(element, str):
                tokens.append(self.vocabulary.command(element))
                continue
            if isinstance(element, TextSlot) and len(values[element.name]) > element.length:
                raise UserError(
                    f"prompts: one has {len(values[element.name])} text tokens, the model's {element.name} slot "
                    f"holds {element.length}; shorten it"
                )
            tokens += self._slot_tokens(element, values[element.name]).tolist()
        return tokens

    def positions(self, tokens: Seq[int]) -> list[int]:
        """Position ids 0, 1, 2, … of a sequence; they start again at the restart token."""
        start = tokens.index(self._restart) if self._restart in tokens else 0
        return [*range(start), *range(len(tokens) - start)]

    def prompt_positions(self, prompt: Seq[int]) -> list[int]:
        """Position ids of a prompt to sample from: those of training, except for the quirk `restart_after_token`."""
        positions = self.positions(prompt)
        if self._restart_after_token and self._restart in prompt:
            start = prompt.index(self._restart)
            positions[start] = start
        return positions

    def allowed(self, slot: Slot) -> tuple[range, ...]:
        """The ids that may be sampled inside a slot; for text, the token that closes it comes last."""
        if isinstance(slot, CodeSlot):
            return (self.vocabulary.codes,)
        end = self.end_of_text(slot)
        return (self.vocabulary.text_tokens,) if end is None else (self.vocabulary.text_tokens, range(end, end + 1))

    def predicted(self, slot: Slot) -> range:
        """The ids that the loss inside a slot compares: all codes, or for text all ids that are no codes."""
        codes = self.vocabulary.codes
        return codes if isinstance(slot, CodeSlot) else range(codes.stop, self.vocabulary.size)

    def end_of_text(self, slot: TextSlot) -> int | None:
        """Id of the command token that closes a text slot, or None where the layout ends with the slot."""
        following = self.elements[self.elements.index(slot) + 1 :][:1]
        return self.vocabulary.command(following[0]) if following and isinstance(following[0], str) else None

    def _slot_tokens(self, slot: Slot, ids: ArrayLike) -> Ids:
        given = np.asarray(ids, np.int64)
        if isinstance(slot, TextSlot):
            return given[: slot.length] + self.vocabulary.text_tokens.start
        if len(given) != slot.length:
            raise ValueError(f"slot {slot.name} holds {slot.grid} codes, got {len(given)}")
        return given


def parse_slots(layout: str, text_length: int) -> list[Slot]:
    """The slots of a layout; raises UserError if it cannot be parsed."""
    return _slots(_parse(layout, text_length))


def _slots(elements: list[str | Slot]) -> list[Slot]:
    return [element for element in elements if not isinstance(element, str)]


def _parse(layout: str, text_length: int) -> list[str | Slot]:
    elements: list[str | Slot] = []
    for word in layout.split():
        match = _ELEMENT.fullmatch(word)
        if match is None or (match["command"] and match["command"] not in COMMANDS):
            raise UserError(
                f"template.layout: cannot read {word!r}; write command tokens such as [BOI1], text slots such as "
                "{text} and grids such as {image:32x32}"
            )
        if match["command"]:
            elements.append(match["command"])
        elif match["y"]:
            elements.append(CodeSlot(match["name"], (int(match["y"]), int(match["x"]))))
        else:
            elements.append(TextSlot(match["name"], text_length))
    names = [slot.name for slot in _slots(elements)]
    if len(set(names)) < len(names):
        raise UserError(f"template.layout: slot names must differ, found {', '.join(names)}")
    return elements
