"""The released sizes on a GPU, with random weights: decoding, training, image tokenizer, ranking, super-resolution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import gemm
from benchmarks.contest import Work, contest, repeated
from benchmarks.decoding import ours
from benchmarks.image_tokenizer import encode_flops, released_size
from benchmarks.magnify_rerank import magnified, measure_rerank
from benchmarks.references import step_bytes
from benchmarks.report import Result, Row, result
from benchmarks.settings import DEVICE, DTYPES, IMAGE_CODES, PROMPT, SHAPES, super_resolution, vocab_size
from benchmarks.training import our_step, parameters
from cogview_pl.generation.config import Quantization
from cogview_pl.lit.callbacks.device_peaks import peak_tflops
from cogview_pl.transformer.config import ActivationCheckpointing
from cogview_pl.vqvae.model import VQVAE

_COPIES = 10


@dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements; the defaults fill one GPU of 80 GB."""

    shapes: tuple[str, ...] = ("cogview_400m", "cogview_4b")
    dtypes: tuple[str, ...] = ("fp16", "bf16")
    grid: int = 32
    images: int = 16
    sequences: tuple[tuple[int, ...], ...] = ((24, 24, 64), (10, 10, 16))
    """Per shape, of a training step with each form of activation checkpointing."""
    encoded: int = 64
    """Images at once."""
    candidates: int = 60
    ranked_at_once: int = 20
    copied: int = 2**31
    """Bytes."""
    pixels: int = 256
    rounds: int = 3


def rows(sizes: Sizes = Sizes()) -> list[Row]:
    """All rows. They also run without a GPU, for tests."""
    largest = sizes.shapes[-1]
    decode = [
        Row(f"cuda:decode-{shape}-{dtype}-x{batch}", partial(measure_decode, sizes, shape, dtype, batch))
        for shape in sizes.shapes
        for dtype in sizes.dtypes
        for batch in (1, sizes.images)
    ]
    train = [
        Row(
            f"cuda:train-{shape}-bf16-x{batch}-{recompute.value}{'-compiled' if compiled else ''}",
            partial(measure_train, sizes, shape, batch, recompute, compiled),
        )
        for shape, batches in zip(sizes.shapes, sizes.sequences, strict=True)
        for batch, recompute in zip(batches, ActivationCheckpointing, strict=True)
        for compiled in (False, True)
    ]
    ranked = partial(measure_rerank, largest, "bf16", sizes.candidates, sizes.grid, sizes.ranked_at_once, sizes.rounds)
    return [
        *decode,
        Row(f"cuda:decode-{largest}-int8-x1", partial(measure_decode, sizes, largest, "bf16", 1, int8=True)),
        *train,
        *(
            Row(f"cuda:encode-{dtype}-x{sizes.encoded}", partial(measure_encode, sizes, dtype))
            for dtype in ("tf32", "bf16")
        ),
        Row(f"cuda:rerank-{largest}-bf16-x{sizes.candidates}", ranked),
        Row(f"cuda:magnify-{largest}-bf16-x1", partial(measure_magnify, sizes, largest)),
    ]


def measure_decode(sizes: Sizes, shape: str, dtype: str, batch: int, *, int8: bool = False) -> Result:
    """Milliseconds per step after a prompt of 64 tokens, and the share of the copy bandwidth that its reads take.

    `int8`: with `quantization=int8`.
    """
    new = sizes.grid**2
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    contenders = {
        "ours": ours(shape, dtype, batch, sizes.grid, Quantization.int8 if int8 else None),
        "copy": repeated(lambda: target.copy_(source), _COPIES),
    }
    found = result("ms", contest(contenders, sizes.rounds), {"ours": new, "copy": _COPIES})
    bandwidth = 2 * sizes.copied / found.values["copy"] * 1e3  # a copy reads and writes
    read = step_bytes(shape, dtype, batch, new, int8=int8) / found.values["ours"] * 1e3
    found.facts["copy, GB/s"] = bandwidth / 1e9
    found.facts["share of the copy bandwidth"] = read / bandwidth
    found.facts["images/s"] = batch / (found.values["ours"] * new) * 1e3
    return found


def measure_train(sizes: Sizes, shape: str, batch: int, recompute: ActivationCheckpointing, compiled: bool) -> Result:
    """Milliseconds per step over the whole vocabulary, weights and AdamW's moments in bf16.

    `recompute` is the activation checkpointing; recomputed operations do not count as work. `compiled` uses
    torch.compile.
    """
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = our_step(shape, "bf16", "vocabulary", batch, sizes.grid, hold="bf16", recompute=recompute, compiled=compiled)
    found = result("ms", contest({"ours": step} | gemm.squares("bf16"), sizes.rounds), {})
    reached = step_flops(shape, batch, PROMPT + sizes.grid**2) / found.values["ours"] * 1e3
    found.facts["TFLOP/s"] = reached / 1e12
    found.facts["parameters"] = parameters(shape)
    found.facts["share of a 4,096³ product's rate"] = reached / gemm.square_rate(found.values)
    if (peak := _peak()) is not None:
        found.facts["MFU"] = reached / peak
    if DEVICE.type == "cuda":
        found.facts["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def step_flops(shape: str, batch: int, length: int) -> int:
    """FLOP of a training step: matrix products of `batch` sequences, and causal attention (half of the square)."""
    layers, hidden_size, _ = SHAPES[shape]
    products = gemm.training_flops(gemm.linears_of_step(layers, hidden_size, vocab_size(), batch * length))
    return products + 6 * batch * layers * hidden_size * length**2


def measure_encode(sizes: Sizes, dtype: str) -> Result:
    """Milliseconds to encode images, in fp32 (convolutions in TF32, as is torch's default) or bf16 (autocast)."""
    model = released_size()
    images = torch.rand(sizes.encoded, 3, sizes.pixels, sizes.pixels, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16"):
        found = result("ms", contest({"encode": lambda: model.encode(images)}, sizes.rounds), {})
        found.facts["codes as in fp32"] = float(
            (model.encode(images) == _encoded_exactly(model, images)).float().mean()
        )
    rate = sizes.encoded / found.values["encode"] * 1e3
    found.facts["images/s"] = rate
    if (peak := _peak()) is not None:
        found.facts["share of the bf16 bound"] = rate * sum(encode_flops(sizes.pixels)) / peak
    return found


def _encoded_exactly(model: VQVAE, images: Tensor) -> Tensor:
    """Codes computed without TF32."""
    with torch.autocast(DEVICE.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return model.encode(images)


def measure_magnify(sizes: Sizes, shape: str) -> Result:
    """Milliseconds to double one image."""
    model, template = super_resolution(shape, sizes.grid)
    codes = torch.randint(0, IMAGE_CODES, (1, sizes.grid, sizes.grid), device=DEVICE)
    work: Work = partial(magnified, model.to(DTYPES["bf16"]), template, codes)
    return result("ms", contest({"one image": work}, 1), {})


def _peak() -> float | None:
    """Dense bf16 FLOP/s of a known GPU, from its data sheet."""
    peak = peak_tflops(torch.cuda.get_device_name(), "bf16-true") if DEVICE.type == "cuda" else None
    return None if peak is None else peak * 1e12
