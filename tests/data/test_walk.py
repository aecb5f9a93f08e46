"""Files of a folder, names in lists, and what is left out."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.image_folders.file_names import FileNames, normalised
from cogview_pl.data.image_folders.walk import walk
from cogview_pl.data.samples import ImageSample, Skipped

from .image_folders import captioned, folder, listing

NFC, NFD = unicodedata.normalize("NFC", "é猫.png"), unicodedata.normalize("NFD", "é猫.png")


def data(root: Path, split: str = "train", fraction: float = 0.0, **options: object) -> FolderDataset:
    return FolderDataset(root, split, 4, fraction, **options)  # type: ignore[arg-type]


def keys(dataset: FolderDataset) -> list[str]:
    return [dataset.key(index) for index in range(len(dataset))]


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    captioned(tmp_path, ["a.png", "b.png"])
    (tmp_path / "captions.csv").unlink()
    (tmp_path / "sub").mkdir()
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "sub" / "up").symlink_to("..")
    assert walk(tmp_path).images == ["a.png", "b.png"]
    assert keys(data(tmp_path, text_fields=())) == ["a.png", "b.png"]


def test_a_named_pipe_is_no_image_and_a_broken_link_is_a_skipped_one(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    found = data(tmp_path, text_fields=())
    assert isinstance(found[0], ImageSample)
    assert found[1] == Skipped("broken.png", "file not found")
    assert len(found) == 2
    assert found.notes() == [f"data.root={tmp_path}: 1 file is left out: 1 named pipe (pipe.png)"]


def test_what_systems_and_programs_leave_in_a_folder_is_left_out_and_counted(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png", "@eaDir/a.png", "__MACOSX/a.png", ".thumbnails/a.png", "._a.png", "s/._a.png"])
    for name in ("Thumbs.db", "x.psd", "y.PSD", "LICENSE"):
        (tmp_path / name).touch()
    found = data(tmp_path, text_fields=())
    assert keys(found) == ["a.png"]
    (note,) = found.notes()
    assert note.startswith(f"data.root={tmp_path}: 9 files are left out: ")
    for part in ("2 hidden files (._a.png …)", "1 hidden folder (.thumbnails)", "1 @eaDir folder (@eaDir)",
                 "1 __MACOSX folder (__MACOSX)", "2 .psd (x.psd …)", "1 of other kinds"):  # fmt: skip
        assert part in note


def test_what_a_list_does_not_name_is_counted(tmp_path: Path) -> None:
    captioned(tmp_path, ["a.png", "b.png", "c.png"])
    listing(tmp_path, "captions.csv", "file_name,text\na.png,图\n")
    listing(tmp_path, "a.txt", "旧")
    found = data(tmp_path)
    assert found.texts() == ["图"]
    assert found.notes() == [
        f"data.root={tmp_path}: captions are the field text of captions.csv",
        f"data.root={tmp_path}: 3 files are left out: 2 .png that no list names (b.png …), "
        "1 .txt beside images (a.txt)",
    ]


def test_images_without_a_caption_are_said(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png", "b.png", "c.png"])
    listing(tmp_path, "a.txt", "图")
    assert data(tmp_path).notes() == [
        f"data.root={tmp_path}: captions are the .txt files beside the images",
        f"data.root={tmp_path}: 2 of 3 images have no caption and will be skipped",
    ]


# --- names in lists


@pytest.mark.parametrize(
    ("given", "name"),
    [("a.png", "a.png"), ("./a.png", "a.png"), ("s//a.png", "s/a.png"), ("s/../a.png", "a.png"), ("../a", "../a"),
     ("file:///d/%E7%8C%AB.png", "/d/猫.png"), ("/d/a.png", "/d/a.png"), ("", "")],
)  # fmt: skip
def test_names_are_normalised(given: str, name: str) -> None:
    assert normalised(given) == name


def test_one_image_under_two_names_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    names = [f"{number:02d}.png" for number in range(30)]
    folder(tmp_path, names)
    rows = [f"{dots}{name},图" for name in names for dots in ("", "./")]
    listing(tmp_path, "captions.csv", "\n".join(["file_name,text", *rows]))
    train, val = (keys(data(tmp_path, split, 0.3)) for split in ("train", "val"))
    assert sorted({*train, *val}) == names and not set(train) & set(val)
    assert len(train) + len(val) == 60 and val


@pytest.mark.parametrize(
    ("file", "given", "how"),
    [
        (NFD, NFC, "in another form of Unicode"),
        (NFC, NFD, "in another form of Unicode"),
        ("s/a.png", "s\\a.png", "with / for \\"),
        ("s/A.PNG", "s\\a.png", "in other letter case"),
        ("a.PNG", "a.png", "in other letter case"),
        ("s/a.png", "s/a", "with an extension that their names lack"),
        ("s/a.png", "a.png", "in another folder, by their base names"),
    ],
)
def test_other_spellings_are_found_and_said(tmp_path: Path, file: str, given: str, how: str) -> None:
    folder(tmp_path, [file])
    listing(tmp_path, "captions.csv", f"file_name,text\n{given},图\n")
    found = data(tmp_path)
    sample = found[0]
    assert isinstance(sample, ImageSample)
    assert (sample.key, sample.text) == (file, "图")
    assert found.notes()[1] == f"data.root={tmp_path}: 1 of the listed files were found {how}"


def test_a_spelling_that_fits_several_files_fits_none(tmp_path: Path) -> None:
    names = FileNames(tmp_path, ["s/a.png", "t/a.png", "b.png", "B.png", "c.png", "c.jpg"])
    assert [names.find(given) for given in ("a.png", "b.PNG", "c", "u/b.png")] == ["a.png", "b.PNG", "c", "u/b.png"]
    assert names.find("b.png") == "b.png" and names.notes() == []


def test_a_name_with_a_backslash_of_its_own_is_itself(tmp_path: Path) -> None:
    folder(tmp_path, ["s\\a.png", "s/a.png"])
    listing(tmp_path, "captions.csv", "file_name,text\ns\\a.png,图\n")
    assert keys(data(tmp_path)) == ["s\\a.png"]
