"""Training on a CPU in fp32: LayerNorm with PB-Relax, GELU and causal attention as one kernel each, with gradients.

torch needs two to ten passes over memory for each of them, and waits for all threads after every pass. The kernels are
written in C++ (`cpu_training.cpp`) and compiled once per machine. They give the numbers of torch up to rounding.

Shapes: N rows, D hidden size, B batch, L length, H heads, K head size.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_pl.kernels.cpp_library import Library

LONGEST_ATTENTION = 256
"""Longest sequence of the attention kernel, which keeps the scores of a head in the cache of a core."""

LIBRARY = Library(Path(__file__).with_suffix(".cpp"))


def can_run(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: fp32 on a CPU, in training, outside autocast and torch.compile."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" and x.dtype == torch.float32 and type(x.data) is Tensor for x in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, smallest_maximum: float, eps: float) -> Tensor:
    """LayerNorm(x / max(max|x|, smallest_maximum)) of the last axis of `(…, D)`; the divisor counts as a constant."""
    return _LayerNorm.apply(x, weight_D, bias_D, smallest_maximum, eps)  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of any shape."""
    return _GELU.apply(x)  # type: ignore[no-any-return]


def causal_attention(qkv_NE: Tensor, starts: Tensor, longest: int, num_heads: int) -> Tensor:
    """softmax(QKᵀ/√K) V over earlier positions of the same sequence, `(N, D)`.

    Args:
        qkv_NE: queries, keys and values of all positions, sequence by sequence; E = 3 · D.
        starts: int64 `(B + 1,)`, first row of each sequence, and N.
        longest: length of the longest sequence, at most `LONGEST_ATTENTION`.
        num_heads: H.
    """
    return _CausalAttention.apply(qkv_NE, starts, longest, num_heads)  # type: ignore[no-any-return]


def _call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a kernel: tensors by the address of their numbers."""
    getattr(LIBRARY.load(), name)(*map(_argument, arguments))


def _argument(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor, smallest_maximum: float, eps: float) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1]
        rows = x.numel() // size
        y, factors_N2 = torch.empty_like(x), x.new_empty(rows, 2)
        _call("norm_forward", x, weight_D, bias_D, y, factors_N2, rows, size, smallest_maximum, eps)
        ctx.save_for_backward(x, weight_D, factors_N2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, factors_N2 = ctx.saved_tensors
        gradient = gradient.contiguous()
        size = x.shape[-1]
        x_gradient, vectors_2D = torch.empty_like(x), x.new_empty(2, size)
        _call("norm_backward", gradient, x, weight_D, factors_N2, x_gradient, vectors_2D, len(factors_N2), size)
        return x_gradient, vectors_2D[0], vectors_2D[1], None, None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _call("gelu_forward", x, y, x.numel())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x_gradient = torch.empty_like(x)
        _call("gelu_backward", gradient.contiguous(), x, x_gradient, x.numel())
        return x_gradient


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NE: Tensor, starts: Tensor, longest: int, num_heads: int) -> Tensor:
        qkv_NE = qkv_NE.contiguous()
        hidden_size = qkv_NE.shape[1] // 3
        ctx.sizes = len(starts) - 1, longest, num_heads, hidden_size // num_heads
        y_ND = qkv_NE.new_empty(len(qkv_NE), hidden_size)
        _call("attention_forward", qkv_NE, starts, y_ND, *ctx.sizes)
        ctx.save_for_backward(qkv_NE, starts)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None, None]:
        qkv_NE, starts = ctx.saved_tensors
        qkv_gradient = torch.empty_like(qkv_NE)
        _call("attention_backward", gradient_ND.contiguous(), qkv_NE, starts, qkv_gradient, *ctx.sizes)
        return qkv_gradient, None, None, None
