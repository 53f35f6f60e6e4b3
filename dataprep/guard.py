"""Storage that goes away, told from images that can't be read: else a set would be finished without the rest."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from fasttrain.dataprep.sources.source import Reader
from fasttrain.formats.boundary import reason_of
from fasttrain.formats.listing import Sample
from fasttrain.system.errors import RunError

LOST = 10  # images in a row that the system can't read: storage is gone


class GuardedReader:
    """A Reader that raises RunError once storage is gone.

    In a row means one after the other in time, whichever thread asks: without storage every one of them fails. So no
    more than a few images are taken for unreadable, however many threads there are and wherever these lie.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader, self._lock = reader, threading.Lock()
        self._failed = set[Sample]()  # since an image could last be read

    def read(self, sample: Sample) -> bytes | np.ndarray:
        """Read as the reader does. Raises RunError, too."""
        try:
            content = self._reader.read(sample)
        except OSError as error:
            with self._lock:
                self._failed.add(sample)
                if len(self._failed) < LOST:
                    raise
            raise RunError(
                f"{LOST} images in a row can't be read, the last is {sample.path}: {reason_of(error)}: "
                "finished shards are kept, run the same command again to continue"
            ) from None
        with self._lock:
            self._failed.clear()
        return content

    def size(self, sample: Sample) -> int:
        return self._reader.size(sample)

    def settle(self, samples: Sequence[Sample]) -> None:
        """Before a shard of these is finished: raise RunError if storage went away while they were read.

        Where some of them are the last that were asked for, others are read again until one can be, or too many
        can't.
        """
        if not self._failed or self._failed.isdisjoint(samples):
            return
        for sample in samples:
            if not self._failed:
                return
            try:
                self.read(sample)
            except (RunError, MemoryError):
                raise
            except Exception:  # which cost it its place when it was first read
                continue
