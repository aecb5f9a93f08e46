"""Cases of the section "Colour and formats" of docs/data.md."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from cogview_pl.data.config import Crop, Decoding
from cogview_pl.data.decoding.decode import ImageError, decode_image
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample
from cogview_pl.data.views import Views

from .profiles import SRGB, profile, stream, with_transparent_level

RED = (220, 20, 20)


def levels(data: io.BytesIO | Path, column: int = 4, **options: object) -> list[int]:
    """The pixel in the middle row, in a column of 8."""
    return decode_image(data, 8, options=Decoding(**options)).pixels[:, 4, column].tolist()  # type: ignore[arg-type]


def is_red(data: io.BytesIO | Path) -> bool:
    return bool(np.allclose(levels(data), RED, atol=5))


def found_and_read(home: Path, form: str, *extensions: str, **options: object) -> None:
    """A red file under each extension is found and read; of several images the first."""
    for number, extension in enumerate(extensions):
        Image.new("RGB", (20, 20), RED).save(home / f"{number}.{extension.upper()}", form, **options)
        (home / f"{number}.txt").write_text("红")
    images = FolderDataset(home, "train", 8, 0)
    samples = [images[index] for index in range(len(images))]
    assert len(samples) == len(extensions)
    assert all(isinstance(one, ImageSample) and np.allclose(one.image[:, 4, 4], RED, atol=5) for one in samples)


class Pictures:
    @staticmethod
    def row_jpeg(home: Path) -> None:
        """JPEG"""
        found_and_read(home, "JPEG", "jpg", "jpeg", "jpe", "jfif", "mpo")
        file = home / "a.mpo"
        Image.new("RGB", (8, 8), RED).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
        assert is_red(file)

    @staticmethod
    def row_png(home: Path) -> None:
        """PNG"""
        found_and_read(home, "PNG", "png", "apng", save_all=True, append_images=[Image.new("RGB", (20, 20))])

    @staticmethod
    def row_animations(home: Path) -> None:
        """WebP, GIF"""
        for form in ("WEBP", "GIF"):
            (home / form).mkdir()
            more = {"save_all": True, "append_images": [Image.new("RGB", (20, 20))]}
            found_and_read(home / form, form, form.lower(), **more)

    @staticmethod
    def row_bmp(home: Path) -> None:
        """BMP, TIFF"""
        (home / "bmp").mkdir()
        found_and_read(home / "bmp", "BMP", "bmp")
        (home / "tiff").mkdir()
        more = {"save_all": True, "append_images": [Image.new("RGB", (20, 20))]}
        found_and_read(home / "tiff", "TIFF", "tif", "tiff", **more)

    @staticmethod
    def row_ppm(home: Path) -> None:
        """PPM"""
        found_and_read(home, "PPM", "ppm", "pgm", "pbm", "pnm")

    @staticmethod
    def row_avif(home: Path) -> None:
        """AVIF"""
        if "AVIF" not in Image.SAVE:
            pytest.skip("this Pillow reads no AVIF")
        found_and_read(home, "AVIF", "avif", quality=95)

    @staticmethod
    def row_extra(home: Path) -> None:
        """HEIC, JPEG XL"""
        pytest.importorskip("pillow_heif").register_heif_opener()
        pytest.importorskip("pillow_jxl")
        for form, extensions in (("HEIF", ("heic", "heif", "hif")), ("JXL", ("jxl",))):
            (home / form).mkdir()
            found_and_read(home / form, form, *extensions)

    @staticmethod
    def row_profile(home: Path) -> None:
        """with an ICC profile (Display P3, Adobe RGB, CMYK, grey, …)"""
        wide = ImageCms.ImageCmsProfile(io.BytesIO(profile("Display P3")))
        image = ImageCms.profileToProfile(Image.new("RGB", (8, 8), (200, 60, 60)), SRGB, wide)
        assert np.allclose(levels(stream(image, icc_profile=profile("Display P3"))), (200, 60, 60), atol=3)

    @staticmethod
    def row_broken_profile(home: Path) -> None:
        """with a broken profile, or one for other pixels"""
        for icc in (b"none" * 50, profile("Adobe RGB", b"CMYK")):
            found = decode_image(stream(Image.new("RGB", (8, 8), RED), icc_profile=icc), 8)
            assert found.pixels[:, 0, 0].tolist() == list(RED) and found.remark.endswith("was ignored")

    @staticmethod
    def row_transparent(home: Path) -> None:
        """transparent"""
        assert levels(stream(Image.new("RGBA", (8, 8), (*RED, 0)))) == [255, 255, 255]
        grey = Image.fromarray(np.full((8, 8), 700, np.uint16))
        assert levels(with_transparent_level(stream(grey), 700)) == [255, 255, 255]

    @staticmethod
    def row_sixteen(home: Path) -> None:
        """16-bit"""
        assert levels(stream(Image.fromarray(np.full((8, 8), 0x1234, np.uint16)))) == [0x12] * 3

    @staticmethod
    def row_thirty_two(home: Path) -> None:
        """32-bit grey of a TIFF"""
        for largest in (255, 65535, 2**31 - 1):
            assert levels(stream(Image.fromarray(np.full((8, 8), largest, np.int32)), "TIFF")) == [255] * 3

    @staticmethod
    def row_float(home: Path) -> None:
        """floating-point"""
        with pytest.raises(ImageError, match="floating-point pixels are not supported"):
            levels(stream(Image.new("F", (8, 8)), "TIFF"))

    @staticmethod
    def row_large_jpeg(home: Path) -> None:
        """JPEG much larger than needed"""
        assert is_red(stream(Image.new("RGB", (999, 701), RED), "JPEG", quality=95))

    @staticmethod
    def row_limit(home: Path) -> None:
        """more than `data.max_pixels` pixels to decode"""
        image = Image.new("RGB", (30, 30), RED)
        with pytest.raises(ImageError, match=r"^30x30 pixels are more than data\.max_pixels=300 allows"):
            levels(stream(image), max_pixels=300)
        assert levels(stream(image, "JPEG"), max_pixels=300)[0] > 200

    @staticmethod
    def row_bytes(home: Path) -> None:
        """more than 256 MiB"""
        with (home / "a.png").open("wb") as file:
            file.truncate(2**28 + 1)
        with pytest.raises(ImageError, match="has 268,435,457 bytes, at most 268,435,456 are read"):
            levels(home / "a.png")

    @staticmethod
    def row_ends(home: Path) -> None:
        """JPEG without EOI, PNG without IEND"""
        for form, end in (("JPEG", 2), ("PNG", 12)):
            data = stream(Image.new("RGB", (8, 8), RED), form).getvalue()[:-end]
            assert is_red(io.BytesIO(data))
            assert decode_image(io.BytesIO(data), 8).remark == "the end marker was missing"

    @staticmethod
    def row_damage(home: Path) -> None:
        """more missing, or a wrong checksum in a PNG"""
        data = bytearray(stream(Image.new("RGB", (8, 8), RED)).getvalue())
        data[data.index(b"IDAT") + 8] ^= 1
        for broken in (data, data[: len(data) // 2]):
            with pytest.raises(ImageError):
                levels(io.BytesIO(broken))

    @staticmethod
    def row_center(home: Path) -> None:
        """`data.crop=center`"""
        assert [levels(sides(), column) for column in (0, 7)] == [[250, 0, 0], [0, 0, 250]]

    @staticmethod
    def row_random(home: Path) -> None:
        """`data.crop=random`"""
        decoding = Decoding(crop=Crop.random)
        places = {int(decode_image(sides(), 8, options=decoding, view=f"{n}").pixels[2, 4].sum()) for n in range(30)}
        assert len(places) > 5

    @staticmethod
    def row_pad(home: Path) -> None:
        """`data.crop=pad`"""
        pixels = decode_image(sides(), 8, options=Decoding(crop=Crop.pad)).pixels
        assert (pixels[:, :2] == 255).all() and pixels[:, 4, 1].tolist() == [250, 0, 0]

    @staticmethod
    def row_zoom(home: Path) -> None:
        """`data.zoom=2`"""
        across = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # its shades say which part a view shows
        file = stream(Image.fromarray(np.stack([across, across.T, across], -1))).getvalue()
        decoding = Decoding(zoom=2)
        whole = decode_image(io.BytesIO(file), 32).pixels
        views = [decode_image(io.BytesIO(file), 32, options=decoding, view=f"{n}").pixels for n in range(60)]
        parts = [view for view in views if not view.equal(whole)]
        assert 20 < len(parts) < 40
        corners = {(int(view[1, 0, 0]) // 4, int(view[0, 0, 0]) // 4) for view in parts}
        assert corners == {(y, x) for y in (0, 16, 32) for x in (0, 16, 32)}
        for view in parts:
            top, left = int(view[1, 0, 0]) // 4, int(view[0, 0, 0]) // 4
            assert view[0].equal(torch.from_numpy(across[top : top + 32, left : left + 32]))
        small = [decode_image(io.BytesIO(file), 48, options=decoding, view=f"{n}").pixels for n in range(20)]
        assert {int(view[0, 0, -1] - view[0, 0, 0]) // 4 for view in small} == {47, 62}  # 64 pixels at most

    @staticmethod
    def row_flip(home: Path) -> None:
        """`data.flip=true`"""
        decoding = Decoding(flip=True)
        reds = [int(decode_image(sides(), 8, options=decoding, view=f"{n}").pixels[0, 4, 0]) for n in range(40)]
        assert set(reds) == {0, 250} and 8 < reds.count(0) < 32

    @staticmethod
    def row_views(home: Path) -> None:
        """`data.crop=random data.views=4`"""
        (home / "a.png").write_bytes(sides().getvalue())
        (home / "a.txt").write_text("猫")
        images = FolderDataset(home, "train", 8, 0, decoding=Decoding(crop=Crop.random, views=4))
        views = Views(images, images.decoding.views)
        assert [views[index].key for index in range(4)] == ["a.png", "a.png#2", "a.png#3", "a.png#4"]


def sides() -> io.BytesIO:
    """Twice as wide as high: red on the left, blue on the right."""
    image = Image.new("RGB", (32, 16), (250, 0, 0))
    image.paste((0, 0, 250), (16, 0, 32, 16))
    return stream(image)
