"""CPU copy of the model with pre-packed weights: a decoding step multiplies a few rows by every weight.

On a CPU such a product takes the time of reading the weights. oneDNN comes close to that with weights that are laid out
for the number of rows. `torch.nn.functional.linear` does so in fp32 on Intel processors; on others it reads them at a
third of that speed or less (on one thread for one row). Measured in `docs/performance.md`.

Shapes: R rows, D inputs, N outputs, n ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from cogview_pl.kernels.cpu_linear import ONEDNN_IS_FASTER
from cogview_pl.transformer.block import MLP
from cogview_pl.transformer.lora import LoRALinear
from cogview_pl.transformer.model import Transformer

# Private names of torch, checked against 2.15: `_reorder_linear_weight`, `_linear_pointwise` and
# `_is_mkldnn_bf16_supported` of `torch.ops.mkldnn`. Without them decoding uses the plain weights, which is slower.
_FEWEST_ROWS = 4  # the layout that oneDNN chooses for 4 rows serves 1 row faster than its layout for 1 does


class PackedLinear(nn.Module):
    """x · weightᵀ + bias for inference, with a copy of the weights in oneDNN's own layout.

    Args:
        weight: `(N, D)`, fp32 or bf16, on the CPU.
        bias: `(N,)` or None.
        rows: expected number of rows; another number gives the same result more slowly.
        gelu: apply GELU, in its tanh form, to the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, *, gelu: bool = False) -> None:
        super().__init__()
        weight = weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight.default(weight, max(rows, _FEWEST_ROWS))
        self._bias = bias
        self._then: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis of a tensor of any shape (…, D)."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, *self._then)


class PackedModel:
    """Hidden states and logits of a model by packed copies of its weights; see `can_pack`.

    The copies take the memory of the model again and do not follow later training. Of a model on several devices only
    the head is packed.

    Args:
        model: the sequence model.
        rows: rows of a batch.
        ids: ranges that logits are computed over, end to end.
    """

    def __init__(self, model: Transformer, rows: int, ids: Sequence[range]) -> None:
        weight = model.token_embedding.weight
        self.hidden = model.hidden if model.sharded else _packed_copy(model, rows).hidden
        """`Transformer.hidden` of the copy."""
        self._head = PackedLinear(torch.cat([weight[span.start : span.stop] for span in ids]), None, rows)

    def logits(self, hidden: Tensor, ids: Sequence[range] | None = None) -> Tensor:
        """Logits `(…, n)` of hidden states `(…, D)`; `ids` are always those of the constructor."""
        return self._head(hidden)


def packed_bytes(*, rows: int, layers: int, hidden_size: int, ids: int, dtype: torch.dtype, quantized: bool) -> int:
    """Bytes of the packed copies on a CPU: matrices of the blocks, unless they are quantized, and rows of the head."""
    if not can_pack(torch.empty(0, dtype=dtype), rows):
        return 0
    return ((0 if quantized else 12 * layers * hidden_size) + ids) * hidden_size * dtype.itemsize


def can_pack(weight: Tensor, rows: int) -> bool:
    """Whether a packed form of the weight is faster for `rows` rows than the plain one.

    Never under autocast, which casts weights, and not for few rows in fp32 on one thread, which MKL serves faster.
    """
    if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu") or type(weight.data) is not Tensor:
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if weight.dtype == torch.bfloat16:
        return computes_in_bf16()
    few = rows < _FEWEST_ROWS and torch.get_num_threads() == 1
    return ONEDNN_IS_FASTER and weight.dtype == torch.float32 and not few


def computes_in_bf16() -> bool:
    """Whether the processor does, so that oneDNN is fast in bf16."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_copy(model: Transformer, rows: int) -> Transformer:
    """The model with packed linear maps and without the parts that only training needs.

    Everything else, quantized weights too, is shared with the original.
    """
    replaced: dict[int, nn.Module | Tensor] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for part in model.modules():
        if isinstance(part, MLP) and can_pack(part.up.weight, rows):
            replaced |= {id(part.up): _packed(part.up, rows, gelu=True), id(part.gelu): nn.Identity()}
        elif isinstance(part, nn.Linear) and id(part) not in replaced and can_pack(part.weight, rows):
            replaced[id(part)] = _packed(part, rows)
        elif isinstance(part, nn.Dropout):
            replaced[id(part)] = nn.Identity()
    return deepcopy(model, replaced)


def _packed(linear: nn.Linear, rows: int, *, gelu: bool = False) -> PackedLinear:
    """The packed form of a linear map; the adapter that it may have is added to its weights."""
    if isinstance(linear, LoRALinear):
        return PackedLinear(linear.merged_weight(), linear.bias.float(), rows, gelu=gelu)
    return PackedLinear(linear.weight, linear.bias, rows, gelu=gelu)
