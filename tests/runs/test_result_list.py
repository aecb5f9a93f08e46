"""Lists of results: they grow batch by batch, and go on after a kill at any byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.input_images import InputImages
from cogview_pl.errors import UserError
from cogview_pl.runs.record import RunRecord
from cogview_pl.runs.result_list import ResultList
from cogview_pl.runs.run_folder import RunFolder

BAD = (1, 2, 6)
BATCH = 3


class Images(InputImages):
    """Ten images; the name of number 8 occurs twice, and some cannot be read."""

    def __init__(self) -> None:
        super().__init__("images=folder")

    def __len__(self) -> int:
        return 10

    def record(self, number: int) -> dict[str, str]:
        return {"file": f"{min(number, 8)}.png"}

    def read(self, number: int) -> Tensor:
        if number in BAD:
            raise SampleError("damaged")
        return torch.full((3, 2, 2), number)

    def fingerprint(self) -> str:
        return "ten"


def opened(path: Path) -> ResultList:
    path.mkdir(exist_ok=True)
    folder = RunFolder(path, None, goes_on=(path / ".cogview_pl.json").exists())
    RunRecord("rerank").save(path)
    return ResultList(folder, Images(), settings={"seed": 1}, inputs={}, verify=True)


def work(results: ResultList, done: int) -> None:
    images = Images()
    for start in range(done, len(images), BATCH):
        numbers, read, skipped = images.read_some(range(start, min(start + BATCH, len(images))))
        values = [{**images.record(n), "value": int(image[0, 0, 0])} for n, image in zip(numbers, read, strict=True)]
        results.add(values, skipped)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("s*.jsonl")}


def test_a_kill_at_any_byte_leaves_lists_that_go_on(tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole")
    work(whole, whole.begin(resume=False, batch_size=BATCH))
    expected = files(tmp_path / "whole")
    assert [record["value"] for record in whole.records()] == [0, 3, 4, 5, 7, 8, 9] and whole.num_skipped == len(BAD)
    for name, other in (("samples.jsonl", "skipped.jsonl"), ("skipped.jsonl", "samples.jsonl")):
        for size in range(0, len(expected[name]), 7):
            path = tmp_path / f"{name} {size}"
            results = opened(path)
            (path / name).write_bytes(expected[name][:size])
            (path / other).write_bytes(expected[other])
            done = results.begin(resume=True, batch_size=BATCH)
            assert done % BATCH == 0 and done < 10
            work(results, done)
            assert files(path) == expected
            assert (results.count, results.num_skipped) == (whole.count, whole.num_skipped)


def test_a_sorted_list_is_whole(tmp_path: Path) -> None:
    results = opened(tmp_path)
    work(results, results.begin(resume=False, batch_size=BATCH))
    unsorted = files(tmp_path)
    results.sort(lambda record: -record["value"])
    assert [record["value"] for record in results.records()] == [9, 8, 7, 5, 4, 3, 0]
    assert results.begin(resume=True, batch_size=BATCH) == len(Images())
    results.sort(lambda record: record["value"])
    assert files(tmp_path) == unsorted


def test_the_first_records_know_their_images(tmp_path: Path) -> None:
    results = opened(tmp_path)
    work(results, results.begin(resume=False, batch_size=BATCH))
    assert [(number, record["value"]) for number, record in results.first(3)] == [(0, 0), (3, 3), (4, 4)]
    assert [number for number, _ in results.first(99)] == [0, 3, 4, 5, 7, 8, 9]


def test_a_new_run_begins_empty_lists(tmp_path: Path) -> None:
    results = opened(tmp_path)
    work(results, results.begin(resume=False, batch_size=BATCH))
    assert results.begin(resume=False, batch_size=BATCH) == results.count == 0
    assert files(tmp_path) == {"samples.jsonl": b""}


def test_images_that_cannot_be_read_at_all_are_refused() -> None:
    class Damaged(Images):
        def read(self, number: int) -> Tensor:
            raise SampleError("file not found")

    with pytest.raises(UserError, match=r"^images=folder: none of the 10 images can be read \(first: 0.png: file not "):
        Damaged().require_readable()
    Images().require_readable()
