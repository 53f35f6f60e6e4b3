"""Freed memory is kept: counted in page faults, in a process of its own."""

import pathlib
import platform
import resource
from unittest.mock import MagicMock

import pytest
import torch
from support.forks import finished

from fasttrain.system import memory
from fasttrain.system.memory import keep_freed_memory, release_freed_memory


def _count_faults(keep: bool) -> None:
    if keep:
        keep_freed_memory()

    def use() -> None:
        for _ in range(3):
            torch.ones(16 << 20)  # 64 MiB

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        use()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    use()
    print(min(faults() for _ in range(5)))  # the system may take pages back meanwhile


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_freed_tensor_is_used_again(tmp_path: pathlib.Path) -> None:
    kept, left = (int(finished(tmp_path, _count_faults, keep).stdout) for keep in (True, False))
    assert 10 * kept < left


def _count_resident() -> None:
    def resident() -> int:
        return int(pathlib.Path("/proc/self/statm").read_text("ascii").split()[1])

    keep_freed_memory()
    torch.ones(64 << 20)  # 256 MiB
    kept = resident()
    release_freed_memory()
    print((kept - resident()) * resource.getpagesize() >> 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_is_kept_can_be_given_back(tmp_path: pathlib.Path) -> None:
    assert int(finished(tmp_path, _count_resident).stdout) > 200


def test_it_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(memory, "_kept", True)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: asked.append(name) or MagicMock())
    for _ in range(2):
        release_freed_memory()
    assert len(asked) == 1
