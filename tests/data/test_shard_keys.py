"""Keys with dots, joined shards, names and keys that appear twice, and members that are left out."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from cogview_pl.data.progress import Silent
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors import UserError

from .shards import image, keys, level, numbered, read, readable, write_tar


def pairs(*stems: str, start: int = 0) -> dict[str, bytes]:
    """An image and a `.txt` of each name; grey levels count up, the text is the name."""
    members = {}
    for number, stem in enumerate(stems, start):
        members |= {f"{stem}.png": image(number), f"{stem}.txt": stem.encode()}
    return members


def found(dataset: ShardDataset) -> dict[str, tuple[str, int]]:
    return {sample.key: (sample.text, level(sample)) for sample in readable(dataset)}


@pytest.mark.parametrize(
    "stems",
    [
        [f"scan.{i:03d}" for i in range(60)],
        [f"photo {i}.0 (V1.{i})" for i in range(10)],
        [f"www.example.com_{i}" for i in range(10)],
        [f"img_{i}.final" if i % 4 == 0 else f"img_{i}" for i in range(20)],
        [f"第{i}章 v1.0/页.{i % 2}" for i in range(6)],
        ["scan.a", "scan.A"],
    ],
    ids=lambda stems: stems[0],
)
def test_names_with_dots_stay_samples_of_their_own(tmp_path: Path, stems: list[str]) -> None:
    dataset = read(write_tar(tmp_path / "0.tar", pairs(*stems)), "txt")
    assert found(dataset) == {stem: (stem, number) for number, stem in enumerate(stems)}
    assert keys(dataset) == stems
    with_dots = [stem for stem in stems if "." in stem.rpartition("/")[2]]
    assert dataset.notes()[1:] == [
        f"data.urls: {len(with_dots)} names have dots, such as {with_dots[0]}; each of them up to its last dot is a key"
    ]


def test_other_samples_keep_their_keys_and_order(tmp_path: Path) -> None:
    members = pairs("a", "scan.0", "b", "scan.1", "c")
    dataset = read(write_tar(tmp_path / "0.tar", members), "txt")
    assert keys(dataset) == ["a", "scan.0", "scan.1", "b", "c"]
    assert found(dataset)["b"] == ("b", 2)


def test_further_images_of_a_complete_sample_are_left_out_and_counted(tmp_path: Path) -> None:
    members = pairs("a", "b") | {"a.small.png": image(7), "a.small.txt": b"small", "b.small.png": image(8)}
    dataset = read(write_tar(tmp_path / "0.tar", members), "txt")
    assert found(dataset) == {"a": ("a", 0), "b": ("b", 1)}
    assert dataset.notes() == [
        "data.urls: captions are the texts of the .txt members",
        "data.urls: 3 members are left out: 2 further images of a sample (a.small.png …), 1 .txt (a.small.txt)",
    ]


def test_one_image_of_another_name_belongs_to_the_text_and_several_are_refused(tmp_path: Path) -> None:
    members = {"a.input.png": image(1), "a.txt": b"a", "b.png.png": image(2), "b.txt": b"b"}
    members |= {"c.left.png": image(3), "c.right.png": image(4), "c.txt": b"c", "d.0.txt": b"d"}
    dataset = read(write_tar(tmp_path / "0.tar", members), "txt")
    samples = [dataset[i] for i in range(len(dataset))]
    assert [(s.text, level(s)) for s in samples if isinstance(s, ImageSample)] == [("a", 1), ("b", 2)]
    assert [s for s in samples if isinstance(s, Skipped)] == [
        Skipped("c", "the shard has several images for this text, and none of them is c.jpg"),
        Skipped("d", "no .txt in the shard"),
    ]


def test_images_without_any_text_are_samples_of_their_own(tmp_path: Path) -> None:
    members = {f"scan.{i}.png": image(i) for i in range(5)} | {"a.png": image(9)}
    dataset = read(write_tar(tmp_path / "0.tar", members), "txt", text_fields=())
    assert {s.key: level(s) for s in readable(dataset)} == {**{f"scan.{i}": i for i in range(5)}, "a": 9}


def test_joined_shards_are_read_to_the_end(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / f"{i}.tar", numbered(i, i + 2)).read_bytes() for i in (0, 2, 4)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(parts))
    assert found(read(joined)) == {f"s{i:04d}": (f"图{i}", i) for i in range(6)}
    joined.write_bytes(parts[0] + bytes(3 * 2**20) + parts[1] + bytes(700))
    assert keys(read(joined)) == ["s0000", "s0001", "s0002", "s0003"]


def test_other_data_after_the_end_of_a_shard_is_refused(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "0.tar", numbered(0, 2))
    file.write_bytes((whole := file.read_bytes()) + b"junk" * 200)
    with pytest.raises(UserError, match=rf"0\.tar is cut off or damaged at byte {len(whole)} .* what follows the end"):
        read(file)


def test_a_name_that_appears_twice_is_said_and_the_later_counts(tmp_path: Path) -> None:
    files = [write_tar(tmp_path / f"{i}.tar", pairs("a", start=i)).read_bytes() for i in (1, 3)]
    (tmp_path / "joined.tar").write_bytes(b"".join(files))
    dataset = read(tmp_path / "joined.tar", "txt")
    assert found(dataset) == {"a": ("a", 3)}
    assert dataset.notes()[1:] == [
        "data.urls: 2 members are left out: 2 earlier members of a name that appears twice (a.png …)"
    ]


def test_a_key_of_two_shards_is_said_and_both_are_read(tmp_path: Path) -> None:
    for folder, start in (("first", 0), ("second", 10)):
        write_tar(tmp_path / folder / "0.tar", pairs("a", "b", start=start))
    dataset = read(f"{tmp_path}/*/0.tar", "txt")
    assert sorted((s.key, level(s)) for s in readable(dataset)) == [("a", 0), ("a", 10), ("b", 1), ("b", 11)]
    _, note = dataset.notes()
    assert note.startswith("data.urls: 2 samples have the key of an earlier one, such as ")
    assert f"{tmp_path}/first/0.tar and {tmp_path}/second/0.tar; all of them are read" in note


def test_progress_is_told_in_mebibytes(tmp_path: Path) -> None:
    told: list[int] = []

    class Told(Silent):
        def __init__(self, name: str, total: int | None, unit: str) -> None:
            told.append(total or 0)
            assert (name, unit) == ("index shards", "MiB")

        def update(self, count: int = 1) -> None:
            told.append(count)

    for number in range(2):
        members = numbered(number, number + 1) | {f"big{number}.{part}": bytes(2**20) for part in "abcd"}
        write_tar(tmp_path / f"{number}.tar", members)
    read(f"{tmp_path}/*.tar", progress=Told)
    total, *counts = told
    assert total == 8 and 6 <= sum(counts) <= 8


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    members = numbered(0, 3) | {f"s{i:04d}.txt": b"t" for i in range(3)} | {"s0001.image": b"1", "s0002.jpg": b""}
    members |= {"./data/._s1.png": b"mac", ".DS_Store": b"", "README": b""}
    file = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(file, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "s0001.png"
            tar.addfile(link)
    assert read(file).notes() == [
        "data.urls: captions are the field zh of the .json members",
        "data.urls: 10 members are left out: 3 .txt (s0000.txt …), 2 hidden files (./data/._s1.png …), "
        "2 links (link.png …), 1 without an extension (README), 1 .image (s0001.image), "
        "1 further image of a sample (s0002.jpg)",
    ]
    assert read(write_tar(tmp_path / "1.tar", numbered(0, 3))).notes()[1:] == []
