"""Reading files that may be anything by now."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class IrregularFile(OSError):
    """A folder, FIFO, socket or device in the place of a file."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A FIFO or device, which could be waited for for ever, raises IrregularFile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IrregularFile(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file. Raises OSError, also for one of more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most} bytes", str(path))
    return content
