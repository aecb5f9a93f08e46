"""Decoding of images."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview_pl.data.config import Decoding
from cogview_pl.data.decoding.decode import ImageError, decode_image, load_image


def encoded(image: Image.Image, form: str, **options: object) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    stream.seek(0)
    return stream


def flat(image: Image.Image, form: str = "PNG", **options: object) -> list[int]:
    """The one colour of an image without detail."""
    pixels = load_image(encoded(image, form, **options), 8)
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert torch.equal(pixels, pixels[:, :1, :1].expand(3, 8, 8))
    return pixels[:, 0, 0].tolist()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_colours_become_rgb() -> None:
    assert flat(Image.new("RGB", (16, 12), (10, 20, 30))) == [10, 20, 30]
    assert flat(Image.new("L", (16, 12), 77)) == [77, 77, 77]
    assert flat(Image.new("1", (16, 12), 1)) == [255, 255, 255]
    assert flat(Image.new("CMYK", (16, 12), (255, 0, 0, 0)), "TIFF") == [0, 255, 255]
    red, green, blue = flat(Image.new("CMYK", (16, 12), (255, 0, 0, 0)), "JPEG", quality=100)
    assert red < 4 and green > 251 and blue > 251


@pytest.mark.parametrize("level", [0, 0x1234, 0x8000, 0xFFFF])
def test_16_bit_grey_keeps_its_brightness(level: int) -> None:
    image = Image.fromarray(np.full((12, 16), level, dtype=np.uint16))
    assert flat(image) == [level >> 8] * 3
    assert flat(image, "TIFF") == [level >> 8] * 3


def test_transparency_is_put_on_white() -> None:
    assert flat(Image.new("RGBA", (8, 8), (255, 0, 0, 0))) == [255, 255, 255]
    assert flat(Image.new("RGBA", (8, 8), (255, 0, 0, 255))) == [255, 0, 0]
    half = flat(Image.new("RGBA", (8, 8), (200, 0, 100, 51)))  # 0.2 colour + 0.8 white
    assert np.allclose(half, [244, 204, 224], atol=1)
    assert np.allclose(flat(Image.new("LA", (8, 8), (0, 51))), [204] * 3, atol=1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert flat(palette) == [9, 8, 7]
    assert flat(palette, transparency=1) == [255, 255, 255]
    assert flat(palette, transparency=bytes([255, 0])) == [255, 255, 255]
    assert flat(palette, "GIF", transparency=1) == [255, 255, 255]


def test_the_camera_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 8, 16))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to show"
    pixels = load_image(encoded(image, "JPEG", exif=exif, quality=95), 16).float()
    assert pixels[2, :6].mean() > 240 > 20 > pixels[2, 10:].mean()  # blue on top


def test_the_centre_of_the_shorter_edge_is_kept() -> None:
    wide = Image.new("RGB", (120, 40), "red")
    wide.paste("lime", (40, 0, 80, 40))
    pixels = load_image(encoded(wide, "PNG"), 10)
    assert pixels[:, :, 1:9].float().mean((1, 2)).tolist() == [0, 255, 0]
    tall = wide.rotate(90, expand=True)
    assert torch.equal(load_image(encoded(tall, "PNG"), 10), pixels.rot90(1, (1, 2)))


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = noise(24, 24)
    assert torch.equal(load_image(encoded(image, "PNG"), 24), torch.tensor(np.array(image)).permute(2, 0, 1))


def test_reducing_averages_instead_of_skipping_pixels() -> None:
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    pixels = load_image(encoded(Image.fromarray(board.astype(np.uint8)), "PNG"), 8).float()
    assert (pixels - 127.5).abs().max() < 3


def test_a_large_jpeg_is_close_to_its_lossless_twin() -> None:
    for width, height in ((904, 704), (903, 701)):
        image = noise(9, 7).resize((width, height), Image.Resampling.BICUBIC)
        error = load_image(encoded(image, "JPEG", quality=95), 32).float()
        error -= load_image(encoded(image, "PNG"), 32).float()
        assert error.abs().mean() < 0.5


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_off_image_is_refused(form: str, tmp_path: Path) -> None:
    whole = encoded(noise(64, 64), form).getvalue()
    for share in (0.0, 0.01, 0.3, 0.6):
        with pytest.raises(ImageError) as error:
            load_image(io.BytesIO(whole[: int(len(whole) * share)]), 16)
        assert "0x" not in one_line(error)  # no memory address: the list of skipped samples is reproducible
    file = tmp_path / "a.bin"
    file.write_bytes(whole)
    assert load_image(file, 16).shape == load_image(str(file), 16).shape == (3, 16, 16)


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 4000, b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="not an image"):
        load_image(io.BytesIO(content), 16)


def test_formats_that_start_other_programs_are_refused() -> None:
    with pytest.raises(ImageError, match="not an image"):
        load_image(encoded(noise(8, 8), "EPS"), 8)


def test_damaged_bytes_never_raise_anything_else() -> None:
    generator = np.random.default_rng(1)
    wholes = [encoded(noise(24, 24), form).getvalue() for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")]
    refused = 0
    for _ in range(60):
        for whole in wholes:
            bad = bytearray(whole)
            for place in generator.integers(0, len(bad), 8):
                bad[place] = generator.integers(256)
            try:
                assert load_image(io.BytesIO(bytes(bad)), 8).shape == (3, 8, 8)
            except ImageError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 50


def test_too_many_pixels_are_refused_by_the_key() -> None:
    for edge, form, refused in ((12, "PNG", True), (12, "JPEG", False), (21, "JPEG", True), (10, "PNG", False)):
        data = encoded(Image.new("RGB", (edge, edge), "red"), form)
        if refused:
            with pytest.raises(ImageError) as error:
                decode_image(data, 4, options=Decoding(max_pixels=100))
            assert one_line(error).startswith(
                f"{edge}x{edge} pixels are more than data.max_pixels=100 allows to decode"
            )
        else:
            assert decode_image(data, 4, options=Decoding(max_pixels=100)).pixels[0].min() > 250
    with pytest.raises(ImageError, match=r"^20x20 pixels are more than data\.max_pixels=100"):
        decode_image(encoded(noise(20, 20), "JPEG"), 18, options=Decoding(max_pixels=100))  # cannot be reduced
    stream = io.BytesIO()
    Image.new("1", (9500, 9500)).save(stream, "PNG")
    with pytest.raises(ImageError, match=r"^9500x9500 pixels are more than the 90,000,000 that are decoded; make the"):
        load_image(stream, 8)  # no key sets this limit


def test_the_limit_of_pillow_stays_and_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(encoded(noise(30, 30), "PNG"), 8).shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_photo_of_108_million_pixels_is_decoded_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (12000, 9000), (20, 200, 20)).save(tmp_path / "a.jpg", quality=60)
    assert (load_image(tmp_path / "a.jpg", 64)[:, 10, 10] - torch.tensor([20, 200, 20])).abs().max() < 4


def test_other_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="5000x10 is too elongated"):
        load_image(encoded(Image.new("RGB", (5000, 10)), "PNG"), 256)
    with pytest.raises(ImageError, match="floating-point pixels"):
        load_image(encoded(Image.new("F", (10, 10)), "TIFF"), 8)
    with pytest.raises(ImageError, match=r"^file not found$"):
        load_image(tmp_path / "none.png", 8)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of what is no file, or cannot be opened, under names of images."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "file.png").write_bytes(b"")
    with (tmp_path / "large.png").open("wb") as stream:
        stream.truncate(2**29)  # a hole
    monkeypatch.chdir(tmp_path)  # an address of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe.png", "is a named pipe, not a file"),
        ("socket.png", "is a socket, not a file"),
        ("device.png", "is a device, not a file"),
        ("folder.png", "is a folder, not a file"),
        ("loop.png", "cannot be read (Too many levels of symbolic links)"),
        ("x" * 300 + ".png", "cannot be read (File name too long)"),
        ("a\0.png", "has no name that a file can have"),
        ("a\ud800.png", "has no name that a file can have"),
        ("broken.png", "file not found"),
        ("file.png/a.png", "file not found"),
        ("large.png", "has 536,870,912 bytes, at most 268,435,456 are read"),
    ],
)
def test_what_is_no_image_file_is_named_and_not_opened(odd: Path, name: str, reason: str) -> None:
    for file in (odd / name, str(odd / name)):
        with pytest.raises(ImageError) as error:
            load_image(file, 8)
        assert one_line(error) == reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read_is_not_missing(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageError, match=r"^cannot be read \(Permission denied\)$"):
        load_image(tmp_path / "a.png", 8)


def test_images_that_are_smaller_than_asked_are_refused() -> None:
    small = noise(48, 64)
    with pytest.raises(ImageError, match=r"^48x64 is smaller than data\.min_size=49$"):
        load_image(encoded(small, "PNG"), 8, min_size=49)
    assert torch.equal(load_image(encoded(small, "PNG"), 8, 48), load_image(encoded(small, "PNG"), 8))
    large = encoded(noise(512, 512), "JPEG")  # may be decoded at a fraction of its size
    assert load_image(large, 8, min_size=512).shape == (3, 8, 8)


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_flipped_bit_in_a_png_is_noticed_wherever_it_is(tmp_path: Path, as_stream: bool) -> None:
    """Also in the last pixels, behind which the decoder stops."""
    file = tmp_path / "a.png"
    Image.effect_noise((24, 24), 60).convert("RGB").save(file)
    whole, wanted = file.read_bytes(), load_image(file, 24)
    assert torch.equal(load_image(io.BytesIO(whole), 24), wanted)
    pixels = range(whole.index(b"IDAT") + 4, whole.index(b"IEND") - 4)
    for place in [*pixels[:20], *pixels[-120:]]:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        with pytest.raises(ImageError):
            load_image(io.BytesIO(data) if as_stream else file, 24)


def test_an_image_may_be_thirty_two_times_as_long_as_it_is_high() -> None:
    for width, height in ((320, 10), (10, 320)):
        assert load_image(encoded(noise(width, height), "PNG"), 8).shape == (3, 8, 8)
    for width, height in ((321, 10), (10, 321)):
        with pytest.raises(ImageError, match=rf"^{width}x{height} is too elongated for a square crop$"):
            load_image(encoded(noise(width, height), "PNG"), 8)


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [(1024, 1032, 8), (512, 640, 8), (504, 504, 4), (512, 516, 4), (520, 260, 4), (256, 256, 4), (248, 320, 2),
     (258, 258, 2), (128, 130, 2), (126, 126, 2), (280, 280, 4), (78, 78, 1), (80, 80, 2)],
)  # fmt: skip
def test_a_large_jpeg_is_decoded_small_where_enough_pixels_are_left(width: int, height: int, scale: int) -> None:
    data = encoded(noise(width, height), "JPEG", quality=95)
    with Image.open(data) as image:
        image.draft(None, (width // scale, height // scale))
        assert image.size == (width // scale, height // scale)
        reduced = encoded(image.convert("RGB"), "PNG")
    data.seek(0)
    assert torch.equal(load_image(data, 32), load_image(reduced, 32))


@pytest.mark.parametrize(
    ("width", "height", "orientation"), [(1001, 667, 1), (667, 1001, 1), (1003, 751, 6), (999, 999, 3)]
)
def test_a_reduced_jpeg_covers_the_same_area(width: int, height: int, orientation: int) -> None:
    """Edges that the scale does not divide are rounded up when a JPEG is reduced."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.array([1, 0, 0]) + np.linspace(0, 255, height)[
        :, None, None
    ] * np.array([0, 1, 0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(ramp.astype(np.uint8))
    data = encoded(image, "JPEG", quality=98, subsampling=0, exif=exif)
    whole = encoded(image, "PNG", exif=exif)
    error = load_image(data, 256).float() - load_image(whole, 256).float()
    assert error[:2].abs().max() < 3
    assert error[:2].mean().abs() < 0.1


@pytest.mark.parametrize(
    ("form", "options", "end"), [("JPEG", {}, 2), ("JPEG", {"progressive": True}, 2), ("PNG", {}, 12)]
)
def test_missing_end_markers_are_no_damage(form: str, options: dict[str, bool], end: int) -> None:
    whole = encoded(noise(120, 90), form, **options).getvalue()
    sloppy = 5 if form == "PNG" else 0  # Pillow does not read the checksum of IEND
    wanted = load_image(io.BytesIO(whole), 32)
    for missing in range(1, end + 1):
        found = decode_image(io.BytesIO(whole[:-missing]), 32)
        assert torch.equal(found.pixels, wanted)
        assert found.remark == ("" if missing < sloppy else "the end marker was missing")
    for missing in (end + 20, end + 300):
        with pytest.raises(ImageError):
            load_image(io.BytesIO(whole[:-missing]), 32)
    assert decode_image(io.BytesIO(whole + b"junk" * 50), 32).remark == ""
