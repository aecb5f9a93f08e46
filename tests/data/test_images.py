"""Names of images, their captions, and splits."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cogview_pl.data.captions import CaptionError, field_text
from cogview_pl.data.image_folders.walk import find_images
from cogview_pl.data.images import split_indices
from cogview_pl.data.samples import fraction_of
from cogview_pl.errors import UserError


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    for name in ("a/x.png", "a/b/y.png", "c/z.png", "lost+found/t.png", ".hidden/u.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in (("a/up", ".."), ("a/b/up", "../.."), ("a/self", "."), ("c/a", "../a"), ("a/b/c", "../../c")):
        (tmp_path / link).symlink_to(target)
    found = [file.relative_to(tmp_path).as_posix() for file in find_images(tmp_path)]
    assert found == ["a/x.png", "a/b/y.png", "a/b/c/z.png", "c/z.png", "c/a/x.png", "c/a/b/y.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match=r"closed cannot be read \(Permission denied\); make it readable"):
        list(find_images(tmp_path))


def test_split_indices() -> None:
    keys = [f"{i:05d}" for i in range(10_000)]
    val = split_indices(keys, "val", 0.1).tolist()
    assert 900 < len(val) < 1100
    assert sorted(val + split_indices(keys, "train", 0.1).tolist()) == list(range(10_000))
    assert set(val) < set(split_indices(keys, "val", 0.2).tolist())
    assert val == [index for index, key in enumerate(keys) if fraction_of(key) < 0.1]
    assert split_indices(["a", "b", "a"], "val", 0.5).tolist() in ([0, 2], [1])  # equal keys share a side


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_no_split_is_empty_with_two_images(fraction: float) -> None:
    for number in range(20):
        keys = [f"{number}a", f"{number}b"]
        assert len(split_indices(keys, "val", fraction)) == len(split_indices(keys, "train", fraction)) == 1


def test_the_extreme_fractions_put_everything_on_one_side() -> None:
    for train, val in ((0, 1), (1, 0)):
        assert split_indices(["a", "b"], "train", train).tolist() == [0, 1][: 2 * val]
        assert split_indices(["a", "b"], "val", val).tolist() == [0, 1][: 2 * val]
    assert split_indices([], "train", 0.5).tolist() == []
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"data\.val_fraction=\S+ must be between 0 and 1"):
            split_indices(["a"], "train", fraction)


@pytest.mark.parametrize(("name", "found"), [("a.JPG", True), ("a.jpeg", True), ("a.png", True), ("a.webp", True),
    ("a.bmp", True), ("a.gif", True), ("a.b.png", True), ("a.txt", False), ("png", False), ("a.png.txt", False),
    (".a.png", False), ("a.tiff", True), ("a.jfif", True), ("a.AVIF", True), ("a.heic", True), ("a.jxl", True),
    ("a.psd", False)])  # fmt: skip
def test_images_are_told_by_their_names(tmp_path: Path, name: str, found: bool) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / name).touch()
    assert list(find_images(tmp_path)) == [tmp_path / "folder.png" / name] * found


def test_images_come_in_the_order_of_their_names_folder_by_folder(tmp_path: Path) -> None:
    for name in ("b/b.png", "a/z.png", "b.png", "a.png", "b/a/1.png", "10.png", "9.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in find_images(tmp_path)]
    assert found == ["10.png", "9.png", "a.png", "b.png", "a/z.png", "b/b.png", "b/a/1.png"]


@pytest.mark.parametrize(
    ("value", "text"),
    [("  猫 \n", "猫"), ("", ""), (None, ""), ([], ""), ([None], ""), (["猫 ", "狗"], "猫"), ([["猫"]], None),
     (3, None), (True, None), ({"a": "猫"}, None), ("\ud800", None), (["\ud800"], None)],
)  # fmt: skip
def test_the_text_of_a_field(value: object, text: str | None) -> None:
    if text is not None:
        assert field_text(value) == text
    else:
        with pytest.raises(CaptionError, match=r"^the style is not "):
            field_text(value, "style")


def test_what_is_no_text_is_quoted_shortly() -> None:
    with pytest.raises(CaptionError) as error:
        field_text({"猫": "a" * 100})
    assert str(error.value) == 'the caption is not text but {"猫": "' + "a" * 33


def test_the_side_of_a_key_is_fixed_for_ever() -> None:
    """Else images that a model was trained on would come into the validation of a run that goes on."""
    keys = [f"{number:02d}.png" for number in range(40)]
    assert split_indices(keys, "val", 0.2).tolist() == [4, 6, 10, 20, 21, 34, 39]
    hashes = [int(hashlib.sha1(key.encode()).hexdigest()[:16], 16) / 2**64 for key in keys]
    for fraction in (0.1, 0.2, 0.5):
        val = [index for index, place in enumerate(hashes) if place < fraction]
        assert split_indices(keys, "val", fraction).tolist() == val
    for split in ("test", "", "Train"):
        with pytest.raises(ValueError, match="split must be train or val"):
            split_indices(keys, split, 0.5)
