"""Expected speed, read from lines of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogview_pl.errors import UserError
from cogview_pl.memory.bench import steps_per_second


def line(row: str, rate: float, parameters: int, device: str = "H100") -> str:
    return json.dumps({"row": row, "machine": {"device": device}, "facts": {"TFLOP/s": rate, "parameters": parameters}})


def expected(file: Path, **other: object) -> float | None:
    wanted = {"device": "H100", "precision": "bf16", "recompute": "none", "parameters": 400, "flops": 1e12}
    return steps_per_second(file, **(wanted | other))  # type: ignore[arg-type]


def test_the_nearest_row_of_this_device_and_precision_counts(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    rows = [
        line("cuda:train-400m-bf16-x8-none", 300, 400),
        line("cuda:train-400m-bf16-x8-block", 200, 400),
        line("cuda:train-4b-bf16-x2-none", 400, 4000),
        line("cuda:train-400m-fp32-x8-none", 30, 400),
        line("cuda:train-400m-bf16-x8-none", 100, 400, device="A100"),
        json.dumps({"row": "cuda:encode", "machine": {"device": "H100"}, "facts": {}}),
    ]
    file.write_text("\n".join(rows), encoding="utf-8")
    assert expected(file) == 300
    assert expected(file, recompute="block") == 200
    assert expected(file, parameters=3000) == 400
    assert expected(file, flops=2e12) == 150
    assert expected(file, precision="fp16") is None
    assert expected(tmp_path / "missing.jsonl") is None


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    file.write_text("time\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"plan\.bench=.*line 1"):
        expected(file)
