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

from fasttrain.kernels.augment.compiled import LANES, LINE, TILE, Arrays, make_views

if TYPE_CHECKING:
    from fasttrain.kernels.augment import Groups
    from fasttrain.kernels.augment.table import ViewTable

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
    groups: Groups,
) -> None:
    """Writes the normalised views, of float32, bfloat16 or float16 (rounded to nearest even), into the groups' memory.

    Arguments as for `kernels.augment.augment`, already checked, and its groups. All sizes are made in one go, image by
    image, so that an image's bytes come from memory once.
    """
    images, views = table.flip_BV.shape
    if not images:
        return
    size_V, address_V = np.empty((2, views), dtype=np.int64)
    for numbers, out_VBSS3 in groups:
        for v, out in zip(numbers, out_VBSS3, strict=True):
            size_V[v], address_V[v] = out.shape[1], out.data_ptr()
    longest_V = table.crop_BV4[..., 2:].amax((0, 2)).numpy()
    side, longest = int(size_V.max()), int(longest_V.max())
    taps = -(-(2 * math.ceil(max(float((longest_V / size_V).max()), 1.0)) + 1) // 4) * 4  # four go at once
    radius = math.ceil(3 * float(table.sigma_BV.max()))
    pitch = _rounded(side)
    sizes = {
        "view": 4 * side * pitch, "weights": 2 * side * taps, "strip": LANES * TILE,
        "band": LANES * (3 * longest + TILE), "padded": pitch + 2 * _rounded(radius), "kernel": radius + 1,
    }  # fmt: skip
    source = _arrays(pixels, offset_B, width_B)
    scale = _arrays(mean.repeat(max(side, LANES)), (1 / std).repeat(max(side, LANES)))
    rows = _arrays(
        table.crop_BV4, table.flip_BV, table.order_BV4, table.strength_BV4, table.gray_BV, table.sigma_BV,
        table.solarize_BV,
    )  # fmt: skip
    like = torch.empty(0, dtype=_STORED_AS[groups[0][1].dtype]).numpy()
    threads = _threads()
    bounds = np.linspace(0, images * views, min(images * views, threads * _CHUNKS_PER_THREAD) + 1).astype(np.int64)

    def run(chunk: tuple[int, int]) -> None:
        make_views(*chunk, source, rows, scale, (side, taps, radius), _divided(sizes), size_V, address_V, like)

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
        unaligned = np.empty(floats + LINE // 4, dtype=np.float32)
        _thread.scratch = unaligned[-unaligned.ctypes.data % LINE // 4 :]
    return _thread.scratch
