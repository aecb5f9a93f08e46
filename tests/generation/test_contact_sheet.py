"""Contact sheets: every image whole, every caption inside its column, clear errors about fonts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview_pl.errors import UserError
from cogview_pl.generation.contact_sheet import contact_sheet

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
CELL = 40


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the box that the pixels of a colour cover."""
    mask = (np.asarray(sheet) == colour).all(-1)
    y, x = mask.nonzero()
    left, top, right, bottom = x.min(), y.min(), x.max() + 1, y.max() + 1
    assert mask.sum() == (right - left) * (bottom - top)
    return left, top, right, bottom


def ink(sheet: Image.Image) -> np.ndarray:
    """Where there is neither paper nor an image."""
    pixels = np.asarray(sheet).astype(int)
    return (np.ptp(pixels, axis=-1) == 0) & (pixels[..., 0] < 250)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("per_row", [1, 2])
def test_every_image_is_whole_and_in_order(columns: int, per_row: int) -> None:
    count = 6 // per_row
    rows = [(f"row {i}", [plain(c) for c in COLOURS[i * per_row : (i + 1) * per_row]]) for i in range(count)]
    sheet = contact_sheet(rows, columns=columns, cell=CELL)
    boxes = [box(sheet, colour) for colour in COLOURS]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(CELL, CELL)}
    places = [(top, left) for left, top, _, _ in boxes]
    assert places == sorted(places)
    assert len({top for top, _ in places}) == -(-count // columns)  # bands
    assert len({left for _, left in places}) == min(columns, count) * per_row


def test_size() -> None:
    def size(rows: int, per_row: int, columns: int, cell: int = CELL) -> tuple[int, int]:
        images = [plain(COLOURS[0])] * per_row
        return contact_sheet([("a", images)] * rows, columns=columns, cell=cell).size

    width, height = size(rows=1, per_row=1, columns=1)
    assert size(rows=6, per_row=1, columns=3) == (3 * width, 2 * height)
    assert size(rows=7, per_row=1, columns=3) == (3 * width, 3 * height)
    assert size(rows=1, per_row=2, columns=1)[1] == height
    assert width < size(rows=1, per_row=2, columns=1)[0] < 2 * width + 1
    assert size(rows=1, per_row=1, columns=1, cell=2 * CELL)[0] - width == CELL


@pytest.mark.parametrize("size", [(16, 16), (7, 3), (200, 100)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_images_of_any_size_and_mode_fill_the_cell(mode: str, size: tuple[int, int]) -> None:
    sheet = contact_sheet([("", [plain(COLOURS[0], size).convert(mode)])], columns=1, cell=CELL)
    left, top, right, bottom = box(sheet, COLOURS[0])
    assert (right - left, bottom - top) == (CELL, CELL)


@pytest.mark.parametrize(
    "caption", ["long " * 30, "w" * 100, "一个红色的圆形在左边" * 5], ids=["words", "one word", "汉字"]
)
def test_long_captions_wrap(caption: str) -> None:
    rows = [("a", [plain(COLOURS[0])]), (caption, [plain(COLOURS[1])])]
    short = contact_sheet([rows[0], ("b", rows[1][1])], columns=2, cell=CELL)
    sheet = contact_sheet(rows, columns=2, cell=CELL)
    assert sheet.width == short.width
    assert sheet.height > short.height
    written = ink(sheet)
    assert not written[:, -3:].any()  # the margin stays free
    assert not written[:, : box(sheet, COLOURS[1])[0] - 5][box(sheet, COLOURS[0])[1] :].any()
    for colour in COLOURS[:2]:  # nothing is written over an image
        left, top, right, bottom = box(sheet, colour)
        assert (right - left, bottom - top) == (CELL, CELL)
    top = box(sheet, COLOURS[1])[1]
    assert written[:top].any()
    assert not written[top:].any()


@pytest.mark.parametrize("caption", ["", " ", "two\nlines", "😀"])
def test_odd_captions(caption: str) -> None:
    sheet = contact_sheet([(caption, [plain(COLOURS[0])])], columns=1, cell=CELL)
    left, top, right, bottom = box(sheet, COLOURS[0])
    assert (right - left, bottom - top) == (CELL, CELL)
    assert not ink(sheet)[top:].any()


class TestFont:
    def test_missing(self, tmp_path: Path) -> None:
        file = tmp_path / "none.ttf"
        with pytest.raises(UserError, match=r"^font=[^\n]*none\.ttf [^\n]*\.ttf[^\n]*$"):
            contact_sheet([("a", [plain(COLOURS[0])])], columns=1, cell=CELL, font=str(file))

    @pytest.mark.parametrize("content", [b"", b"no font\n" * 50])
    def test_no_font(self, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "bad.ttf"
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"^font=[^\n]*bad\.ttf [^\n]*$"):
            contact_sheet([("a", [plain(COLOURS[0])])], columns=1, cell=CELL, font=str(file))
