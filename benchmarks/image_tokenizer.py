"""The image tokenizer at the released size: code search, encoding and decoding.

Shapes: N vectors, D codebook_dim, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import gemm, memory
from benchmarks.contest import Work, contest
from benchmarks.report import Result, Row, result
from benchmarks.settings import DEVICE
from cogview_pl.kernels.cpu_linear import matmul
from cogview_pl.vqvae.codebook import nearest, rows_per_block
from cogview_pl.vqvae.config import BUILT_IN, FixedQuantizerConfig, VQVAEConfig
from cogview_pl.vqvae.model import VQVAE

HIDDEN_SIZE, CODEBOOK_DIM, CODEBOOK_SIZE = 512, 256, 8192
STRIDES, KERNEL = 3, 4
IMAGES, PIXELS = 4, 256
VECTORS = 16 * 1024
_CHECKED = 1024  # number of vectors whose codes are compared with a search in fp64
_NEAR_TIE = 1e-4  # a code is right if its distance exceeds the smallest one by at most this share


def rows() -> list[Row]:
    """Code search, and encoding and decoding in both precisions."""
    codecs = [Row(f"vq:images-{dtype}", partial(measure_images, dtype)) for dtype in ("fp32", "bf16")]
    return [Row("vq:code-search", measure_search), *codecs]


def measure_search(rounds: int = 5) -> Result:
    """Milliseconds for 16 x 1,024 vectors of hidden size 256 and 8,192 codes."""
    x_ND, codebook_KD = _vectors()
    contenders: dict[str, Work] = {
        "ours": lambda: nearest(x_ND, codebook_KD.T),
        "vector-quantize-pytorch": _peer_search(x_ND, codebook_KD),
        "cdist, argmin": lambda: torch.cdist(x_ND, codebook_KD).argmin(1),
        "bare torch.mm": _bare_products(x_ND, codebook_KD, lambda x_RD: torch.mm(x_RD, codebook_KD.T)),
        "bare product": _bare_products(x_ND, codebook_KD, lambda x_RD: matmul(x_RD, codebook_KD)),
    }
    with torch.inference_mode():
        found = result("ms", contest(contenders, rounds), {})
        found.facts["codes right"] = _share_right(x_ND, codebook_KD, nearest(x_ND, codebook_KD.T)[0])
    fastest = min(found.values["bare torch.mm"], found.values["bare product"])
    found.facts["share of the bare GEMM"] = fastest / found.values["ours"]
    if memory.MEASURABLE and DEVICE.type == "cpu":
        extra = memory.growth_apart("benchmarks.image_tokenizer:search_after_warm_up", with_inputs=False)
        found.facts["memory above the inputs, MB"] = extra / 1e6
    return found


def measure_images(dtype: str, rounds: int = 3) -> Result:
    """Milliseconds for four images of 256 pixels; bf16 is autocast with the code search in fp32."""
    model = released_size()
    images = torch.rand(IMAGES, 3, PIXELS, PIXELS, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bf16"):
        codes = model.encode(images)
        contenders: dict[str, Work] = {"encode": lambda: model.encode(images), "decode": lambda: model.decode(codes)}
        found = result("ms", contest(contenders | gemm.squares(dtype), rounds), {})
    rate = gemm.square_rate(found.values)
    found.facts["GFLOP/s of a 4,096³ product"] = rate / 1e9
    for name, flops in (("encode", sum(encode_flops(PIXELS))), ("decode", decode_flops(PIXELS))):
        reached = IMAGES * flops / found.values[name] * 1e3
        found.facts[f"GFLOP/s of {name}"] = reached / 1e9
        found.facts[f"{name}, share of the product's rate"] = reached / rate
    return found


def released_size() -> VQVAE:
    """A tokenizer of the released size with random weights: fp32, channels last, on `DEVICE`."""
    config = VQVAEConfig(
        downsampling=2**STRIDES,
        hidden_size=HIDDEN_SIZE,
        residual_blocks=0,
        codebook_dim=CODEBOOK_DIM,
        codebook_size=CODEBOOK_SIZE,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        quantizer=FixedQuantizerConfig(_target_=f"{BUILT_IN}.FixedQuantizer", commitment_weight=0.25),
    )
    model = VQVAE(config)
    return model.to(DEVICE).to(memory_format=torch.channels_last).eval()


def encode_flops(pixels: int) -> tuple[int, int]:
    """FLOP of the convolutions and of the code search, for an image of `pixels` x `pixels`."""
    edges = [pixels >> stride for stride in range(1, STRIDES + 1)]
    channels = [3] + [HIDDEN_SIZE] * (STRIDES - 1)
    convolutions = [2 * edge**2 * into * HIDDEN_SIZE * KERNEL**2 for edge, into in zip(edges, channels, strict=True)]
    last = 2 * edges[-1] ** 2 * HIDDEN_SIZE * CODEBOOK_DIM
    return sum(convolutions) + last, 2 * edges[-1] ** 2 * CODEBOOK_DIM * CODEBOOK_SIZE


def decode_flops(pixels: int) -> int:
    """FLOP of the transposed convolutions and the last convolution, for an image of `pixels` x `pixels`."""
    edges = [pixels >> stride for stride in range(STRIDES, 0, -1)]
    channels = [CODEBOOK_DIM] + [HIDDEN_SIZE] * (STRIDES - 1)
    convolutions = [2 * edge**2 * into * HIDDEN_SIZE * KERNEL**2 for edge, into in zip(edges, channels, strict=True)]
    return sum(convolutions) + 2 * pixels**2 * HIDDEN_SIZE * 3


def search_after_warm_up() -> Work:
    """The code search, after a search of a few vectors that initialises libraries."""
    x_ND, codebook_KD = _vectors()
    nearest(x_ND[:8], codebook_KD[:16].T)
    return lambda: nearest(x_ND, codebook_KD.T)


def _vectors() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(VECTORS, CODEBOOK_DIM, device=DEVICE), torch.randn(CODEBOOK_SIZE, CODEBOOK_DIM, device=DEVICE)


def _peer_search(x_ND: Tensor, codebook_KD: Tensor) -> Work:
    """vector-quantize-pytorch with the same codebook."""
    from vector_quantize_pytorch import VectorQuantize

    peer = VectorQuantize(dim=CODEBOOK_DIM, codebook_size=CODEBOOK_SIZE, kmeans_init=False).eval().to(DEVICE)
    peer._codebook.embed.data.copy_(codebook_KD[None])
    return lambda: peer(x_ND[None])


def _bare_products(x_ND: Tensor, codebook_KD: Tensor, multiply: Callable[[Tensor], Tensor]) -> Work:
    """Only the matrix products of the search, in the same blocks of rows."""
    blocks = x_ND.split(rows_per_block(len(codebook_KD)))
    return lambda: [multiply(x_RD) for x_RD in blocks]


def _share_right(x_ND: Tensor, codebook_KD: Tensor, codes_N: Tensor) -> float:
    """Share of codes that are the nearest ones in fp64, or nearly as near."""
    distance_NK = torch.cdist(x_ND[:_CHECKED].double(), codebook_KD.double())
    found_N = distance_NK.gather(1, codes_N[:_CHECKED, None])[:, 0]
    return float((found_N <= distance_NK.amin(1) * (1 + _NEAR_TIE)).double().mean())
