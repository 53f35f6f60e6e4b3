"""How far a run is, how fast it goes of late, and what it does while no step is being taken."""

from __future__ import annotations

import collections
import time

REMEMBERED, APART = 100, 0.25  # moments that the rate is taken over, and the least seconds between two of them
IDLE_SECONDS = 5.0  # a step that takes longer is named


class Pace:
    """Counts steps, and the time they take by a clock that stands still while a status is set.

    A step that ends with a status set is not counted: it is one that compiles, or waits for the first batch.
    """

    def __init__(self, step: int, last_step: int) -> None:
        self.step, self.last_step = step, last_step
        self.status = self.note = ""
        self.steps_per_second = 0.0  # 0 where nothing is known yet
        self._since = time.monotonic()  # of the status, or the end of the last step
        self._running = False
        self._steps, self._seconds, self._read = 0, 0.0, self._since
        self._moments = collections.deque([(0, 0.0)], REMEMBERED)

    def begin(self, status: str) -> None:
        """Set what is being done instead of a step; "" for nothing."""
        self._count_time()
        self._running = not status
        self.status, self._since = status, time.monotonic()

    def finish(self, step: int) -> None:
        """A step has ended, and with it what was being done."""
        self._count_time()
        self._steps += self._running
        self.step, self.status, self._running, self._since = step, "", True, self._read
        first_steps, first_seconds = self._moments[0]
        if self._seconds > first_seconds:
            self.steps_per_second = (self._steps - first_steps) / (self._seconds - first_seconds)
        if self._seconds - self._moments[-1][1] > APART:
            self._moments.append((self._steps, self._seconds))

    def _count_time(self) -> None:
        now = time.monotonic()
        self._seconds += (now - self._read) * self._running
        self._read = now

    def seconds_left(self, step: int) -> float | None:
        """After a step; None where nothing is known yet."""
        return (self.last_step - step) / self.steps_per_second if self.steps_per_second else None

    def activity(self) -> str:
        """What is being done and for how long, where it takes its time, after the note; "" while steps are quick."""
        seconds = time.monotonic() - self._since
        text = self.status or (f"step {self.step + 1}" if seconds >= IDLE_SECONDS else "")
        if text and seconds >= 1:
            text += f", {clock(seconds) if seconds >= 60 else f'{seconds:.0f} s'}"
        return "; ".join(filter(None, (self.note, text)))


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
