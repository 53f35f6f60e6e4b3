"""What can't be read is black, and only the reason is kept."""

import weakref
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from fasttrain.input.blanks import Blanks
from fasttrain.input.stores import Encoded, Store
from fasttrain.system.errors import DataError


class Pixels:
    """Stands for the bytes and pixels that a frame holds while it fails."""


class Failing(SimpleNamespace):
    """Every sample fails in one place, by an error that another one led to."""

    def __init__(self, place: str) -> None:
        super().__init__(num_samples=4, classes=(), fingerprint="", name=str, place=str, source_name=str)
        self.fails_at, self.held = place, list[weakref.ref[Pixels]]()

    def fail(self, place: str) -> None:
        if place == self.fails_at:
            pixels = Pixels()
            self.held.append(weakref.ref(pixels))
            try:
                raise OSError("first")
            except OSError as error:
                raise DataError("damaged") from error

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        self.fail("labels")
        return index_N

    def read(self, index: int) -> Encoded:
        self.fail("read")
        return Encoded(2, 2, None)

    def write(self, sample: Encoded, address: int) -> None:
        self.fail("write")


@pytest.mark.parametrize("place", ["labels", "read", "write"])
def test_a_failed_sample_keeps_its_reason_and_nothing_else(place: str) -> None:
    store = Failing(place)
    blanks = Blanks(cast("Store", store))
    pixels = np.ones(12, np.uint8)
    for index in range(4):
        blanks.labels(np.array([index]))
        blanks.write(blanks.read(index), pixels.ctypes.data)
    assert {index: str(error) for index, error in blanks.failed.items()} == dict.fromkeys(range(4), "damaged")
    assert len(store.held) == 4
    assert [ref() for ref in store.held] == [None] * 4
