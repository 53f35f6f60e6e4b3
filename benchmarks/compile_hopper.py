#!/usr/bin/env python3
"""Compiles every Triton kernel for Hopper (sm_90) ahead of time, which needs no GPU, and prints what each one takes.

python benchmarks/compile_hopper.py similarity
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

if __package__ in (None, ""):  # run as a script from a bare checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Kernel:
    """A function of Triton's, as it is launched."""

    label: str
    function: Any
    types: dict[str, str]  # of arguments; others are fp32 pointers (names ending in _ptr) and 32-bit numbers
    constants: dict[str, Any]
    options: dict[str, Any]


def similarity() -> Iterator[Kernel]:
    import torch

    from kernels.similarity import gpu

    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        types = {"x_ptr": f"*{name}", "queue_ptr": f"*{name}", "grad_ptr": f"*{name}"}
        for rows in (16, 256, 4096):
            tiles = gpu.tiles_for(rows, 128, dtype.itemsize)
            constants = {
                "D": 128, "BLOCK_D": 128, "BLOCK_R": tiles.rows, "BLOCK_K": tiles.keys, "OWN": False, "EVEN": True,
                "PRODUCTS": gpu._products(dtype),
            }  # fmt: skip
            options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers or None}
            yield Kernel(f"{name} rows {rows}", gpu._part_kernel, types, constants, options)
            if not tiles.registers:
                yield Kernel(f"{name} rows {rows}", gpu._backward_kernel, types, constants, options)
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_P": 64}
    yield Kernel("64 parts", gpu._combine_kernel, {}, constants, {"num_warps": 4})


KERNELS = {"similarity": similarity}


def compile_kernel(kernel: Kernel) -> str:
    """Compiles one; returns a line on registers, spills and shared memory."""
    function = kernel.function
    names = [name for name in function.arg_names if name not in kernel.constants]
    signature = {name: kernel.types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    signature |= dict.fromkeys(kernel.constants, "constexpr")
    # As at a launch: addresses that torch allocates are multiples of 16 bytes.
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name.endswith("_ptr")}
    source = ASTSource(function, signature, kernel.constants, attributes)
    compiled = triton.compile(source, target=HOPPER, options=kernel.options)
    taken = f"{_resources(compiled.asm['cubin'])}, shared {compiled.metadata.shared} B"
    return f"{function.__name__:18} {kernel.label:16} {taken}"


def _resources(cubin: bytes) -> str:
    """Registers and spills of a program, as cuobjdump or the cubin's own notes tell; "?" where neither is at hand."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return "registers ?"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    return f"registers {found[1]}, stack {found[2]} B" if found else "registers ?"


def main() -> int:
    for name in sys.argv[1:] or KERNELS:
        for kernel in KERNELS[name]():
            print(compile_kernel(kernel), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
