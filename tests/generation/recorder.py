"""CUDA graphs imitated on a CPU: a step is recorded once, and its operations run again on the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogview_pl.generation.engine.cuda_graph import Step


class Recorder(TorchDispatchMode):
    """Keeps every operation with its operands and results, and runs them again on the same memory, as a graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "waits"
        results = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_leaves(results)))
        return results

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            for old, new in zip(recorded, tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


def recorded(step: Step) -> Step:
    """Runs the step at the first call, and its recorded operations at further calls."""
    recorder = Recorder()

    def repeated() -> None:
        if recorder.operations:
            recorder.replay()
        else:
            with recorder:
                step()

    return repeated
