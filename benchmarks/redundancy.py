#!/usr/bin/env python3
"""The losses of Barlow Twins and VICReg, forward and backward: ours beside plain torch with its D×D matrices.

    python benchmarks/redundancy.py

Every round runs each side once, in fp32; medians over the rounds count. Memory is what a side takes beyond its inputs
at the worst moment, in a process of its own. Plain torch is what the published codes do, and what ours is tested
against. Prints a table, appends a line to benchmarks/results/redundancy.jsonl; the last line of the output is JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.similarity import _resident, seconds, show
from fasttrain.losses import redundancy, reference
from fasttrain.system.cli import finish, parse
from fasttrain.system.options import Options, Positive

# Rows and columns: of the presets, and with more rows than columns
ON_GPU = (512, 2048), (2048, 8192), (8192, 8192)
ON_CPU = (128, 512), (256, 2048), (1024, 512)
LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "barlow ours": redundancy.barlow, "barlow plain": reference.barlow,
    "vicreg ours": redundancy.vicreg, "vicreg plain": reference.vicreg,
}  # fmt: skip
WAY = "forward and backward"


@dataclass(frozen=True)
class RedundancyBenchmark(Options):
    """Time the losses of Barlow Twins and VICReg, and take their memory, beside plain torch."""

    rounds: Positive[int] = 9
    """Rounds; each runs every side once. Medians over them count."""


def make_run(side: str, rows: int, dim: int) -> Callable[[], None]:
    """A forward and backward of a side on views that are much alike."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    x, noise = (torch.randn(rows, dim, device=device, generator=generator) for _ in range(2))
    views = x.clone().requires_grad_(), (x + 0.3 * noise).requires_grad_()

    def run() -> None:
        torch.autograd.grad(sum(LOSSES[side](*views)), views)  # type: ignore[arg-type]

    return run


def memory_alone(side: str, rows: int, dim: int) -> int:
    """Bytes that a side takes, for a process that has held nothing before."""
    make_run(side, 4, 4)()
    run = make_run(side, rows, dim)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def measure(options: RedundancyBenchmark) -> int:
    on_gpu = torch.cuda.is_available()
    figures: dict[str, object] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    for rows, dim in ON_GPU if on_gpu else ON_CPU:
        runs = {side: make_run(side, rows, dim) for side in LOSSES}
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {side: [] for side in runs}
        for _ in range(options.rounds):
            for side, run in runs.items():
                times[side].append(seconds(run, 1, on_gpu))
        print(f"\nM {rows}, D {dim}, of which D×D is {4 * dim**2 / 2**20:.0f} MiB")
        ms, mib = show({WAY: times}, "barlow ours")[WAY], {}
        for side in LOSSES:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                mib[side] = pool.apply_async(memory_alone, (side, rows, dim)).get(300) / 2**20
            print(f"  {side:18}{mib[side]:10.1f} MiB beyond the embeddings")
        figures[f"{rows}x{dim}"] = {side: {"ms": ms[side], "mib": mib[side]} for side in LOSSES}
    print(json.dumps(figures), flush=True)
    record.append("redundancy", figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: measure(parse(RedundancyBenchmark, sys.argv[1:]))))
