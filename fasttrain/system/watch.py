"""Says when nothing has been finished for a while, and what is being read meanwhile. It ends nothing.

A conversion may well wait for slow storage, or for a mount that comes back in an hour; but a person should know.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

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
