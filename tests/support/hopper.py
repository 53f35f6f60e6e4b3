"""What Triton's compiler makes of our kernels for an H100, on a machine that need not have one."""

import json
import os
import pathlib
import subprocess
import sys

from support.commands import ROOT


def compiled_for_hopper(kernels: str, cache: pathlib.Path) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, bytes of stack and of shared memory by kernel and label, of one folder's Triton kernels on sm_90."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/compile_hopper.py", kernels], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, label): tuple(taken) for name, label, *taken in lines}
