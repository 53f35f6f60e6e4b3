"""Where samples come from: .beton shards or plain image files, as one numbered set each."""

from __future__ import annotations

import ctypes
import hashlib
import pathlib
from typing import NamedTuple, Protocol, cast

import numpy as np

from dataprep import jpeg
from dataprep.beton import MODE_RAW, BetonReader
from dataprep.images import read_rgb
from dataprep.manifest import Manifest, ManifestError
from dataprep.sources import fingerprint, scan_folder


class Encoded(NamedTuple):
    """One sample before its pixels are written: its size, and what write() needs."""

    height: int
    width: int
    content: object


class Store(Protocol):
    """A numbered set of images. read and write are called from many threads, and raise DataError for a bad sample."""

    num_samples: int
    label_N: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str  # changes when any sample's content or number does

    def read(self, index: int) -> Encoded: ...

    def write(self, sample: Encoded, address: int) -> None:
        """Write height×width×3 RGB bytes at a memory address."""

    def name(self, index: int) -> str:
        """How an error names the sample."""


class ShardStore:
    """The .beton shards of one split, read in place; pixels are decoded straight into the batch."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest, split: str) -> None:
        """Raises DataError where a shard does not match the manifest."""
        self.classes = tuple(manifest.classes)
        checksums = " ".join(shard.sha256 for shard in manifest.splits[split])
        self.fingerprint = hashlib.sha256(checksums.encode()).hexdigest()
        self._shards = []
        for shard in manifest.splits[split]:
            reader = BetonReader(folder / shard.name)
            if reader.num_samples != shard.num_samples:
                raise ManifestError(
                    f"{folder / shard.name} holds {reader.num_samples} samples, the manifest says {shard.num_samples}"
                )
            self._shards.append(reader)
        self._start_S = np.cumsum([0] + [shard.num_samples for shard in self._shards])
        self.num_samples = int(self._start_S[-1])
        self.label_N = np.concatenate([shard.label_N for shard in self._shards])
        self._base_S = [shard.data.ctypes.data for shard in self._shards]

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._start_S, index, side="right")) - 1
        return shard, index - int(self._start_S[shard])

    def read(self, index: int) -> Encoded:
        shard, row = self._locate(index)
        reader = self._shards[shard]
        return Encoded(int(reader.height_N[row]), int(reader.width_N[row]), (shard, row))

    def write(self, sample: Encoded, address: int) -> None:
        shard, row = cast("tuple[int, int]", sample.content)
        reader = self._shards[shard]
        source, size = self._base_S[shard] + int(reader.pointer_N[row]), int(reader.size_N[row])
        if reader.mode_N[row] == MODE_RAW:
            ctypes.memmove(address, source, size)
            return
        jpeg.decode_into(source, size, sample.height, sample.width, address)

    def name(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"sample {row} of {self._shards[shard].path}"


class FolderStore:
    """The image files of one split of a folder, decoded as they are."""

    def __init__(self, root: pathlib.Path, split: str) -> None:
        """Raises DataError for a missing folder, one without images, or a split it does not have."""
        source = scan_folder(root)
        if split not in source.splits:
            raise ManifestError(f"{root} has no {split!r} split; it has: {', '.join(source.splits)}")
        self.classes = source.classes
        self.fingerprint = fingerprint(source)
        self._root = source.root
        self._samples = source.splits[split]
        self.num_samples = len(self._samples)
        self.label_N = np.array([sample.label for sample in self._samples], dtype=np.int64)

    def read(self, index: int) -> Encoded:
        pixels = read_rgb((self._root / self._samples[index].path).read_bytes())
        return Encoded(pixels.shape[0], pixels.shape[1], pixels)

    def write(self, sample: Encoded, address: int) -> None:
        pixels = cast("np.ndarray", sample.content)
        ctypes.memmove(address, pixels.ctypes.data, pixels.nbytes)

    def name(self, index: int) -> str:
        return str(self._root / self._samples[index].path)
