"""Regular files, opened so that nothing waits: opening a FIFO, or reading a device, could for ever."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def regular_descriptor(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a regular file, as os.open does, and return its descriptor.

    Raises:
        OSError: it can't be opened, or is a folder, FIFO, socket or device.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading; buffering as for open(). Raises OSError as regular_descriptor."""
    return open(path, "rb", buffering, opener=regular_descriptor)


def read_at_most(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; OSError as open_regular, or for a larger one."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", os.fspath(path))
        return file.read(size)  # not the limit: memory for as much would be taken first
