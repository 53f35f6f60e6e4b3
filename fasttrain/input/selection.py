"""Some samples of a store, as a store."""

from __future__ import annotations

import contextlib

import numpy as np

from fasttrain.input.stores import Encoded, Store
from fasttrain.system.errors import DataError

LABELS_TRIED = 20


class Selection:
    """Samples of a store by their numbers in it, numbered anew from 0. fingerprint: the whole store's."""

    def __init__(self, store: Store, index_N: np.ndarray) -> None:
        self.num_samples, self.classes, self.fingerprint = len(index_N), store.classes, store.fingerprint
        self.write = store.write
        self._store, self._index = store, index_N

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        return self._store.labels(self._index[index_N])

    def read(self, index: int) -> Encoded:
        return self._store.read(int(self._index[index]))

    def name(self, index: int) -> str:
        return self._store.name(int(self._index[index]))

    def place(self, index: int) -> str:
        return self._store.place(int(self._index[index]))

    def source_name(self, index: int) -> str:
        return self._store.source_name(int(self._index[index]))


def evenly(store: Store, most: int) -> Selection:
    """Evenly spaced samples, `most` at most: all classes of sorted files are among them in proportion."""
    count = min(most, store.num_samples)
    return Selection(store, np.linspace(0, store.num_samples - 1, count).astype(np.int64))


def seems_labelled(store: Store) -> bool:
    """Whether a few of its images have a label."""
    few = evenly(store, LABELS_TRIED)
    for index in range(few.num_samples):
        with contextlib.suppress(DataError, OSError):  # damage says nothing about the others
            if few.labels(np.array([index]))[0] < 0:
                return False
    return True
