"""The .beton layout of FFCV 1.0.2, written and read without FFCV.

    header | field descriptors | metadata of every sample | JPEG streams or pixels | allocation table

The stock FFCV `Reader` and `Loader` read what is written here: fields `image` (RGBImageField) and `label` (IntField).
Two rules of FFCV shape the files: no sample straddles a multiple of the page size, and the allocation table is the last
thing in the file. What stock FFCV writes is read here, whatever else it holds (beton_fields.py). Layout: ffcv/types.py,
ffcv/writer.py and ffcv/memory_allocator.py of FFCV 1.0.2.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fasttrain.formats.beton_fields import FIELD, IMAGE, IMAGE_TYPE, INT_TYPE, Layout, layout_of, read_fields
from fasttrain.formats.writer import ShardWriter
from fasttrain.system.errors import DataError
from fasttrain.system.mapped import map_file

VERSION = 2
MIN_PAGE_SIZE = 1 << 23  # FFCV's default; a larger sample doubles it until it fits
MAX_PAGE_SIZE = 1 << 31  # the header's field has 32 bits
MODE_JPG, MODE_RAW = 0, 1

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")]
)
SAMPLE = np.dtype({"names": ["image", "label"], "formats": [IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24})
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

FIELDS = np.array([(IMAGE_TYPE, b"image", 0), (INT_TYPE, b"label", 0)], FIELD)  # of what is written here
METADATA_START = HEADER.itemsize + FIELDS.nbytes

Number = TypeVar("Number", int, np.ndarray)


class BetonError(DataError):
    """The file is no sound .beton file of images; the text is one line."""


class StoredImage(NamedTuple):
    """A sample's image: how it is stored, MODE_JPG or MODE_RAW (height * width * 3 bytes of RGB), and where, bytes."""

    mode: int
    height: int
    width: int
    pointer: int
    size: int


FLAWS = (
    "lies outside the file", "has an unknown image mode", "is an image without pixels",
    "is a raw image of the wrong size",
)  # fmt: skip


def flaws(
    file_size: Number, mode: Number, height: Number, width: Number, pointer: Number, size: Number
) -> tuple[Any, Any, Any, Any]:
    """Return which of FLAWS an image has: of one sample, or of all, as uint64 (N,)."""
    pixels = height * width
    # Where the size alone is too large, what is taken from it means nothing.
    outside = (size > file_size) | (pointer > file_size - size)
    return outside, mode > MODE_RAW, pixels == 0, (mode == MODE_RAW) & (size != 3 * pixels)


class BetonWriter(ShardWriter):
    """Writes one .beton file, holding one sample in memory."""

    def __init__(self, path: str | os.PathLike[str], max_samples: int) -> None:
        """Open the temporary file, with room for the metadata of max_samples samples."""
        super().__init__(path)
        self._samples = np.zeros(max_samples, SAMPLE)
        self._allocations = np.zeros(max_samples, ALLOCATION)
        self._end = METADATA_START + self._samples.nbytes
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
        header = np.array((VERSION, len(FIELDS), self._page_size, self.num_samples, self._end), HEADER)
        self._file.seek(self._end)
        self._file.write(self._allocations[: self.num_samples].tobytes())
        self._file.seek(0)
        self._file.write(header.tobytes() + FIELDS.tobytes() + self._samples.tobytes())
        self._new.publish()


class BetonReader:
    """A .beton file, mapped into memory and checked once, so that later reads stay inside it.

    Attributes:
        path: the file.
        num_samples: N.
        mode_N: uint8, MODE_JPG or MODE_RAW (height * width * 3 bytes of RGB).
        height_N, width_N: uint16, pixels.
        pointer_N, size_N: uint64, place and length in `data`, bytes.
        label_N: int64, as the file has it; -1 for a file without a field of labels.
        data: the whole file, uint8, read-only; address: where it begins in memory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map and check the file.

        Raises:
            BetonError: missing, truncated, or anything in it that is inconsistent.
        """
        self.path = Path(path)
        try:
            self.data = map_file(path)
        except OSError as error:
            raise BetonError(f"{path}: {error.strerror}") from None
        self.address: int = self.data.ctypes.data
        header = self._read(HEADER, 0, 1, "the header")[0]
        self.num_samples = int(header["num_samples"])
        start, layout = self._read_layout(header)
        samples_N = self._read(layout.sample, start, self.num_samples, "the metadata")
        self._fail_if(not self.num_samples, "no samples")
        image_N = samples_N["image"]
        self.mode_N, self.height_N, self.width_N, self.pointer_N = (
            image_N[name].copy() for name in ("mode", "height", "width", "pointer")
        )  # not views of the file, which may change after its check
        if "label" in (layout.sample.names or ()):
            self.label_N = samples_N["label"].copy()
        else:
            self.label_N = np.full(self.num_samples, -1)
        self.size_N = self._read_sizes(int(header["table"]), start + samples_N.nbytes, layout.per_sample)
        self._check_samples()

    def _fail_if(self, condition: object, reason: str) -> None:
        if condition:
            raise BetonError(f"{self.path}: {reason}")

    def _read(self, dtype: np.dtype, start: int, count: int, what: str) -> np.ndarray:
        # Compared as Python integers before anything is allocated: a damaged header may claim any number.
        end = start + count * dtype.itemsize
        self._fail_if(end > self.data.size, f"{what} would end at byte {end}, the file has {self.data.size}")
        return np.frombuffer(self.data, dtype, count, start)

    def _read_layout(self, header: np.void) -> tuple[int, Layout]:
        """Return where the metadata begins, and how that of a sample lies."""
        version = int(header["version"])
        self._fail_if(version != VERSION, f"not a .beton file of version {VERSION} (version {version})")
        rows = self._read(FIELD, HEADER.itemsize, int(header["num_fields"]), "the field list")
        try:
            return HEADER.itemsize + rows.nbytes, layout_of(read_fields(rows))
        except ValueError as error:
            raise BetonError(f"{self.path}: {error}") from None

    def _read_sizes(self, table: int, data_start: int, per_sample: int) -> np.ndarray:
        """Return size_N from the allocation table, which has so many entries for each sample and ends the file."""
        self._fail_if(table == 0, "unfinished: it has no allocation table")
        self._fail_if(table < data_start, f"the allocation table at byte {table} lies inside the metadata")
        entries_M = self._read(ALLOCATION, table, self.num_samples * per_sample, "the allocation table")
        excess = self.data.size - table - entries_M.nbytes
        self._fail_if(excess, f"{excess} bytes after the allocation table: not {per_sample} for each sample")
        self._fail_if(
            np.any(entries_M["sample"] >= self.num_samples), "the allocation table names samples that do not exist"
        )
        sample_M = entries_M["sample"].astype(np.int64)
        uneven = np.any(np.bincount(sample_M) != per_sample)
        self._fail_if(uneven, "the allocation table names a sample twice in place of another")
        # Something empty may begin where the image does.
        is_image_M = (entries_M["pointer"] == self.pointer_N[sample_M]) & (entries_M["size"] > 0)
        sample_of_N = sample_M[is_image_M]
        size_N = np.zeros(self.num_samples, np.uint64)
        size_N[sample_of_N] = entries_M["size"][is_image_M]
        self._fail_if(
            len(sample_of_N) != self.num_samples or not size_N.all(), "metadata and allocation table disagree"
        )
        return size_N

    def _check_samples(self) -> None:
        columns = (self.mode_N, self.height_N, self.width_N, self.pointer_N, self.size_N)
        file_size = np.array(self.data.size, np.uint64)
        found = flaws(file_size, *(column_N.astype(np.uint64) for column_N in columns))
        for reason, found_N in zip(FLAWS, found, strict=True):
            self._fail_if(np.any(found_N), f"sample {int(np.argmax(found_N))} {reason}")

    def image(self, row: int) -> StoredImage:
        """Return how and where the image of a sample is stored."""
        columns = (self.mode_N, self.height_N, self.width_N, self.pointer_N, self.size_N)
        return StoredImage(*(int(column_N[row]) for column_N in columns))

    def label(self, row: int) -> int:
        """Return the label of a sample."""
        return int(self.label_N[row])
