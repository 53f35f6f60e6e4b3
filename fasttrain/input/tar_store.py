"""WebDataset shards as a store: POSIX tars read in place, through the index files that lie beside them."""

from __future__ import annotations

import pathlib
from typing import cast

import numpy as np

from fasttrain.formats import jpeg
from fasttrain.formats.manifest import Manifest, ManifestError
from fasttrain.formats.tar import TarShardReader
from fasttrain.input.stores import Encoded


class TarStore:
    """The `.tar` shards of one split, with members KEY.jpg and KEY.cls; pixels are decoded straight into the batch."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest, split: str) -> None:
        """Raises DataError where a shard or its index is missing, unsound, or does not match the manifest."""
        self.classes = tuple(manifest.classes)
        self.fingerprint = manifest.fingerprint(split)
        self._shards = []
        for shard in manifest.splits[split]:
            reader = TarShardReader(folder / shard.name)
            if reader.num_samples != shard.num_samples:
                raise ManifestError(
                    f"{folder / shard.name} holds {reader.num_samples} samples, the manifest says {shard.num_samples}"
                )
            self._shards.append(reader)
        self._start_S = np.cumsum([0] + [shard.num_samples for shard in self._shards])
        self.num_samples = int(self._start_S[-1])

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        """Read when asked for: a label lies beside its image, so that opening a data set reads none of its pages.

        Raises DataError for one that is no number.
        """
        places = map(self._locate, index_N.tolist())
        return np.array([self._shards[shard].label(row) for shard, row in places], dtype=np.int64)

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._start_S, index, side="right")) - 1
        return shard, index - int(self._start_S[shard])

    def read(self, index: int) -> Encoded:
        shard, row = place = self._locate(index)
        header = jpeg.read_header(self._shards[shard].jpeg(row))
        return Encoded(header.height, header.width, place)

    def write(self, sample: Encoded, address: int) -> None:
        number, row = cast("tuple[int, int]", sample.content)
        shard = self._shards[number]
        source, size = shard.address + int(shard.jpeg_at_N[row]), int(shard.jpeg_size_N[row])
        jpeg.decode_into(source, size, sample.height, sample.width, address)

    def jpeg(self, sample: Encoded) -> np.ndarray:
        shard, row = cast("tuple[int, int]", sample.content)
        return self._shards[shard].jpeg(row)

    def name(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"sample {row} of {self._shards[shard].path}"
