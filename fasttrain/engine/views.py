"""What a step is fed with: the views of a batch, its labels beside them, and the memory that views lie in."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from fasttrain.input import Batch
from fasttrain.kernels.augment import Views, augment
from fasttrain.system.collectives import sent
from fasttrain.views.draw import center, crop_fraction, draw
from fasttrain.views.spec import Recipe, sides

_KEPT = 2  # batches' memory that waits to be used again


def make_views(
    batch: Batch, recipe: Recipe, size: int, seed: int, epoch: int, mean: Sequence[float], std: Sequence[float],
    dtype: torch.dtype, out: Views | None = None,
) -> Views:  # fmt: skip
    """A batch's views by a recipe, or, where that is empty, its central crops: a tensor (V, B, 3, S, S) for each size.

    A view depends on the seed, the epoch, its sample and `size`, the side in pixels of a view of full size. out: an
    earlier result to be overwritten.
    """
    size_2B = batch.height_B, batch.width_B
    if recipe:
        table, size_V = draw(recipe, *size_2B, batch.index_B, seed, epoch, size), sides(recipe, size)
    else:
        table, size_V = center(*size_2B, crop_fraction(size)), (size,)
    return augment(batch.pixels, batch.offset_B, *size_2B, table, size_V, mean, std, dtype=dtype, out=out)


def on_device(label_B: Tensor | None, device: torch.device) -> Tensor | None:
    """Labels where the views are; the host does not wait for the copy."""
    return None if label_B is None else sent(label_B, device)


class ViewMemory:
    """Memory of views on a CPU, lent out again once no tensor refers to it.

    Fresh memory has to be cleared by the system, which takes longer than the views (docs/log.md).
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def borrow(self, size_V: Sequence[int], images: int, dtype: torch.dtype) -> Views:
        """What `augment` takes as its `out`."""
        shapes = [(size_V.count(side), images, side, side, 3) for side in dict.fromkeys(size_V)]
        counts = [math.prod(shape) for shape in shapes]
        num_bytes = sum(counts) * dtype.itemsize
        memory = self._free.pop() if self._free else torch.empty(0, dtype=torch.uint8)
        if len(memory) != num_bytes:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        lent = memory.numpy()  # an object of its own, which all tensors made from it keep alive
        weakref.finalize(lent, self._take_back, memory).atexit = False
        parts = torch.from_numpy(lent).view(dtype).split(counts)
        return tuple(part.view(shape).permute(0, 1, 4, 2, 3) for part, shape in zip(parts, shapes, strict=True))

    def _take_back(self, memory: Tensor) -> None:
        if len(self._free) < _KEPT:
            self._free.append(memory)
