"""What the writers of both shard formats have in common: a shard has its name only once it is complete."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from fasttrain.system.durable import NewFile

_HAND_OVER_BYTES = 1 << 24
_SYNC_FILE_RANGE_WRITE = 2  # of Linux' fcntl.h: start, and wait for nothing; other systems lack the call
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

Writer = TypeVar("Writer", bound="ShardWriter")


class ShardWriter(ABC):
    """Writes one file, sample by sample, under a temporary name in the same folder until `finish`.

    As a context manager it finishes at the end of the block, and removes the temporary file if the block raises or
    wrote no sample (FFCV cannot load an empty file). The bytes depend on the samples alone.
    """

    num_samples: int

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the temporary file."""
        self._path = Path(path)
        self._new = NewFile(self._path, buffering=1 << 20)
        self._file = self._new.file
        self.num_samples = 0
        self._handed_over = 0

    @abstractmethod
    def write(self, stream: bytes, height: int, width: int, label: int, raw: bool = False) -> None:
        """Append one sample.

        Args:
            stream: a JPEG, or if raw the height * width * 3 bytes of its RGB pixels.
            height: its height in pixels, at most 65535.
            width: its width in pixels, at most 65535.
            label: index of its class, -1 for none.

        Raises:
            ValueError: the format cannot hold it.
            OSError: the disk is full, or failed.
        """

    @abstractmethod
    def finish(self) -> None:
        """Write what is left, make everything durable, and give the file its name."""

    def _hand_over(self, num_bytes: int) -> None:
        """Have the system start to write a file of so many bytes to the disk: less to wait for at the end."""
        if _sync_file_range is not None and num_bytes >= self._handed_over + _HAND_OVER_BYTES:
            self._handed_over = num_bytes
            _sync_file_range(self._file.fileno(), 0, 0, _SYNC_FILE_RANGE_WRITE)

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.num_samples:
                self.finish()
        finally:
            self._new.discard()
