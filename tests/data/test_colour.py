"""Colour: every kind of pixels becomes sRGB on white."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from cogview_pl.data.bad_samples import collate_images
from cogview_pl.data.decoding.colour import BROKEN_PROFILE, OTHER_SPACE
from cogview_pl.data.decoding.decode import decode_image, load_image
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.mended import MendedLog

from .profiles import PRIMARIES, SRGB, profile, stream, with_transparent_level


def colour(data: io.BytesIO, place: int = 4) -> list[int]:
    return load_image(data, 8)[:, place, place].tolist()


@pytest.mark.parametrize("name", PRIMARIES)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_profiles_are_converted_to_srgb(name: str, form: str) -> None:
    icc = profile(name)
    wide = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    for shown in ((180, 120, 60), (220, 90, 80), (90, 160, 90)):
        image = ImageCms.profileToProfile(Image.new("RGB", (16, 16), shown), SRGB, wide)
        options = {"PNG": {}, "JPEG": {"quality": 98}, "WEBP": {"lossless": True}, "TIFF": {}}[form]
        assert np.allclose(colour(stream(image, form, icc_profile=icc, **options)), shown, atol=4)


def test_the_red_of_display_p3() -> None:
    """More saturated than sRGB can show: the red channel is full."""
    assert colour(stream(Image.new("RGB", (8, 8), (220, 20, 20)), icc_profile=profile("Display P3")))[0] > 235


def test_pixels_under_srgb_profiles_stay() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    icc = ImageCms.ImageCmsProfile(SRGB).tobytes()
    assert torch.equal(load_image(stream(image, icc_profile=icc), 8), load_image(stream(image), 8))


def test_profiles_of_transparent_palette_and_grey_images() -> None:
    icc = profile("Display P3")
    (red,) = {tuple(colour(stream(Image.new("RGB", (8, 8), (200, 40, 40)), icc_profile=icc)))}
    assert colour(stream(Image.new("RGBA", (8, 8), (200, 40, 40, 255)), icc_profile=icc)) == list(red)
    assert colour(stream(Image.new("RGBA", (8, 8), (200, 40, 40, 0)), icc_profile=icc)) == [255, 255, 255]
    half = colour(stream(Image.new("RGBA", (8, 8), (200, 40, 40, 51)), icc_profile=icc))
    assert np.allclose(half, [0.2 * level + 0.8 * 255 for level in red], atol=1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 40, 40])
    assert colour(stream(palette, icc_profile=icc)) == list(red)
    grey = colour(stream(Image.new("L", (8, 8), 100), icc_profile=profile("ProPhoto RGB", b"GRAY")))
    assert grey[0] == grey[1] == grey[2] > 110  # gamma 1.8 is brighter than sRGB
    assert np.allclose(colour(stream(Image.new("L", (8, 8), 100), icc_profile=profile("ProPhoto RGB"))), grey, atol=2)


@pytest.mark.parametrize(("mode", "icc", "remark"), [
    ("RGB", b"no profile" * 20, BROKEN_PROFILE),
    ("RGB", profile("Adobe RGB")[:200], BROKEN_PROFILE),
    ("RGB", profile("Adobe RGB", b"GRAY"), OTHER_SPACE),
    ("RGB", profile("Adobe RGB", b"CMYK"), OTHER_SPACE),
])  # fmt: skip
def test_profiles_that_cannot_be_used_are_ignored_and_said(mode: str, icc: bytes, remark: str) -> None:
    found = decode_image(stream(Image.new(mode, (8, 8), (220, 20, 20)), icc_profile=icc), 8)
    assert found.pixels[:, 4, 4].tolist() == [220, 20, 20]
    assert found.remark == remark


def test_broken_profiles_are_counted(tmp_path: Path) -> None:
    for number in range(5):
        icc = b"no profile" * 20 if number < 3 else b""
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{number}.png", icc_profile=icc)
        (tmp_path / f"{number}.txt").write_text("红")
    batch = collate_images(list(FolderDataset(tmp_path, "train", 8, 0)))
    log = MendedLog(tmp_path / "mended.jsonl")
    log.add(batch.remarks)
    log.add(batch.remarks)  # each image counts once
    assert batch.images.shape == (5, 3, 8, 8)
    assert MendedLog(tmp_path / "mended.jsonl").count == log.count == 3
    assert log.summary() == (
        f"images that were decoded with a remark: 3 × {BROKEN_PROFILE}; see {tmp_path / 'mended.jsonl'}"
    )


def test_transparent_levels_of_16_bit_grey_are_white() -> None:
    levels = np.full((8, 8), 0x8000, dtype=np.uint16)
    levels[:4] = 1000
    data = with_transparent_level(stream(Image.fromarray(levels)), 1000)
    assert colour(data, 2) == [255, 255, 255]
    assert colour(data, 6) == [128, 128, 128]


@pytest.mark.parametrize(
    ("dtype", "largest", "wanted"),
    [(np.int32, 255, 255), (np.int32, 65535, 255), (np.int32, 2**31 - 1, 255), (np.int32, 130, 130)],
)
def test_32_bit_grey_keeps_its_brightness(dtype: type, largest: int, wanted: int) -> None:
    levels = np.zeros((8, 8), dtype=dtype)
    levels[:4] = largest
    data = stream(Image.fromarray(levels), "TIFF")
    assert colour(data, 2) == [wanted] * 3
    assert colour(data, 6) == [0, 0, 0]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("photometric", "wanted"), [(1, [0x12] * 3), (0, [255 - 0x12] * 3)])
def test_16_bit_grey_whose_white_is_zero(order: str, photometric: int, wanted: list[int]) -> None:
    pixels = np.full((8, 8), 0x1234, dtype=f"{order}u2").tobytes()
    tags = [(256, 3, 8), (257, 3, 8), (258, 3, 16), (259, 3, 1), (262, 3, photometric), (273, 4, 200), (277, 3, 1),
            (278, 3, 8), (279, 4, len(pixels))]  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}{'HH' if kind == 3 else 'I'}",
        *((value, 0) if kind == 3 else (value,))) for tag, kind, value in tags
    )  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    data = (head + entries + b"\0" * 4).ljust(200, b"\0") + pixels
    assert colour(io.BytesIO(data)) == wanted


def test_cielab() -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), (200, 60, 90)), SRGB, ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.allclose(colour(stream(lab, "TIFF")), (200, 60, 90), atol=4)
