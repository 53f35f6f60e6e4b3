"""A store whose every sample can be read: one that can't be keeps its place, and no other replaces it."""

from __future__ import annotations

import ctypes
from typing import cast

import numpy as np

from fasttrain.input.stores import BlockStore, Encoded, Store
from fasttrain.system.errors import DataError


class Blanks:
    """A store in which a sample that can't be read, or its label, is black; `failed` says why, by index.

    A loader then has nothing to replace, so batches hold the samples that the order has there.
    """

    def __init__(self, store: Store) -> None:
        self.num_samples, self.classes, self.fingerprint = store.num_samples, store.classes, store.fingerprint
        self.name, self.place, self.source_name = store.name, store.place, store.source_name
        self.failed: dict[int, DataError | OSError] = {}
        self._store = store
        if isinstance(store, BlockStore):
            self.block_S, self.num_bytes = store.block_S, store.num_bytes
            self.fetch, self.expect_lanes = store.fetch, store.expect_lanes

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        """As the store's, of one sample; -1 for one that can't be read."""
        try:
            return self._store.labels(index_N)
        except (DataError, OSError) as error:
            self.failed[int(index_N[0])] = _bare(error)
            return np.full(len(index_N), -1)

    def read(self, index: int) -> Encoded:
        try:
            encoded = self._store.read(index)
        except (DataError, OSError) as error:
            self.failed[index] = _bare(error)
            return Encoded(1, 1, (index, None))
        return encoded._replace(content=(index, encoded))

    def write(self, sample: Encoded, address: int) -> None:
        index, encoded = cast("tuple[int, Encoded | None]", sample.content)
        try:
            if encoded:
                return self._store.write(encoded, address)
        except DataError as error:
            self.failed[index] = _bare(error)
        ctypes.memset(address, 0, 3 * sample.height * sample.width)
        return None


def _bare(error: DataError | OSError) -> DataError | OSError:
    """The error without the frames that it came through: they hold a file's bytes and its pixels."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
