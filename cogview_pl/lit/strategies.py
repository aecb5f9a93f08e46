"""Strategies that shard a sequence model; their checkpoints do not depend on the number of devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as InferenceStrategy
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from cogview_pl.lit.lightning_internals import set_mesh_sizes, tree_map
from cogview_pl.transformer.parallel import full, load_weights, sharded_like


class _FullCheckpoints(ModelParallelStrategy):
    """Writes the checkpoint that one device would write: one file of full tensors, from the first process.

    Tensors are gathered one after the other, and only the first process keeps them. Lightning's own form numbers the
    optimizer states by the order of parameters in the model. Our parameters are in groups, in another order, so a run
    that goes on with another strategy would mix up their states.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Full weights, on the CPU; empty in all processes but the first."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Full optimizer state, numbered as the optimizer does; empty in all processes but the first."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._gathered(inner.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any strategy that writes one file; each process takes its shards."""
        assert self.lightning_module is not None
        checkpoint = torch.load(self.broadcast(checkpoint_path), map_location="cpu", weights_only=True, mmap=True)
        load_weights(self.lightning_module, checkpoint.pop("state_dict"))
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            optimizer.load_state_dict(_shards(optimizer, state))
        return checkpoint

    def _gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        found = tree_map(lambda value: full(value, self.is_global_zero), dict(state))
        return found if self.is_global_zero else {}


class FullyShardedStrategy(_FullCheckpoints):
    """FSDP2 over all devices."""

    def setup_environment(self) -> None:
        set_mesh_sizes(self, data_parallel=self.num_nodes * self.num_processes, tensor_parallel=1)
        super().setup_environment()


class TensorParallelStrategy(_FullCheckpoints):
    """Tensor parallelism over all devices, which all train on the same samples."""

    def setup_environment(self) -> None:
        set_mesh_sizes(self, data_parallel=1, tensor_parallel=self.num_nodes * self.num_processes)
        super().setup_environment()


def join_tensor_parallel(accelerator: str, devices: int, num_nodes: int) -> DeviceMesh:
    """Start or join the processes of an inference on several devices; returns the mesh that shards the model.

    Raises:
        ValueError, MisconfigurationException: there are fewer devices.
    """
    strategy = InferenceStrategy(
        lambda model, mesh: model, data_parallel_size=1, tensor_parallel_size=devices * num_nodes
    )
    Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy).launch()
    return strategy.device_mesh["tensor_parallel"]


def _shards(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A full optimizer state with this process's shard of each tensor that has the shape of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    shards = {
        number: {
            name: (
                sharded_like(value, parameter)
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
            )
            for name, value in state["state"].get(number, {}).items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    return {"state": shards, "param_groups": state["param_groups"]}
