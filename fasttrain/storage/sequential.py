"""Reading a part of a file in sequence, so that the system's cache holds it when it is read at random."""

from __future__ import annotations

import os
from pathlib import Path

_PIECE = 1 << 20  # bytes of a call, which waits without the interpreter's lock; they stay in a core's own cache


def read_through(path: Path, start: int, end: int) -> None:
    """Read the bytes from start to before end, of which none is kept. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        piece = memoryview(bytearray(_PIECE))
        while start < end and (count := os.preadv(descriptor, [piece[: end - start]], start)):
            start += count
    finally:
        os.close(descriptor)
