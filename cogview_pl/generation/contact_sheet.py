"""Contact sheets: rows of images, each row under its caption."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cogview_pl.durable.read import UnreadableError, require_file
from cogview_pl.errors import UserError

_log = logging.getLogger(__name__)

_LARGEST_FONT = 2**27  # bytes; collections of Chinese fonts take about 20 million

_FONT_PACKAGE = ("cvttf_NotoSansCJK_Regular", "NotoSansCJKtc-Regular.otf")
_SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simhei.ttf",
)
_GAP = 4
_LINE = 1.35  # line height, in font sizes
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    columns: int,
    cell: int,
    font: str | None = None,
) -> Image.Image:
    """One image that shows all rows.

    Args:
        rows: caption and images; every row has the same number of images.
        columns: number of rows that stand next to each other.
        cell: edge of an image on the sheet in pixels.
        font: font file for the captions; None searches for an installed font with Chinese characters.
    """
    size = max(11, cell // 9)
    face = load_font(font, size)
    per_row = max(len(images) for _, images in rows)
    width = per_row * (cell + _GAP) + _GAP
    captions = [_wrap(caption, face, width - 2 * _GAP) for caption, _ in rows]
    caption_height = round(max(len(lines) for lines in captions) * size * _LINE) + _GAP
    height = caption_height + cell + 2 * _GAP
    bands = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * width, bands * height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (lines, (_, images)) in enumerate(zip(captions, rows, strict=True)):
        left, top = index % columns * width + _GAP, index // columns * height + _GAP
        for number, line in enumerate(lines):
            pen.text((left, top + number * size * _LINE), line, font=face, fill=_INK)
        for number, image in enumerate(images):
            scaled = image.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (left + number * (cell + _GAP), top + caption_height))
    return sheet


def joined(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one height next to each other."""
    sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height), _PAPER)
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


@cache
def load_font(font: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of this size in pixels: the given file, else that of the `fonts` extra, else a font of the system.

    Raises:
        UserError: the given file is missing or is no font.
    """
    if font is not None:
        try:
            require_file(font, _LARGEST_FONT)
            return ImageFont.truetype(font, size)
        except (OSError, UnreadableError) as error:
            raise UserError(
                f"font={font} cannot be read as a font ({error}); give a .ttf, .otf or .ttc file"
            ) from error
    for candidate in (*_packaged_font(), *_SYSTEM_FONTS):
        try:
            return ImageFont.truetype(candidate, size)
        except OSError:
            continue
    _log.warning(
        "No font with Chinese characters found: captions on contact sheets will show boxes. "
        'pip install "cogview_pl[fonts]", or set font=FILE.'
    )
    return ImageFont.load_default(size)


def _packaged_font() -> list[str]:
    package, file = _FONT_PACKAGE
    spec = importlib.util.find_spec(package)
    return [] if spec is None or spec.origin is None else [str(Path(spec.origin).parent / file)]


def _wrap(text: str, face: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; breaks between any two characters, as Chinese allows."""
    lines = [""]
    for character in " ".join(text.split()):
        if face.getlength(lines[-1] + character) > width and lines[-1]:
            lines.append("")
        lines[-1] += character
    return lines
