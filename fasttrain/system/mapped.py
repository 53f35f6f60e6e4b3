"""Files mapped into memory without a descriptor that stays open: a process may have 1,024 of these, and 65,530 maps."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import weakref
from typing import Any

import numpy as np

from fasttrain.system.regular import regular_descriptor

_PROT_READ, _MAP_SHARED = 1, 1
_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """Owner of a mapping, as numpy asks for memory: it ends with the last array that shows a part of it."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}
        end = weakref.finalize(self, _library().munmap, address, size)
        end.atexit = False  # another thread may be reading still


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    library.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_int64]
    library.mmap.restype = pointer
    library.munmap.argtypes = [pointer, size]
    return library


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Return a regular file's bytes, uint8, read-only, in place: they are read once they are looked at.

    Raises OSError: it can't be opened or mapped, is empty, or is a folder, FIFO, socket or device.
    """
    descriptor = regular_descriptor(path)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            raise OSError(errno.EINVAL, "empty file", os.fspath(path))
        address = _library().mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
    finally:
        os.close(descriptor)
    owner: Any = _Mapping(address, size)
    return np.asarray(owner)


def copied(address: int, size: int) -> bytes:
    """Return a copy of memory, made without the interpreter's lock: storage that hangs below it must not keep that."""
    copy = ctypes.create_string_buffer(size)
    ctypes.memmove(copy, address, size)
    return copy.raw
