"""One .beton shard of a converted data set, of which nothing is read but what is asked for.

A billion images have 48 GB of tables. So what a table says of a sample is checked when its turn comes, and of a large
shard it is read only then: as BetonWriter lays it out, whose allocation table has the samples in their order.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from pathlib import Path

import numpy as np

from fasttrain.formats.beton import (
    ALLOCATION,
    FIELDS,
    FLAWS,
    HEADER,
    METADATA_START,
    SAMPLE,
    VERSION,
    BetonError,
    StoredImage,
    flaws,
)
from fasttrain.system.mapped import copied, map_file

_SAMPLE, _ALLOCATION = struct.Struct("<BHHQ3xq"), struct.Struct("<QQQ")  # SAMPLE and ALLOCATION: ten times as fast
_SAMPLE_BYTES, _ALLOCATION_BYTES = SAMPLE.itemsize, ALLOCATION.itemsize
# A shard of at most so many samples has its tables held while it is open, in 192 KiB: copied one by one, each entry has
# the interpreter's lock change hands, which small images feel.
HELD_SAMPLES = 4096


class _Entry(threading.local):
    """A thread's place for an entry of a table, to which it is copied without the interpreter's lock."""

    def __init__(self) -> None:
        self.content = ctypes.create_string_buffer(max(_SAMPLE_BYTES, _ALLOCATION_BYTES))
        self.address = ctypes.addressof(self.content)


_ENTRY, _copy = _Entry(), ctypes.memmove


class _Table:
    """Entries of 24 bytes: in memory where they are few, else copied from the file one by one."""

    def __init__(self, address: int, count: int, entry: struct.Struct) -> None:
        self._address, self._size, self._unpack = address, entry.size, entry.unpack_from
        self._held = copied(address, count * entry.size) if count <= HELD_SAMPLES else None

    def __getitem__(self, row: int) -> tuple[int, ...]:
        if self._held is not None:
            return self._unpack(self._held, row * self._size)
        _copy(_ENTRY.address, self._address + row * self._size, self._size)
        return self._unpack(_ENTRY.content)


class BetonShard:
    """A shard, mapped into memory; what is read of it is copied without the interpreter's lock, then checked.

    Attributes:
        num_samples: N.
        data: the whole file, uint8, read-only; address: where it begins in memory.
    """

    def __init__(self, path: Path) -> None:
        """Map the file, and check its header.

        Raises:
            BetonError: missing, truncated, or its header is not that of BetonWriter.
        """
        try:
            self.data = map_file(path)
        except OSError as error:
            raise BetonError(f"{path}: {error.strerror}") from None
        self.address: int = self.data.ctypes.data
        head = copied(self.address, min(METADATA_START, self.data.size))
        if len(head) < METADATA_START or head[HEADER.itemsize :] != FIELDS.tobytes():
            raise BetonError(f"{path}: not a .beton file as convert.py writes it")
        version, _, _, self.num_samples, table = np.frombuffer(head, HEADER, 1)[0].tolist()
        if version != VERSION:
            raise BetonError(f"{path}: not a .beton file of version {VERSION} (version {version})")
        ends = METADATA_START + self.num_samples * _SAMPLE_BYTES, table + self.num_samples * _ALLOCATION_BYTES
        if ends[0] > table or ends[1] != self.data.size or not self.num_samples:
            raise BetonError(
                f"{path}: its tables of {self.num_samples} samples do not fit the file: truncated, perhaps"
            )
        self._size = self.data.size
        self._samples = _Table(self.address + METADATA_START, self.num_samples, _SAMPLE)
        self._allocations = _Table(self.address + table, self.num_samples, _ALLOCATION)

    def image(self, row: int) -> StoredImage:
        """Read how and where the image of a sample is stored; BetonError where that can't be."""
        mode, width, height, pointer, _ = self._samples[row]
        sample, start, size = self._allocations[row]
        if sample != row or start != pointer or not size:
            raise BetonError("metadata and allocation table disagree")
        found = flaws(self._size, mode, height, width, pointer, size)
        if True in found:
            raise BetonError(f"it {FLAWS[found.index(True)]}")
        return StoredImage(mode, height, width, pointer, size)

    def label(self, row: int) -> int:
        """Read the label of a sample, whatever it is."""
        return self._samples[row][-1]
