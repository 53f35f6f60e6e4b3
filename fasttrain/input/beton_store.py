"""`.beton` files as a store, read in place: the shards of a converted data set, and files of stock FFCV."""

from __future__ import annotations

import ctypes
from typing import cast

import numpy as np

from fasttrain.formats import jpeg
from fasttrain.formats.beton import MODE_RAW, BetonReader, StoredImage
from fasttrain.formats.beton_set import BetonSet
from fasttrain.formats.beton_shard import BetonShard
from fasttrain.formats.image import check_size
from fasttrain.formats.manifest import Shard
from fasttrain.input.stores import Encoded, Shards, Stream, as_ppm
from fasttrain.storage.near import Near

Content = tuple[BetonShard | BetonReader, StoredImage]


class ShardStore(Shards[BetonShard | BetonReader]):
    """.beton files of one split; pixels are decoded straight into the batch."""

    @staticmethod
    def open_shard(near: Near, shard: Shard) -> BetonShard:
        return BetonShard(near.path(shard.name))

    def try_sample(self, index: int) -> None:
        shard, row = self.locate(index)
        self._opened(shard).image(row)

    def begins(self, index: int) -> int:
        shard, row = self.locate(index)
        return self._opened(shard).image(row).pointer

    def read(self, index: int) -> Encoded:
        shard, row = self.locate(index)
        reader = self._opened(shard)
        image = reader.image(row)
        check_size(image.height, image.width)  # memory is laid out for what the file says
        return Encoded(image.height, image.width, (reader, image))

    def write(self, sample: Encoded, address: int) -> None:
        reader, image = cast("Content", sample.content)
        if image.mode == MODE_RAW:
            ctypes.memmove(address, reader.address + image.pointer, image.size)
            return
        jpeg.decode_into(reader.address + image.pointer, image.size, image.height, image.width, address)

    def stream(self, sample: Encoded) -> Stream:
        reader, image = cast("Content", sample.content)
        stored = reader.data[image.pointer : image.pointer + image.size]
        if image.mode == MODE_RAW:
            return as_ppm(stored.reshape(image.height, image.width, 3))
        return Stream(stored, is_jpeg=True)


class StockStore(ShardStore):
    """Files that no manifest describes: few, so that all are open, with their tables in memory."""

    def __init__(self, near: Near, found: BetonSet, split: str) -> None:
        """near: the folder that the files lie in."""
        readers = found.splits[split]
        shards = [Shard(reader.path.name, reader.num_samples, reader.data.size, "") for reader in readers]
        super().__init__(near, shards, readers.__getitem__, found.classes, found.fingerprint(split))
        self._label_N = np.concatenate(found.label_S[split])

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        return self._label_N[index_N]
