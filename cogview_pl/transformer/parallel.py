"""The sequence model spread over devices: weights sharded and gathered block by block (FSDP2), or tensor parallel.

In both, parameters become DTensors that know their whole shape and keep their names.

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

_THREE = 3  # queries, keys and values, one behind the other in one matrix


def shard_weights(model: Transformer, mesh: DeviceMesh) -> None:
    """FSDP2: every process keeps its part of each parameter, and has a block whole only while it computes it.

    Gradients are averaged over the mesh. The tables stay whole from `hidden` to the end of the backward pass, since
    the loss reads the output matrix in between.
    """
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    model.sharded = True


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Every process computes its part of the heads and of the MLP's inner units, of the same batch.

    Two sums over the mesh a block. Tables, LayerNorms and what is added after a sum are the same everywhere.

    Raises:
        ValueError: the heads cannot be divided.
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
    """`ColwiseParallel` for queries, keys and values in one matrix: of each a process gets the rows of its heads."""

    def __init__(self) -> None:
        super().__init__(output_layouts=_StridedShard(2, split_factor=_THREE))

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            split = distribute_tensor(parameter, device_mesh, [_StridedShard(0, split_factor=_THREE)])
            module.register_parameter(key, nn.Parameter(split, requires_grad=parameter.requires_grad))


def whole(value: Any, keep: bool) -> Any:
    """A tensor of which every process holds a part as a whole one on the CPU; anything else as it is.

    All processes must ask; those that do not `keep` it get None.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.cpu() if isinstance(value, Tensor) else value


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process' part of a whole tensor of the parameter's shape, spread as the parameter is, on its device."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    # Every process has the whole one at hand, so nothing is sent.
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def gather_weights(model: nn.Module, keep: bool) -> None:
    """Make the weights whole again, on the CPU, in a model that will not compute any more; all processes must call.

    Args:
        model: its parameters are replaced.
        keep: whether this process wants them; the others are left with their parts.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a validation the tables are still whole, in memory that FSDP takes back
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                full = whole(parameter, keep)
                if keep:
                    module.register_parameter(name, nn.Parameter(full, requires_grad=parameter.requires_grad))


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights into a model that may be spread over devices.

    Raises:
        KeyError: a weight is missing.
    """
    for name, tensor in model.state_dict().items():
        tensor.copy_(like(weights[name], tensor))


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, of which some may be spread over devices; a scalar, the same in all processes."""
    spread = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not spread:
        return nn.utils.get_total_norm(gradients)
    norms = [_plain(nn.utils.get_total_norm(spread))]
    rest = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if rest:
        norms.append(nn.utils.get_total_norm(rest))
    return torch.stack(norms).norm()


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> None:
    """Scale gradients, of which some may be spread over devices, so that their norm is at most `largest`."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    norm = gradient_norm([parameter.grad for parameter in having if parameter.grad is not None])
    for spread in (True, False):
        alike = [parameter for parameter in having if isinstance(parameter, DTensor) == spread]
        nn.utils.clip_grads_with_norm_(alike, largest, norm)


def _plain(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
