"""WebDataset shards as a store: POSIX tars read in place, through the index files that lie beside them."""

from __future__ import annotations

from typing import cast

import numpy as np

from fasttrain.formats import jpeg
from fasttrain.formats.image import check_size, decode_rgb
from fasttrain.formats.manifest import Shard
from fasttrain.formats.tar import TarSample, TarShardReader
from fasttrain.input.stores import Encoded, Shards, Stream, as_encoded, as_ppm, write_pixels
from fasttrain.storage.near import Near

Content = tuple[TarShardReader, TarSample]


class TarStore(Shards[TarShardReader]):
    """The `.tar` shards of one split, with members KEY.jpg or .png, and KEY.cls; JPEGs go straight into the batch."""

    @staticmethod
    def open_shard(near: Near, shard: Shard) -> TarShardReader:
        return TarShardReader(near.path(shard.name), near.path(shard.index.name) if shard.index else None)

    def try_sample(self, index: int) -> None:
        shard, row = self.locate(index)
        self._opened(shard).sample(row)

    def begins(self, index: int) -> int:
        shard, row = self.locate(index)
        return self._opened(shard).sample(row).image_at

    def read(self, index: int) -> Encoded:
        shard, row = self.locate(index)
        reader = self._opened(shard)
        sample = reader.sample(row)
        if sample.is_png:
            return as_encoded(decode_rgb(reader.image_bytes(sample), None, 1))
        header = jpeg.read_header(reader.image(sample))
        check_size(header.height, header.width)  # memory is laid out for what the file says
        return Encoded(header.height, header.width, (reader, sample))

    def write(self, sample: Encoded, address: int) -> None:
        if isinstance(sample.content, np.ndarray):
            write_pixels(sample.content, sample, address)
            return
        reader, found = cast("Content", sample.content)
        source = reader.address + found.image_at
        jpeg.decode_into(source, found.image_size, sample.height, sample.width, address)

    def stream(self, sample: Encoded) -> Stream:
        if isinstance(sample.content, np.ndarray):
            return as_ppm(sample.content)
        reader, found = cast("Content", sample.content)
        return Stream(reader.image(found), is_jpeg=True)
