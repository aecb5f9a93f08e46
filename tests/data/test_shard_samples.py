"""What shards are looked at for before a run, and how their samples are read, kept and named."""

from __future__ import annotations

import io
import json
import signal
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped


def image(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(stream, "PNG")
    return stream.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def numbered(count: int, **fields: str) -> dict[str, bytes]:
    members = {}
    for number in range(count):
        members[f"{number:02d}.png"] = image(number)
        members[f"{number:02d}.json"] = json.dumps({"zh": f"图{number}", **fields}).encode()
    return members


def read(url: str | list[str], field: str = "zh", split: str = "train", **options: object) -> ShardDataset:
    return ShardDataset(url, split, 8, options.pop("val_fraction", 0.0), field, **options)  # type: ignore[arg-type]


def test_the_fields_of_samples_from_all_parts_are_looked_at(tmp_path: Path) -> None:
    members = numbered(40) | {f"{number:02d}.json": b"" for number in range(33)}
    members["39.json"] = b'{"en": "cat", "medium": "oil"}'
    url = tar_of(tmp_path / "a.tar", members)
    assert read(url, "en").text(39) == read(url, "en", style_field="medium").text(39) == "cat"
    with pytest.raises(UserError, match=r"no such field in the \.json of 32 samples; .*: zh, en, medium$"):
        read(url, "fr")
    with pytest.raises(UserError, match=r"style_field=kind: no such field in the \.json of 32 samples"):
        read(url, style_field="kind")


def test_fields_are_taken_from_what_can_be_read(tmp_path: Path) -> None:
    for broken in (b"[1]", b"{", b"\xff", b"[" * 10**5):
        members = numbered(2) | {"00.json": broken}
        del members["01.json"]
        dataset = read(tar_of(tmp_path / "a.tar", members), "en")  # no field is known: none is refused
        assert isinstance(dataset[0], Skipped)
        assert dataset[0].reason == (
            "the .json is not an object" if broken == b"[1]" else "the .json is not valid JSON"
        )
        assert dataset[1] == Skipped("01", "no .json in the shard")
        members |= {"02.json": b'{"zh": 1}'}
        with pytest.raises(UserError, match=r"set it to one of: zh$"):
            read(tar_of(tmp_path / "a.tar", members), "en")


def test_the_caption_and_the_style_may_be_in_different_members(tmp_path: Path) -> None:
    members = numbered(3, medium=" 油画 ")
    members |= {f"{number:02d}.txt": f"\ufeff 文{number}\r\n".encode() for number in range(3)}
    members["02.txt"] = b"\xff"
    del members["01.json"]
    dataset = read(tar_of(tmp_path / "a.tar", members), "txt", style_field="medium", style_patterns=["{style}:{text}"])
    assert dataset.texts() == ["油画:文0", "", ""]
    assert [dataset[i] for i in (1, 2)] == [
        Skipped("01", "no .json in the shard"),
        Skipped("02", "the .txt is not UTF-8 text"),
    ]


def test_each_split_of_the_styles_asked_for_has_its_own_texts(tmp_path: Path) -> None:
    members = numbered(20)
    for number in range(20):
        fields = {"zh": f"图{number}", "medium": ("油画", "素描", "水墨")[number % 3]}
        members[f"{number:02d}.json"] = json.dumps(fields).encode()
    url = tar_of(tmp_path / "a.tar", members)
    seen = set()
    for split in ("train", "val"):
        dataset = read(
            url, split=split, val_fraction=0.4, style_field="medium", styles=["水墨", "油画"],
            style_patterns=["{style}:{text}"],
        )  # fmt: skip
        for index in range(len(dataset)):
            number = int(dataset.key(index))
            sample = dataset[index]
            assert isinstance(sample, ImageSample)
            assert sample.text == f"{('油画', '素描', '水墨')[number % 3]}:图{number}"
            assert int(sample.image[0, 0, 0]) == number
            seen.add(number)
    assert seen == {number for number in range(20) if number % 3 != 1}
    for split in ("train", "val"):  # without shards of its own, validation has the styles of all
        with pytest.raises(UserError, match="no sample has the style '版画'"):
            read(url, split=split, val_fraction=0.4, style_field="medium", styles=["油画", "版画"])


def test_names_that_are_no_unicode_are_kept_apart(tmp_path: Path) -> None:
    keys = ["\udcff", "\udcfe"]
    members = {f"{key}.{end}": data for key, note in zip(keys, (b"a", b"b"), strict=True)
               for end, data in (("png", image(1)), ("txt", note))}  # fmt: skip
    dataset = read(tar_of(tmp_path / "a.tar", members), "txt")
    assert [dataset.key(i) for i in range(2)] == keys
    assert dataset.texts() == ["a", "b"]


def test_the_keys_of_many_samples_are_told_apart_by_their_lengths(tmp_path: Path) -> None:
    keys = ["猫", "a", "dir/长长长", "b" * 50, "c"]
    members = {f"{key}.{end}": data for key in keys for end, data in (("png", image(1)), ("txt", key.encode()))}
    dataset = read(tar_of(tmp_path / "a.tar", members), "txt")
    assert [dataset.key(i) for i in range(5)] == keys == dataset.texts()


@pytest.mark.parametrize("size", [2**20, 2**20 + 1])
def test_a_note_of_a_mebibyte_is_read(tmp_path: Path, size: int) -> None:
    members = {"a.png": image(1), "a.txt": b"t" + b" " * (size - 1), "b.txt": b"t"}
    sample = read(tar_of(tmp_path / "a.tar", members), "txt")[0]
    if size == 2**20:
        assert isinstance(sample, ImageSample) and sample.text == "t"
    else:
        assert sample == Skipped("a", "the .txt has 1,048,577 bytes, at most 1,048,576 are read")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose beginning no one can read")
def test_a_shard_that_the_system_does_not_read_costs_samples_not_the_run(tmp_path: Path) -> None:
    dataset = read(tar_of(tmp_path / "a.tar", {"a.png": image(1), "a.txt": b"t"}), "txt")
    (tmp_path / "b.tar").symlink_to("/proc/self/mem")
    (tmp_path / "b.tar").rename(tmp_path / "a.tar")
    assert dataset[0] == Skipped("a", f"{tmp_path}/a.tar cannot be read (Input/output error)")


def test_a_shard_is_known_behind_a_link(tmp_path: Path) -> None:
    url = tar_of(tmp_path / "a.tar", numbered(2))
    (tmp_path / "same.tar").symlink_to("a.tar")
    for urls, val_urls in ((url, f"{tmp_path}/same.tar"), (f"{tmp_path}/same.tar", url)):
        with pytest.raises(UserError, match=r"^data\.val_urls: \S+\.tar is in data\.urls too; take it out of one of"):
            read(urls, val_urls=val_urls)


def test_a_stop_that_is_asked_for_ends_the_reading_of_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tar_of(tmp_path / "a.tar", numbered(2))
    (tmp_path / "empty.tar").write_bytes(bytes(1024))
    for url in (full, f"{tmp_path}/empty.tar"):
        with monkeypatch.context() as asked, pytest.raises(Stopped):
            asked.setattr(SIGNALS, "received", signal.SIGTERM)
            read(url)
    assert len(read(full)) == 2
