"""A clock that goes on only when a test says so, for whoever asks time.monotonic()."""

import threading
import time

import pytest


class Clock:
    """Seconds, as time.monotonic() gives them; how long a test itself takes does not count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = time.monotonic()
        self._asked: dict[int, int] = {}  # how often, by thread
        self._changed = threading.Condition()
        monkeypatch.setattr(time, "monotonic", self)

    def __call__(self) -> float:
        with self._changed:
            thread = threading.get_ident()
            self._asked[thread] = self._asked.get(thread, 0) + 1
            self._changed.notify_all()
            return self._now

    def passes(self, seconds: float, looks: int = 1) -> None:
        """So much time goes by, in which another thread looks at the clock; returns once it has, so many times."""
        with self._changed:
            self._now += seconds
            before = self._looks()
            assert self._changed.wait_for(lambda: self._looks() >= before + looks, timeout=60), "nobody looked"

    def _looks(self) -> int:
        return sum(count for thread, count in self._asked.items() if thread != threading.get_ident())
