"""A store without files, and what loaders hand over as plain values."""

import ctypes
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from fasttrain.input import Batch
from fasttrain.input.stores import Encoded
from fasttrain.system.errors import DataError


def images(batch: Batch) -> Iterator[tuple[int, int | None, np.ndarray]]:
    """(index, label or None, pixels) of every sample of a batch, copied out of the loader's buffer."""
    for b in range(len(batch)):
        first, height, width = int(batch.offset_B[b]), int(batch.height_B[b]), int(batch.width_B[b])
        pixels = batch.pixels[first : first + height * width * 3].numpy().reshape(height, width, 3).copy()
        yield int(batch.index_B[b]), None if batch.label_B is None else int(batch.label_B[b]), pixels


def indices(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.index_B.tolist() for batch in batches]


class Numbers:
    """A store whose sample i is one pixel of colour i; `broken` samples fail, `slow` ones wait for an event."""

    classes, fingerprint = ("a",), "numbers"

    def __init__(self, count: int, broken: Iterable[int] = (), slow: threading.Event | None = None) -> None:
        self.num_samples, self.broken, self.slow = count, set(broken), slow

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        return index_N

    def read(self, index: int) -> Encoded:
        return Encoded(1 + index % 3, 1, index)

    def write(self, sample: Encoded, address: int) -> None:
        if self.slow:
            self.slow.wait()
        if sample.content in self.broken:
            raise DataError("broken")
        pixels = np.ctypeslib.as_array((ctypes.c_uint8 * (sample.height * 3)).from_address(address))
        pixels[:] = sample.content % 251

    def name(self, index: int) -> str:
        return f"number {index}"

    place = source_name = name
