"""Token stores with images in two sizes, and the training windows of super-resolution."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cogview_pl.data.token_store.rows import WithoutText
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.data.window_dataset import WindowDataset
from cogview_pl.errors import UserError
from cogview_pl.generation.super_resolution.windows import windows
from cogview_pl.vocab import Template, Vocabulary

GRID = 4
CODES = torch.arange(16).view(1, 4, 4)
LARGE = torch.arange(64).view(1, 8, 8)
LAYOUT = "[ROI1] {text} [BASE] [BOI1] {small:2x2} [EOI1] [ROI2] [POS0] [BASE] [BOI2] {large:4x4} [EOI2]"


def write(folder: Path, *, large: bool, images: int = 2, format: str = "native") -> TokenStore:
    """A store whose image i has the codes of image 0 plus i."""
    writer = TokenStoreWriter(
        folder,
        text_length=4,
        grid=(GRID, GRID),
        text_vocab_size=20,
        codebook_size=80,
        text_tokenizer="text-1",
        image_tokenizer="image-1",
        splits={"train": images},
        format=format,
        large=large,
    )
    for i in range(images):
        writer.append("train", {"text": [[i, i + 1]]}, CODES + i, [f"image {i}"], i + 1, LARGE + i if large else None)
    writer.finish()
    return TokenStore.open(folder)


def template(layout: str = LAYOUT) -> Template:
    return Template(layout, target="large", loss={"large": 1.0}, vocabulary=Vocabulary(80, 20), text_length=4)


@pytest.mark.parametrize("format", ["native", "cogview"])
def test_the_store_keeps_both_sizes(tmp_path: Path, format: str) -> None:
    rows = write(tmp_path, large=True, format=format).split("train")
    for i in range(2):
        text_tokens, codes = rows[i]
        assert text_tokens == {"text": [i, i + 1]}
        assert torch.equal(codes, CODES[0] + i)
        assert torch.equal(rows.large(i), LARGE[0] + i)


def test_a_store_takes_what_it_was_made_for(tmp_path: Path) -> None:
    settings = {"text_length": 4, "grid": (4, 4), "text_vocab_size": 20, "codebook_size": 80}
    settings |= {"text_tokenizer": "t", "image_tokenizer": "i", "splits": {"train": 1}, "large": True}
    writer = TokenStoreWriter(tmp_path / "a", **settings)  # type: ignore[arg-type]
    for wrong in (None, LARGE[:, :6], LARGE + 40):  # missing, of another size, with codes that do not exist
        with pytest.raises(ValueError):
            writer.append("train", {"text": [[1]]}, CODES, ["key"], 1, wrong)
    with pytest.raises(UserError, match="large"):
        TokenStoreWriter(tmp_path / "a", **settings | {"large": False})  # type: ignore[arg-type]


def test_every_window_of_every_image(tmp_path: Path) -> None:
    data = WindowDataset(write(tmp_path, large=True).split("train"), template(), every=True)
    assert len(data) == 2 * 9
    seen = set()
    for i in range(len(data)):
        sequence = data[i]
        small, large = (sequence.tokens[sequence.slots == slot].tolist() for slot in (1, 2))
        image = i // 9
        top, left = divmod(small[0] - image, 4)
        assert small == (CODES[0, top : top + 2, left : left + 2] + image).flatten().tolist()
        assert large == (LARGE[0, 2 * top : 2 * top + 4, 2 * left : 2 * left + 4] + image).flatten().tolist()
        seen.add((image, top, left))
    assert len(seen) == len(data)


def test_magnify_asks_for_windows_that_were_trained() -> None:
    """The nine windows of decoding are those of an image in training."""
    for window in windows(GRID):
        for source, target in zip(window.source, window.target, strict=True):
            assert source.start in (0, 1, 2) and source.stop - source.start == GRID // 2
            assert target.start == 2 * source.start


def test_validation_takes_one_window_of_each_image(tmp_path: Path) -> None:
    data = WindowDataset(write(tmp_path, large=True, images=11).split("train"), template(), every=False)
    assert len(data) == 11
    assert data[1].tokens.tolist() != data[10].tokens.tolist()  # the same window of other images
    assert ((data[0].slots == 2) == (data[10].slots == 2)).all()


def test_without_text_keeps_both_grids(tmp_path: Path) -> None:
    rows = write(tmp_path, large=True).split("train")
    full = WindowDataset(rows, template(), every=True)[3]
    bare = WindowDataset(WithoutText(rows), template(), every=True)[3]
    assert 0 not in bare.slots[: bare.slots.tolist().index(1) - 3]  # no text token; only the token that closes the text
    assert full.tokens[full.slots != 0][-18:].tolist() == bare.tokens[-18:].tolist()


def test_stores_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"store\.large=true"):
        WindowDataset(write(tmp_path / "a", large=False).split("train"), template(), every=True)
    other = template(LAYOUT.replace("2x2", "4x4").replace("{large:4x4}", "{large:8x8}"))
    with pytest.raises(UserError, match="8x8"):
        WindowDataset(write(tmp_path / "b", large=True).split("train"), other, every=True)


def test_a_sample_is_named_by_its_image_and_window(tmp_path: Path) -> None:
    rows = write(tmp_path, large=True, images=11).split("train")
    every = WindowDataset(rows, template(), every=True)
    once = WindowDataset(rows, template(), every=False)
    assert [every.key(i) for i in (0, 8, 9, 98)] == [
        f"{rows.key(image)}, window {window}" for image, window in ((0, 0), (0, 8), (1, 0), (10, 8))
    ]
    assert [once.key(i) for i in (0, 8, 10)] == [
        f"{rows.key(image)}, window {window}" for image, window in ((0, 0), (8, 8), (10, 1))
    ]
    assert len({every.key(i) for i in range(len(every))}) == 99
    for i in (0, 4, 10):  # the same windows in both
        for found, wanted in zip(once[i], every[9 * i + i % 9], strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_a_window_is_laid_out_in_both_sizes(tmp_path: Path) -> None:
    data = WindowDataset(write(tmp_path, large=True).split("train"), template(), every=True)
    vocabulary = data.template.vocabulary
    roi, base, boi, eoi, roi2, pos, boi2, eoi2 = (
        vocabulary.command(f"[{name}]") for name in ("ROI1", "BASE", "BOI1", "EOI1", "ROI2", "POS0", "BOI2", "EOI2")
    )
    # Window 5 begins in row 1, column 2 of the small grid, in row 2, column 4 of the large one.
    assert data[5].tokens.tolist() == [
        *(roi, 80 + 0, 80 + 1, base, boi),
        *(6, 7, 10, 11),
        *(eoi, roi2, pos, base, boi2),
        *(20, 21, 22, 23, 28, 29, 30, 31, 36, 37, 38, 39, 44, 45, 46, 47),
        eoi2,
    ]


@pytest.mark.parametrize("edge", [2, 6])
def test_windows_must_overlap_by_half(edge: int) -> None:
    class Rows:
        layout = SimpleNamespace(large=True, grid=(edge, edge), text_fields=("text",))

    layout = f"[ROI1] {{text}} [BOI1] {{small:{edge // 2}x{edge // 2}}} [BOI2] {{large:{edge}x{edge}}}"
    with pytest.raises(UserError, match=rf"a grid of {edge}x{edge} codes has no half-overlapping .* multiple of 4$"):
        WindowDataset(Rows(), template(layout), every=True)  # type: ignore[arg-type]


def test_the_grid_that_does_not_match_is_named_row_by_column(tmp_path: Path) -> None:
    layout = LAYOUT.replace("2x2", "2x4").replace("4x4", "4x8")
    with pytest.raises(UserError, match="slot large holds 4x8 codes, the token store has 4x4; choose the model"):
        WindowDataset(write(tmp_path, large=True).split("train"), template(layout), every=True)
