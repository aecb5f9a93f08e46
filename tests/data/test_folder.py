"""Folders of captioned images: their captions, their styles, and the errors that name what is wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogview_pl.data.bad_samples import require_readable
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError

from .image_folders import PATTERNS, captioned, captions, folder, holes, linked, listed, listing, one_line, piped

JSONL = (
    '{"file_name": "a.png", "text": " 熊猫 ", "en": "panda"}\n\n{"file_name": "s/b.png", "text": "猫", "en": "cat"}\n'
)
CSV = 'file_name,text,en\na.png, 熊猫 ,panda\ns/b.png,猫,"cat"\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", JSONL),
        ("captions.jsonl", JSONL.replace("file_name", "image").replace("\n", "\r\n")),
        ("captions.jsonl", JSONL.replace("file_name", "path").replace('"text"', '"caption"')),
        ("captions.jsonl", JSONL.replace('"猫"', '["猫", "小猫"]')),
        ("captions.csv", CSV),
        ("metadata.csv", CSV.replace("\n", "\r\n").replace("text", "caption")),
        ("captions.tsv", CSV.replace(",", "\t")),
        ("metadata.tsv", CSV.replace(",", "\t")),
    ],
)
def test_listings(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    folder(tmp_path, ["a.png", "s/b.png"])
    listing(tmp_path, name, content, encoding)
    assert captions(tmp_path) == [("a.png", "熊猫"), ("s/b.png", "猫")]
    assert captions(str(tmp_path), "en") == [("a.png", "panda"), ("s/b.png", "cat")]


def test_a_quoted_caption_may_hold_separators_and_lines(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png"])
    listing(tmp_path, "captions.csv", 'file_name,text\na.png,"一,二\n""三"""\n')
    assert captions(tmp_path) == [("a.png", '一,二\n"三"')]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_text_file_beside_each_image(tmp_path: Path, encoding: str) -> None:
    folder(tmp_path, ["b.png", "s/a.JPG", ".hidden/c.png", "._b.png", "nocaption.gif"])
    listing(tmp_path, "b.txt", "红色的圆\n", encoding)
    listing(tmp_path / "s", "a.txt", "方块", encoding)
    listing(tmp_path, "README.txt", "not a caption")
    assert captions(tmp_path) == [("b.png", "红色的圆"), ("nocaption.gif", ""), ("s/a.JPG", "方块")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "gone", r"data\.root=\S*gone does not exist; set it to"),
        (lambda root: listing(root, "f", "") / "f", r"data\.root=\S*f is not a folder"),
        (lambda root: root, r"has no captions; add one of metadata\.jsonl, .*captions\.tsv.* or one \.txt"),
        (lambda root: listing(root, "captions.jsonl", "\n"), r"captions\.jsonl lists no images"),
        (lambda root: listing(root, "captions.csv", ""), r"captions\.csv lists no images"),
        (
            lambda root: listing(root, "captions.jsonl", '{"image": "a.png", "text": "t"}\n{"image": '),
            r"captions\.jsonl:2 is not JSON",
        ),
        (lambda root: listing(root, "captions.jsonl", "[1]"), r"captions\.jsonl:1 is not a JSON object"),
        (
            lambda root: listing(root, "captions.jsonl", '{"text": "t"}'),
            r"jsonl:1 names no image.*fields here: text",
        ),
        (
            lambda root: listing(root, "captions.jsonl", '{"image": "a.png", "zh": "t", "en": "t"}'),
            r"jsonl:1 has no field text or caption; set data\.caption_field to one of: image, zh, en",
        ),
        (
            lambda root: listing(root, "captions.jsonl", '{"image": "a.png", "text": 3}'),
            r":1, text: .* not text but 3",
        ),
        (
            lambda root: listing(root, "captions.csv", "file_name,text\na.png,t,u\n"),
            r"csv:2 has 3 columns, .* has 2",
        ),
        (lambda root: listing(root, "captions.csv", 'file_name,text\na.png,"t\n'), r"csv:2 is malformed"),
        (
            lambda root: listing(root, "captions.csv", "file_name,text\na.png,\xff\xe9\n", "latin-1"),
            r"csv:2, text: the caption is not valid Unicode; mend the line or set data\.caption_field$",
        ),
        (
            lambda root: listing(root, "captions.csv", "file_name,text\nx.png,t\ny.png,t\n"),
            r"none of the 2 listed images exists, the first is \S*x\.png",
        ),
        (lambda root: listing(root, "a.txt", "\xff\xe9", "latin-1"), r"/a\.txt is not UTF-8 text; save it as UTF-8$"),
        (lambda root: root / ("y" * 300), r"data\.root=\S*y cannot be read \(File name too long\); set it to"),
        (
            lambda root: linked(root / "loop"),
            r"data\.root=\S*loop cannot be read \(Too many levels of symbolic links\)",
        ),
        (lambda root: root / "a\0", r"data\.root=.* has no name that a file can have; set it to a folder"),
        (lambda root: piped(root, "captions.jsonl"), r"captions\.jsonl is a named pipe, not a file; mend or remove it"),
        (lambda root: linked(root / "captions.csv").parent, r"captions\.csv cannot be read \(Too many levels of symb"),
        (
            lambda root: folder(root, ["metadata.csv/b.png"]),
            r"metadata\.csv is a folder, not a file; mend or remove it",
        ),
        (lambda root: piped(root, "a.txt"), r"has no captions; add one of"),
        (
            lambda root: linked(root / "a.txt").parent,
            r"a\.txt cannot be read \(Too many levels of symbolic links\); mend",
        ),
        (lambda root: holes(root, "a.txt"), r"a\.txt has 1,099,511,627,776 bytes, at most 1,048,576 are read; mend"),
        (
            lambda root: holes(root, "captions.jsonl"),
            r"captions\.jsonl:1 has more than 1,048,576 characters; write one",
        ),
        (lambda root: holes(root, "captions.csv"), r"captions\.csv:1 has more than 1,048,576 characters; write one"),
        (
            lambda root: listing(root, "metadata.jsonl", JSONL + '{"file_name": "' + "c" * 2**20),
            r"metadata\.jsonl:4 has more than 1,048,576 characters; write one image per line",
        ),
        (
            lambda root: listing(linked(root / "l.png").parent, "captions.csv", "file_name,text\nx.png,t\nl.png,t\n"),
            r"none of the 2 listed images can be read; \S*l\.png cannot be read \(Too many levels of symb",
        ),
        (
            lambda root: listing(root, "captions.csv", f"file_name,text\n{'x' * 300}.png,t\n"),
            r"none of the 1 listed images can be read; \S*x\.png cannot be read \(File name too long\)$",
        ),
    ],
)
def test_what_is_wrong_with_a_folder(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    root = make(folder(tmp_path, ["a.png"]))
    with pytest.raises(UserError, match=message) as error:
        captions(root)
    one_line(error)


def test_an_unknown_caption_field_is_named(tmp_path: Path) -> None:
    listing(folder(tmp_path, ["a.png"]), "captions.csv", CSV)
    with pytest.raises(UserError, match=r"csv:2 has no field zh; .* one of: file_name, text, en"):
        captions(tmp_path, "zh")


# --- FolderDataset


def test_folder_samples(tmp_path: Path) -> None:
    names = ["a.png", "b.png"]
    dataset = FolderDataset(captioned(tmp_path, names), "train", 4, 0.0)
    assert dataset.texts() == [dataset.text(0), dataset.text(1)] == ["图a.png", "图b.png"]
    sample = dataset[1]
    assert isinstance(sample, ImageSample)
    assert (sample.key, sample.text) == (dataset.key(1), dataset.text(1)) == ("b.png", "图b.png")
    assert sample.image[:, 0, 0].tolist() == [255, 0, 0]
    assert dataset[-1].key == "b.png"
    with pytest.raises(IndexError):
        dataset[2]


def test_bad_samples_are_skipped_with_a_reason(tmp_path: Path) -> None:
    folder(tmp_path, ["good.png", "empty.png"])
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = ["good.png,g", "empty.png, ", "bad.png,b", "gone.png,x"]
    listing(tmp_path, "captions.csv", "\n".join(["file_name,text", *rows]))
    dataset = FolderDataset(tmp_path, "train", 4, 0.0)
    assert isinstance(dataset[0], ImageSample)
    assert dataset[1] == Skipped("empty.png", "the caption is empty")
    assert dataset[2] == Skipped("bad.png", "not an image in a known format, or cut off")
    assert dataset[3] == Skipped("gone.png", "file not found")


def test_what_is_no_file_is_skipped_with_a_reason_and_not_opened(tmp_path: Path) -> None:
    root = piped(captioned(tmp_path, ["good.png"]), "pipe.png")
    (root / "folder.png").mkdir()
    rows = ["good.png,g", "pipe.png,p", "folder.png,f", f"{linked(root / 'loop.png').name},l", f"{'x' * 300},x"]
    listing(root, "captions.csv", "\n".join(["file_name,text", *rows]))
    dataset = FolderDataset(root, "train", 4, 0.0)
    assert isinstance(dataset[0], ImageSample)
    assert [dataset[i] for i in range(1, 5)] == [
        Skipped("pipe.png", "is a named pipe, not a file"),
        Skipped("folder.png", "is a folder, not a file"),
        Skipped("loop.png", "cannot be read (Too many levels of symbolic links)"),
        Skipped("x" * 300, "cannot be read (File name too long)"),
    ]


def test_lines_of_a_caption_beside_an_image_end_alike(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_bytes("一\r\n二\r三\n".encode())
    assert listed(tmp_path)[0].captions == ("一", "二", "三")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a.txt", "captions.csv", "."])
def test_what_may_not_be_read_is_not_missing(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "root", ["a.png"])
    listing(root, "a.txt", "t")
    if name == "captions.csv":
        listing(root, name, CSV)
    (root / name).chmod(0)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)") as error:
        captions(root)
    assert str(root / name) in one_line(error)
    root.chmod(0o700)


# --- fingerprint


def test_the_fingerprint_is_that_of_samples_and_settings(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    root = captioned(tmp_path / "root", names)

    def of(split: str = "train", size: int = 4, fraction: float = 0.0, **options: Any) -> str:
        return FolderDataset(root, split, size, fraction, **options).fingerprint()

    fingerprint = of()
    assert fingerprint == of() and len(fingerprint) == 32
    found = [fingerprint, of(size=8), of(min_size=1), of("train", 4, 0.5), of("val", 4, 0.5)]
    found += [of(style_field="text"), of(style_field="text", style_patterns=PATTERNS)]
    captioned(root, names[::-1])
    found.append(of())
    captioned(root, names[:2])
    found.append(of())
    listing(root, "captions.csv", "file_name,text\na.png,图a.png\nb.png,图b.png\nc.png,其它\n")
    found.append(of())
    assert len(set(found)) == len(found) == 10


def test_the_fingerprint_goes_with_copies_and_tells_changed_images(tmp_path: Path) -> None:
    root = captioned(tmp_path / "root", ["a.png", "b.png"])
    dataset = FolderDataset(shutil.copytree(root, tmp_path / "copy"), "train", 4, 0.0)  # with the times of its files
    image = tmp_path / "copy" / "b.png"
    found = [FolderDataset(root, "train", 4, 0.0).fingerprint(), dataset.fingerprint()]
    assert found[0] == found[1]
    time = image.stat().st_mtime_ns
    os.utime(image, ns=(time, time + 1))
    found.append(dataset.fingerprint())
    os.truncate(image, 1)
    os.utime(image, ns=(time, time))
    found.append(dataset.fingerprint())
    image.unlink()
    found.append(dataset.fingerprint())
    assert len(set(found)) == 4


def test_the_split_is_a_stable_partition(tmp_path: Path) -> None:
    names = [f"s/{i}.png" for i in range(40)]
    root = captioned(tmp_path, names)
    sides = {split: FolderDataset(root, split, 4, 0.25) for split in ("train", "val")}
    keys = {split: [side.key(i) for i in range(len(side))] for split, side in sides.items()}
    assert sorted(keys["train"] + keys["val"]) == sorted(names)
    # Each sample keeps its side when others are taken away and the order changes.
    fewer = list(reversed(names))[:20]
    captioned(root, fewer)
    later = FolderDataset(root, "val", 4, 0.25)
    assert [later.key(i) for i in range(len(later))] == [name for name in fewer if name in keys["val"]]


def test_a_data_set_without_one_readable_sample_is_refused(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(70)]
    dataset = FolderDataset(captioned(tmp_path, names), "train", 4, 0.0)
    require_readable(dataset)
    for name in names[:-1]:
        (tmp_path / name).write_bytes(b"")
    require_readable(dataset, limit=70)
    (tmp_path / names[-1]).write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 64 samples of 70 .*first: 000\.png: not an image") as error:
        require_readable(dataset)
    one_line(error)
    with pytest.raises(UserError, match="no samples"):
        require_readable(FolderDataset(tmp_path, "val", 4, 0.0))


# --- smaller images


def test_smaller_images_are_skipped(tmp_path: Path) -> None:
    root = captioned(tmp_path, ["a.png", "b.png"])
    Image.new("RGB", (40, 16)).save(root / "b.png")
    dataset = FolderDataset(root, "train", 4, 0.0, min_size=16)
    assert dataset[0] == Skipped("a.png", "8x8 is smaller than data.min_size=16")
    assert isinstance(dataset[1], ImageSample)


# --- styles
