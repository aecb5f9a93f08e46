"""Colour: pixels of any mode and colour space become sRGB on a white ground."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1

_SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile → mode of its pixels

_SAME = 3
"""A profile is sRGB if it moves no colour by more than these levels: rounding, and the variants of sRGB's curve."""

BROKEN_PROFILE = "the colour profile is broken, and was ignored"
OTHER_SPACE = "the colour profile is for another kind of pixels, and was ignored"


class ColourError(ValueError):
    """Pixels of a kind that is not supported; the text says which."""


def to_srgb(image: Image.Image) -> tuple[Image.Image, str]:
    """The image in sRGB (mode RGB), and a remark, empty where there is nothing to say.

    Colour profiles are applied; one that cannot be is ignored, with a remark. Transparent pixels are put on white.
    16-bit and 32-bit grey keep their high bits.

    Raises:
        ColourError: pixels are floating-point numbers.
    """
    profile = image.info.get("icc_profile")
    image, alpha = _without_alpha(image)
    image, remark = _converted(image, profile)
    if alpha is not None:
        ground = Image.new("RGBA", image.size, "white")
        image.putalpha(alpha)
        ground.alpha_composite(image)
        image = ground.convert("RGB")
    return image, remark


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Pixels without transparency in mode RGB, L, CMYK or LAB, and the opacity, None where all is opaque."""
    if image.mode == "F":
        raise ColourError("floating-point pixels are not supported")
    if image.mode.startswith("I"):
        return _eight_bits(image)
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "1")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        return (image.getchannel("R") if grey else image.convert("RGB")), alpha
    if image.mode in ("RGB", "L", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 or 32 bits as mode L, and the opacity; Pillow keeps the high byte of 16-bit colour, so do we."""
    levels = np.asarray(image)
    transparent = image.info.get("transparency")
    alpha = None
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS) == (32,):
        levels = _sixteen_of_thirty_two(levels, unsigned=tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)) == (_UNSIGNED,))
    bright = (levels.clip(0, 65535) >> 8).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        bright = 255 - bright
    return Image.fromarray(bright), alpha


def _sixteen_of_thirty_two(levels: np.ndarray, *, unsigned: bool) -> np.ndarray:
    """32-bit levels in the range of 16 bits.

    Such files rarely use all bits, so the largest level tells whether it is a range of 8, 16 or 32 bits.
    """
    wide = levels.astype(np.int64)
    if unsigned:  # Pillow reads both kinds as signed
        wide &= 2**32 - 1
    largest = wide.max(initial=0)
    if largest <= 255:
        return wide << 8
    return wide if largest <= 65535 else wide >> (16 if unsigned else 15)


def _converted(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """The image in sRGB, mode RGB, and a remark on its profile."""
    if image.mode == "LAB":
        return _apply(image, _from_lab()), ""
    plain = image.convert("RGB")
    if not profile:
        return plain, ""
    try:
        space = _space_of(profile)
        if space == "RGB" and image.mode == "L":
            image = plain
        if space != image.mode:
            return plain, OTHER_SPACE
        transform = _to_srgb(profile, space)
        return (plain if transform is None else _apply(image, transform)), ""
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return plain, BROKEN_PROFILE


def _apply(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is, unless the image is changed in place
    return converted


@lru_cache(maxsize=16)
def _space_of(profile: bytes) -> str | None:
    """Mode of the pixels that a profile describes; None for a space that no image has here."""
    return _SPACES.get(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space)


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile to sRGB; None if the profile is sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return transform
    lattice = _lattice()
    moved = np.asarray(_apply(lattice, transform)).astype(int) - np.asarray(lattice)
    return None if np.abs(moved).max() <= _SAME else transform


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


@lru_cache(maxsize=1)
def _lattice() -> Image.Image:
    """Colours at equal distances, one a pixel."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))
