"""A decoding step on a CPU as one call of C++ (`cpu_decoding.cpp`, compiled once per machine).

Weights stay where they are, in fp32, bf16, or int8 with a scale per output; numbers between them are fp32.

Shapes: R rows, D hidden size, H heads, K head size, C capacity, N outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cogview_pl.kernels.cpp_library import Library

WIDTH = 8
"""Hidden size and head size must be multiples of this number of floats."""

LIBRARY = Library(Path(__file__).with_suffix(".cpp"))
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class NormWeights(NamedTuple):
    """Weight and bias of a LayerNorm, fp32 `(D,)`."""

    weight: Tensor | None
    bias: Tensor | None


NO_NORM = NormWeights(None, None)


class LinearWeights(NamedTuple):
    """A linear map: x · weightᵀ · scale + bias."""

    weight: Tensor
    """`(N, D)`, fp32, bf16 or int8, contiguous."""
    scale: Tensor | None
    """fp32 `(N,)`; None: 1."""
    bias: Tensor | None
    """fp32 `(N,)`; None: 0."""


class LayerWeights(NamedTuple):
    """A block, in the order of the struct `Layer`."""

    attention_in: NormWeights
    qkv: LinearWeights
    out: LinearWeights
    attention_branch: NormWeights
    mlp_in: NormWeights
    up: LinearWeights
    down: LinearWeights
    mlp_branch: NormWeights


class LinearMap:
    """x · weightᵀ · scale + bias."""

    def __init__(self, weights: LinearWeights) -> None:
        self._weights = weights  # the pointers below are into their memory
        self._pointers = _pointers([weights])
        self._kind = _KINDS[weights.weight.dtype]

    def __call__(self, x_RD: Tensor, threads: int) -> Tensor:
        """`(R, N)` fp32, of x in fp32, contiguous."""
        rows, inputs = x_RD.shape
        y_RN = x_RD.new_empty(rows, len(self._weights.weight))
        sizes = map(ctypes.c_int64, (self._kind, rows, inputs, y_RN.shape[1]))
        LIBRARY.load().linear_map(_at(self._pointers), *sizes, _at(x_RD), _at(y_RN), ctypes.c_int64(threads))
        return y_RN


class DecodingStep:
    """A step of all layers.

    Args:
        layers: the blocks, whose linear maps have one dtype.
        final_norm: the last LayerNorm.
        num_heads: H.
        smallest_maximum: PB-Relax divides by max(max|x|, this); 0: plain LayerNorm.
        eps: of LayerNorm, after that division.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        final_norm: NormWeights,
        *,
        num_heads: int,
        smallest_maximum: float,
        eps: float,
    ) -> None:
        self._weights = layers, final_norm  # the pointers below are into their memory
        self._layers = _pointers([part for layer in layers for part in layer])
        self._final_norm = _pointers([final_norm])
        self._kind = ctypes.c_int64(_KINDS[layers[0].qkv.weight.dtype])
        self._norm = ctypes.c_float(smallest_maximum), ctypes.c_float(eps)
        self._sizes = len(layers), num_heads

    def __call__(self, x_RD: Tensor, stored_L2RHCK: Tensor, lengths_R: Tensor, threads: int) -> Tensor:
        """Final normalised hidden states `(R, D)`; appends keys and values to the cache.

        Args:
            x_RD: embeddings of the new positions, fp32, contiguous.
            stored_L2RHCK: keys and values, fp32; the last two axes are contiguous.
            lengths_R: stored positions of each row, int64, less than C.
            threads: at least 1; the result does not depend on it.

        Raises:
            ValueError: the cache is full.
        """
        if int(lengths_R.max()) >= stored_L2RHCK.shape[4]:
            raise ValueError(f"the cache has room for {stored_L2RHCK.shape[4]} positions, and a row has as many")
        rows, hidden_size = x_RD.shape
        layers, heads = self._sizes
        sizes = (ctypes.c_int64 * 5)(layers, rows, hidden_size, heads, hidden_size // heads)
        cache = (ctypes.c_int64 * 6)(stored_L2RHCK.data_ptr(), lengths_R.data_ptr(), *stored_L2RHCK.stride()[:4])
        y_RD = torch.empty_like(x_RD)
        parts = _at(self._layers), _at(self._final_norm), sizes, cache, self._kind, *self._norm
        LIBRARY.load().decode_step(*parts, _at(x_RD), _at(y_RD), ctypes.c_int64(threads))
        return y_RD


def _pointers(parts: Sequence[NormWeights | LinearWeights]) -> Tensor:
    """Addresses of the tensors of the parts, one after the other; 0 for None."""
    return torch.tensor([0 if tensor is None else tensor.data_ptr() for part in parts for tensor in part])


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
