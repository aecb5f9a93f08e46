"""The transformer on several devices: weights sharded and gathered block by block (FSDP2), or tensor parallel.

In both, parameters become DTensors, which know their full shape and keep their names.

`ColwiseParallel._partition_linear_fn` and `_StridedShard` are private names of torch (checked with 2.15): without them
each device would get a contiguous third of the fused projection instead of its own heads.

Shapes: B batch, L length, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from cogview_pl.transformer.block import Block
from cogview_pl.transformer.model import Transformer

# Private names of torch, checked against 2.15: `_StridedShard` and `ColwiseParallel._partition_linear_fn`. Without them
# queries, keys and values of one matrix cannot be sharded by heads, so there is no strategy=tp.
_THREE = 3  # queries, keys and values, consecutive in one matrix


def shard_weights(model: Transformer, mesh: DeviceMesh) -> None:
    """FSDP2: each process holds its part of every parameter, and a full block only while it computes that block.

    Gradients are averaged over the mesh. The embeddings stay full from `hidden` to the end of the backward pass,
    because the loss reads the lm_head in between.
    """
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    model.sharded = True


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Each process computes its part of the heads and of the MLP's inner units, for the same batch.

    A block takes two sums over the mesh. Embeddings, LayerNorms and biases after a sum are the same in all processes.

    Raises:
        ValueError: the number of processes does not divide the heads.
    """
    if model.num_heads % mesh.size():
        raise ValueError(f"{model.num_heads} heads cannot be divided among {mesh.size()} devices")
    for block in model.blocks:
        assert isinstance(block, Block)
        plan = {
            "attention.qkv": _HeadwiseParallel(),
            "attention.out": RowwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
        block.attention.num_heads = model.num_heads // mesh.size()
    model.sharded = True


class _HeadwiseParallel(ColwiseParallel):
    """`ColwiseParallel` for the fused projection: a process gets the rows of its heads from each third."""

    def __init__(self) -> None:
        super().__init__(output_layouts=_StridedShard(2, split_factor=_THREE))

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            split = distribute_tensor(parameter, device_mesh, [_StridedShard(0, split_factor=_THREE)])
            module.register_parameter(key, nn.Parameter(split, requires_grad=parameter.requires_grad))


def full(value: Any, keep: bool) -> Any:
    """A sharded tensor as a full tensor on the CPU; a plain tensor is moved there, other values stay.

    All processes must call it; a process that does not `keep` the value gets None.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.cpu() if isinstance(value, Tensor) else value


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process' part of a full tensor, sharded like a parameter of the same shape, on its device."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    # Every process has the full tensor, so nothing is sent.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def gather_weights(model: nn.Module, keep: bool) -> None:
    """Replace sharded parameters by full ones on the CPU; all processes must call it. The model must not run again.

    Args:
        model: its parameters are replaced.
        keep: whether this process gets the full weights; other processes keep their parts.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a validation the embeddings are still full, in memory that FSDP will free
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                gathered = full(parameter, keep)
                if keep:
                    module.register_parameter(name, nn.Parameter(gathered, requires_grad=parameter.requires_grad))


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy full weights into a model, sharded or not.

    Raises:
        KeyError: a weight is missing.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(sharded_like(weights[name], tensor))


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, sharded or not; a scalar, the same in all processes."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return nn.utils.get_total_norm(gradients)
    norm = nn.utils.get_total_norm(sharded)
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm]
    rest = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if rest:
        norms.append(nn.utils.get_total_norm(rest))
    return torch.stack(norms).norm()


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> None:
    """Scale the gradients of parameters, sharded or not, so that their joint norm is at most `largest`."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm([parameter.grad for parameter in having if parameter.grad is not None])
    for sharded in (True, False):
        alike = [parameter for parameter in having if isinstance(parameter, DTensor) == sharded]
        nn.utils.clip_grads_with_norm_(alike, largest, norm)
