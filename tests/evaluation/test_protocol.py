"""Two evaluations are compared only if they have the same protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogview_pl.errors import UserError
from cogview_pl.evaluation.protocol import compare, table

BASE: dict[str, float | str] = {
    "eval/fid_0": 10.0,
    "eval/is": 2.0,
    "perf/evaluate_s": 3.0,
    "protocol/features_sha256": "aa",
    "protocol/seed": 0,
}


def write(folder: Path, **changes: float | str | None) -> str:
    folder.mkdir()
    metrics = BASE | {key.replace("__", "/"): value for key, value in changes.items()}
    (folder / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if v is not None}))
    return str(folder)


def test_difference_of_every_metric(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", eval__fid_0=7.5, eval__is=None, perf__evaluate_s=9.0)
    found = compare([first, str(Path(second) / "metrics.json")])
    assert found == {
        "first/eval/fid_0": 10.0,
        "second/eval/fid_0": 7.5,
        "difference/eval/fid_0": -2.5,
        "first/eval/is": 2.0,
        "protocol/features_sha256": "aa",
        "protocol/seed": 0,
    }
    lines = [line.split() for line in table(found).splitlines()]
    assert lines == [["first", "second", "difference"], ["eval/fid_0", "10", "7.5", "-2.5"], ["eval/is", "2", "–", "–"]]


def test_protocols_that_differ(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", protocol__features_sha256="bb", protocol__seed=1)
    with pytest.raises(UserError, match=r"protocol/features_sha256 is aa in .*a and bb in .*b;"):
        compare([first, second])
    third = write(tmp_path / "c", protocol__blur_radii="0,1")
    with pytest.raises(UserError, match=r"protocol/blur_radii is not set in .*a and 0,1 in .*c;"):
        compare([first, third])


def test_what_is_no_evaluation(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    bare = write(tmp_path / "b", protocol__features_sha256=None, protocol__seed=None)
    (tmp_path / "c.json").write_text("{")
    for wrong, word in ((bare, "no protocol"), (str(tmp_path / "c.json"), "not JSON"), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=word):
            compare([first, wrong])
    with pytest.raises(UserError, match="found 1; give two"):
        compare([first])
