"""Freed memory is kept: counted in page faults, in a process of its own."""

import platform
import subprocess
import sys

import pytest
from support.commands import ROOT

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from fasttrain.system.memory import keep_freed_memory
    keep_freed_memory()
def use():
    for _ in range(3):
        torch.ones(16 << 20)  # 64 MiB
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_freed_tensor_is_used_again():
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, cwd=ROOT, timeout=100, check=True
        )
        faults[how] = int(done.stdout)
    assert 10 * faults["keep"] < faults["leave"]
