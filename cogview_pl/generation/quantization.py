"""Weight-only quantization of a sequence model for inference, by torchao (extra `quant`).

Matrices of the blocks are held in 8 or 4 bits. Embeddings, which are the head as well, LayerNorms and biases stay as
they are: the head's logits decide each sample, and they are a small share of a large model.
"""

from __future__ import annotations

import torch

from cogview_pl.errors import UserError
from cogview_pl.generation.config import Quantization
from cogview_pl.kernels.torchao import import_torchao
from cogview_pl.transformer.model import Transformer

_INT4_GROUPS = (
    128,
    64,
    32,
)  # numbers of inputs that may share a scale in the int4 kernels; the largest that fits is used
_INT4_INPUTS = 1024  # the int4 kernels pad the inputs of a matrix to a multiple of this
_SCALE_BYTES = 4  # per group: scale and zero point in bf16


def quantize(model: Transformer, quantization: Quantization | None) -> None:
    """Quantize the matrices of the blocks in place; None leaves the model as it is.

    The model must be on its device and in its precision already, and cannot be trained or saved afterwards.

    Raises:
        UserError: torchao is missing, or has no kernel for this device, precision or hidden size.
    """
    if quantization is None:
        return
    table = model.token_embedding.weight
    hidden_size = table.shape[1]
    if quantization == Quantization.int4:
        _check_int4(table, hidden_size)
    elif table.dtype == torch.float16:  # products are taken before they are scaled, and leave the range of fp16
        raise UserError("quantization=int8 overflows with precision=fp16; use precision=bf16 or precision=fp32")
    torchao = import_torchao("torchao.quantization", f"quantization={quantization.value}")
    if quantization == Quantization.int8:
        torchao.quantize_(model.blocks, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        options = {"group_size": _group(hidden_size), "int4_packing_format": "tile_packed_to_4d"}
        torchao.quantize_(model.blocks, torchao.Int4WeightOnlyConfig(**options, set_inductor_config=False))


def matrix_bytes(quantization: Quantization, hidden_size: int) -> float:
    """Bytes of the matrices of one block with the scales of int4; the scales of int8, one per row, do not count."""
    if quantization == Quantization.int8:
        return 12.0 * hidden_size**2  # 4 · hidden_size² in attention, twice 4 · hidden_size² in the MLP
    inputs = [*[_padded(hidden_size)] * 8, _padded(4 * hidden_size)]  # for 8 · hidden_size and hidden_size outputs
    return hidden_size * sum(inputs) * (0.5 + _SCALE_BYTES / (_group(hidden_size) or _INT4_GROUPS[0]))


def _padded(inputs: int) -> int:
    return -(-inputs // _INT4_INPUTS) * _INT4_INPUTS


def _group(hidden_size: int) -> int | None:
    return next((size for size in _INT4_GROUPS if hidden_size % size == 0), None)


def _check_int4(table: torch.Tensor, hidden_size: int) -> None:
    if table.device.type != "cuda" or torch.cuda.get_device_capability(table.device) < (8, 0):
        raise UserError(
            "quantization=int4 needs a CUDA GPU of compute capability 8.0 (Ampere) or later; use quantization=int8"
        )
    if table.dtype != torch.bfloat16:
        raise UserError("quantization=int4 computes in bf16; set precision=bf16, or use quantization=int8")
    if _group(hidden_size) is None:
        raise UserError(
            f"quantization=int4 needs a model.hidden_size that 32 divides, this model has {hidden_size}; use "
            "quantization=int8"
        )
