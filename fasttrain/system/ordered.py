"""Work shared among threads: results in the order of the tasks, a limited number of bytes ahead of who takes them."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

from fasttrain.system.cores import usable_cores
from fasttrain.system.workers import Workers

Task = TypeVar("Task")
Result = TypeVar("Result")

PORTION_BYTES = 1 << 23  # a thread hands over what it has when it is this much, or its task is done
BYTES_AHEAD = 1 << 25  # for each thread, of results that nobody has taken
# To let threads end: one that computes while the interpreter is taken down would crash it, one that hangs does not.
PATIENCE_SECONDS = 10.0


class _Lane(Generic[Result]):
    """What one task has given and nobody has taken yet: portions, each with its bytes."""

    def __init__(self) -> None:
        self.portions: deque[tuple[list[Result], int]] = deque()
        self.ended = False
        self.error: BaseException | None = None


class _Shelf(Generic[Result]):
    """Between threads that put portions of results down and the one that takes them, lane by lane."""

    def __init__(self, num_bytes: int) -> None:
        """num_bytes: what may lie here; a lane that is waited for gets one portion beyond it, so that all goes on."""
        self._closed = False
        self._room = num_bytes
        self._awaited: _Lane[Result] | None = None
        self._changed = threading.Condition()

    def put(self, lane: _Lane[Result], portion: list[Result], num_bytes: int) -> None:
        """Add a portion once there is room for it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or num_bytes <= self._room or (lane is self._awaited and not lane.portions)
            )
            self._room -= num_bytes
            lane.portions.append((portion, num_bytes))
            self._changed.notify_all()

    def end(self, lane: _Lane[Result], error: BaseException | None) -> None:
        """Nothing more comes, because of this error or because the task is done."""
        with self._changed:
            lane.ended, lane.error = True, error
            self._changed.notify_all()

    def take(self, lane: _Lane[Result]) -> Iterator[Result]:
        """Yield the results of a lane as they come; raises the error it ended with."""
        while portion := self._next(lane):
            yield from portion
        if lane.error is not None:
            raise lane.error

    def _next(self, lane: _Lane[Result]) -> list[Result]:
        with self._changed:
            self._awaited = lane
            self._changed.notify_all()
            self._changed.wait_for(lambda: lane.portions or lane.ended)
            if not lane.portions:
                return []
            portion, num_bytes = lane.portions.popleft()
            self._room += num_bytes
            self._changed.notify_all()
            return portion

    def is_open(self) -> bool:
        """Whether anything will be taken from here."""
        return not self._closed

    def close(self) -> None:
        """Nobody takes anything any more: threads need not wait for room."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def stream_in_order(
    function: Callable[[Task], Iterable[Result]],
    tasks: Iterable[Task],
    size: Callable[[Result], int],
    num_workers: int = 0,
) -> Generator[Result, None, None]:
    """Yield the results of function(task) of every task, in the order of the tasks, computed by threads.

    Tasks are drawn only a few ahead, and of the results BYTES_AHEAD for each thread are held, beyond that per thread
    what it is at: PORTION_BYTES and one more result. Closing the generator waits for the threads to be done with what
    they are at, but not for ever: one that hangs in a read keeps no process alive.

    Args:
        function: rarely holds the interpreter lock; should give its results one by one, or all of a task are held.
        tasks: one task each; worth a thread's while from some milliseconds on.
        size: bytes of a result.
        num_workers: 0 = one for each core this process may use.

    Raises:
        Exception: whatever function raises.
    """
    num_workers = num_workers or usable_cores()
    shelf: _Shelf[Result] = _Shelf(num_workers * BYTES_AHEAD)
    pending: deque[_Lane[Result]] = deque()
    workers = Workers(num_workers)
    try:
        for task in tasks:
            pending.append(_Lane())
            workers.submit(_fill, pending[-1], shelf, function, task, size)
            if len(pending) > 2 * num_workers + 2:
                yield from shelf.take(pending.popleft())
        while pending:
            yield from shelf.take(pending.popleft())
    finally:
        shelf.close()
        workers.close(PATIENCE_SECONDS)


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int = 0
) -> Generator[Result, None, None]:
    """Yield function(task) of every task, as stream_in_order does, for results that take no memory to speak of."""
    return stream_in_order(lambda task: (function(task),), tasks, lambda _: 0, num_workers)


def _fill(
    lane: _Lane[Result],
    shelf: _Shelf[Result],
    function: Callable[[Task], Iterable[Result]],
    task: Task,
    size: Callable[[Result], int],
) -> None:
    """What a thread does for one task; nothing once the results aren't wanted any more."""
    error = None
    try:
        if shelf.is_open():
            for portion, num_bytes in _portions(itertools.takewhile(lambda _: shelf.is_open(), function(task)), size):
                shelf.put(lane, portion, num_bytes)
    except BaseException as raised:  # raised again where the results are taken
        error = raised
    shelf.end(lane, error)


def _portions(results: Iterable[Result], size: Callable[[Result], int]) -> Iterator[tuple[list[Result], int]]:
    portion, num_bytes = list[Result](), 0
    for result in results:
        portion.append(result)
        num_bytes += size(result)
        if num_bytes >= PORTION_BYTES:
            yield portion, num_bytes
            portion, num_bytes = [], 0
    if portion:
        yield portion, num_bytes
