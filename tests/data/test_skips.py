"""The list of skipped samples, the share that ends a run, and the check before one starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogview_pl.data.records import record_line
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.skips import SkipLog, enough_to_judge, require_readable
from cogview_pl.errors import UserError


def bad(*numbers: int) -> list[Skipped]:
    return [Skipped(f"k{number}", f"reason {number}") for number in numbers]


def good(number: int) -> ImageSample:
    return ImageSample(f"k{number}", torch.zeros(3, 1, 1, dtype=torch.uint8), "t")


def test_a_line_is_a_sample_as_json(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "s.jsonl", max_share=1)
    log.add(bad(1), seen=1)
    record = json.loads((tmp_path / "s.jsonl").read_text())
    assert {key: record[key] for key in ("key", "reason")} == {"key": "k1", "reason": "reason 1"}
    assert (tmp_path / "s.jsonl").read_bytes() == record_line({"key": "k1", "reason": "reason 1"})
    assert SkipLog(tmp_path / "none.jsonl", max_share=1).count == 0
    assert not (tmp_path / "none.jsonl").exists()  # only what is skipped makes a list


def test_a_hundred_samples_are_enough_to_judge_or_all_there_are() -> None:
    assert [enough_to_judge(size) for size in (1, 99, 100, 101, 10**6)] == [1, 99, 100, 100, 100]


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_share_is_judged_from_the_hundredth_sample(tmp_path: Path, share: float) -> None:
    log = SkipLog(tmp_path / "s.jsonl", max_share=share)
    log.add(bad(*range(30)), seen=99)
    with pytest.raises(
        UserError, match=r"^30 of 100 pictures could not be read \(first: k0: reason 0\); see .*s\.jsonl;"
    ):
        log.add([], seen=1)
    calm = SkipLog(tmp_path / "t.jsonl", max_share=share)
    calm.add(bad(*range(int(100 * share))), seen=100)  # just as many as are allowed
    assert calm.state == {"seen": 100, "skipped": int(100 * share)}


def test_a_saved_state_is_gone_on_with(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "s.jsonl", max_share=0.5)
    log.load_state({"seen": 1000, "skipped": 400})
    log.add(bad(*range(100)), seen=100)  # 500 of 1100
    assert log.state == {"seen": 1100, "skipped": 500}
    with pytest.raises(UserError, match=r"^600 of 1199 "):
        log.add(bad(*range(100)), seen=99)
    assert log.count == 100


def test_the_first_sample_of_an_old_list_is_named(tmp_path: Path) -> None:
    SkipLog(tmp_path / "s.jsonl", max_share=1).add(bad(7, 8), seen=2)
    log = SkipLog(tmp_path / "s.jsonl", max_share=0, minimum=1)
    assert log.count == 2
    with pytest.raises(UserError, match=r"^1 of 1 .*first: k7: reason 7"):
        log.add(bad(9), seen=1)


def test_a_link_in_place_of_the_list_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").symlink_to(tmp_path / "victim")
    log = SkipLog(tmp_path / "s.jsonl", max_share=1)
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
        SkipLog(path, max_share=1)


@pytest.mark.parametrize("rest", [b'{"key": "k2", "rea', b"[1", b"[" * 10**5, b"\xff"])
def test_the_rest_of_a_line_that_was_cut_off_is_taken_away(tmp_path: Path, rest: bytes) -> None:
    path, whole = tmp_path / "s.jsonl", record_line(bad(1)[0]._asdict())
    path.write_bytes(whole + rest)
    assert SkipLog(path, max_share=1).count == 1
    assert path.read_bytes() == whole


def test_a_run_needs_one_readable_sample_among_the_first() -> None:
    message = r"^data: none of the first {} samples could be read \(first: k0: reason 0\); check data\.root"
    with pytest.raises(UserError, match=r"^data: the data set has no samples; check data\.root, data\.urls and"):
        require_readable([])
    with pytest.raises(UserError, match=message.format(3)):
        require_readable(bad(0, 1, 2))
    with pytest.raises(UserError, match=message.format(64)):
        require_readable([*bad(*range(64)), good(64)])
    require_readable([*bad(*range(63)), good(63)])
    with pytest.raises(UserError, match=message.format(2)):
        require_readable([*bad(0, 1), good(2)], limit=2)


def test_what_lies_behind_the_first_readable_sample_is_not_read() -> None:
    class Costly(list):  # type: ignore[type-arg]
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            assert index < 2
            return super().__getitem__(index)

    require_readable(Costly([*bad(0), good(1), good(2)]))
