"""Standard output and error that may be gone or full: what can't be told is dropped, and the work goes on.

A terminal is closed, a pipe's reader has ended, the disk of a log is full: none of it is worth a night's run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class Stream:
    """Stands for a standard stream. lost: something could not be written to it."""

    def __init__(self, stream: TextIO | None) -> None:
        """stream: None where the process was started without it."""
        self.lost, self._closed = False, stream is None
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
        with contextlib.suppress(AttributeError, ValueError):  # another kind of stream; one that is closed
            # a name that the locale can't spell is still told
            self._stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        try:
            self.lost |= self._closed
            return self._stream.write(text)
        except (OSError, ValueError):  # the latter: it was closed
            self.lost = True
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.lost = True

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the stream has
        return getattr(self._stream, name)


def keep_streams() -> None:
    """Let this process's standard streams never end it. Those it was started without are taken up by /dev/null.

    Otherwise the next file that is opened would get the number of standard error, and all that is written to that.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Stream):
            setattr(sys, name, Stream(getattr(sys, name)))


def tell_at_once(text: str) -> None:
    """Write a line to standard error without a lock, as a signal handler must: it may have come within a print."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
