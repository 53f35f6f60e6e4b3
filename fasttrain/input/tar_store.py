"""WebDataset shards as a store: POSIX tars read in place, through the index files that lie beside them."""

from __future__ import annotations

import pathlib
from typing import cast

import numpy as np

from fasttrain.formats import jpeg
from fasttrain.formats.image import check_size, decode_rgb
from fasttrain.formats.manifest import Manifest
from fasttrain.formats.tar import TarShardReader
from fasttrain.input.stores import Encoded, Shards, Stream, as_encoded, as_ppm, names_of, open_shards, write_pixels
from fasttrain.system.errors import DataError


class TarStore(Shards[TarShardReader]):
    """The `.tar` shards of one split, with members KEY.jpg or .png, and KEY.cls; JPEGs go straight into the batch."""

    @classmethod
    def of(cls, folder: pathlib.Path, manifest: Manifest, split: str) -> TarStore:
        """Raises DataError where a shard or its index is missing, unsound, or does not match the manifest."""
        shards = open_shards(folder, manifest.splits[split], TarShardReader)
        return cls(shards, manifest.classes, manifest.fingerprint(split), names_of(folder, manifest, split))

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        """Read when asked for: a label lies beside its image, so that opening a data set reads none of its pages.

        Raises DataError for one that is no number, or none of the classes.
        """
        return np.array([self._label(*self.locate(index)) for index in index_N.tolist()], dtype=np.int64)

    def _label(self, number: int, row: int) -> int:
        shard = self._shards[number]
        label = shard.label(row)
        if not -1 <= label < len(self.classes):
            raise DataError(f"sample {row} of {shard.path}: label {label} is none of the {len(self.classes)} classes")
        return label

    def read(self, index: int) -> Encoded:
        shard, row = place = self.locate(index)
        reader = self._shards[shard]
        if reader.is_png_N[row]:
            return as_encoded(decode_rgb(reader.image_bytes(row), None, 1))
        header = jpeg.read_header(reader.image(row))
        check_size(header.height, header.width)  # memory is laid out for what the file says
        return Encoded(header.height, header.width, place)

    def write(self, sample: Encoded, address: int) -> None:
        if isinstance(sample.content, np.ndarray):
            write_pixels(sample.content, sample, address)
            return
        number, row = cast("tuple[int, int]", sample.content)
        shard = self._shards[number]
        source, size = shard.address + int(shard.image_at_N[row]), int(shard.image_size_N[row])
        jpeg.decode_into(source, size, sample.height, sample.width, address)

    def stream(self, sample: Encoded) -> Stream:
        if isinstance(sample.content, np.ndarray):
            return as_ppm(sample.content)
        shard, row = cast("tuple[int, int]", sample.content)
        return Stream(self._shards[shard].image(row), is_jpeg=True)
