"""The sides of the loader benchmark that are this project's, and the limit they are measured against."""

from __future__ import annotations

import ctypes
import pathlib
import threading
from collections.abc import Iterator

import torch

from fasttrain.engine.views import make_views
from fasttrain.formats.beton import BetonReader
from fasttrain.formats.manifest import Manifest
from fasttrain.input import IMAGENET_MEAN, IMAGENET_STD, Order, ThreadLoader, open_dataset
from fasttrain.kernels.augment import Views
from fasttrain.views.spec import RECIPES, ViewSpec

_CROPS = (ViewSpec(jitter_p=0, gray_p=0, blur_p=0, count=2),)
_RGB, _FAST_DCT = 0, 2048  # of turbojpeg.h, the loader's own settings


class DecodeLimit:
    """libturbojpeg in a bare ctypes loop: every thread takes the next stream and decodes it into its own buffer."""

    def __init__(self, data: pathlib.Path, threads: int) -> None:
        library = ctypes.CDLL("libturbojpeg.so.0")
        library.tjInitDecompress.restype = ctypes.c_void_p
        self._call = library.tjDecompress2
        self._call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5]
        self._readers = [BetonReader(data / shard.name) for shard in Manifest.load(data).splits["train"]]
        streams, largest = [], 0
        for reader in self._readers:
            base = reader.data.ctypes.data
            columns = (reader.pointer_N, reader.size_N, reader.width_N, reader.height_N)
            for pointer, size, width, height in zip(*(column.tolist() for column in columns), strict=True):
                streams.append((base + pointer, size, width, height))
                largest = max(largest, width * height * 3)
        self._streams, self._threads = streams, threads
        self._handles = [library.tjInitDecompress() for _ in range(threads)]
        self._buffers = [ctypes.create_string_buffer(largest) for _ in range(threads)]

    def _decode(self, k: int, streams: Iterator[tuple[int, int, int, int]]) -> None:
        call, handle, out = self._call, self._handles[k], ctypes.addressof(self._buffers[k])
        for address, size, width, height in streams:
            call(handle, address, size, out, width, 0, height, _RGB, _FAST_DCT)

    def epoch(self, _n: int) -> int:
        streams = iter(self._streams)  # a list's iterator may be shared by threads
        threads = [threading.Thread(target=self._decode, args=(k, streams)) for k in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(self._streams)


class Ours:
    """The loader, and what is made of its batches: nothing, two crops, or two MoCo-v2 views."""

    def __init__(self, data: pathlib.Path, threads: int, batch_size: int, work: str, size: int) -> None:
        """size: side of the views in pixels."""
        self._size, store = size, open_dataset(data, "train")
        self._loader = ThreadLoader(store, Order(store.num_samples, batch_size), threads)
        self._recipe = {"decode": None, "crops": _CROPS, "full": RECIPES["mocov2"]}[work]
        self._views: Views | None = None

    def epoch(self, n: int) -> int:
        count = 0
        for batch in self._loader.epoch(n):
            count += len(batch)
            if self._recipe is not None:
                self._views = make_views(
                    batch, self._recipe, self._size, 0, n, IMAGENET_MEAN, IMAGENET_STD, torch.float32, out=self._views
                )
        return count

    def close(self) -> None:
        self._loader.close()
