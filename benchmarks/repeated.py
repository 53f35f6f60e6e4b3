"""A small data set as a large one, so that what is timed is not how epochs begin and end."""

from __future__ import annotations

from typing import cast

import numpy as np

from fasttrain.input.stores import Encoded, Store, Stream, StreamStore

LEAST_BATCHES = 200  # of an epoch


def times(num_samples: int, batch_size: int) -> int:
    """How often a set of samples must come in an epoch of LEAST_BATCHES."""
    return -(-LEAST_BATCHES * batch_size // num_samples)


class Repeated:
    """A store whose samples come `times` times in an epoch of batches of that size."""

    def __init__(self, store: Store, batch_size: int) -> None:
        self._store, self._count = store, store.num_samples
        self.num_samples = store.num_samples * times(store.num_samples, batch_size)
        self.classes, self.fingerprint = store.classes, store.fingerprint

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        return self._store.labels(index_N % self._count)

    def read(self, index: int) -> Encoded:
        return self._store.read(index % self._count)

    def write(self, sample: Encoded, address: int) -> None:
        self._store.write(sample, address)

    def stream(self, sample: Encoded) -> Stream:
        return cast("StreamStore", self._store).stream(sample)

    def name(self, index: int) -> str:
        return self._store.name(index % self._count)

    def place(self, index: int) -> str:
        return self._store.place(index % self._count)

    def source_name(self, index: int) -> str:
        return self._store.source_name(index % self._count)
