"""The base class of data sets: its defaults, and samples with several texts."""

from __future__ import annotations

import pytest
import torch

from cogview_pl.data.bad_samples import collate_images
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.errors import UserError


class Greys(CaptionedImages):
    """Grey images; sample 2 cannot be read."""

    def __init__(self, size: int, level: int = 0, answer: str = "是") -> None:
        self.size = size
        self.level = level
        self.answer = answer

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        if index == 2:
            return Skipped("two", "broken")
        image = torch.full((3, 2, 2), (index + self.level) % 256, dtype=torch.uint8)
        return ImageSample(f"grey {index}", image, f"灰{index}", {"answer": self.answer})


def test_texts_and_keys_are_those_of_the_samples() -> None:
    greys = Greys(4)
    assert greys.texts() == ["灰0", "灰1", "", "灰3"]
    assert [greys.text(index, "answer") for index in range(3)] == ["是", "是", ""]
    assert [greys.key(index) for index in range(3)] == ["grey 0", "grey 1", "two"]
    with pytest.raises(UserError, match=r"^data: sample grey 0 has no text question, a slot of template\.layout$"):
        greys.text(0, "question")


def test_the_fingerprint_goes_with_sizes_images_and_texts() -> None:
    found = [one.fingerprint() for one in (Greys(3), Greys(4), Greys(3, level=1), Greys(3, answer="否"))]
    assert len(set(found)) == 4 and all(len(one) == 32 for one in found)
    assert Greys(3).fingerprint() == found[0]
    assert Greys(1000).fingerprint() == Greys(1000).fingerprint() != Greys(1001).fingerprint()


def test_a_batch_holds_every_text() -> None:
    greys = Greys(4)
    batch = collate_images([greys[index] for index in (0, 2, 3)])
    assert batch.texts == batch.texts_of("text") == ["灰0", "灰3"]
    assert batch.texts_of("answer") == ["是", "是"]
    assert batch.skipped == [Skipped("two", "broken")]
    with pytest.raises(UserError, match=r"^data: samples such as grey 0 have no text question"):
        batch.texts_of("question")
    assert collate_images([greys[2]]).texts_of("question") == []
