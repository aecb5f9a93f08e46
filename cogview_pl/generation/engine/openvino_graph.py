"""A transformer with its KV cache as graphs of OpenVINO.

The KV cache is a pair of variables per layer, which grow by the L new positions of a pass. OpenVINO fuses reading,
appending and attention into one operation if the rows of the old part are gathered by an index, so the graph has one.

Shapes: R rows, L new positions, S stored positions, D hidden size, H heads, K head size, N outputs, n ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.kernels.openvino import import_openvino
from cogview_pl.kernels.torchao import int8_parts
from cogview_pl.transformer.attention import fused_attention
from cogview_pl.transformer.block import SMALLEST_MAXIMUM, Block, LayerNorm, Residual
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.lora import LoRALinear
from cogview_pl.transformer.model import Transformer


def can_export(model: Transformer) -> bool:
    """Whether the graph covers the model: on one CPU, fp32 or int8 weights, fused attention, LayerNorm per token."""
    table = model.token_embedding.weight
    return (
        table.device.type == "cpu"
        and table.dtype == torch.float32
        and not model.sharded
        and model.norm_scope != NormScope.tensor
        and not torch.is_autocast_enabled("cpu")
        and all(isinstance(block, Block) and block.attention.function is fused_attention for block in model.blocks)
        and all(
            type(part) is LoRALinear or _plain(part) or int8_parts(part.weight) is not None
            for part in model.blocks.modules()
            if isinstance(part, nn.Linear)
        )
    )


def step_graph(model: Transformer, ids: Sequence[range]) -> Any:
    """Final hidden states of the next positions, logits of the last one, and the KV cache that they extend.

    Inputs: tokens and positions, int64 `(R, L)`; what is added to attention scores, float32 `(R or 1, 1, L, S + L)`;
    and 0 … R - 1, int32 `(R,)`. Outputs: float32 `(R, L, D)` and `(R, n)`.
    """
    return _Exporter(model, ids).step()


def head_graph(model: Transformer, ids: Sequence[range]) -> Any:
    """Logits, float32 `(R, n)`, of hidden states `(R, D)`."""
    return _Exporter(model, ids).head()


class _Exporter:
    """Nodes of the graph from the modules of a model, whose memory they share."""

    def __init__(self, model: Transformer, ids: Sequence[range]) -> None:
        self.openvino = import_openvino()
        from openvino import opset13

        self.ops: Any = opset13
        self._model, self._ids = model, ids
        self._hidden_size = model.token_embedding.weight.shape[1]
        self._head_size = self._hidden_size // model.num_heads

    def head(self) -> Any:
        """See `head_graph`."""
        hidden = self.ops.parameter([-1, self._hidden_size], np.float32)
        return self.openvino.Model([self.ops.result(self._logits(hidden))], [hidden])

    def step(self) -> Any:
        """See `step_graph`."""
        ops, model = self.ops, self._model
        tokens, positions = ops.parameter([-1, -1], np.int64), ops.parameter([-1, -1], np.int64)
        scores, rows = ops.parameter([-1, 1, -1, -1], np.float32), ops.parameter([-1], np.int32)
        x = ops.add(
            ops.gather(self.constant(model.token_embedding.weight), tokens, self._number(0)),
            ops.gather(self.constant(model.position_embedding.weight), positions, self._number(0)),
        )
        count = ops.shape_of(rows)
        empty = ops.broadcast(
            self._array(0.0, np.float32),
            ops.concat([count, self._array([model.num_heads, 0, self._head_size])], 0),
        )
        assigned: list[Any] = []
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            opened = self._norm(x, block.attention_residual.norm_in)
            qkv = self._split(self._linear(opened, block.attention.qkv))
            keys, values = (
                self._extended(f"{name}{layer}", new, rows, empty, assigned)
                for name, new in zip(("keys", "values"), qkv[1:], strict=True)
            )
            y = ops.scaled_dot_product_attention(qkv[0], keys, values, scores)
            y = ops.reshape(ops.transpose(y, self._array([0, 2, 1, 3])), self._array([0, 0, self._hidden_size]), True)
            x = self._close(x, self._linear(y, block.attention.out), block.attention_residual)
            raised = ops.gelu(self._linear(self._norm(x, block.mlp_residual.norm_in), block.mlp.up), "tanh")
            x = self._close(x, self._linear(raised, block.mlp.down), block.mlp_residual)
        hidden = self._norm(x, model.final_norm)
        logits = self._logits(ops.gather(hidden, self._number(-1), self._number(1)))
        results = [ops.result(hidden), ops.result(logits)]
        return self.openvino.Model(results, assigned, [tokens, positions, scores, rows])

    def constant(self, tensor: Tensor) -> Any:
        """A weight, in the memory of the tensor if it is contiguous."""
        return self.ops.constant(tensor.detach().contiguous().numpy(), shared_memory=True)

    def _extended(self, name: str, new: Any, rows: Any, empty: Any, assigned: list[Any]) -> Any:
        """Stored keys or values with the new ones `(R, H, S + L, K)`; appends the node that stores them."""
        from openvino.op.util import Variable, VariableInfo

        ops, info = self.ops, VariableInfo()
        info.data_shape = self.openvino.PartialShape([-1, self._model.num_heads, -1, self._head_size])
        info.data_type, info.variable_id = self.openvino.Type.f32, name
        variable = Variable(info)
        stored = ops.gather(ops.read_value(empty, variable), rows, self._number(0))
        every = ops.concat([stored, new], 2)
        assigned.append(ops.assign(every, variable))
        return every

    def _split(self, qkv: Any) -> list[Any]:
        """Queries, keys and values, each `(R, H, L, K)`."""
        ops = self.ops
        shape = self._array([0, 0, 3, self._model.num_heads, self._head_size])
        parts = ops.transpose(ops.reshape(qkv, shape, True), self._array([2, 0, 3, 1, 4]))
        return [ops.squeeze(part, self._number(0)) for part in ops.split(parts, self._number(0), 3).outputs()]

    def _logits(self, hidden: Any) -> Any:
        """By the rows of the head that the ids need; in int8 if the blocks are."""
        head_nD = torch.cat([self._model.token_embedding.weight[span.start : span.stop] for span in self._ids])
        quantized = any(int8_parts(weight) is not None for weight in self._model.blocks.parameters())
        weight = self._scaled(*_int8_rows(head_nD)) if quantized else self.constant(head_nD)
        return self.ops.matmul(hidden, weight, False, True)

    def _linear(self, x: Any, part: nn.Linear) -> Any:
        """x · weightᵀ + bias."""
        ops, int8 = self.ops, int8_parts(part.weight)
        if isinstance(part, LoRALinear):
            weight = self.constant(part.merged_weight())
        elif int8 is not None:
            weight = self._scaled(*int8)
        else:
            weight = self.constant(part.weight)
        return ops.add(ops.matmul(x, weight, False, True), self.constant(part.bias.float()))

    def _scaled(self, int8_ND: Tensor, scale_N: Tensor) -> Any:
        """A weight in int8, which OpenVINO reads as such."""
        whole = self.ops.convert(self.constant(int8_ND), np.float32)
        return self.ops.multiply(whole, self.constant(scale_N.view(-1, 1)))

    def _norm(self, x: Any, norm: nn.Module) -> Any:
        """LayerNorm, with PB-Relax if its scope is the token; x itself where the block has none.

        PB-Relax divides by the largest |x| against overflow in fp16. In fp32 that only makes eps relative to it, so
        small that the smallest eps serves all: the result differs by 8e-8 · (largest |x| / standard deviation)².
        """
        if not isinstance(norm, LayerNorm):
            return x
        ops, eps = self.ops, norm.eps
        if norm.scope == NormScope.token:
            eps *= SMALLEST_MAXIMUM**2
        normal = ops.mvn(x, self._array([-1]), True, eps, "inside_sqrt")
        return ops.add(ops.multiply(normal, self.constant(norm.weight)), self.constant(norm.bias))

    def _close(self, x: Any, branch: Any, residual: Residual) -> Any:
        """Residual stream with the branch's output added."""
        return self._norm(self.ops.add(x, self._norm(branch, residual.norm_branch)), residual.norm_sum)

    def _number(self, value: int) -> Any:
        return self._array(value)

    def _array(self, values: Any, kind: type = np.int64) -> Any:
        return self.ops.constant(np.array(values, dtype=kind))


def _int8_rows(weight_ND: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in int8 and the scale of each row."""
    scale_N = weight_ND.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / torch.iinfo(torch.int8).max
    return (weight_ND / scale_N[:, None]).round().to(torch.int8), scale_N


def _plain(linear: nn.Linear) -> bool:
    return type(linear) is Linear and type(linear.weight.data) is Tensor and linear.weight.dtype == torch.float32
