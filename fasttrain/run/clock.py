"""How long the steps wait for their batches, how much of that is for the copy to the GPU, and how long views take.

On a GPU the host runs ahead of the steps it has queued, and waits for them in the loader (prefetch.py) without a loss:
its clock can't tell. So marks are left in the stream of the steps, where a batch is asked for and where it is handed
over. What passes between the two there is time in which the GPU had nothing to do. Nothing waits for the marks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from fasttrain.input import Batch

Mark = float | torch.cuda.Event  # a moment: of the host's clock in seconds, or of the stream the steps run on


class Wait(NamedTuple):
    """Where one batch was asked for, where its pixels were on the device (if they were copied), where it was given."""

    asked: Mark
    arrived: torch.cuda.Event | None
    given: Mark


class Marks(NamedTuple):
    """Those of some steps: around their batches, and around the making of their views."""

    waits: list[Wait]
    views: list[tuple[Mark, Mark]]


class Seconds(NamedTuple):
    """Waited for batches, of these for the copy to the GPU; and taken by the views."""

    data: float
    transfer: float
    views: float


class BatchClock:
    """Leaves the marks."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._marks = device.type == "cuda", Marks([], [])

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, each between two marks."""
        iterator = iter(batches)
        while True:
            asked = self._mark()
            batch = next(iterator, None)
            if batch is None:
                return
            self._marks.waits.append(Wait(asked, batch.arrived, self._mark()))
            yield batch

    @contextlib.contextmanager
    def making_views(self) -> Iterator[None]:
        """Count the time in here to the views; a GPU's includes that in which it waits for the host to go on."""
        began = self._mark()
        yield
        self._marks.views.append((began, self._mark()))

    def take(self) -> Marks:
        """The marks since the last time."""
        taken, self._marks = self._marks, Marks([], [])
        return taken

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_of(marks: Marks) -> Seconds:
    """What lies between marks; on a GPU what the stream was given after them must have begun."""
    total = transfer = 0.0
    for wait in marks.waits:
        whole = _between(wait.asked, wait.given)
        total += whole
        if wait.arrived is not None:  # before `asked`, if the copy ended while the step before was running
            transfer += min(whole, max(0.0, _between(wait.asked, wait.arrived)))
    return Seconds(total, transfer, sum(_between(*pair) for pair in marks.views))


def _between(first: Mark, second: Mark) -> float:
    if isinstance(first, float):
        assert isinstance(second, float)
        return second - first
    return first.elapsed_time(second) / 1000  # type: ignore[arg-type]
