"""The list of skipped samples, the share that ends a run, what a batch leaves out, and the check before a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from cogview_pl.data.bad_samples import BadSampleLog, collate_images, enough_to_judge, require_readable
from cogview_pl.data.records import read_record, record_line
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError


def bad(*numbers: int) -> list[Skipped]:
    return [Skipped(f"图{number}", f"reason {number}") for number in numbers]


def good(number: int) -> ImageSample:
    return ImageSample(f"图{number}", torch.zeros(3, 1, 1, dtype=torch.uint8), "t")


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_each_skipped_sample_is_listed_once_and_counted_whenever_it_is_met(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    log = BadSampleLog(path, max_share=1.0)
    log.add(bad(1, 2), seen=8)
    log.add(bad(2, 3, 3), seen=8)
    log.add([], seen=8)
    assert log.count == 3
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [read_record(line) for line in lines] == [sample._asdict() for sample in bad(1, 2, 3)]
    assert "图1" in lines[0]


def test_too_many_skipped_samples_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    log = BadSampleLog(path, max_share=0.1, minimum=20)
    log.add(bad(1, 2), seen=19)  # more than a tenth, but of too few
    log.add([], seen=1)  # exactly a tenth
    with pytest.raises(UserError) as error:
        log.add(bad(3), seen=1)
    assert one_line(error) == (
        f"3 of 21 samples cannot be used (first: 图1: reason 1); see {path}; raise data.max_skipped_share to go on"
    )
    assert BadSampleLog(path, max_share=0.1).count == 3  # the last one is in the list as well


def test_the_list_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    log = BadSampleLog(path, max_share=0.1, minimum=20)
    log.add(bad(1, 2), seen=30)
    again = BadSampleLog(path, max_share=0.1, minimum=20)
    assert again.count == 2
    again.note(bad(2, 3))
    again.require_few(30)
    with pytest.raises(UserError, match=r"^3 of the 29 samples cannot be used \(first: 图1: reason 1\); see"):
        again.require_few(29)


def test_old_entries_do_not_count_against_a_fresh_start(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    BadSampleLog(path, max_share=1.0).add(bad(*range(50)), seen=1000)
    log = BadSampleLog(path, max_share=0.1, minimum=20)
    log.add(bad(1), seen=20)
    assert log.count == 50


def test_a_small_set_read_again_and_again_keeps_its_share(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "skipped.jsonl", max_share=0.1, minimum=enough_to_judge(12))
    with pytest.raises(UserError, match=r"^6 of 12 "):
        for _ in range(10):
            log.add(bad(1, 2, 3), seen=6)


def test_a_line_cut_off_by_a_kill_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    BadSampleLog(path, max_share=1.0).add(bad(1, 2), seen=2)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        log = BadSampleLog(path, max_share=1.0)
        log.add(bad(1, 2), seen=2)
        assert path.read_bytes() == whole
    path.write_text("something else\n")
    with pytest.raises(UserError, match=r"skipped\.jsonl:1 is damaged or no skipped sample; delete"):
        BadSampleLog(path, max_share=1.0)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"skipped\.jsonl is a named pipe, not a file; delete it"):
        BadSampleLog(path, max_share=1.0)


def test_a_flipped_bit_in_the_list_is_noticed(tmp_path: Path) -> None:
    """Another key would count as another sample, and a line without its end as one that will be met again."""
    path = tmp_path / "skipped.jsonl"
    BadSampleLog(path, max_share=1.0).add(bad(1, 2), seen=2)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"skipped\.jsonl:[12] is damaged or no skipped sample; delete"):
                BadSampleLog(path, max_share=1.0)


def test_a_file_name_that_is_not_unicode_can_be_listed(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    BadSampleLog(path, max_share=1.0).add([Skipped("a\udce4.png", "r")], seen=1)
    log = BadSampleLog(path, max_share=1.0)
    log.add([Skipped("a\udce4.png", "r")], seen=1)
    assert log.count == 1


def test_collate_sets_the_skipped_aside() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    one, two = ImageSample("a", images[0], "甲"), ImageSample("b", images[1], "乙")
    batch = collate_images([one, *bad(1), two])
    assert torch.equal(batch.images, images)
    assert (batch.texts, batch.keys, batch.skipped) == (["甲", "乙"], ["a", "b"], bad(1))
    nothing = collate_images([*bad(1, 2)])
    assert nothing.images.shape == (0, 3, 0, 0)
    assert nothing.images.dtype == torch.uint8
    assert (nothing.texts, nothing.keys, nothing.skipped) == ([], [], bad(1, 2))


def test_a_line_is_a_sample_as_json(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "s.jsonl", max_share=1)
    log.add(bad(1), seen=1)
    record = json.loads((tmp_path / "s.jsonl").read_text())
    assert {key: record[key] for key in ("key", "reason")} == {"key": "图1", "reason": "reason 1"}
    assert (tmp_path / "s.jsonl").read_bytes() == record_line({"key": "图1", "reason": "reason 1"})
    assert BadSampleLog(tmp_path / "none.jsonl", max_share=1).count == 0
    assert not (tmp_path / "none.jsonl").exists()  # only what is skipped makes a list


def test_a_hundred_samples_are_enough_to_judge_or_all_there_are() -> None:
    assert [enough_to_judge(size) for size in (1, 99, 100, 101, 10**6)] == [1, 99, 100, 100, 100]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_share_is_judged_from_the_hundredth_sample(tmp_path: Path, share: float) -> None:
    log = BadSampleLog(tmp_path / "s.jsonl", max_share=share)
    log.add(bad(*range(30)), seen=99)
    with pytest.raises(UserError, match=r"^30 of 100 samples cannot be used \(first: 图0: reason 0\); see .*s\.jsonl;"):
        log.add([], seen=1)
    calm = BadSampleLog(tmp_path / "t.jsonl", max_share=share)
    calm.add(bad(*range(int(100 * share))), seen=100)  # just as many as are allowed


@pytest.mark.parametrize("number", [0, 20, 99])
def test_bad_samples_that_come_first_do_not_stop_a_set_that_is_good(tmp_path: Path, number: int) -> None:
    """The set is judged, not its beginning; the list says in which order they came."""
    log = BadSampleLog(tmp_path / "s.jsonl", max_share=0.1)
    for start in range(0, number, 10):
        log.note(bad(*range(start, min(number, start + 10))))
        log.require_few(1000)
    log.note(bad(*range(100)))
    log.require_few(1000)
    log.note(bad(100))
    with pytest.raises(UserError, match=r"^101 of the 1,000 samples cannot be used \(first: 图0: reason 0\);"):
        log.require_few(1000)


def test_a_probe_ends_a_hopeless_run_at_once_and_lists_what_it_met(tmp_path: Path) -> None:
    def samples(share: float) -> list[ImageSample | Skipped]:
        return [*bad(*range(int(share * 2000))), *map(good, range(int(share * 2000), 2000))]

    for share in (0.0, 0.01, 0.05, 0.1):  # in the order of names the bad ones come first
        log = BadSampleLog(tmp_path / f"{share}.jsonl", max_share=0.1)
        log.require_few_in_probe(samples(share), lambda: None)  # type: ignore[arg-type]
    for share in (0.45, 1.0):
        log = BadSampleLog(tmp_path / f"{share}.jsonl", max_share=0.1)
        with pytest.raises(UserError, match=r"^\d+ of 100 samples, chosen at random, cannot be used \(first: 图"):
            log.require_few_in_probe(samples(share), lambda: None)  # type: ignore[arg-type]
        assert 25 < log.count <= 100
    strict = BadSampleLog(tmp_path / "strict.jsonl", max_share=0.0)
    with pytest.raises(UserError, match=r"^1 of 3 samples, chosen at random,"):
        strict.require_few_in_probe([good(0), *bad(1), good(2)], lambda: None)  # type: ignore[arg-type]
    BadSampleLog(tmp_path / "any.jsonl", max_share=1.0).require_few_in_probe(bad(1, 2), lambda: None)  # type: ignore[arg-type]


def test_the_first_sample_of_an_old_list_is_named(tmp_path: Path) -> None:
    BadSampleLog(tmp_path / "s.jsonl", max_share=1).add(bad(7, 8), seen=2)
    log = BadSampleLog(tmp_path / "s.jsonl", max_share=0, minimum=1)
    assert log.count == 2
    with pytest.raises(UserError, match=r"^1 of 1 .*first: 图7: reason 7"):
        log.add(bad(9), seen=1)


def test_a_link_in_place_of_the_list_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").symlink_to(tmp_path / "victim")
    log = BadSampleLog(tmp_path / "s.jsonl", max_share=1)
    with pytest.raises(OSError, match="symbolic links"):
        log.add(bad(1), seen=1)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "line", [b"[1]", b'{"key": "a"}', b'{"key": "a", "reason": "b", "more": 1}', b"\xff", b"[" * 10**5, b""]
)
def test_lines_that_are_no_samples_are_named_by_their_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(record_line(bad(1)[0]._asdict()) + line + b"\n" + record_line(bad(2)[0]._asdict()))
    with pytest.raises(UserError, match=r"s\.jsonl:2 is damaged or no skipped sample; delete the file$"):
        BadSampleLog(path, max_share=1)


@pytest.mark.parametrize("rest", [b'{"key": "k2", "rea', b"[1", b"[" * 10**5, b"\xff"])
def test_the_rest_of_a_line_that_was_cut_off_is_taken_away(tmp_path: Path, rest: bytes) -> None:
    path, whole = tmp_path / "s.jsonl", record_line(bad(1)[0]._asdict())
    path.write_bytes(whole + rest)
    assert BadSampleLog(path, max_share=1).count == 1
    assert path.read_bytes() == whole


def test_a_run_needs_one_readable_sample_somewhere(tmp_path: Path) -> None:
    message = r"^data: none of {} samples of {} can be used \(first: 图0: reason 0\); check data\.root"
    with pytest.raises(UserError, match=r"^data: the data set has no samples; check data\.root, data\.urls and"):
        require_readable([])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message.format(3, 3)):
        require_readable(bad(0, 1, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message.format(64, "1,000")):
        require_readable(bad(*range(1000)))  # type: ignore[arg-type]
    for limit in (2, 64):
        require_readable([*bad(0), good(1)], limit)  # type: ignore[arg-type]
    require_readable([*bad(*range(70)), *map(good, range(70, 2000))])  # type: ignore[arg-type]


def test_what_lies_behind_the_first_readable_sample_is_not_read() -> None:
    class Costly(list):  # type: ignore[type-arg]
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            assert index < 2
            return super().__getitem__(index)

    require_readable(Costly([*bad(0), good(1)]))
