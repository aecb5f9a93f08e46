"""The model as decoding runs it: at each step a few rows are multiplied by every weight.

On a CPU such a product is as fast as the weights can be read. oneDNN comes close to that with weights that are laid
out for the number of rows. `torch.nn.functional.linear` does so in fp32 on Intel's processors; on others it reads them
at a third of that speed or less (on one thread for one row). Measured in `docs/performance.md`.

Shapes: R rows, D inputs, N outputs, n ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from cogview_pl.generation.engine.fused_gpu import FusedModel, fused_model
from cogview_pl.kernels.cpu_linear import ONEDNN_IS_FASTER
from cogview_pl.transformer.block import MLP, Cache
from cogview_pl.transformer.lora import LoRALinear
from cogview_pl.transformer.model import Transformer

# Private names of torch, checked against 2.15: `_reorder_linear_weight`, `_linear_pointwise` and
# `_is_mkldnn_bf16_supported` of `torch.ops.mkldnn`. Without them decoding uses the plain weights, which is slower.
_FEWEST_ROWS = 4  # the layout that oneDNN chooses for 4 rows serves 1 row faster than its layout for 1 does


class PackedLinear(nn.Module):
    """x · weightᵀ + bias with a copy of the weights in oneDNN's own layout; for inference.

    Args:
        weight: `(N, D)`, fp32 or bf16, on the CPU.
        bias: `(N,)` or None.
        rows: how many rows there will be; with another number it is right, and slower.
        gelu: take the GELU of the result, in its tanh form.
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


class DecodingModel:
    """What decoding runs of a sequence model: hidden states with a cache, and logits over a few id ranges.

    On a CPU its weights are packed copies where that is possible, made when this is constructed: it takes as much
    memory as the model again, and does not follow later training.

    Args:
        model: the sequence model.
        rows: rows of a batch.
        ids: ranges that logits are computed over, end to end.
    """

    def __init__(self, model: Transformer, rows: int, ids: Sequence[range]) -> None:
        self.device = model.token_embedding.weight.device
        fused = fused_model(model)
        self.by_kernels = fused is not None
        """Whether it runs by the kernels of a GPU."""
        self._model: Transformer | FusedModel = fused or model
        self._ids = ids
        self._head: nn.Module | None = None
        weight = model.token_embedding.weight
        if can_pack(weight):
            self._model = model if model.sharded else _packed_copy(model, rows)
            self._head = PackedLinear(torch.cat([weight[span.start : span.stop] for span in ids]), None, rows)

    def hidden(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Hidden states `(B, L, D)` of tokens that continue the rows of the cache; see `Transformer.hidden`."""
        return self._model.hidden(tokens, positions, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(…, n)` of hidden states `(…, D)`."""
        return self._model.logits(hidden, self._ids) if self._head is None else self._head(hidden)


def packed_bytes(*, layers: int, hidden_size: int, ids: int, dtype: torch.dtype, quantized: bool) -> int:
    """Memory of the packed copies on a CPU: the blocks' matrices, unless they are quantized, and the head's rows."""
    if not can_pack(torch.empty(0, dtype=dtype)):
        return 0
    return ((0 if quantized else 12 * layers * hidden_size) + ids) * hidden_size * dtype.itemsize


def can_pack(weight: Tensor) -> bool:
    """Whether there is a packed form of the weight, faster than the plain one, and products are taken as they are."""
    if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu") or type(weight.data) is not Tensor:
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return ONEDNN_IS_FASTER and weight.dtype == torch.float32


def _packed_copy(model: Transformer, rows: int) -> Transformer:
    """The model with packed linear maps and nothing that only training needs.

    It shares everything else, quantized weights too, with the original.
    """
    replaced: dict[int, nn.Module | Tensor] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for part in model.modules():
        if isinstance(part, MLP) and can_pack(part.up.weight):
            replaced |= {id(part.up): _packed(part.up, rows, gelu=True), id(part.gelu): nn.Identity()}
        elif isinstance(part, nn.Linear) and id(part) not in replaced and can_pack(part.weight):
            replaced[id(part)] = _packed(part, rows)
        elif isinstance(part, nn.Dropout):
            replaced[id(part)] = nn.Identity()
    return deepcopy(model, replaced)


def _packed(linear: nn.Linear, rows: int, *, gelu: bool = False) -> PackedLinear:
    """The packed form of a map, with an adapter that it may have added to its weights."""
    if isinstance(linear, LoRALinear):
        return PackedLinear(linear.merged_weight(), linear.bias.float(), rows, gelu=gelu)
    return PackedLinear(linear.weight, linear.bias, rows, gelu=gelu)
