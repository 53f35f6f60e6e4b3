"""The .beton layout of FFCV 1.0.2, written and read without FFCV.

    header | 2 field descriptors | metadata of every sample | JPEG streams or pixels | allocation table

The stock FFCV `Reader` and `Loader` read these files. Two rules of FFCV shape them: no sample straddles a multiple of
the page size, and the allocation table is the last thing in the file. Layout: ffcv/types.py, ffcv/writer.py and
ffcv/memory_allocator.py of FFCV 1.0.2; its fields are `image` (RGBImageField) and `label` (IntField).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fasttrain.formats.writer import ShardWriter
from fasttrain.system.errors import DataError

VERSION = 2
MIN_PAGE_SIZE = 1 << 23  # FFCV's default; a larger sample doubles it until it fits
MAX_PAGE_SIZE = 1 << 31  # the header's field has 32 bits
MODE_JPG, MODE_RAW = 0, 1

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype({"names": ["image", "label"], "formats": [IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24})
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

_FIELDS = np.array([(2, b"image", 0), (1, b"label", 0)], FIELD)  # type ids of RGBImageField and IntField
_METADATA_START = HEADER.itemsize + _FIELDS.nbytes


class BetonError(DataError):
    """The file is no sound .beton file with the fields `image` and `label`; the text is one line."""


class BetonWriter(ShardWriter):
    """Writes one .beton file, holding one sample in memory."""

    def __init__(self, path: str | os.PathLike[str], max_samples: int) -> None:
        """Open the temporary file, with room for the metadata of max_samples samples."""
        super().__init__(path)
        self._samples = np.zeros(max_samples, SAMPLE)
        self._allocations = np.zeros(max_samples, ALLOCATION)
        self._end = _METADATA_START + self._samples.nbytes
        self._page_size = MIN_PAGE_SIZE
        self._file.seek(self._end)

    def write(self, stream: bytes, height: int, width: int, label: int, raw: bool = False) -> None:
        """Append one sample, as ShardWriter says; ValueError also for more than max_samples."""
        if self.num_samples == len(self._samples):
            raise ValueError(f"{self._path}: more than the {self.num_samples} samples announced")
        pointer = self._place(len(stream))
        if pointer != self._end:  # a seek writes what is buffered: ten times the cost of a small sample
            self._file.seek(pointer)
        self._file.write(stream)
        self._end = pointer + len(stream)
        self._hand_over(self._end)
        mode = MODE_RAW if raw else MODE_JPG
        self._samples[self.num_samples] = ((mode, width, height, pointer), label)
        self._allocations[self.num_samples] = (self.num_samples, pointer, len(stream))
        self.num_samples += 1

    def _place(self, size: int) -> int:
        """Return where a stream goes: at the end, or at the next page where it would straddle two.

        Pages may grow on the way: a sample within one page lies within one page of any larger power of two.
        """
        while size > self._page_size:
            self._page_size *= 2
        if self._page_size > MAX_PAGE_SIZE:
            raise ValueError(f"{self._path}: a sample of {size} bytes is too large")
        left = -self._end % self._page_size
        return self._end if size <= left or left == 0 else self._end + left

    def finish(self) -> None:
        """Write the tables, make everything durable, and give the file its name."""
        header = np.array((VERSION, len(_FIELDS), self._page_size, self.num_samples, self._end), HEADER)
        self._file.seek(self._end)
        self._file.write(self._allocations[: self.num_samples].tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes() + _FIELDS.tobytes() + self._samples.tobytes())
        self._new.publish()


class BetonReader:
    """A .beton file, mapped into memory and checked once, so that later reads stay inside it.

    Attributes:
        path: the file.
        num_samples: N.
        mode_N: uint8, MODE_JPG or MODE_RAW (height * width * 3 bytes of RGB).
        height_N, width_N: uint16, pixels.
        pointer_N, size_N: uint64, place and length in `data`, bytes.
        label_N: int64, -1 for none.
        data: the whole file, uint8, read-only.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map and check the file.

        Raises:
            BetonError: missing, truncated, or anything in it that is inconsistent.
        """
        self.path = Path(path)
        try:
            self.data = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BetonError(f"{path}: {getattr(error, 'strerror', None) or 'empty file'}") from None
        header = self._read(HEADER, 0, 1, "the header")[0]
        self._check_fields(header)
        self.num_samples = int(header["num_samples"])
        samples_N = self._read(SAMPLE, _METADATA_START, self.num_samples, "the metadata")
        image_N = samples_N["image"]
        self.mode_N, self.height_N, self.width_N, self.pointer_N = (
            np.ascontiguousarray(image_N[name]) for name in ("mode", "height", "width", "pointer")
        )
        self.label_N = np.ascontiguousarray(samples_N["label"])
        self.size_N = self._read_sizes(int(header["table"]))
        self._check_samples()

    def _fail_if(self, condition: object, reason: str) -> None:
        if condition:
            raise BetonError(f"{self.path}: {reason}")

    def _read(self, dtype: np.dtype, start: int, count: int, what: str) -> np.ndarray:
        # Compared as Python integers before anything is allocated: a damaged header may claim any number.
        end = start + count * dtype.itemsize
        self._fail_if(end > self.data.size, f"{what} would end at byte {end}, the file has {self.data.size}")
        return np.frombuffer(self.data, dtype, count, start)

    def _check_fields(self, header: np.void) -> None:
        version, num_fields = int(header["version"]), int(header["num_fields"])
        self._fail_if(version != VERSION, f"not a .beton file of version {VERSION} (version {version})")
        self._fail_if(num_fields != len(_FIELDS), f"{num_fields} fields instead of `image` and `label`")
        fields = self._read(FIELD, HEADER.itemsize, num_fields, "the field list")
        names = [(int(field["type_id"]), field["name"]) for field in fields]
        expected = [(int(field["type_id"]), field["name"]) for field in _FIELDS]
        self._fail_if(names != expected, f"fields {names} instead of {expected}")

    def _read_sizes(self, table: int) -> np.ndarray:
        """Return size_N from the allocation table, which must have one entry per sample and end the file."""
        self._fail_if(table == 0, "unfinished: it has no allocation table")
        data_start = _METADATA_START + self.num_samples * SAMPLE.itemsize
        self._fail_if(table < data_start, f"the allocation table at byte {table} lies inside the metadata")
        entries_N = self._read(ALLOCATION, table, self.num_samples, "the allocation table")
        excess = self.data.size - table - entries_N.nbytes
        self._fail_if(excess, f"{excess} bytes after the allocation table: not one entry per sample")
        sample_N = entries_N["sample"]
        self._fail_if(np.any(sample_N >= self.num_samples), "the allocation table names samples that do not exist")
        order_N = np.argsort(sample_N, kind="stable")
        twice = np.any(sample_N[order_N] != np.arange(self.num_samples))
        self._fail_if(twice, "the allocation table names a sample twice")
        differ = np.any(entries_N["pointer"][order_N] != self.pointer_N)
        self._fail_if(differ, "metadata and allocation table disagree")
        return np.ascontiguousarray(entries_N["size"][order_N])

    def _check_samples(self) -> None:
        # In this order no sum can overflow: sizes are compared before they are subtracted.
        file_size = np.uint64(self.data.size)
        outside_N = (self.size_N > file_size) | (self.pointer_N > file_size - np.minimum(self.size_N, file_size))
        self._fail_if(outside_N.any(), f"sample {int(outside_N.argmax())} lies outside the file")
        self._fail_if(np.any(self.mode_N > MODE_RAW), "unknown image mode")
        pixels_N = self.height_N.astype(np.uint64) * self.width_N.astype(np.uint64)
        self._fail_if(np.any(pixels_N == 0), "an image without pixels")
        raw_N = self.mode_N == MODE_RAW
        self._fail_if(np.any(self.size_N[raw_N] != 3 * pixels_N[raw_N]), "a raw image of the wrong size")
