"""Freed memory is kept: counted in page faults, in a process of its own."""

import pathlib
import platform
import resource

import pytest
import torch
from support.forks import finished

from fasttrain.system.memory import keep_freed_memory


def _count_faults(keep: bool) -> None:
    if keep:
        keep_freed_memory()

    def use() -> None:
        for _ in range(3):
            torch.ones(16 << 20)  # 64 MiB

    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_freed_tensor_is_used_again(tmp_path: pathlib.Path) -> None:
    kept, left = (int(finished(tmp_path, _count_faults, keep).stdout) for keep in (True, False))
    assert 10 * kept < left
