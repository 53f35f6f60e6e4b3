"""Signals that are remembered while something is under way, and handled as before afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from fasttrain.system.streams import tell_at_once

Handlers = dict[int, Any]  # by signal


def _replaceable(*numbers: int) -> Handlers:
    """The handlers of those signals that can be given another one and get theirs back.

    None outside of the main thread, which alone may do so; and not one that was set by other means than Python's.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}


def _set(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def interrupt_ends() -> Iterator[None]:
    """SIGINT ends the process at once in here. Python's own handler waits for the end of a call of compiled code."""
    before = _replaceable(signal.SIGINT)
    try:
        _set(dict.fromkeys(before, signal.SIG_DFL))
        yield
    finally:
        _set(before)


class Stopped(Exception):
    """A signal has ended what was under way, and what is done is saved. number: the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignal:
    """Within `with`, remembers SIGINT, SIGTERM, SIGUSR1 or SIGHUP until the step is done.

    A second SIGINT does what it did before that: KeyboardInterrupt in a notebook, the end of a command. Launchers
    repeat the others (a scheduler signals torchrun, torchrun its processes), so those only count once. A terminal that
    goes away sends SIGHUP; where it is ignored, as under nohup, it stays so. Outside of the main thread none is heeded.
    """

    received = 0

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = self._write  # until there is a display
        self._before: Handlers = {}

    def __enter__(self) -> StopSignal:
        self._before = _replaceable(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        if self._before.get(signal.SIGHUP) == signal.SIG_IGN:
            del self._before[signal.SIGHUP]
        _set(dict.fromkeys(self._before, self._remember))
        return self

    def __exit__(self, *_error: object) -> None:
        _set(self._before)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        if self.received:
            return
        self.received = number
        self.tell("stopping after this step, with a checkpoint")

    def _write(self, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            tell_at_once(text)
