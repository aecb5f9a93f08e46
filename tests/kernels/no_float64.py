"""A device type that stands for Apple's GPUs, which have no float64."""

from __future__ import annotations

from typing import Any

from torch import Tensor, float64
from torch.utils._python_dispatch import TorchDispatchMode

from cogview_pl.kernels import availability


class NoFloat64(TorchDispatchMode):
    """The CPU stands for an Apple GPU: raises as MPS does where an operation makes a float64 tensor."""

    def __enter__(self) -> NoFloat64:
        self._before = availability.WITHOUT_FLOAT64
        availability.WITHOUT_FLOAT64 = ("cpu",)  # type: ignore[assignment]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        availability.WITHOUT_FLOAT64 = self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor) and one.dtype == float64:
                raise TypeError(f"{func}: the MPS framework doesn't support float64")
        return found
