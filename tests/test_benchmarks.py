"""The benchmark: its arithmetic, which rows a command line means, and that the rows of a GPU run (tiny, anywhere)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench,
    cuda,
    gemm,
    gpu_forms,
    growth,
    image_tokenizer,
    memory,
    on_gpu,
    random_runs,
    report,
    settings,
)
from benchmarks.contest import Work
from benchmarks.references import original_decode
from cogview_pl.lit.callbacks.device_peaks import peak_tflops
from tests.make_models import make_transformer

TINY = cuda.Sizes(
    shapes=("tiny",),
    dtypes=("fp16", "bf16"),
    grid=4,
    images=2,
    sequences=((2, 2, 2),),
    encoded=2,
    candidates=3,
    ranked_at_once=2,
    copied=2**16,
    pixels=16,
    rounds=1,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SHAPES, "tiny", (1, 32, 2))
    monkeypatch.setattr(gemm, "SQUARE", 64)


def _rows(*titles: str) -> list[report.Row]:
    return [report.Row(title, lambda: report.Result("ms", {"ours": 2.0, "peer": 5.0}, {}, {})) for title in titles]


def test_rows_are_selected_by_subject_and_text() -> None:
    subjects = {"decode": lambda: _rows("decode:S1-fp32", "decode:S1-bf16"), "train": lambda: _rows("train:S1-fp32")}

    def titles(*words: str, only: str = "") -> list[str]:
        return [row.title for row in report.select(subjects, words, only)]

    assert titles("train", "decode") == ["train:S1-fp32", "decode:S1-fp32", "decode:S1-bf16"]
    assert titles("decode:bf16") == ["decode:S1-bf16"]
    assert titles("decode", "train", only="fp32") == ["decode:S1-fp32", "train:S1-fp32"]
    with pytest.raises(ValueError, match="no subject paint"):
        titles("paint")
    with pytest.raises(ValueError, match="no row"):
        titles("decode:S9")


def test_titles_differ_and_name_their_subject() -> None:
    for subject, rows in bench.SUBJECTS.items():
        titles = [row.title for row in rows()]
        assert len(set(titles)) == len(titles)
        assert all(title.startswith(f"{subject}:") for title in titles)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_rows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["cuda"]) == 2
    assert capsys.readouterr().err.splitlines() == ["bench: cuda: this machine has no CUDA device that torch can use"]


def test_a_row_becomes_one_line_of_json(tmp_path: Path) -> None:
    (row,) = _rows("decode:S1-fp32")
    for _ in range(2):
        report.append_json(tmp_path / "rows.jsonl", row.title, row.measure())
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == ["decode:S1-fp32"] * 2
    assert lines[0]["values"] == {"ours": 2.0, "peer": 5.0}
    assert torch.__version__.startswith(lines[0]["versions"]["torch"])


def test_floor_counts_every_matrix_three_times() -> None:
    layers, hidden_size, vocabulary, tokens = 2, 24, 100, 10
    model = make_transformer(
        vocab_size=vocabulary, num_layers=layers, hidden_size=hidden_size, num_heads=2, num_positions=tokens
    )
    matrices = [*model.parameter_groups().matrices, model.token_embedding.weight]
    wanted = sum(6 * tokens * matrix.numel() for matrix in matrices)
    assert gemm.training_flops(gemm.linears_of_step(layers, hidden_size, vocabulary, tokens)) == wanted


def test_released_sizes_have_their_published_work() -> None:
    convolutions, search = image_tokenizer.encode_flops(256)
    assert round(convolutions / 1e9, 1) == 44.0
    assert round(search / 1e9, 1) == 4.3
    assert round(image_tokenizer.decode_flops(256) / 1e9, 1) == 176.3
    peak = peak_tflops("NVIDIA H100 80GB HBM3", "bf16-true")
    assert peak is not None
    assert peak * 1e12 / (convolutions + search) == pytest.approx(20_468, abs=1)
    assert cuda.step_flops("cogview_4b", 1, 1088) == pytest.approx(26.49e12, rel=1e-3)


def test_a_cache_has_the_size_of_its_formula() -> None:
    found = growth.measure_cache()
    assert found.values["S1 fp32 x1"] == 2 * 6 * 384 * 1088 * 4 / 1e6


def test_a_line_is_fitted() -> None:
    fit = growth.line([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert (fit.slope, fit.intercept, fit.r_squared) == pytest.approx((2.0, 3.0, 1.0))


def allocate(megabytes: str) -> Work:
    """Work that keeps so much more with every call."""
    held: list[bytes] = []
    return lambda: held.append(b"x" * (int(megabytes) * 10**6))


@pytest.mark.slow
@pytest.mark.skipif(not memory.MEASURABLE, reason="needs Linux")
def test_memory_counts_what_work_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    found = memory.growth_apart("tests.test_benchmarks:allocate", "40", with_inputs=False)
    assert found / 1e6 == pytest.approx(40 * memory.CALLS, abs=5)


def test_the_originals_scheme_draws_codes_of_the_whole_image(tiny: None) -> None:
    codes = original_decode("tiny", "fp32", 2, 4)()
    assert isinstance(codes, torch.Tensor)
    assert codes.shape == (2, 16)
    assert int(codes.max()) < settings.IMAGE_CODES


@pytest.mark.slow
def test_what_needs_a_gpu_runs_tiny_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SHAPES, "tiny", (2, 32, 2))
    assert on_gpu.main(["--tiny", "--json", str(tmp_path / "rows.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = {line["row"]: line for line in lines}
    memory = [row for title, row in rows.items() if "fp16" not in title]
    assert len(memory) == len(on_gpu.TINY.cases)
    for row in memory:
        assert row["facts"]["planned / measured"] == pytest.approx(1, abs=0.1), row["row"]
    stable, plain = rows["gpu:fp16-sandwich-with-PB-Relax-tiny"]["facts"], rows["gpu:fp16-plain-pre-LN-tiny"]["facts"]
    steps = on_gpu.TINY.stability[0]
    assert stable["of them with a finite loss"] == steps
    assert stable["steps that the scaler skipped"] < steps / 2
    assert plain["first step that overflowed"] == 0
    assert plain["of them with a finite loss"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_whole_of_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("gpu: no CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_forms_of_a_gpu_are_refused_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_forms.main([]) == 2
    assert capsys.readouterr().err == "gpu_forms: no CUDA device that torch can use\n"


def test_forms_of_a_gpu_name_rows_that_there_are() -> None:
    selected = [report.select(bench.SUBJECTS, [f"cuda:{title}"]) for title in gpu_forms.ROWS_OF_CUDA]
    assert [len(rows) for rows in selected] == [2, 1, 1, 1, 1, 1]
    titles = [row.title for row in gpu_forms.forms()]
    assert len(set(titles)) == len(titles)


def test_random_tokenizers_have_the_configured_vocabulary() -> None:
    tokenizer = random_runs.text_tokenizer(random_runs.composed(["task=pretrain", "text.vocab_size=30000"]).text)
    assert tokenizer.vocab_size == 30_000
    assert tokenizer.encode("红色的圆形")


def test_rows_of_a_gpu_run(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HIDDEN_SIZE", "CODEBOOK_DIM"):
        monkeypatch.setattr(image_tokenizer, name, 16)
    for row in cuda.rows(TINY):
        if "compiled" in row.title:
            continue  # takes a CPU half a minute
        found = row.measure()
        assert all(math.isfinite(value) and value > 0 for value in found.values.values()), row.title
        assert row.title in report.text(row.title, found)
