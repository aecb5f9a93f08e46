"""Weight-only quantization of a sequence model for inference, by torchao (extra `quant`).

The matrices of the blocks are held in 8 or 4 bits. Embeddings, which are the head as well, LayerNorms and biases stay
as they are: the head's logits decide each draw, and it is a small share of a large model.
"""

from __future__ import annotations

import torch

from cogview_pl.errors import UserError
from cogview_pl.transformer.model import Transformer

_INT4_GROUPS = (128, 64, 32)  # inputs that share a scale in the kernels for 4 bits; the largest that fits is taken
_INT4_INPUTS = 1024  # the kernels for 4 bits fill the inputs of a matrix up to multiples of this
_SCALE_BYTES = 4  # of a group: scale and zero point in bf16


def quantize(model: Transformer, weights: str | None) -> None:
    """Put the blocks' matrices into `weights`, int8 or int4, in place; None leaves the model as it is.

    The model must be on its device and in its precision already, and cannot be trained or saved afterwards.

    Raises:
        UserError: torchao is missing, or has no kernel for this device, precision or width.
    """
    if weights is None:
        return
    table = model.token_embedding.weight
    width = table.shape[1]
    if weights == "int4":
        _check_int4(table, width)
    elif table.dtype == torch.float16:  # products are taken before they are scaled, and leave the range of fp16
        raise UserError("weights=int8 overflows with precision=fp16; use precision=bf16 or precision=fp32")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(f'weights={weights} needs torchao; pip install "cogview_pl[quant]"') from error
    if weights == "int8":
        quantize_(model.blocks, Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        options = {"group_size": _group(width), "int4_packing_format": "tile_packed_to_4d"}
        quantize_(model.blocks, Int4WeightOnlyConfig(**options, set_inductor_config=False))


def matrix_bytes(weights: str, width: int) -> float:
    """Memory of the matrices of one block, scales of int4 included; those of int8, one per row, do not count."""
    if weights == "int8":
        return 12.0 * width**2  # 4 · width² in attention, twice 4 · width² in the MLP
    inputs = [*[_padded(width)] * 8, _padded(4 * width)]  # of 8 · width outputs, and of width
    return width * sum(inputs) * (0.5 + _SCALE_BYTES / (_group(width) or _INT4_GROUPS[0]))


def _padded(inputs: int) -> int:
    return -(-inputs // _INT4_INPUTS) * _INT4_INPUTS


def _group(width: int) -> int | None:
    return next((size for size in _INT4_GROUPS if width % size == 0), None)


def _check_int4(table: torch.Tensor, width: int) -> None:
    if table.device.type != "cuda" or torch.cuda.get_device_capability(table.device) < (8, 0):
        raise UserError("weights=int4 needs a CUDA GPU of compute capability 8.0 (Ampere) or later; use weights=int8")
    if table.dtype != torch.bfloat16:
        raise UserError("weights=int4 computes in bf16; set precision=bf16, or use weights=int8")
    if _group(width) is None:
        raise UserError(f"weights=int4 needs a model.width that 32 divides, this model has {width}; use weights=int8")
