"""Where samples come from, as one numbered set of images each: the contract, and .beton shards."""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader
from fasttrain.formats.image import check_size
from fasttrain.formats.manifest import Manifest, ManifestError, Shard
from fasttrain.system.errors import DataError


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
        """How an error names the sample."""


@runtime_checkable
class JpegStore(Store, Protocol):
    """A store whose samples lie in files as JPEG streams, so that another decoder can take them."""

    def jpeg(self, sample: Encoded) -> np.ndarray:
        """The stream of a sample that read() gave, uint8; DataError for one that is stored otherwise."""


class ShardReader(Protocol):
    """What a reader of either format tells of a shard."""

    num_samples: int
    path: pathlib.Path


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


class Shards(Generic[AnyReader]):
    """The shards of one split of a data set, whose samples are numbered through."""

    def __init__(self, shards: Sequence[AnyReader], classes: Sequence[str], fingerprint: str) -> None:
        self.classes, self.fingerprint = tuple(classes), fingerprint
        self._shards = shards
        self._start_S = np.cumsum([0] + [shard.num_samples for shard in shards])
        self.num_samples = int(self._start_S[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """A sample's shard, by its place among them, and the sample's number in it."""
        shard = int(np.searchsorted(self._start_S, index, side="right")) - 1
        return shard, index - int(self._start_S[shard])

    def name(self, index: int) -> str:
        shard, row = self.locate(index)
        return f"sample {row} of {self._shards[shard].path}"


def check_labels(path: pathlib.Path, label_N: np.ndarray, num_classes: int) -> None:
    """Raise DataError, which names the sample, for a label that is neither -1 nor one of so many classes."""
    wrong_N = (label_N < -1) | (label_N >= num_classes)
    if wrong_N.any():
        row = int(wrong_N.argmax())
        raise DataError(f"sample {row} of {path}: label {label_N[row]} is none of the {num_classes} classes")


class ShardStore(Shards[BetonReader]):
    """.beton files of one split, read in place; pixels are decoded straight into the batch."""

    def __init__(
        self, shards: Sequence[BetonReader], classes: Sequence[str], fingerprint: str, label_S: Sequence[np.ndarray]
    ) -> None:
        """label_S: the labels of each file, -1 for none."""
        super().__init__(shards, classes, fingerprint)
        self._label_N = np.concatenate(label_S)
        self._base_S = [shard.data.ctypes.data for shard in shards]

    @classmethod
    def of(cls, folder: pathlib.Path, manifest: Manifest, split: str) -> ShardStore:
        """The .beton shards of a converted data set.

        Raises DataError where one does not match the manifest, or has a label that is no class.
        """
        shards = open_shards(folder, manifest.splits[split], BetonReader)
        for shard in shards:
            check_labels(shard.path, shard.label_N, len(manifest.classes))
        return cls(shards, manifest.classes, manifest.fingerprint(split), [shard.label_N for shard in shards])

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

    def jpeg(self, sample: Encoded) -> np.ndarray:
        shard, row = cast("tuple[int, int]", sample.content)
        reader = self._shards[shard]
        if reader.mode_N[row] == MODE_RAW:
            raise DataError("stored as raw pixels, not as a JPEG")
        start = int(reader.pointer_N[row])
        return reader.data[start : start + int(reader.size_N[row])]
