"""The augmentation on CPU cores: the compiled part shared out over this module's own threads, each with its scratch.

Compiled code releases the interpreter lock, so torch's and numba's thread settings are neither used nor changed.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels.augment.compiled import LANES, TILE, Arrays, make_views

if TYPE_CHECKING:
    from fasttrain.kernels.augment.table import ViewTable

_LINE = 64  # bytes of a cache line, to which vectors are aligned
_CHUNKS_PER_THREAD = 4  # evens out images of different sizes; a chunk is one call into compiled code
_thread = threading.local()
# How numba sees the output: it knows neither 16-bit float, so their bits are written (see compiled.py).
_STORED_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def augment(
    pixels: Tensor,
    offset_B: Tensor,
    height_B: Tensor,
    width_B: Tensor,
    table: ViewTable,
    mean: Tensor,
    std: Tensor,
    out_VBSS3: Tensor,
) -> None:
    """Writes the normalised views into out_VBSS3, of float32, bfloat16 or float16 (rounded to nearest even).

    Arguments as for `kernels.augment.augment`, already checked.
    """
    views, images, size = out_VBSS3.shape[:3]
    longest = int(table.crop_BV4[..., 2:].max()) if images else 1
    taps = -(-(2 * math.ceil(max(longest / size, 1.0)) + 1) // 4) * 4  # four go at once
    radius = math.ceil(3 * float(table.sigma_BV.max())) if images else 0
    pitch = _rounded(size)
    sizes = {
        "view": 4 * size * pitch, "weights": 2 * size * taps, "strip": LANES * TILE,
        "band": LANES * (3 * longest + TILE), "padded": pitch + 2 * _rounded(radius), "kernel": radius + 1,
    }  # fmt: skip
    source = _arrays(pixels, offset_B, width_B)
    scale = _arrays(mean.repeat(max(size, LANES)), (1 / std).repeat(max(size, LANES)))
    rows = _arrays(
        table.crop_BV4, table.flip_BV, table.order_BV4, table.strength_BV4, table.gray_BV, table.sigma_BV,
        table.solarize_BV,
    )  # fmt: skip
    out = out_VBSS3.view(_STORED_AS[out_VBSS3.dtype]).numpy().reshape(views, images, size * size * 3)
    streamed = size % LANES == 0 and out_VBSS3.data_ptr() % _LINE == 0
    threads = _threads()
    bounds = np.linspace(0, images * views, min(images * views, threads * _CHUNKS_PER_THREAD) + 1).astype(np.int64)

    def run(chunk: tuple[int, int]) -> None:
        make_views(*chunk, source, rows, scale, (size, taps, radius), streamed, _divided(sizes), out)

    list(_pool(threads).map(run, zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)))


def _threads() -> int:
    """The cores this process may use (each rank of a machine keeps to its own: fasttrain/engine/ranks.py)."""
    return len(os.sched_getaffinity(0))


def _arrays(*tensors: Tensor) -> Arrays:
    return tuple(np.ascontiguousarray(tensor.numpy()) for tensor in tensors)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="augment")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads


def _rounded(floats: int) -> int:
    return -(-floats // LANES) * LANES


def _divided(sizes: dict[str, int]) -> Arrays:
    """This thread's scratch, divided into float32 arrays of at least these sizes, in whole vectors."""
    ends = np.cumsum([_rounded(size) for size in sizes.values()])
    scratch = _scratch(int(ends[-1]))
    return tuple(np.split(scratch[: ends[-1]], ends[:-1]))


def _scratch(floats: int) -> np.ndarray:
    """This thread's float32 scratch, kept from call to call and made larger when needed."""
    if getattr(_thread, "scratch", np.empty(0)).size < floats:
        unaligned = np.empty(floats + _LINE // 4, dtype=np.float32)
        _thread.scratch = unaligned[-unaligned.ctypes.data % _LINE // 4 :]
    return _thread.scratch
