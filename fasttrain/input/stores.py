"""Where samples come from, as one numbered set of images each: the contract, and .beton shards."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.image import check_size
from fasttrain.formats.manifest import Manifest, ManifestError, Shard, wrong_label
from fasttrain.formats.names import read_names, sample_name
from fasttrain.storage.sequential import read_through
from fasttrain.system.errors import DataError, note
from fasttrain.system.memory import machine_memory

BLOCK_SAMPLES = 1 << 14  # at most: more than a shard usually holds
CACHE_SHARE = 0.5  # of the machine's memory may hold blocks that are in use, or read ahead


class Encoded(NamedTuple):
    """One sample before its pixels are written: its size, and what write() needs."""

    height: int
    width: int
    content: object


class Store(Protocol):
    """A numbered set of images. read and write are called from many threads, and raise DataError for a bad sample."""

    num_samples: int
    classes: tuple[str, ...]
    fingerprint: str  # changes when any sample's content or number does

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        """Labels of samples, int64, -1 for none. Called from many threads, and raises DataError for a bad one."""

    def read(self, index: int) -> Encoded: ...

    def write(self, sample: Encoded, address: int) -> None:
        """Write height×width×3 RGB bytes at a memory address."""

    def name(self, index: int) -> str:
        """How an error names the sample; the source's own name may be read for it."""

    def place(self, index: int) -> str:
        """The same without touching the storage, which may be what hangs."""

    def source_name(self, index: int) -> str:
        """What the source called the sample, or shard:row. For going through in order: a shard's are read at once.

        Raises DataError or OSError where they can't be read.
        """


@runtime_checkable
class BlockStore(Store, Protocol):
    """A store whose samples lie in blocks: storage reads those of one in sequence.

    block_S: where each begins among the samples, and the last one ends, int64, (blocks + 1,). num_bytes: of all.
    """

    block_S: np.ndarray
    num_bytes: int

    def fetch(self, first: int, end: int) -> None:
        """Have the samples from first to before end, all of one block, where they are read at random without delay.

        Called from threads that read ahead (fasttrain/input/ahead.py). Raises DataError or OSError.
        """

    def blocks_ahead(self, lanes: int) -> int:
        """How many blocks may be fetched before they are needed, where this process reads `lanes` of them at once.

        0: fetching is of no use.
        """


class Stream(NamedTuple):
    """A file in memory, uint8: a JPEG as it is stored, sound or not, or a PPM of pixels that were stored."""

    data: np.ndarray
    is_jpeg: bool


@runtime_checkable
class StreamStore(Store, Protocol):
    """A store whose samples lie in files as streams, so that another decoder can take them."""

    def stream(self, sample: Encoded) -> Stream:
        """What is stored of a sample that read() gave."""


def as_ppm(pixels_HW3: np.ndarray) -> Stream:
    """Put (H, W, 3) uint8 pixels behind the header of a format that every decoder reads."""
    height, width, _ = pixels_HW3.shape
    header = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
    return Stream(np.concatenate([header, pixels_HW3.reshape(-1)]), is_jpeg=False)


def as_encoded(pixels_HW3: np.ndarray) -> Encoded:
    """A sample that had to be decoded to learn its size."""
    return Encoded(pixels_HW3.shape[0], pixels_HW3.shape[1], pixels_HW3)


def write_pixels(pixels_HW3: np.ndarray, sample: Encoded, address: int) -> None:
    """Copy (H, W, 3) uint8 pixels to an address; DataError if they are not of the sample's size."""
    if pixels_HW3.shape != (sample.height, sample.width, 3):
        raise DataError(f"decodes to {pixels_HW3.shape}, its header says {sample.height} x {sample.width}")
    array = np.ascontiguousarray(pixels_HW3)
    ctypes.memmove(address, array.ctypes.data, array.nbytes)


@functools.lru_cache  # the splits of one data set are opened one by one, some of them again for kNN
def tell_once(_path: str, lines: tuple[str, ...]) -> None:
    """Say what a person should know of the data set at a path, once, and on the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            note(line)


class ShardReader(Protocol):
    """What a reader of either format tells of a shard."""

    num_samples: int
    path: pathlib.Path
    data: np.memmap


AnyReader = TypeVar("AnyReader", bound=ShardReader)


def open_shards(
    folder: pathlib.Path, shards: Sequence[Shard], reader: Callable[[pathlib.Path], AnyReader]
) -> list[AnyReader]:
    """Open the shards of one split. Raises DataError where one is missing, unsound, or not what the manifest says."""
    readers = [reader(folder / shard.name) for shard in shards]
    for found, stated in zip(readers, shards, strict=True):
        if found.num_samples != stated.num_samples:
            raise ManifestError(
                f"{found.path} holds {found.num_samples} samples, the manifest says {stated.num_samples}"
            )
    return readers


class Names(NamedTuple):
    """A shard's file of names, and its SHA-256 (hex) as the manifest has it."""

    path: pathlib.Path
    sha256: str


def names_of(folder: pathlib.Path, manifest: Manifest, split: str) -> list[Names | None]:
    """The file of names of each shard of a split; None for one that has none."""
    found = (shard.names for shard in manifest.splits[split])
    return [Names(folder / names.name, names.sha256) if names else None for names in found]


class Shards(Generic[AnyReader]):
    """The shards of one split of a data set, whose samples are numbered through."""

    def __init__(
        self,
        shards: Sequence[AnyReader],
        classes: Sequence[str],
        fingerprint: str,
        names: Sequence[Names | None],
    ) -> None:
        """names: the file of names of each shard."""
        self.classes, self.fingerprint = tuple(classes), fingerprint
        self._shards, self._names = shards, names
        self._names_read: tuple[int, list[str]] = -1, []  # of which shard, and they
        self._start_S = np.cumsum([0] + [shard.num_samples for shard in shards])
        self.num_samples, self.num_bytes = int(self._start_S[-1]), sum(shard.data.size for shard in shards)
        self.block_S = _blocks(self._start_S)

    def locate(self, index: int) -> tuple[int, int]:
        """A sample's shard, by its place among them, and the sample's number in it."""
        shard = int(np.searchsorted(self._start_S, index, side="right")) - 1
        return shard, index - int(self._start_S[shard])

    def fetch(self, first: int, end: int) -> None:
        """Read the part of the file in sequence, so that it lies in the system's cache."""
        shard, row = self.locate(first)
        reader = self._shards[shard]
        share = reader.data.size / reader.num_samples  # of a sample: a block is all of a file, or many samples of one
        read_through(reader.path, int(row * share), math.ceil((row + end - first) * share))

    def blocks_ahead(self, lanes: int) -> int:
        """One for each lane, if memory has room for as many, beside those in use."""
        mean = self.num_bytes / (len(self.block_S) - 1)
        room = int(CACHE_SHARE * machine_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / mean)
        return max(0, min(lanes, room - lanes))

    def name(self, index: int) -> str:
        shard, row = self.locate(index)
        names = self._names[shard]
        return sample_name(self._shards[shard].path, row, names.path if names else None)

    def place(self, index: int) -> str:
        shard, row = self.locate(index)
        return sample_name(self._shards[shard].path, row, None)

    def source_name(self, index: int) -> str:
        shard, row = self.locate(index)
        reader, names = self._shards[shard], self._names[shard]
        if names is None:
            return f"{reader.path.name}:{row}"
        if self._names_read[0] != shard:
            self._names_read = shard, read_names(names.path, reader.num_samples, names.sha256)
        return self._names_read[1][row]


def _blocks(start_S: np.ndarray) -> np.ndarray:
    """Where shards begin, and equal parts of those that are larger than a block: a single file may hold all images."""
    parts_S = -(-np.diff(start_S) // BLOCK_SAMPLES)
    inner = [
        np.linspace(int(start_S[shard]), int(start_S[shard + 1]), int(parts_S[shard]) + 1).astype(np.int64)[1:-1]
        for shard in np.flatnonzero(parts_S > 1)
    ]
    return np.sort(np.concatenate([start_S, *inner]))


class ShardStore(Shards[BetonReader]):
    """.beton files of one split, read in place; pixels are decoded straight into the batch."""

    def __init__(
        self, shards: Sequence[BetonReader], classes: Sequence[str], fingerprint: str, label_S: Sequence[np.ndarray],
        names: Sequence[Names | None],
    ) -> None:  # fmt: skip
        """label_S: the labels of each file, -1 for none. names: as for Shards."""
        super().__init__(shards, classes, fingerprint, names)
        self._label_N = np.concatenate(label_S)
        self._base_S = [shard.data.ctypes.data for shard in shards]

    @classmethod
    def of(cls, folder: pathlib.Path, manifest: Manifest, split: str) -> ShardStore:
        """The .beton shards of a converted data set.

        Raises DataError where one does not match the manifest, or has a label that is no class.
        """
        shards = open_shards(folder, manifest.splits[split], BetonReader)
        for shard in shards:
            if problem := wrong_label(shard.label_N, len(manifest.classes)):
                raise ManifestError(f"{shard.path}: {problem}: run dataprep/verify.py")
        label_S = [shard.label_N for shard in shards]
        return cls(shards, manifest.classes, manifest.fingerprint(split), label_S, names_of(folder, manifest, split))

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        return self._label_N[index_N]

    def read(self, index: int) -> Encoded:
        shard, row = self.locate(index)
        reader = self._shards[shard]
        height, width = int(reader.height_N[row]), int(reader.width_N[row])
        check_size(height, width)  # memory is laid out for what the file says
        return Encoded(height, width, (shard, row))

    def write(self, sample: Encoded, address: int) -> None:
        shard, row = cast("tuple[int, int]", sample.content)
        reader = self._shards[shard]
        source, size = self._base_S[shard] + int(reader.pointer_N[row]), int(reader.size_N[row])
        if reader.mode_N[row] == MODE_RAW:
            ctypes.memmove(address, source, size)
            return
        jpeg.decode_into(source, size, sample.height, sample.width, address)

    def stream(self, sample: Encoded) -> Stream:
        shard, row = cast("tuple[int, int]", sample.content)
        reader = self._shards[shard]
        start = int(reader.pointer_N[row])
        stored = reader.data[start : start + int(reader.size_N[row])]
        if reader.mode_N[row] == MODE_RAW:
            return as_ppm(stored.reshape(sample.height, sample.width, 3))
        return Stream(stored, is_jpeg=True)
