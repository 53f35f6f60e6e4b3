"""Says when nothing moves, and who is at what meanwhile; ends a wait, where that is wanted, but not for slow storage.

As long as something is finished now and then, storage may be as slow as it likes. When nothing is for WARN_SECONDS, a
line says so. A conversion may well wait longer, for a mount that comes back in an hour; training raises an error after
STALL_SECONDS. Time in which this process itself was stopped does not count: no worker could finish anything in it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

from fasttrain.system.errors import RunError, printable

WARN_SECONDS = 10.0  # without anything finished: a line on stderr
STALL_SECONDS = 60.0  # … an error; a network mount that fails over has come back by then
_NAMED = 4  # tasks in a message

Task = TypeVar("Task")
Result = TypeVar("Result")


class Arrivals:
    """What comes to this process from storage elsewhere, for all its watches.

    moved: when the last bytes came, of the monotonic clock. trouble: what the storage has failed with since then.
    """

    moved, trouble = 0.0, ""

    def came(self) -> None:
        """Bytes have come."""
        self.moved, self.trouble = time.monotonic(), ""


ARRIVALS = Arrivals()


class Wait:
    """Since when someone waits, who looks every poll_seconds().

    A look that comes far too late shows that this process was stopped (Ctrl-Z, a suspended job): the wait begins anew.
    """

    def __init__(self) -> None:
        self.began = self.unbroken = self._looked = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        if now - self._looked > WARN_SECONDS:
            self.unbroken = now
        self._looked = now


class Watch(Generic[Task]):
    """Which tasks threads are at, and when one was last finished."""

    def __init__(self, unit: str, name: Callable[[Task], str], error: type[RunError] | None = None) -> None:
        """unit: what is finished, one by one. name: how a message calls a task. error: ends a wait; None waits on."""
        self.stalled = False  # a wait has ended in an error: whoever hangs is not worth another wait
        self._unit, self._name, self._error = unit, name, error
        self._at: dict[object, Task] = {}
        self._moved = time.monotonic()
        self._warned = 0.0  # when the last warning was told

    @contextlib.contextmanager
    def at(self, task: Task) -> Iterator[None]:
        """Meanwhile this thread is at a task, which is then done, well or not; perhaps as a part of another."""
        place = object()
        self._at[place] = task
        try:
            yield
        finally:
            del self._at[place]
            self.moved()

    def moved(self) -> None:
        """Something is finished."""
        self._moved = time.monotonic()

    @contextlib.contextmanager
    def patrol(self) -> Iterator[None]:
        """Meanwhile a thread warns: for those who wait in calls of others."""
        ended = threading.Event()

        def walk() -> None:
            while not ended.wait(poll_seconds()):
                self._warn(self._moved)

        self.moved()
        threading.Thread(target=walk, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def result(self, future: Future[Result]) -> Result:
        """What a worker returns or raises. Raises the watch's error when all of them have stopped."""
        wait = Wait()
        while True:
            try:
                return future.result(poll_seconds())
            except FutureTimeout:
                if future.done():  # the worker itself raised it, or has just finished
                    return future.result()
                self.check(wait)

    def check(self, wait: Wait) -> None:
        """Warn or raise, for one who waits and looks.

        As long as bytes come from storage elsewhere, nothing is raised: a shard may take longer than a sample.
        """
        wait.look()
        moved = max(self._moved, wait.unbroken if self._error else wait.began)
        if self._error and time.monotonic() - max(moved, ARRIVALS.moved) > STALL_SECONDS:
            self.stalled = True
            hangs = "storage or a worker hangs"
            raise self._error(f"no {self._unit} for {STALL_SECONDS:.0f} s: {hangs}{self._places()}")
        self._warn(moved)

    def _warn(self, moved: float) -> None:
        idle = time.monotonic() - moved
        if idle > WARN_SECONDS and self._warned < moved:
            self._warned = time.monotonic()
            ends = f" (the run ends after {STALL_SECONDS:.0f})" if self._error else ""
            if time.monotonic() - ARRIVALS.moved < WARN_SECONDS:
                ends = " (storage is slow: bytes still come)"
            print(f"warning: no {self._unit} for {idle:.0f} s{ends}{self._places()}", file=sys.stderr, flush=True)

    def _places(self) -> str:
        tasks = sorted(set(map(self._name, self._at.copy().values())))
        more = f" and {len(tasks) - _NAMED} more" if len(tasks) > _NAMED else ""
        at = f", at {', '.join(tasks[:_NAMED])}{more}" if tasks else ""
        return printable(f"{at}; {ARRIVALS.trouble}" if ARRIVALS.trouble else at)


def poll_seconds() -> float:
    """How often a wait looks whether anything moves."""
    return min(WARN_SECONDS, STALL_SECONDS) / 10
