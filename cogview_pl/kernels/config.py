"""Options of the kernels: the schema of the key `cpu_kernels`."""

from __future__ import annotations

from enum import Enum


class CPUKernels(Enum):
    """Kernels that train a sequence model on a CPU in fp32.

    `compiled`: those of this project; `torch`: those of torch; `auto`: compiled, where there is a C++ compiler.
    """

    auto = "auto"
    compiled = "compiled"
    torch = "torch"
