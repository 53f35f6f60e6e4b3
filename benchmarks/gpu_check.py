#!/usr/bin/env python3
"""Before anything is timed on a GPU: what is there, and whether its arithmetic is right at the sizes that are timed.

    python benchmarks/gpu_check.py --data OUT

The losses over the queue and their gradients against fp64, and views against the reference, in the dtypes of training.
Where they differ too much the command says so and ends with status 1. The last line of the output is JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
import sys
import time
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script, of a checkout or of an installation
    above = pathlib.Path(__file__).resolve().parents
    sys.path[0] = str(next(folder for folder in above if (folder / "fasttrain/__init__.py").exists()))

import torch

from benchmarks import augment, similarity
from fasttrain.system.cli import finish, parse
from fasttrain.system.errors import RunError
from fasttrain.system.options import Options, Positive

PACKAGES = "torch", "triton", "torchvision", "numpy", "numba"


@dataclass(frozen=True)
class GpuCheck(Options):
    """Check the kernels on this machine's GPU, or on its CPU. The last line of the output is JSON."""

    data: str
    """Converted data set."""
    rows: Positive[tuple[int, ...]] = (256, 4096)
    """Queries of the losses that are compared."""
    keys: Positive[int] = 65536
    """Keys in the queue."""
    images: Positive[int] = 16
    """Images whose views are compared."""
    size: Positive[int] = 224
    """Side of these in pixels."""


def there() -> dict[str, object]:
    """Versions and device."""
    found: dict[str, object] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if not torch.cuda.is_available():
        return found | {"device": "cpu"}
    about = torch.cuda.get_device_properties(0)
    return found | {
        "device": about.name, "capability": f"{about.major}.{about.minor}", "processors": about.multi_processor_count,
        "gib": round(about.total_memory / 2**30, 1), "l2_mib": about.L2_cache_size / 2**20, "cuda": torch.version.cuda,
    }  # fmt: skip


def losses(options: GpuCheck, device: str) -> dict[str, float]:
    """Seconds of compiling and checking, by queries. Raises RunError where a loss or its gradient is wrong."""
    dtype, took = torch.bfloat16 if device == "cuda" else torch.float32, {}
    for n in options.rows:
        began = time.perf_counter()
        one = similarity.make_inputs(n, options.keys, device, dtype)[0]
        try:
            similarity.check(similarity.ours, one, similarity.exact(*one))
        except ArithmeticError as error:
            raise RunError(f"losses over the queue, {n} queries of {dtype}: {error}") from None
        took[str(n)] = round(time.perf_counter() - began, 2)
        print(f"losses over the queue, {n} queries, {options.keys} keys, {dtype}: as in fp64", flush=True)
    return took


def check(options: GpuCheck) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = there()
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    seconds = losses(options, device)
    batches = augment.load(pathlib.Path(options.data), options.images, options.images, torch.device(device))
    views = augment.compare(batches, options.size, (torch.float32, torch.bfloat16))
    most = {kind: round(max(each.mean for each in by_case.values()), 4) for kind, by_case in views.items()}
    print(json.dumps({**found, "seconds_of_losses": seconds, "mean_levels_of_views": most}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(finish(lambda: check(parse(GpuCheck, sys.argv[1:]))))
