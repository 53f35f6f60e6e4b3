"""Columns of numbers that grow row by row: in memory while they are small, else in a file that has no name.

Such a file is written from front to back and then mapped. The system drops it with the process, however that ends. It
lies in the folder that TMPDIR names, else in /var/tmp, which is meant for large files: /tmp is memory on many machines.
It is read here and there, so it should be a disk of this machine, which the folder of the shards often is not.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

import numpy as np

from fasttrain.system.durable import reason
from fasttrain.system.errors import RunError

SPILL_BYTES = 1 << 26  # a column that is larger goes to the file
_WRITTEN_AT_ONCE = 1 << 20
_READ_AT_ONCE = 1 << 16  # numbers


def spill_folder() -> str:
    """Return the folder that columns go to."""
    usual = "/var/tmp" if os.access("/var/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()
    return os.environ.get("TMPDIR") or usual


class Column:
    """Numbers of one type, appended and then read by position.

    Attributes:
        tail: what has been appended since the last `settle`; append to it, or call `extend`.
    """

    def __init__(self, code: Literal["B", "i", "q"]) -> None:
        """code: as of array; "B" holds bytes."""
        self._code = code
        self.tail: Any = bytearray() if code == "B" else array(code)
        self._file: BinaryIO | None = None
        self._map: mmap.mmap | None = None

    @property
    def on_disk(self) -> bool:
        """Whether the numbers lie in the file."""
        return self._file is not None

    def extend(self, number_N: np.ndarray) -> None:
        """Append numbers, which have to fit the type. Raises RunError as settle."""
        self.tail.frombytes(number_N.astype(self._code).tobytes())
        self.settle()

    def settle(self) -> None:
        """Write to the file what has been appended, if it is much. RunError where the disk is full, or fails."""
        num_bytes = len(self.tail) * memoryview(self.tail).itemsize
        if num_bytes >= (_WRITTEN_AT_ONCE if self._file else SPILL_BYTES):
            self._write()

    def values(self) -> Any:  # noqa: ANN401 - a bytearray, an array or a memoryview
        """Return all numbers, to be read by position, once nothing more is appended. Raises RunError as settle."""
        if self._file is None:
            return self.tail
        if self._map is None:
            self._write()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._map).cast(self._code)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all numbers, some at a time, without keeping them in memory. Raises RunError as settle."""
        number_N = np.frombuffer(self.values(), self._code)
        for start in range(0, len(number_N), _READ_AT_ONCE):
            yield number_N[start : start + _READ_AT_ONCE]
            self.release()

    def replace(self, position: int, number: int) -> None:
        """Write another number over one."""
        if self._file is None:
            self.tail[position] = number
        else:
            self._write()
            at = array(self._code, [number])
            os.pwrite(self._file.fileno(), at, position * at.itemsize)

    def release(self) -> None:
        """Let go of the memory that pages of the file have taken; they are read again when they are needed."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _write(self) -> None:
        folder = spill_folder()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the column
            content = memoryview(bytes(self.tail))
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise RunError(
                f"{folder}: {reason(error)}: a long listing goes there, TMPDIR names another folder"
            ) from None
        del self.tail[:]
