"""The formats of image files: one list for finding files by name and for decoding them."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

FORMATS_EXTRA = 'pip install "cogview_pl[formats]"'

HEAD = 64
"""Bytes at the beginning of a file that tell formats apart which Pillow does not read itself."""


class Format(NamedTuple):
    """A raster format."""

    name: str
    """Pillow's name."""
    extensions: tuple[str, ...]
    """Lower-case extensions without the dot."""
    shown: str = ""
    """The name in messages, for formats that an installation may lack."""
    package: str = ""
    """Module that registers the format with Pillow; empty: Pillow decodes it itself."""
    remedy: str = ""
    """What installs the format where it is missing."""


# Raster formats only: Pillow's EPS reader, for example, would start another program on a file from a stranger.
_BUILT_IN = (
    Format("JPEG", ("jpg", "jpeg", "jpe", "jfif", "mpo")),
    Format("PNG", ("png", "apng")),
    Format("WEBP", ("webp",)),
    Format("BMP", ("bmp",)),
    Format("GIF", ("gif",)),
    Format("TIFF", ("tif", "tiff")),
    Format("PPM", ("ppm", "pgm", "pbm", "pnm")),
)
_AVIF = Format("AVIF", ("avif",), "AVIF", "", "install Pillow 11.3 or newer")
_HEIF = Format("HEIF", ("heic", "heif", "hif"), "HEIC", "pillow_heif", FORMATS_EXTRA)
JXL = Format("JXL", ("jxl",), "JPEG XL", "pillow_jxl", FORMATS_EXTRA)

IMAGE_EXTENSIONS = tuple(extension for one in (*_BUILT_IN, _AVIF, _HEIF, JXL) for extension in one.extensions)
"""Lower-case extensions of image files without the dot."""

_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_JXL_HEADS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")

# Pillow has no entry for big-endian 16-bit grey where zero is white; colour.py inverts it.
TiffImagePlugin.OPEN_INFO.setdefault((TiffImagePlugin.MM, 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


class FormatMissingError(Exception):
    """A file is in a format that this installation does not decode; the text says what to install."""


def formats_of(head: bytes) -> tuple[str, ...]:
    """Pillow's names of the formats that a file may have.

    Args:
        head: the first `HEAD` bytes of the file.

    Raises:
        FormatMissingError: the format needs a package that is not installed.
    """
    special = _special(head)
    if special is None:
        return tuple(one.name for one in _BUILT_IN)
    if special.name not in Image.OPEN:
        Image.init()
    if special.name not in Image.OPEN and special.package:
        _register(special)
    if special.name not in Image.OPEN:
        raise FormatMissingError(f"{special.shown} images are not decoded by this installation; {special.remedy}")
    return (special.name,)


def _special(head: bytes) -> Format | None:
    if head.startswith(_JXL_HEADS):
        return JXL
    if head[4:8] != b"ftyp":
        return None
    brands = [head[8:12], *(head[place : place + 4] for place in range(16, int.from_bytes(head[:4], "big"), 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return _AVIF
    return _HEIF if any(brand in _HEIF_BRANDS for brand in brands) else None


def _register(special: Format) -> None:
    try:
        package = import_module(special.package)
    except ImportError:
        return
    if special is _HEIF:
        package.register_heif_opener(thumbnails=False)
