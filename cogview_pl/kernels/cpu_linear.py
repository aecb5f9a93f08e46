"""Matrix products on a CPU: by oneDNN where the default library is slow.

`torch.nn.functional.linear` hands fp32 products on x86 to MKL, which is as fast as any on processors of its own maker
and runs at half its speed or less on all others. oneDNN, which the same torch carries for convolutions, makes no such
difference. Measured in `docs/performance.md`.

Shapes: N rows, D inputs, M outputs.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_FEWEST_ROWS = 256  # below, laying the weights out for oneDNN costs more than it brings
_FIRST_CORE = 1000  # characters that hold what is said of it


def _processor() -> str:
    """Maker and model, as the system tells them."""
    linux = Path("/proc/cpuinfo")
    if not linux.is_file():
        return platform.processor()
    with linux.open(encoding="utf-8", errors="replace") as cores:
        return cores.read(_FIRST_CORE)


# Asked once: torch.compile cannot look through these calls.
_BOTH_LIBRARIES = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()

ONEDNN_IS_FASTER = _BOTH_LIBRARIES and "GenuineIntel" not in _processor()
"""Whether fp32 products with gradients, or of few rows, are taken by oneDNN on this machine."""


class Linear(nn.Linear):
    """x · weightᵀ + bias of the last axis; by oneDNN it is taken as a convolution with a 1 × 1 kernel.

    That is how oneDNN is reached with gradients. Sums run in another order: about 1e-6 relative to `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map a tensor of any shape (…, D) to (…, M)."""
        return linear(input, self.weight, self.bias)


def linear(input: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """`Linear` as a function: input · weightᵀ + bias, of shape (…, M) for an input (…, D)."""
    many = input.numel() >= _FEWEST_ROWS * input.shape[-1]
    if not (ONEDNN_IS_FASTER and many and _plain_fp32(input, weight_MD)):
        return F.linear(input, weight_MD, bias_M)
    return by_convolution(input, weight_MD, bias_M)


def by_convolution(input: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, whatever it brings."""
    pixels_1D1N = input.reshape(1, 1, -1, input.shape[-1]).permute(0, 3, 1, 2)  # one row per pixel, channels last
    output_1M1N = F.conv2d(pixels_1D1N, weight_MD[:, :, None, None], bias_M)
    return output_1M1N.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1)


def product(x_ND: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias `(N, M)` of many rows, without gradients; strided views are fine.

    By oneDNN on every processor: where MKL is as fast it still takes more memory to work in.
    """
    if _BOTH_LIBRARIES and _plain_fp32(x_ND, weight_MD) and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise.default(x_ND, weight_MD, bias_M, "none", [], "")
    return F.linear(x_ND, weight_MD, bias_M)


def _plain_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether this is an fp32 product on a CPU, of ordinary tensors."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight.data) in (Tensor, FakeTensor)  # the memory estimate plays steps on fake tensors
        and not torch.is_autocast_enabled("cpu")
    )
