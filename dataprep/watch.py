"""Says when nothing has been finished for a while, and what is being read meanwhile. It ends nothing.

A conversion may well wait for slow storage, or for a mount that comes back in an hour; but a person should know.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import numpy as np

from fasttrain.dataprep.listing import Reader, Sample

WARN_SECONDS = 10.0
_NAMED = 4  # samples in a message


class Watch:
    """While it is entered, a thread prints a line on stderr whenever nothing was finished for WARN_SECONDS."""

    def __init__(self, unit: str, busy: Callable[[], str]) -> None:
        """unit: what is finished, one by one; busy: what is being done, for the line."""
        self._unit, self._busy = unit, busy
        self._moved = time.monotonic()
        self._ended = threading.Event()

    def moved(self) -> None:
        """Something is finished."""
        self._moved = time.monotonic()

    def _look(self) -> None:
        warned = 0.0
        while not self._ended.wait(WARN_SECONDS / 10):
            moved = self._moved
            idle = time.monotonic() - moved
            if idle > WARN_SECONDS and warned < moved:
                warned = moved
                line = f"warning: no {self._unit} finished for {idle:.0f} s, still waiting: {self._busy()}"
                print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Watch:
        self.moved()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()


class WatchedReader:
    """A Reader that knows which samples are being read."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._at: dict[int, str] = {}  # by thread

    def read(self, sample: Sample) -> bytes | np.ndarray:
        self._at[threading.get_ident()] = sample.path
        try:
            return self._reader.read(sample)
        finally:
            del self._at[threading.get_ident()]

    def size(self, sample: Sample) -> int:
        self._at[threading.get_ident()] = sample.path
        try:
            return self._reader.size(sample)
        finally:
            del self._at[threading.get_ident()]

    def busy(self) -> str:
        """Return what is being done, for a line."""
        names = sorted(set(self._at.copy().values()))
        if not names:
            return "decoding, or writing the shard"
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"reading {', '.join(names[:_NAMED])}{more}"
