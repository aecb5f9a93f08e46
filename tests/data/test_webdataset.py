"""WebDataset shards: pairing, random access, splits, and what is said about bad ones."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cogview_pl.data.bad_samples import collate_images
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.shards import files as shard_files
from cogview_pl.data.shards.files import expand_urls
from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors import UserError

from .shards import image, keys, level, numbered, read, readable, write_tar


def test_any_sample_in_any_order(three_shards: Path) -> None:
    dataset = read(f"{three_shards}/set-{{000..002}}.tar")
    assert len(dataset) == 30
    for index in [29, 0, 17, 17, 10, 9, -1]:
        number = index % 30
        sample = dataset[index]
        assert isinstance(sample, ImageSample)
        assert (sample.key, sample.text) == (f"s{number:04d}", f"图{number}")
        assert torch.equal(sample.image, torch.full((3, 8, 8), number, dtype=torch.uint8))
    assert dataset.texts() == [f"图{number}" for number in range(30)]
    assert dataset.text(3) == "图3"
    assert read(f"{three_shards}/set-000.tar", "more").texts()[4] == "甲4"
    with pytest.raises(IndexError):
        dataset[30]


def test_it_reads_what_webdataset_writes_and_sees_the_same(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    file = tmp_path / "w.tar"
    with webdataset.TarWriter(str(file)) as writer:
        for number in range(5):
            key = f"dir.v1/样本{number}"
            writer.write({"__key__": key, "webp": image(number, "WEBP"), "json": {"zh": f"图{number}"}})
    theirs = list(webdataset.WebDataset(str(file), shardshuffle=False))
    ours = read(file)
    assert keys(ours) == [sample["__key__"] for sample in theirs]
    assert ours.texts() == [json.loads(sample["json"])["zh"] for sample in theirs]
    assert [level(sample) for sample in readable(ours)] == list(range(5))


def test_members_are_paired_by_the_name_up_to_its_first_dot(tmp_path: Path) -> None:
    members = {f"{name}.txt": name.encode() for name in ("a", "x/a", "x.y/a")}
    members |= {"a.PNG": image(1), "x/a.png": image(2), "x.y/a.png": image(3)}
    members |= {"a.small.png": image(4), ".hidden.png": image(5), "noextension": b"", "._a.png": b"mac"}
    dataset = read(write_tar(tmp_path / "a.tar", members), "txt")
    found = {sample.key: (sample.text, level(sample)) for sample in readable(dataset)}
    assert found == {"a": ("a", 1), "x/a": ("x/a", 2), "x.y/a": ("x.y/a", 3)}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_image_formats(tmp_path: Path, form: str) -> None:
    extension = {"JPEG": "jpeg"}.get(form, form.lower())
    tar = write_tar(tmp_path / "a.tar", {"k." + extension: image(90, form), "k.txt": b"\xef\xbb\xbf t \n"})
    sample = read(tar, "txt")[0]
    assert isinstance(sample, ImageSample)
    assert sample.text == "t"
    assert (sample.image.int() - 90).abs().max() <= 1


def test_long_names_and_large_members(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = tmp_path / f"{form}.tar"
        name = "很长的名字" * 40
        with tarfile.open(file, "w", format=form) as tar:
            for extension, data in (("png", image(7) + bytes(100_000)), ("txt", b"t")):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        sample = read(file, "txt")[0]
        assert isinstance(sample, ImageSample)
        assert sample.key == name


def test_what_is_missing_or_damaged_is_skipped_with_a_reason(tmp_path: Path) -> None:
    def caption(value: object) -> bytes:
        return json.dumps({"zh": value}).encode()

    members = {"good.png": image(1), "good.json": caption("好")}
    bad: dict[str, tuple[dict[str, bytes], str]] = {
        "a": ({"png": image(1)}, "no .json in the shard"),
        "b": ({"json": caption("t")}, "no image in the shard"),
        "c": ({"png": image(1), "json": b"{"}, "the .json is not valid JSON"),
        "d": ({"png": image(1), "json": b"\xff\xfe"}, "the .json is not valid JSON"),
        "e": ({"png": image(1), "json": b"[]"}, "the .json is not an object"),
        "f": ({"png": image(1), "json": b'{"en": "t"}'}, "the .json has no field zh"),
        "g": ({"png": image(1), "json": caption(" ")}, "the caption is empty"),
        "h": ({"png": image(1), "json": caption(None)}, "the caption is empty"),
        "i": ({"png": image(1), "json": caption([])}, "the caption is empty"),
        "j": ({"png": image(1), "json": caption({"x": 1})}, 'the caption is not text but {"x": 1}'),
        "k": ({"png": image(1), "json": caption("\ud800")}, "the caption is not valid Unicode"),
        "l": ({"png": b"", "json": caption("t")}, "not an image in a known format, or cut off"),
        "m": ({"txt": b"t"}, "no .json in the shard"),
    }
    for key, (parts, _) in bad.items():
        members |= {f"{key}.{extension}": data for extension, data in parts.items()}
    dataset = read(write_tar(tmp_path / "a.tar", members))
    found = {sample.key: sample for sample in (dataset[i] for i in range(len(dataset)))}
    assert isinstance(found.pop("good"), ImageSample)
    assert found == {key: Skipped(key, reason) for key, (_, reason) in bad.items()}
    assert dataset.texts()[:2] == ["好", ""]
    text = read(write_tar(tmp_path / "b.tar", {"a.png": image(1), "a.txt": b"\xff", "b.txt": b"t"}), "txt")
    assert text[0] == Skipped("a", "the .txt is not UTF-8 text")
    assert text[1] == Skipped("b", "no image in the shard")


# --- urls


def test_patterns(three_shards: Path) -> None:
    root = str(three_shards)
    files = [three_shards / f"set-{i:03d}.tar" for i in range(3)]
    assert expand_urls(f"{root}/set-{{000..002}}.tar", "data.urls") == files
    assert expand_urls(f"{root}/*.tar", "data.urls") == files
    assert expand_urls(f"{root}/{{set,set}}-000.tar", "data.urls") == files[:1]
    assert expand_urls([f"{root}/set-002.tar", f"{root}/set-*.tar"], "data.urls") == [
        files[2],
        files[0],
        files[1],
    ]


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (
            "https://example.org/a-{000..003}.tar",
            r"^data\.urls=https:\S+ is remote; download the shards first",
        ),
        ("s3://bucket/a.tar", "is remote"),
        ("pipe:curl -s http://example.org/a.tar", "is remote"),
        ("ROOT/set-{000..009}.tar", r"no file matches \S*/set-003\.tar; check path and range"),
        ("ROOT/x*.tar", r"no file matches \S*/x\*\.tar"),
        ("ROOT", r"no file matches \S+; it is a folder, write \S+/\*\.tar"),
        ("ROOT/set-{000.tar", r"has unbalanced braces; write a range as \{000\.\.003\}"),
        ([], r"^data\.urls is empty"),
        ("ROOT/set-{0..1000000}.tar", r"tar stands for more than 1,000,000 shards; check its ranges"),
        ("ROOT/{0..9999}/{0..9999}.tar", r"tar stands for more than 1,000,000 shards"),
        (f"ROOT/set-{{0..{'9' * 5000}}}.tar", r"stands for more than 1,000,000 shards"),
        ("~nobody.knows/set.tar", r"no file matches ~nobody\.knows/set\.tar"),
        ("ROOT/pipe.tar", r"^data\.urls: \S*/pipe\.tar is a named pipe, not a file; give .tar files"),
        ("ROOT/pip*.tar", r"^data\.urls: \S*/pipe\.tar is a named pipe, not a file"),
        ("ROOT/loop.tar", r"^data\.urls: \S*/loop\.tar cannot be read \(Too many levels of symbolic links\); see"),
        ("ROOT/loo*.tar", r"loop\.tar cannot be read \(Too many levels of symbolic links\)"),
        ("ROOT/gon*.tar", r"^data\.urls: \S*/gone\.tar is a link to what does not exist; mend or remove it"),
        (f"ROOT/{'x' * 300}.tar", r"x\.tar cannot be read \(File name too long\); see to it, or leave it out"),
        ("ROOT/a\0.tar", r"tar has no name that a file can have; see to it"),
    ],
)
def test_what_is_wrong_with_a_pattern(three_shards: Path, urls: str | list[str], message: str) -> None:
    os.mkfifo(three_shards / "pipe.tar")
    (three_shards / "loop.tar").symlink_to("loop.tar")
    (three_shards / "gone.tar").symlink_to("nowhere")
    urls = urls.replace("ROOT", str(three_shards)) if isinstance(urls, str) else urls
    with pytest.raises(UserError, match=message) as error:
        read(urls)
    assert "\n" not in str(error.value)


# --- damaged shards


def test_a_shard_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", numbered(0, 3)).read_bytes()
    end = 2 * 512 * 6  # six members: a header and one block of content each, then the zeros of the end
    assert whole[end:] == bytes(len(whole) - end) and any(whole[end - 512 : end])
    file = tmp_path / "cut.tar"
    for size in [0, 1, 511, 512, 513, 700, *range(1024, end + 1, 512), end - 1, end + 511]:
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar is .*cut off.*leave it out of data\.urls") as error:
            read(file)
        assert "\n" not in str(error.value)
    file.write_bytes(whole[: end + 512])
    assert len(read(file)) == 3


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", numbered(0, 4))
    content = bytearray(file.read_bytes())
    content[4 * 512 + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar is cut off or damaged at byte 2048 \(1 samples before it\)"):
        read(file)


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    plain = write_tar(tmp_path / "plain.tar", numbered(0, 2)).read_bytes()
    for content in (b"hello" * 500, gzip.compress(plain), b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar is not an uncompressed tar file.*unpack it if"):
            read(file)


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    for members in ({}, {"a.txt": b"t", "b.mp3": b""}):
        with pytest.raises(UserError, match=r"no images in \S+a\.tar … \(1 shards in all\); .* jpg, jpeg, .*png"):
            read(write_tar(tmp_path / "a.tar", members), "txt")


def test_a_shard_that_changes_during_the_run_costs_samples_not_the_run(three_shards: Path) -> None:
    dataset = pickle.loads(pickle.dumps(read(f"{three_shards}/*.tar")))  # as a worker has it: no open files
    (three_shards / "set-001.tar").write_bytes(b"")
    (three_shards / "set-002.tar").unlink()
    assert isinstance(dataset[9], ImageSample)
    assert "has become shorter" in dataset[10].reason
    assert "set-002.tar does not exist" in dataset[20].reason
    os.mkfifo(three_shards / "set-002.tar")
    assert "set-002.tar is a named pipe, not a file" in dataset[20].reason


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_members_of_absurd_size_are_skipped_and_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    hole = "is stored without its holes (a sparse member), which is not read"
    with file.open("wb") as stream:
        for name, data in (("a.png", image(1)), ("a.json", b'{"zh": "t"}')):
            for key in "abc":
                stream.write(header(key + name[1:], len(data)) + data + bytes(-len(data) % 512))
        for name, size in (("b.png", 2**29), ("c.json", 2**21)):  # the later ones count
            stream.write(header(name, size))
            stream.seek(size, 1)  # a hole
        for name in ("d.png", "d.json"):
            stream.write(header(name, len(data)) + data + bytes(-len(data) % 512))
        for name in ("d.json", "e.png"):
            stream.write(header(name, 512, tarfile.GNUTYPE_SPARSE) + bytes(512))
        stream.write(header("e.json", len(data)) + data + bytes(-len(data) % 512))
        stream.write(bytes(1024))
    dataset = read(file)
    assert isinstance(dataset[0], ImageSample)
    assert [dataset[i] for i in range(1, 5)] == [
        Skipped("b", "the image has 536,870,912 bytes, at most 268,435,456 are read"),
        Skipped("c", "the .json has 2,097,152 bytes, at most 1,048,576 are read"),
        Skipped("d", f"the .json {hole}"),
        Skipped("e", f"the image {hole}"),
    ]


def test_a_key_of_many_letters_costs_the_others_nothing(tmp_path: Path) -> None:
    members = numbered(0, 200)
    long = "长" * 20_000
    members |= {f"{long}.png": image(7), f"{long}.json": b'{"zh": "t"}'}
    dataset = read(write_tar(tmp_path / "a.tar", members))
    assert (dataset.key(199), dataset.key(200)) == ("s0199", long)
    assert len(pickle.dumps(dataset)) < 200_000


# --- fingerprint


def test_the_fingerprint_is_that_of_settings_and_files(three_shards: Path) -> None:
    urls = f"{three_shards}/set-00[01].tar"
    others = [
        read(f"{three_shards}/set-000.tar"),
        read([f"{three_shards}/set-001.tar", f"{three_shards}/set-000.tar"]),
        read(urls, "more"),
        read(urls, split="val", val_fraction=0.3),
        read(urls, val_fraction=0.3),
        read(urls, val_fraction=0.2),
        read(urls, val_urls=f"{three_shards}/set-002.tar"),
        read(urls, min_size=1),
        read(urls, style_field="zh"),
        read(urls, style_field="zh", style_patterns=["{style}风格的{text}"]),
        read(urls, style_field="zh", styles=["图1"]),
        ShardDataset(urls, "train", 16, 0.0, "zh"),
    ]
    fingerprint = read(urls).fingerprint()
    assert fingerprint == read(urls).fingerprint() and len(fingerprint) == 32
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_the_fingerprint_goes_with_copies_and_tells_changed_files(three_shards: Path, tmp_path: Path) -> None:
    copies = tmp_path / "elsewhere"
    copies.mkdir()
    for number in range(3):
        shutil.copy2(three_shards / f"set-00{number}.tar", copies)  # with its time
    moved, last = read(f"{copies}/*.tar"), copies / "set-002.tar"
    fingerprint = read(f"{three_shards}/*.tar").fingerprint()
    assert moved.fingerprint() == fingerprint
    time = last.stat().st_mtime_ns
    found = {fingerprint}
    os.utime(last, ns=(time, time + 1))
    found.add(moved.fingerprint())
    os.truncate(last, 1)
    os.utime(last, ns=(time, time))
    found.add(moved.fingerprint())
    last.unlink()
    found.add(moved.fingerprint())
    last.symlink_to(last.name)
    found.add(moved.fingerprint())
    assert len(found) == 5


# --- the caption field


def test_an_unknown_caption_field_is_named(tmp_path: Path, three_shards: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.caption_field=en: no such field .* set it to one of: zh, more$"):
        read(f"{three_shards}/*.tar", "en")
    with pytest.raises(UserError, match=r"=txt: no sample has a \.txt, only json, png"):
        read(f"{three_shards}/*.tar", "txt")
    texts = write_tar(tmp_path / "t.tar", {"a.png": image(1), "a.txt": b"t"})
    with pytest.raises(UserError, match=r"=zh: no sample has a \.json, only png, txt; .*=txt"):
        read(texts)


def test_a_field_of_only_some_samples_will_do(tmp_path: Path) -> None:
    members = numbered(0, 3) | {"s0000.json": b'{"en": "t"}', "s0001.json": b"{"}
    dataset = read(write_tar(tmp_path / "a.tar", members))
    assert dataset.texts() == ["", "", "图2"]


# --- styles


def test_hash_split(three_shards: Path) -> None:
    train = read(f"{three_shards}/*.tar", val_fraction=0.3)
    val = read(f"{three_shards}/*.tar", split="val", val_fraction=0.3)
    assert sorted(keys(train) + keys(val)) == keys(read(f"{three_shards}/*.tar"))
    assert 0 < len(val) < len(train)
    for sample in readable(train) + readable(val):
        assert (sample.key, sample.text) == (f"s{level(sample):04d}", f"图{level(sample)}")
    # New shards do not move a sample to the other side.
    write_tar(three_shards / "set-003.tar", numbered(30, 60))
    more = read(f"{three_shards}/*.tar", split="val", val_fraction=0.3)
    assert [key for key in keys(more) if key < "s0030"] == keys(val)


# --- processes


def test_more_shards_than_may_be_open(three_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "MAX_OPEN", 2)
    dataset = read(f"{three_shards}/*.tar")
    order = np.random.default_rng(0).permutation(30).tolist()
    assert [dataset[i].key for i in order] == [f"s{i:04d}" for i in order]


def test_a_pickled_copy_reads_too(three_shards: Path) -> None:
    dataset = read(f"{three_shards}/*.tar")
    assert isinstance(dataset[11], ImageSample)  # opens the shard
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[11].key == dataset.key(11) == "s0011"
    assert level(readable(copy)[11]) == 11


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_workers_do_not_disturb_one_another(tmp_path: Path) -> None:
    # Long reads make processes that share a file position collide nearly always.
    members = {name: data + bytes(4_000_000 * name.endswith("png")) for name, data in numbered(0, 5).items()}
    dataset = read(write_tar(tmp_path / "large.tar", members))
    assert isinstance(dataset[0], ImageSample)  # the shard is open before the workers start
    order = np.random.default_rng(0).integers(0, 5, 600).tolist()
    loader = DataLoader(
        dataset,
        batch_size=5,
        sampler=order,
        num_workers=3,
        collate_fn=collate_images,
        multiprocessing_context="fork",
    )
    levels: list[int] = []
    for batch in loader:
        assert not batch.skipped
        assert isinstance(dataset[len(levels) % 5], ImageSample)  # the parent reads at the same time
        levels += batch.images[:, 0, 0, 0].tolist()
    assert levels == order
