"""A pool of threads that can't keep the process alive.

concurrent.futures waits for its threads when the interpreter exits, for ever if one hangs in a read; these are daemons.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Workers:
    """`count` threads that run calls in the order submitted."""

    def __init__(self, count: int) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        # Threads inherit the blocked signal, so that Ctrl-C reaches the main thread, whatever it waits for.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for thread in self._threads:
                thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def submit(
        self, call: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        future: Future[Result] = Future()
        self._calls.put((future, call, args, kwargs))
        return future

    def close(self, patience: float = 0.0) -> None:
        """Let the threads end once they are done with what is queued; wait for them that many seconds at most."""
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call, args, kwargs = item
            del item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*args, **kwargs))
                except BaseException as error:  # raised again where the result is asked for
                    future.set_exception(error)
            del future, call, args, kwargs  # an idle thread keeps nothing alive
