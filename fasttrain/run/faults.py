"""Faults from outside, told in one line: memory that is full, another process that is gone."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fasttrain.system.errors import EXIT_FAILURE, RunError
from fasttrain.system.memory import HOST_MEMORY

GPU_MEMORY = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure.*out of memory")
CONNECTION = re.compile(r"gloo|Connection (closed|reset|refused)|Broken pipe|ncclRemoteError")


@contextlib.contextmanager
def explained(advice: str) -> Iterator[None]:
    """What is done in here raises RunError with what to do where it would raise torch's errors for these faults.

    advice: what to do where memory is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(_out_of_memory("GPU", advice, error)) from error
    except MemoryError as error:
        raise RunError(_out_of_memory("main", advice, error)) from error
    except RuntimeError as error:
        if GPU_MEMORY.search(str(error)):
            raise RunError(_out_of_memory("GPU", advice, error)) from error
        if HOST_MEMORY.search(str(error)):
            raise RunError(_out_of_memory("main", advice, error)) from error
        lost = isinstance(error, dist.DistNetworkError | dist.DistStoreError) or CONNECTION.search(str(error))
        if lost and dist.is_initialized():
            atexit.register(_end_at_once)
            raise RunError(_lost_process(error)) from error
        raise


def _out_of_memory(which: str, advice: str, error: BaseException) -> str:
    return f"out of {which} memory; {advice}: {_begin(error)}"


def _lost_process(error: BaseException) -> str:
    return (
        "lost another process of this job, whose own error tells more if it could write one; the same command "
        f"continues from the newest checkpoint: {_begin(error)}"
    )


def _end_at_once() -> None:
    """End the process before torch's own clean-up, which waits for collectives on the GPU that can never finish."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_FAILURE)


def _begin(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" …")
