"""One .beton shard of a converted data set, of which nothing is read but what is asked for.

A billion images have 48 GB of tables. So what a table says of a sample is read, and checked, when its turn comes: as
BetonWriter lays it out, whose allocation table has the samples in their order.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from fasttrain.formats.beton import (
    ALLOCATION,
    FIELDS,
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
        self._metadata, self._table = self.address + METADATA_START, self.address + table

    def image(self, row: int) -> StoredImage:
        """Read how and where the image of a sample is stored; BetonError where that can't be."""
        mode, width, height, pointer, _ = self._sample(row)
        entry = copied(self._table + row * _ALLOCATION_BYTES, _ALLOCATION_BYTES)
        sample, start, size = _ALLOCATION.unpack(entry)
        if sample != row or start != pointer or not size:
            raise BetonError("metadata and allocation table disagree")
        for reason, found in flaws(self.data.size, mode, height, width, pointer, size):
            if found:
                raise BetonError(f"it {reason}")
        return StoredImage(mode, height, width, pointer, size)

    def label(self, row: int) -> int:
        """Read the label of a sample, whatever it is."""
        return self._sample(row)[-1]

    def _sample(self, row: int) -> tuple[int, int, int, int, int]:
        """Read mode, width, height, pointer and label."""
        return _SAMPLE.unpack(copied(self._metadata + row * _SAMPLE_BYTES, _SAMPLE_BYTES))
