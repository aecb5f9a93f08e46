"""Matmuls on a CPU: by oneDNN where the default library is slow.

On x86, `torch.nn.functional.linear` uses MKL for fp32. MKL uses AVX-512 on Intel's processors only, so where others
have it, MKL runs at half speed; oneDNN, which torch includes for convolutions, uses it on all. It also
reads the weights of few rows slowly there. Measured in `docs/performance.md`.

Shapes: N rows, D inputs, M outputs.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# Private name of torch, checked against 2.15: `torch.ops.mkldnn._linear_pointwise`. Without it `F.linear` does the
# same, more slowly where MKL is slow.
_FEWEST_ROWS = 256  # with fewer rows, reordering the weights for oneDNN costs more than it saves
_FIRST_CORE = 1000  # characters of /proc/cpuinfo that describe the first core


def _processor() -> str:
    """Maker and model of the processor, as the system reports them."""
    linux = Path("/proc/cpuinfo")
    if not linux.is_file():
        return platform.processor()
    with linux.open(encoding="utf-8", errors="replace") as cores:
        return cores.read(_FIRST_CORE)


# Evaluated once: torch.compile cannot trace these calls.
_BOTH_LIBRARIES = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()

ONEDNN_IS_FASTER = _BOTH_LIBRARIES and "GenuineIntel" not in _processor()
"""Whether oneDNN reads the weights of few rows faster than MKL, in fp32 on this machine."""

CONVOLUTIONS_ARE_FASTER = ONEDNN_IS_FASTER and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether `linear` uses oneDNN for fp32 on this machine."""


class Linear(nn.Linear):
    """x · weightᵀ + bias of the last axis; where MKL lacks AVX-512, oneDNN computes it as a 1 × 1 convolution.

    Only a convolution reaches oneDNN with gradients. Its sums have another order: results differ from `nn.Linear` by
    about 1e-6 relative.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map a tensor of any shape (…, D) to (…, M)."""
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """`Linear` as a function: input · weightᵀ + bias, of shape (…, M) for an input (…, D)."""
    many = input.numel() >= _FEWEST_ROWS * input.shape[-1]
    if not (CONVOLUTIONS_ARE_FASTER and many and _plain_fp32(input, weight_MD)):
        return F.linear(input, weight_MD, bias_M)
    return by_convolution(input, weight_MD, bias_M)


def by_convolution(input: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, whether it is faster or not."""
    pixels_1D1N = input.reshape(1, 1, -1, input.shape[-1]).permute(0, 3, 1, 2)  # one row per pixel, channels last
    output_1M1N = F.conv2d(pixels_1D1N, weight_MD[:, :, None, None], bias_M)
    return output_1M1N.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1)


def matmul(x_ND: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias `(N, M)` of many rows, without gradients; the tensors may be strided views.

    By oneDNN on every processor: even where MKL is as fast, it needs more working memory.
    """
    if _BOTH_LIBRARIES and _plain_fp32(x_ND, weight_MD) and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise.default(x_ND, weight_MD, bias_M, "none", [], "")
    return F.linear(x_ND, weight_MD, bias_M)


def _plain_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether this is an fp32 matmul on a CPU, of ordinary tensors."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight.data) in (Tensor, FakeTensor)  # the memory estimate plays steps on fake tensors
        and not torch.is_autocast_enabled("cpu")
    )
