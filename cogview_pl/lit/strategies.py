"""Strategies that spread a sequence model's weights over devices, with checkpoints that do not depend on how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as InferenceStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from cogview_pl.transformer.parallel import full, load_weights, sharded_like


class _WholeCheckpoints(ModelParallelStrategy):
    """Writes what one device would have written: the first process, one file, whole tensors.

    Tensors are made whole one after the other, and in the first process alone they are kept. Lightning's own form of
    this numbers the optimizer's states by the order of parameters in the model; ours are in groups, in another order,
    and a run that goes on with another strategy would give parameters the states of others.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, on the CPU; empty but in the first process."""
        assert self.lightning_module is not None
        return self._in_the_first(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, as the optimizer numbers it; empty but in the first process."""
        return self._in_the_first(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file of any strategy that writes one; each process takes its parts."""
        assert self.lightning_module is not None
        checkpoint = torch.load(self.broadcast(checkpoint_path), map_location="cpu", weights_only=True, mmap=True)
        load_weights(self.lightning_module, checkpoint.pop("state_dict"))
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            optimizer.load_state_dict(_parts(optimizer, state))
        return checkpoint

    def _in_the_first(self, state: Mapping[str, Any]) -> dict[str, Any]:
        found = tree_map(lambda value: full(value, self.is_global_zero), dict(state))
        return found if self.is_global_zero else {}


class FullyShardedStrategy(_WholeCheckpoints):
    """FSDP2 over all devices."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


class TensorParallelStrategy(_WholeCheckpoints):
    """Tensor parallelism over all devices, which all train on the same samples."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = 1, self.num_nodes * self.num_processes
        super().setup_environment()


def join_tensor_parallel(accelerator: str, devices: int, num_nodes: int) -> DeviceMesh:
    """Start or join the processes of an inference on several devices; returns the mesh that divides the model.

    Raises:
        ValueError, MisconfigurationException: there are not so many devices.
    """
    strategy = InferenceStrategy(
        lambda model, mesh: model, data_parallel_size=1, tensor_parallel_size=devices * num_nodes
    )
    Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy).launch()
    return strategy.device_mesh["tensor_parallel"]


def _parts(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's whole state with this process' parts of all that has the shape of its parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parts = {
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
    return {"state": parts, "param_groups": state["param_groups"]}
