"""Rows of features as the inputs of a linear classifier, in fp64 and some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fasttrain.evaluation.features import Features
from fasttrain.evaluation.ranking import NEVER, best_classes

CHUNK_ROWS = 8192
KEPT_BYTES = 1 << 30  # on a CPU; on a GPU half of what is free


class Design:
    """Inputs (n, D) fp64 and classes (n,) int64 on a device, chunk by chunk, any number of times.

    They are kept where they fit, and else read and made anew each time.
    """

    def __init__(
        self, features: Features, index_N: np.ndarray, inputs: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        """index_N: which rows. inputs: makes them of rows of features in fp64, (n, F) → (n, D)."""
        self._features, self._index_N, self._inputs, self._device = features, index_N, inputs, device
        self._kept = list(self._read()) if 8 * len(index_N) * (features.width + 1) <= _room(device) else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self._index_N), CHUNK_ROWS):
            rows = self._index_N[first : first + CHUNK_ROWS]
            x_ND = self._inputs(self._features.rows(rows, self._device).double())
            yield x_ND, self._features.label_N[rows].to(self._device)


def _room(device: torch.device) -> int:
    """Bytes that one Design may keep."""
    if device.type != "cuda":
        return KEPT_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + cached) // 2


def offset_of_classes(label_N: Tensor, num_classes: int, device: torch.device) -> Tensor:
    """What is added to the logits, (C,) fp64: 0, or NEVER for classes that no label is of."""
    offset_C = torch.full((num_classes,), NEVER, dtype=torch.float64)
    offset_C[label_N] = 0.0
    return offset_C.to(device)


def ranked_by(weight_DC: Tensor, offset_C: Tensor, rows: Design) -> Tensor:
    """The likeliest classes of each row, as best_classes gives them."""
    none = best_classes(offset_C[None, :].expand(0, -1))
    return torch.cat([none, *(best_classes(x_ND @ weight_DC + offset_C) for x_ND, _ in rows)])
