"""Compiles the Triton kernels for GPUs that this machine need not have: `python -m tests.kernels.compile_for_gpus`.

Triton brings the assembler. Prints a line per kernel: its name, registers per thread, and bytes of them that it spills
to memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cogview_pl.generation.engine import fused_gpu
from cogview_pl.kernels import nearest_code_triton, sampling_triton, transformer_triton
from cogview_pl.kernels.availability import FUSED_SUMS
from cogview_pl.transformer import loss

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDEST_BY_16 = ("outputs", "inputs", "row_stride", "head_stride")
"""Numbers that are multiples of 16 at the released sizes, as Triton finds out when it starts a kernel."""


class Kernel(NamedTuple):
    """A kernel with the types of its arguments and its constants at the released size of 4B."""

    function: Any
    types: str
    """Of the arguments that are no constants, in order."""
    constants: dict[str, Any]
    warps: int
    stages: int = 3


def kernels(overlap: bool) -> list[Kernel]:
    """All kernels, with programmatic dependent launch or without."""
    relax = {"RELAX": True, "TARGET": 8.0, "SMALLEST": 1e-4, "OVERLAP": overlap}
    linear = {"BIAS": True, "GELU": True, "BLOCK_N": 2, "BLOCK_J": 128, "BLOCK_I": 8, "OVERLAP": overlap}
    plain = "*bf16 *bf16 *bf16 *bf16 i32 i32"
    heads = {"HEAD": 64, "BLOCK_K": 64, "BLOCK_S": 64, "OVERLAP": overlap}
    attend = "*bf16 *bf16 *bf16 *i64 *bf16 *fp32 *i32 i32 i32 i32 fp32"
    search = {"BLOCK_D": 256, "BLOCK_K": 64}
    few = transformer_triton.linear_of_few_rows
    return [
        Kernel(few, plain, {**linear, "ROWS": 1, "SCALE": False, "scale_N": None, "LINES": 128}, 4),
        Kernel(few, plain, {**linear, "ROWS": 4, "SCALE": False, "scale_N": None, "LINES": 512}, 4),
        Kernel(few, "*bf16 *i8 *bf16 *bf16 *bf16 i32 i32", {**linear, "ROWS": 2, "SCALE": True, "LINES": 64}, 4),
        Kernel(
            transformer_triton.close_and_open,
            "*bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *bf16 i32 fp32",
            {**relax, "BRANCH_NORM": True, "BLOCK": 4096},
            4,
        ),
        Kernel(transformer_triton.attend, attend, {**heads, "PARTS": 5, "PARTS_2": 8}, 2),
        Kernel(
            transformer_triton.cross_entropies,
            "*bf16 *i64 *fp32 *fp32 i32",
            {"GRADIENTS": True, "BLOCK": loss._IDS_OF_KERNEL},
            loss._WARPS_OF_KERNEL,
        ),
        Kernel(
            sampling_triton._sample,
            "*fp32 *fp32 *i64 i32 fp32 i32",
            {"TOP_K": True, "BLOCK": 8192},
            sampling_triton._WARPS,
        ),
        *(
            Kernel(
                nearest_code_triton._nearest,
                "*bf16 *bf16 *bf16 *bf16 *fp32 *i64 *fp32 i32 i32 i32",
                {**search, "SPLIT": split, "BLOCK_N": 64 if split else 128},
                nearest_code_triton._WARPS,
                nearest_code_triton._STAGES,
            )
            for split in (False, True)
        ),
    ]


def registers(kernel: Kernel, capability: int) -> tuple[int, int]:
    """Registers per thread, and bytes that it spills, of the kernel compiled for a compute capability such as 90."""
    types = iter(kernel.types.split())
    names = kernel.function.arg_names
    signature = {name: "constexpr" if name in kernel.constants else next(types) for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in WIDEST_BY_16
    }
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=aligned)
    options = (
        {"num_warps": kernel.warps, "num_stages": kernel.stages}
        | FUSED_SUMS
        | ({"launch_pdl": True} if kernel.constants.get("OVERLAP") else {})
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    used = dict(re.findall(r"(REG|STACK):(\d+)", tool.stdout))
    return int(used["REG"]), int(used["STACK"])


def main() -> int:
    """Compile all kernels for Ampere and Hopper."""
    overlap_from = 10 * fused_gpu._OVERLAP_FROM[0]
    for capability in (80, 90):
        for kernel in kernels(overlap=capability >= overlap_from):
            print(capability, kernel.function.__name__, *registers(kernel, capability), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
