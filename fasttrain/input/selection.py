"""Some samples of a store, as a store."""

from __future__ import annotations

import contextlib
import math
from typing import cast

import numpy as np

from fasttrain.formats.manifest import spread
from fasttrain.input.stores import BlockStore, Encoded, Shards, Store
from fasttrain.system.errors import DataError, RunError
from fasttrain.system.watch import Watch
from fasttrain.system.workers import Workers

LABELS_TRIED = 20
MOST = 0.5  # of the samples of a block: it is then read as a whole
OF_A_BLOCK = 4  # one sample of so many is taken, of the blocks of a set elsewhere that are read for a few


class Selection:
    """Samples of a store by their numbers in it, numbered anew from 0. fingerprint: the whole store's.

    It has the blocks of a store of which it is in order and takes most, so that these are read ahead.
    """

    def __init__(self, store: Store, index_N: np.ndarray) -> None:
        self.num_samples, self.classes, self.fingerprint = len(index_N), store.classes, store.fingerprint
        self.write = store.write
        self._store, self._index = store, index_N
        if isinstance(store, BlockStore) and (np.diff(index_N) > 0).all():
            start_S = np.searchsorted(index_N, store.block_S)  # among the selected
            count_K = np.diff(start_S)
            if len(index_N) > MOST * np.diff(store.block_S)[count_K > 0].sum():
                self.block_S, self.num_bytes = np.unique(start_S), store.num_bytes
                self.fetch, self.expect_lanes = self._fetch, store.expect_lanes

    def _fetch(self, first: int, _end: int) -> None:
        """The whole block of the store."""
        assert isinstance(self._store, BlockStore)
        number = int(np.searchsorted(self._store.block_S, self._index[first], "right"))
        self._store.fetch(*self._store.block_S[number - 1 : number + 1].tolist())

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
    """Evenly spaced samples, `most` at most: all classes of sorted files are among them in proportion.

    Of a set elsewhere, evenly spaced samples of some evenly spaced blocks, so that not all of it has to come.
    """
    count = min(most, store.num_samples)
    if isinstance(store, Shards) and store.is_elsewhere:
        blocks = len(store.block_S) - 1
        chosen = spread(blocks, math.ceil(min(blocks, OF_A_BLOCK * count * blocks / store.num_samples)))
        there = np.concatenate([np.arange(*store.block_S[block : block + 2]) for block in chosen])
        return Selection(cast("Store", store), there[spread(len(there), count)])
    return Selection(store, np.linspace(0, store.num_samples - 1, count).astype(np.int64))


def seems_labelled(store: Store) -> bool:
    """Whether a few of its images have a label. Raises RunError where storage hangs."""
    few = evenly(store, LABELS_TRIED)
    watch, pool = Watch("label", few.place, RunError), Workers(1)

    def label(index: int) -> int:
        with watch.at(index), contextlib.suppress(DataError, OSError):  # damage says nothing about the others
            return int(few.labels(np.array([index]))[0])
        return 0

    try:
        return all(watch.result(pool.submit(label, index)) >= 0 for index in range(few.num_samples))
    finally:
        pool.close()
