"""Tokenised samples become the sequence of the layout, and batches of them are padded with what has no loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cogview_pl.data.sequence_dataset import SequenceCollator, SequenceDataset
from cogview_pl.errors import UserError
from cogview_pl.vocab import Sequence, Template, Vocabulary

VOCABULARY = Vocabulary(codebook_size=10, text_vocab_size=5)
ROI, BASE, BOI, EOI = (VOCABULARY.command(f"[{name}]") for name in ("ROI1", "BASE", "BOI1", "EOI1"))


class Stored:
    """Two tokenised images of 2x3 codes."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[dict[str, list[int]], torch.Tensor]:
        return {"text": [4, 2][: index + 1]}, torch.arange(6).view(2, 3) + index

    def key(self, index: int) -> str:
        return f"image {index}"


def template(layout: str = "[ROI1] {text} [BASE] [BOI1] {image:2x3} [EOI1]") -> Template:
    loss = {"text": 0.5, "image": 2.0}
    return Template(layout, target="image", loss=loss, vocabulary=VOCABULARY, text_length=3)


def sequence(tokens: list[int], weights: list[float], slots: list[int], positions: list[int]) -> Sequence:
    return Sequence(np.array(tokens), np.array(weights, np.float32), np.array(slots), np.array(positions))


def test_a_sample_is_laid_out_with_its_codes_row_by_row() -> None:
    data = SequenceDataset(Stored(), template(), (2, 3))
    assert len(data) == 2
    assert [data.key(i) for i in range(2)] == ["image 0", "image 1"]
    assert data[1].tokens.tolist() == [ROI, 10 + 4, 10 + 2, BASE, BOI, 1, 2, 3, 4, 5, 6, EOI]
    assert data[1].weights.tolist() == [0.0, 0.5, 0.5, 0.5, 0.0, *[2.0] * 6, 0.0]
    assert data[1].slots.tolist() == [-1, 0, 0, 0, -1, *[1] * 6, -1]
    assert data[1].positions.tolist() == list(range(12))
    assert data[0].tokens.tolist() == [ROI, 10 + 4, BASE, BOI, 0, 1, 2, 3, 4, 5, EOI]


@pytest.mark.parametrize("grid", [(3, 2), (2, 4), (1, 3)])
def test_a_store_with_another_grid_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(
        UserError, match=rf"slot image holds 2x3 codes, the token store has {grid[0]}x{grid[1]}; choose the model"
    ):
        SequenceDataset(Stored(), template(), grid)
    SequenceDataset(Stored(), template(), [2, 3])  # type: ignore[arg-type]  # as a file has it


def test_a_batch_is_padded_at_the_end_with_what_has_no_loss() -> None:
    long = sequence([7, 8, 9], weights=[0.0, 0.5, 2.0], slots=[-1, 0, 1], positions=[0, 1, 0])
    short = sequence([6, 3], weights=[0.0, 1.0], slots=[-1, 1], positions=[0, 1])
    batch = SequenceCollator(pad=15)([short, long])
    assert batch.tokens.tolist() == [[6, 3, 15], [7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 0], [0, 1, 0]]
    assert batch.weights.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.5, 2.0]]
    assert batch.slots.tolist() == [[-1, 1, -1], [-1, 0, 1]]
    assert [column.dtype for column in batch] == [torch.int64, torch.int64, torch.float32, torch.int64]


def test_no_sequences_become_a_row_that_can_be_predicted_and_has_no_loss() -> None:
    batch = SequenceCollator(pad=15)([])
    assert batch.tokens.tolist() == [[15, 15]]  # an input and what is predicted from it
    assert batch.positions.tolist() == [[0, 0]]
    assert batch.weights.tolist() == [[0.0, 0.0]]
    assert batch.slots.tolist() == [[-1, -1]]
    assert batch.weights.dtype == torch.float32


class Pairs(Stored):
    """The same two images, with a source for each."""

    def others(self, index: int) -> dict[str, torch.Tensor]:
        return {"source": 9 - torch.arange(6).view(2, 3) - index}


def test_the_source_of_a_pair_stands_before_its_target() -> None:
    layout = "[ROI1] {text} [BASE] [BOI1] {source:2x3} [EOI1] [BASE] [BOI1] {image:2x3} [EOI1]"
    loss = {"image": 1.0}
    pairs = Template(layout, target="image", loss=loss, vocabulary=VOCABULARY, text_length=3)
    built = SequenceDataset(Pairs(), pairs, (2, 3), ("text",), ("source",))[1]
    source, target = [8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6]
    text = [ROI, 10 + 4, 10 + 2]
    assert built.tokens.tolist() == [*text, BASE, BOI, *source, EOI, BASE, BOI, *target, EOI]
    assert built.weights.tolist() == [0.0] * 14 + [1.0] * 6 + [0.0]
    prompt = pairs.prompt({"text": [4, 2], "source": source})
    assert prompt == built.tokens[:14].tolist()
    with pytest.raises(UserError, match=r"^template\.layout: the token store has no images for slot source; run task="):
        SequenceDataset(Stored(), pairs, (2, 3))
