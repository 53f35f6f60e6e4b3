"""Waiting for workers that may be slow, but not for ever.

What counts is whether anything moves: as long as some worker finishes a sample now and then, storage may be as slow as
it likes. When none does, a line says which samples the workers are at, and later the wait ends with an error.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from fasttrain.system.errors import RunError

WARN_SECONDS = 10.0  # without a finished sample: a line on stderr
STALL_SECONDS = 60.0  # … an error; a network mount that fails over has come back by then
_NAMED = 4  # samples in a message

Result = TypeVar("Result")


class LoaderError(RunError):
    """Decoding fails too often, or has stopped."""


class Watch:
    """Which sample each worker is at, and when one was last finished."""

    def __init__(self, name: Callable[[int], str]) -> None:
        """name: how a message calls a sample."""
        self.stalled = False  # a wait has ended in an error: whoever hangs is not worth another wait
        self._name = name
        self._at: dict[int, int] = {}  # by thread
        self._moved = time.monotonic()
        self._warned = 0.0  # the value of _moved that a warning was about

    def begin(self, sample: int) -> None:
        """A worker takes up a sample."""
        self._at[threading.get_ident()] = sample

    def end(self) -> None:
        """It is done with it, well or not."""
        self._at.pop(threading.get_ident(), None)
        self._moved = time.monotonic()

    def result(self, future: Future[Result]) -> Result:
        """What a worker returns or raises. Raises LoaderError when all of them have stopped."""
        since = time.monotonic()
        while True:
            try:
                return future.result(poll_seconds())
            except FutureTimeout:
                if future.done():  # the worker itself raised it, or has just finished
                    return future.result()
                self.check(since)

    def check(self, since: float) -> None:
        """Warn or raise, for one who has waited since that time of the monotonic clock."""
        moved = max(self._moved, since)
        idle = time.monotonic() - moved
        if idle > STALL_SECONDS:
            self.stalled = True
            raise LoaderError(f"no sample for {STALL_SECONDS:.0f} s: storage or a worker hangs{self._places()}")
        if idle > WARN_SECONDS and self._warned < moved:
            self._warned = moved
            ends = f"the run ends after {STALL_SECONDS:.0f}"
            print(f"warning: no sample for {idle:.0f} s ({ends}){self._places()}", file=sys.stderr, flush=True)

    def _places(self) -> str:
        samples = sorted(set(self._at.copy().values()))
        if not samples:
            return ""
        named = ", ".join(self._name(sample) for sample in samples[:_NAMED])
        return f", at {named}" + (f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else "")


def poll_seconds() -> float:
    """How often a wait looks whether anything moves."""
    return min(WARN_SECONDS, STALL_SECONDS) / 10
