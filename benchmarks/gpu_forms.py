"""Forms for a GPU, before and after, in one command of less than 13 minutes.

    python -m benchmarks.gpu_forms [--before FOLDER] [--json FILE] [--seconds N]

1. Results: every form of a GPU against single operations of torch, at the released sizes. The command ends with an
   error if one differs by more than rounding.
2. Forms: each one timed in turns with what it replaces.
3. Rows of `cuda`: decoding of 4B, super-resolution, training, encoding. `--before` names a checkout of an earlier
   version, whose rows run in the same order on the same GPU, each pair one after the other. Rows that would end after
   `--seconds` (default 780) are left out, and named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from benchmarks.contest import Work, contest, repeated
from benchmarks.report import Result, Row, result
from benchmarks.settings import DEVICE, IMAGE_CODES, SHAPES, TOP_K, text_to_image
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.engine.cuda_graph import CapturedStep
from cogview_pl.generation.engine.fused_gpu import FusedModel
from cogview_pl.generation.sampling import probabilities, sample, sample_logits
from cogview_pl.kernels.fused_conv import convolution_as_product

ROWS_OF_CUDA = (
    "decode-cogview_4b-bf16",  # one image, and sixteen
    "magnify-cogview_4b-bf16-x1",
    "encode-bf16",
    "train-cogview_4b-bf16-x10-none-compiled",
    "train-cogview_4b-bf16-x16-block-compiled",
    "decode-cogview_4b-int8-x1",
)
"""In the order of their worth, for a loan that ends early."""
_LONGEST_ROW = 150
"""Seconds that a row may take."""
_REPEATS, _ROUNDS = 50, 5
_DRAWS = 4096
_REFUSED = 2


def forms() -> list[Row]:
    """Every form against what it replaces."""
    linears = [
        Row(f"forms:linear-{name}-x{rows}", partial(measure_linear, name, rows))
        for name in ("qkv", "out", "up", "down")
        for rows in (1, 2, 3, 4, 16)
    ]
    return [Row("forms:sample", measure_sample), *linears, Row("forms:first-convolution", measure_convolution)]


def measure_sample(rows: int = 1) -> Result:
    """A sample from 8,192 logits by the kernel and by single operations, in a CUDA graph each.

    Raises:
        RuntimeError: more than one sample of some thousand differs.
    """
    sampling = Sampling(top_k=TOP_K)
    many, numbers = _normal(_DRAWS, IMAGE_CODES), torch.rand(_DRAWS, device=DEVICE)
    ties = many.bfloat16().float()
    for logits in (many, ties):
        wanted = sample(probabilities(logits, sampling), numbers)
        differ = int((sample_logits(logits, sampling, numbers) != wanted).sum())
        if differ > 1:
            raise RuntimeError(f"sample: {differ} of {_DRAWS} samples are not those of single operations")
    one, number = many[:rows], numbers[:rows]
    return _in_turns(
        {
            "ours": lambda: sample_logits(one, sampling, number),
            "single operations": lambda: sample(probabilities(one, sampling), number),
        }
    )


@torch.inference_mode()
def measure_linear(name: str, rows: int, shape: str = "cogview_4b") -> Result:
    """A linear map of 4B with bias (and GELU for `up`), by this project and by cuBLAS, in a CUDA graph each.

    Raises:
        RuntimeError: the results differ by more than rounding.
    """
    _, width, _ = SHAPES[shape]
    outputs, inputs = {"qkv": (3, 1), "out": (1, 1), "up": (4, 1), "down": (1, 4)}[name]
    parts = [nn.Linear(inputs * width, outputs * width, device=DEVICE, dtype=torch.bfloat16) for _ in range(8)]
    x_RD, gelu = _normal(rows, inputs * width).bfloat16(), name == "up"
    model, _ = text_to_image("S1", 4)
    fused = FusedModel(model.bfloat16())

    def ours(part: nn.Linear) -> Tensor:
        return fused._linear(x_RD, part, gelu=gelu)

    def plainly(part: nn.Linear, x: Tensor = x_RD) -> Tensor:
        found = F.linear(x, part.weight.to(x.dtype), part.bias.to(x.dtype) if part.bias is not None else None)
        return F.gelu(found, approximate="tanh") if gelu else found

    _same(ours(parts[0]), plainly(parts[0], x_RD.float()), f"linear {name} of {rows} rows")
    found = _in_turns({"ours": lambda: [ours(part) for part in parts], "cuBLAS": lambda: [plainly(p) for p in parts]})
    read = len(parts) * parts[0].weight.nbytes
    found.facts["TB/s of weights"] = read / found.values["ours"] / 1e9
    return found


def measure_convolution(images: int = 64, pixels: int = 256) -> Result:
    """The first convolution of the image tokenizer with ReLU: one product, and with channels padded to eight.

    Raises:
        RuntimeError: the results differ by more than rounding.
    """
    layer = nn.Conv2d(3, 512, 4, 2, 1, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x = _normal(images, 3, pixels, pixels).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = F.pad(layer.weight, (0, 0, 0, 0, 0, 5)).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def padded() -> Tensor:
        wide = F.pad(x, (0, 0, 0, 0, 0, 5)).contiguous(memory_format=torch.channels_last)
        return torch.cudnn_convolution_relu(wide, weight, layer.bias, (2, 2), (1, 1), (1, 1), 1)

    @torch.inference_mode()
    def product() -> Tensor:
        return convolution_as_product(x, layer)

    _same(product(), padded().float(), "first convolution")
    return result("ms", contest({"ours": product, "channels padded": padded}, _ROUNDS), {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and measure everything; returns the exit code, 0 if all results are right."""
    parser = argparse.ArgumentParser(prog="gpu_forms", description="Forms for a GPU, before and after.")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout of an earlier version")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one line of JSON per row")
    parser.add_argument("--seconds", type=float, default=780, metavar="N", help="start no row that may end later")
    options = parser.parse_args(arguments)
    if DEVICE.type != "cuda":
        print("gpu_forms: no CUDA device that torch can use", file=sys.stderr)
        return _REFUSED
    end = time.monotonic() + options.seconds
    failed = [row.title for row in forms() if not _measured(row, options.json)]
    folders = [Path.cwd()] + ([options.before] if options.before is not None else [])
    for title in ROWS_OF_CUDA:
        for folder in folders:
            if time.monotonic() + _LONGEST_ROW > end:
                print(f"left out, there is no time: cuda:{title} of {folder}", flush=True)
                continue
            print(f"in {folder}:", flush=True)
            command = [sys.executable, "-m", "benchmarks.bench", f"cuda:{title}"]
            more = ["--json", str(options.json.resolve())] if options.json is not None else []
            code = subprocess.run([*command, *more], cwd=folder, check=False).returncode
            failed += [f"{title} of {folder}"] if code else []
    if failed:
        print(f"gpu_forms: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _measured(row: Row, json_file: Path | None) -> bool:
    try:
        found = row.measure()
    except Exception as error:  # other rows are still useful
        print(f"{row.title}\n    failed: {error}", flush=True)
        return False
    print(report.text(row.title, found), flush=True)
    if json_file is not None:
        report.append_json(json_file, row.title, found)
    return True


def _in_turns(works: dict[str, Callable[[], object]]) -> Result:
    """Milliseconds of each work as a captured step."""

    def captured(work: Callable[[], object]) -> Work:
        step = CapturedStep(lambda: (work(), None)[1])
        step()
        return repeated(step, _REPEATS)

    with torch.inference_mode():
        steps = {name: captured(work) for name, work in works.items()}
        timings = contest(steps, _ROUNDS)
    return result("ms", timings, dict.fromkeys(steps, _REPEATS))


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def _same(found: Tensor, wanted: Tensor, what: str, most: float = 1e-2) -> None:
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not error < most:
        raise RuntimeError(f"{what}: relative error {error:.2g}, at most {most} is rounding")


if __name__ == "__main__":
    sys.exit(main())
