#!/usr/bin/env python3
"""Compiles the Triton kernels for Hopper (sm_90) without a GPU, and prints what a program of each takes.

    python benchmarks/compile_hopper.py similarity augment

A kernel is compiled as a call on a GPU would have it, from the call's own arguments, by the ptxas that comes with
Triton; nothing is launched. A line of JSON each: kernel, label, registers of a thread, bytes of its stack (spills),
bytes of shared memory. Where ptxas serialises a kernel's products on tensor cores, so that each waits for the one
before, its words go to stderr and the status is 1.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))
os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget

Report = Callable[[str], None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Hopper:
    """Stands in for the driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class _Compiled:
    """Stands in for a kernel: where it would be launched, it is compiled and reported."""

    label = ""
    serialised = 0  # kernels

    def __init__(self, kernel: Any) -> None:  # noqa: ANN401 Triton's functions have no public type
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: object, **constants: object) -> None:
            made = self._kernel.warmup(*arguments, grid=grid, **constants)
            registers, stack = _resources(made.asm["cubin"])
            print(json.dumps([made.metadata.name, _Compiled.label, registers, stack, made.metadata.shared]), flush=True)
            if complaint := _serialised(made.asm["ptx"]):
                print(f"{_Compiled.label}: {complaint}", file=sys.stderr)
                _Compiled.serialised += 1

        return call


def _tool(name: str, suffix: str, content: bytes, *words: str) -> str:
    """What one of Triton's own CUDA tools says, on either stream, about a file of this content."""
    program = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        done = subprocess.run([program, *words, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    words = _tool("cuobjdump", ".cubin", cubin, "--dump-resource-usage").split()
    usage = dict(word.split(":", 1) for word in words if ":" in word)
    return int(usage["REG"]), int(usage["STACK"])


def _serialised(ptx: str) -> str | None:
    """ptxas's line that says so; Triton keeps ptxas's words to itself, hence a second run of it."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    said = _tool("ptxas", ".ptx", ptx.encode(), "-v", f"--gpu-name={target[1]}", "--output-file=/dev/null")
    return next((line for line in said.splitlines() if "serialized" in line), None)


def _stand_in(gpu: ModuleType) -> None:
    """Have a kernel module take tensors on the CPU, and compile what it would launch."""
    gpu.INTERPRETED = True  # type: ignore[attr-defined]
    for name, value in list(vars(gpu).items()):
        if name.endswith("_kernel"):
            setattr(gpu, name, _Compiled(value))


def similarity() -> None:
    from fasttrain.kernels.similarity import gpu, log_sum_exp, nearest, readout

    _stand_in(gpu)
    gpu._multiprocessors = lambda _device: 132  # type: ignore[assignment]
    calls = [(rows, 128, 65536) for rows in (16, 256, 4096)]  # rows, columns, keys
    calls += [(4096, 64, 65536), (4096, 256, 65536), (4096, 128, 65535), (4096, 256, 65535)]
    sides = [(512, 128, "both sides"), (8192, 128, "both sides"), (8192, 64, "both sides"), (8192, 256, "both sides")]
    sides += [(8191, 128, "both sides"), (8191, 256, "both sides"), (4096, 256, "keys")]
    for dtype in DTYPES:
        for rows, dim, keys in calls:
            _Compiled.label = f"{dtype} rows {rows} dim {dim} keys {keys}"
            x_RD = torch.zeros(rows, dim, dtype=dtype, requires_grad=True)
            _, out_RD = readout(x_RD, torch.zeros(keys, dim, dtype=dtype), 0.2, impl="triton")
            out_RD.sum().backward()  # of O: the gradient of lse needs no kernel
            nearest(x_RD, torch.zeros(keys, dim, dtype=dtype), impl="triton")
        for rows, dim, which in sides:
            _Compiled.label = f"{dtype} rows {rows} dim {dim} keys {rows}, gradient of {which}"
            x_RD, keys_KD = (torch.zeros(rows, dim, dtype=dtype, requires_grad=True) for _ in range(2))
            x_RD.requires_grad_(which != "keys")
            log_sum_exp(x_RD, keys_KD, 0.2, own=0, impl="triton").sum().backward()


def augment() -> None:
    from fasttrain.kernels.augment import augment, gpu
    from fasttrain.views.draw import draw
    from fasttrain.views.spec import RECIPES

    _stand_in(gpu)
    for count, dtype in ((5, torch.float32), (5, torch.bfloat16), (5, torch.float16), (1, torch.bfloat16)):
        _Compiled.label = f"{dtype} batch {count}"
        height_B, width_B = (torch.full((count,), side, dtype=torch.int32) for side in (300, 400))
        offset_B = torch.arange(count) * 300 * 400 * 3
        pixels = torch.zeros(count * 300 * 400 * 3, dtype=torch.uint8)
        table = draw(RECIPES["mocov3"], height_B, width_B, torch.arange(count), seed=1, epoch=0, size=224)
        plain = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        augment(pixels, offset_B, height_B, width_B, table, (224, 224), *plain, impl="triton", dtype=dtype)


KERNELS = {"similarity": similarity, "augment": augment}


def main(names: list[str]) -> int:
    triton.runtime.driver.set_active(_Hopper())
    for name in names or KERNELS:
        KERNELS[name]()
    return 1 if _Compiled.serialised else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
