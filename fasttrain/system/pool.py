"""Work shared among processes: a few tasks ahead, results in order, nothing left behind, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from fasttrain.system.cores import usable_cores
from fasttrain.system.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int = 0
) -> Generator[Result, None, None]:
    """Yield function(task) of every task, in the order of the tasks, computed by worker processes.

    Tasks are drawn only a few ahead of the results, so that any number of them fits in memory. Closing the generator
    ends the workers once their current task is done.

    Args:
        function: called in the workers; it, the tasks and the results must be picklable.
        tasks: one task each; worth a worker's while from some milliseconds on.
        num_workers: 0 = one for each core this process may use.

    Raises:
        RunError: a worker was killed. Whatever function raises is raised here, too.
    """
    num_workers = num_workers or usable_cores()
    with _worker_pool(num_workers) as pool:
        pending: deque[Future[Result]] = deque()
        for task in tasks:
            pending.append(_submit(pool, function, task))
            if len(pending) > 2 * num_workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _worker_pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    # "spawn": a forked copy of a process that has threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_watch_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise RunError("a worker process died (out of memory?): run the same command again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: Executor, function: Callable[[Task], Result], task: Task) -> Future[Result]:
    # Workers start here and inherit the blocked signal, so that Ctrl-C reaches this process alone.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, task)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _watch_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker waiting for tasks does not notice that the process which gives them was killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
