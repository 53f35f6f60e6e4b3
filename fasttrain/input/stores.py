"""Where samples come from, as one numbered set of images each: the contract, and what shards have in common."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from fasttrain.formats.manifest import Manifest, ManifestError, Shard, spread
from fasttrain.formats.names import read_names, sample_name
from fasttrain.storage.near import Near
from fasttrain.system.cores import machine_size
from fasttrain.system.errors import DataError, note
from fasttrain.system.memory import machine_memory
from fasttrain.system.sequential import read_through

BLOCK_SAMPLES = 1 << 14  # at most: more than a shard usually holds
OPEN_SHARDS = 1024  # at once; those of which samples are being decoded stay open besides
OPEN_ELSEWHERE = 16  # …, of a set elsewhere, until its lanes are known: those the cache removes take disk while open
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

    def expect_lanes(self, lanes: int) -> int:
        """Be ready for a process that reads `lanes` blocks at once; how many more may be fetched before they are due.

        0: fetching is of no use.
        """


def blocks_of(store: Store) -> np.ndarray | None:
    """Where the blocks of a store begin, as Order takes them; None: it has none."""
    return store.block_S if isinstance(store, BlockStore) else None


def label_of(store: Store, index: int, needed: bool) -> int:
    """A sample's label, -1 for none. Raises DataError for a bad one and, where one is needed, for none."""
    label = int(store.labels(np.array([index]))[0])
    if needed and label < 0:
        raise DataError("has no label")
    return label


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
    """An open shard of either format."""

    num_samples: int
    data: np.ndarray

    def label(self, row: int) -> int:
        """A sample's label, as it is stored; DataError for what is no number."""


AnyReader = TypeVar("AnyReader", bound=ShardReader)
AnyShards = TypeVar("AnyShards", bound="Shards")


class Shards(ABC, Generic[AnyReader]):
    """The shards of one split of a data set, whose samples are numbered through. Each is opened when it is needed."""

    def __init__(
        self, near: Near, shards: Sequence[Shard], opened: Callable[[int], AnyReader], classes: Sequence[str],
        fingerprint: str,
    ) -> None:  # fmt: skip
        """opened: a shard by its place among them; called from many threads, for every sample."""
        self.classes, self.fingerprint = tuple(classes), fingerprint
        self.is_elsewhere = near.capacity() is not None  # one sample then costs as much as its shard
        self._near, self._shards, self._opened = near, shards, opened
        self._names_read: tuple[int, list[str]] = -1, []  # of which shard, and they
        start_S = np.cumsum([0, *(shard.num_samples for shard in shards)])
        self._start = array("q", start_S.tobytes())  # searched for one number, that is five times as fast as numpy
        self.num_samples, self.num_bytes = int(start_S[-1]), sum(shard.num_bytes for shard in shards)
        self.largest = max((shard.num_bytes for shard in shards), default=0)
        self.block_S = _blocks(start_S)

    @classmethod
    def of(cls: type[AnyShards], near: Near, manifest: Manifest, split: str) -> AnyShards:
        """Those of a converted data set, which this touches none of."""
        shards, open_shard = manifest.splits[split], cls.open_shard

        def opened(number: int) -> ShardReader:
            try:
                return checked(open_shard(near, shards[number]), shards[number], near)
            except DataError:
                if near.capacity() is None:
                    raise
            # It may have made room in the cache for others between coming and being opened.
            return checked(open_shard(near, shards[number]), shards[number], near)

        # Whoever holds a sample of a shard holds its reader, too: one that is closed for others stays mapped for it.
        cached = functools.lru_cache(OPEN_SHARDS if near.capacity() is None else OPEN_ELSEWHERE)(opened)
        return cls(near, shards, cached, manifest.classes, manifest.fingerprint(split))

    @staticmethod
    @abstractmethod
    def open_shard(near: Near, shard: Shard) -> AnyReader:
        """Raises DataError or OSError."""

    def try_shards(self, most: int) -> None:
        """Open shards, of more than `most` so many evenly spread ones, and look at the first and last sample of each.

        Raises DataError or OSError where one is missing, unsound, or not what the manifest says.
        """
        for number in spread(len(self._shards), most):
            if self._shards[number].num_samples:
                self.try_sample(int(self._start[number]))
                self.try_sample(int(self._start[number + 1]) - 1)

    @abstractmethod
    def try_sample(self, index: int) -> None:
        """Raises DataError for a sample whose place in its shard is not sound."""

    def locate(self, index: int) -> tuple[int, int]:
        """A sample's shard, by its place among them, and the sample's number in it."""
        shard = bisect.bisect_right(self._start, index) - 1
        return shard, index - self._start[shard]

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        """Read when asked for, so that opening a data set reads none of their pages.

        Raises DataError for one that is no number, or none of the classes.
        """
        return np.array([self._label(index) for index in index_N.tolist()], dtype=np.int64)

    def _label(self, index: int) -> int:
        shard, row = self.locate(index)
        label = self._opened(shard).label(row)
        if not -1 <= label < len(self.classes):
            raise DataError(f"{self.place(index)}: label {label} is none of the {len(self.classes)} classes")
        return label

    def fetch(self, first: int, end: int) -> None:
        """Open the shard, and read the part of its file in sequence, so that it lies in the system's cache.

        What is elsewhere is fetched, and opened later: it takes disk while it is open, also when the cache drops it.
        """
        number, row = self.locate(first)
        shard = self._shards[number]
        if self.is_elsewhere:
            for file in (shard, shard.index):
                if file:
                    self._near.path(file.name)
            return
        self._opened(number)  # with what lies beside it
        start = self.begins(first) if row else 0
        read_through(
            self._near.path(shard.name), start, shard.num_bytes if end == self._start[number + 1] else self.begins(end)
        )

    @abstractmethod
    def begins(self, index: int) -> int:
        """At which byte of its file a sample's image begins. Raises DataError where that can't be read."""

    def expect_lanes(self, lanes: int) -> int:
        """One more for each lane, if memory has room for as many, beside those in use.

        Of a set elsewhere, as many as the cache has room for, beside those in use and as many that have just been. From
        now on hardly more of its shards stay open than lanes: an open one takes disk that the cache can't give others.
        """
        processes, capacity = machine_size(), self._near.capacity()
        if capacity is not None:
            room = capacity // (processes * self.largest)
            kept = lanes + lanes // 4 + 2 if lanes else min(OPEN_SHARDS, max(1, room // 2))
            self._opened = functools.lru_cache(kept)(self._opened.__wrapped__)  # type: ignore[attr-defined]
            return min(len(self.block_S) - 1, max(1, room - 2 * lanes))
        mean = self.num_bytes / (len(self.block_S) - 1)
        room = int(CACHE_SHARE * machine_memory() / processes / mean)
        return max(0, min(lanes, room - lanes))

    def name(self, index: int) -> str:
        shard, row = self.locate(index)
        names = self._shards[shard].names
        path = None
        with contextlib.suppress(DataError, OSError):  # a name is worth no error
            path = self._near.path(names.name) if names and not self.is_elsewhere else None
        return sample_name(self._near.shown(self._shards[shard].name), row, path)

    def place(self, index: int) -> str:
        shard, row = self.locate(index)
        return sample_name(self._near.shown(self._shards[shard].name), row, None)

    def source_name(self, index: int) -> str:
        number, row = self.locate(index)
        shard = self._shards[number]
        if shard.names is None:
            return f"{shard.name}:{row}"
        if self._names_read[0] != number:
            path = self._near.path(shard.names.name)
            self._names_read = number, read_names(path, shard.num_samples, shard.names.sha256)
        return self._names_read[1][row]


def checked(reader: AnyReader, stated: Shard, near: Near) -> AnyReader:
    """The reader; ManifestError where it is not of the shard that the manifest states."""
    if reader.data.size != stated.num_bytes:
        problem = f"{reader.data.size} bytes, but the manifest says {stated.num_bytes}"
        raise ManifestError(f"{near.shown(stated.name)}: {problem}")
    if reader.num_samples != stated.num_samples:
        problem = f"holds {reader.num_samples} samples, the manifest says {stated.num_samples}"
        raise ManifestError(f"{near.shown(stated.name)} {problem}")
    return reader


def _blocks(start_S: np.ndarray) -> np.ndarray:
    """Where shards begin, and equal parts of those that are larger than a block: a single file may hold all images.

    A shard without samples, as other tools may leave one, is no block.
    """
    parts_S = -(-np.diff(start_S) // BLOCK_SAMPLES)
    inner = [
        np.linspace(int(start_S[shard]), int(start_S[shard + 1]), int(parts_S[shard]) + 1).astype(np.int64)[1:-1]
        for shard in np.flatnonzero(parts_S > 1)
    ]
    return np.unique(np.concatenate([start_S, *inner]))
