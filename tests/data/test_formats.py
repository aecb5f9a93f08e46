"""Formats of image files: what is found is read, and what is missing is named."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, features

from cogview_pl.data.bad_samples import require_readable
from cogview_pl.data.config import Decoding
from cogview_pl.data.decoding import formats
from cogview_pl.data.decoding.decode import ImageError, decode_image, load_image
from cogview_pl.data.decoding.formats import IMAGE_EXTENSIONS
from cogview_pl.data.decoding.jxl_size import jxl_size
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample
from cogview_pl.errors import UserError

RED = (220, 20, 20)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200
MIF1 = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 200
JXL = b"\xff\x0a" + b"\0" * 50
CONTAINER_JXL = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 50


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without the optional packages."""
    monkeypatch.setattr(formats, "_HEIF", formats._HEIF._replace(package="no_such_package_1"))
    monkeypatch.setattr(formats, "JXL", formats.JXL._replace(package="no_such_package_2"))
    for name in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    yield


def is_red(pixels: object) -> bool:
    return all(abs(found - wanted) < 6 for found, wanted in zip(pixels[:, 4, 4].tolist(), RED, strict=True))  # type: ignore


def test_every_extension_that_is_found_is_read(tmp_path: Path) -> None:
    """Under each extension stands a file of its format, or an error that names the extra."""
    for number, extension in enumerate(IMAGE_EXTENSIONS):
        if extension in ("heic", "heif", "hif", "jxl", "avif"):
            continue
        form = Image.registered_extensions()[f".{extension}"]
        Image.new("RGB", (20, 20), RED).convert("1" if extension == "pbm" else "RGB").save(
            tmp_path / f"{number:02}.{extension}", "JPEG" if form == "MPO" else form
        )
        (tmp_path / f"{number:02}.txt").write_text(extension)
    images = FolderDataset(tmp_path, "train", 8, 0)
    assert [images.text(index) for index in range(len(images))] == list(IMAGE_EXTENSIONS[:16])
    for sample in images:
        assert isinstance(sample, ImageSample)
        assert is_red(sample.image) or sample.text in ("pbm", "pgm")


def test_a_frame_of_several_in_one_jpeg(tmp_path: Path) -> None:
    file = tmp_path / "a.mpo"
    Image.new("RGB", (90, 90), RED).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (90, 90))])
    assert is_red(load_image(file, 8))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), RED).save(tmp_path / "a.jpg", "AVIF")
    assert is_red(load_image(tmp_path / "a.jpg", 8))
    data = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(ImageError):
        load_image(io.BytesIO(data[: len(data) // 2]), 8)


@pytest.mark.parametrize("name", ["HEIF", "JXL"])
def test_heic_and_jpeg_xl_with_the_extra(name: str) -> None:
    package = pytest.importorskip({"HEIF": "pillow_heif", "JXL": "pillow_jxl"}[name])
    if name == "HEIF":
        package.register_heif_opener()
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), RED).save(stream, name)
    assert is_red(load_image(io.BytesIO(stream.getvalue()), 8))
    with pytest.raises(ImageError):
        load_image(io.BytesIO(stream.getvalue()[:60]), 8)


@pytest.mark.parametrize(
    ("content", "form"), [(HEIC, "HEIC"), (MIF1, "HEIC"), (JXL, "JPEG XL"), (CONTAINER_JXL, "JPEG XL")]
)
def test_what_installs_a_missing_format_is_said(without_extra: None, content: bytes, form: str) -> None:
    with pytest.raises(ImageError) as error:
        load_image(io.BytesIO(content), 8)
    assert str(error.value) == f'{form} images are not decoded by this installation; pip install "cogview_pl[formats]"'


def test_a_folder_of_heic_files_without_the_extra_ends_with_its_name(without_extra: None, tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC)
    (tmp_path / "a.txt").write_text("猫")
    with pytest.raises(UserError, match=r'HEIC images .*pip install "cogview_pl\[formats\]"'):
        require_readable(FolderDataset(tmp_path, "train", 8, 0))


@pytest.mark.parametrize(
    ("width", "height"),
    [(8, 8), (64, 256), (40, 200), (7, 9), (300, 100), (513, 700), (9000, 3), (1920, 1080), (160, 120)],
)
def test_the_size_of_jpeg_xl_is_known_before_it_is_decoded(width: int, height: int) -> None:
    pytest.importorskip("pillow_jxl")
    image = Image.new("L", (width, height), 77)
    for options in ({}, {"exif": Image.Exif(), "use_container": True}):
        stream = io.BytesIO()
        image.save(stream, "JXL", **options)
        assert stream.getvalue().startswith(b"\0\0\0\x0cJXL " if options else b"\xff\x0a")
        assert jxl_size(stream) == (width, height)
        with pytest.raises(ImageError, match=rf"^{width}x{height} pixels are more than data\.max_pixels=26 allows"):
            decode_image(stream, 8, options=Decoding(max_pixels=26))


@pytest.mark.parametrize("content", [JXL, CONTAINER_JXL, CONTAINER_JXL[:12] + b"\0\0\0\x14ftyp" * 80])
def test_jpeg_xl_without_an_image_is_refused(content: bytes) -> None:
    pytest.importorskip("pillow_jxl")
    with pytest.raises(ImageError):
        load_image(io.BytesIO(content), 8)
