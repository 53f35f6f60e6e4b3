"""WebDataset shards as a store: POSIX tars read in place, through the index files that lie beside them."""

from __future__ import annotations

import ctypes
import pathlib
from typing import NamedTuple, cast

import numpy as np

from fasttrain.formats import jpeg
from fasttrain.formats.manifest import Manifest, ManifestError
from fasttrain.input.stores import Encoded
from fasttrain.system.errors import DataError

INDEX_VERSION = "v1.2"  # of DALI's wds2idx
_WORDS = 8  # a sample's line: jpg OFFSET SIZE NAME cls OFFSET SIZE NAME
_LONGEST_LABEL = 20  # digits; more is no class


class _Shard(NamedTuple):
    """A mapped tar, and where each sample's members lie in it (bytes)."""

    path: pathlib.Path
    data: np.ndarray
    jpeg_at_N: np.ndarray
    jpeg_size_N: np.ndarray
    label_at_N: np.ndarray
    label_size_N: np.ndarray


class TarStore:
    """The `.tar` shards of one split, with members KEY.jpg and KEY.cls; pixels are decoded straight into the batch."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest, split: str) -> None:
        """Raises DataError where a shard or its index is missing, unsound, or does not match the manifest."""
        self.classes = tuple(manifest.classes)
        self.fingerprint = manifest.fingerprint(split)
        self._shards = [_open_shard(folder / shard.name, shard.num_samples) for shard in manifest.splits[split]]
        self._start_S = np.cumsum([0] + [len(shard.jpeg_at_N) for shard in self._shards])
        self.num_samples = int(self._start_S[-1])
        self._base_S = [shard.data.ctypes.data for shard in self._shards]

    def labels(self, index_N: np.ndarray) -> np.ndarray:
        """Read when asked for: a label lies beside its image, so that opening a data set reads none of its pages.

        Raises DataError for one that is no number.
        """
        return np.array([self._label(index) for index in index_N.tolist()], dtype=np.int64)

    def _label(self, index: int) -> int:
        number, row = self._locate(index)
        shard = self._shards[number]
        text = ctypes.create_string_buffer(min(int(shard.label_size_N[row]), _LONGEST_LABEL))
        # Without the interpreter's lock: storage that hangs here must not keep others from saying so.
        ctypes.memmove(text, self._base_S[number] + int(shard.label_at_N[row]), len(text))
        try:
            return int(text.raw)
        except ValueError:
            raise DataError(f"{self.name(index)}: its .cls is no number") from None

    def _locate(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._start_S, index, side="right")) - 1
        return shard, index - int(self._start_S[shard])

    def read(self, index: int) -> Encoded:
        shard, row = place = self._locate(index)
        self._label(index)  # by a worker, who is watched, and for whom a bad one is a bad sample
        header = jpeg.read_header(self._stream(shard, row))
        return Encoded(header.height, header.width, place)

    def write(self, sample: Encoded, address: int) -> None:
        number, row = cast("tuple[int, int]", sample.content)
        shard = self._shards[number]
        source, size = self._base_S[number] + int(shard.jpeg_at_N[row]), int(shard.jpeg_size_N[row])
        jpeg.decode_into(source, size, sample.height, sample.width, address)

    def jpeg(self, sample: Encoded) -> np.ndarray:
        return self._stream(*cast("tuple[int, int]", sample.content))

    def _stream(self, number: int, row: int) -> np.ndarray:
        shard = self._shards[number]
        start = int(shard.jpeg_at_N[row])
        return shard.data[start : start + int(shard.jpeg_size_N[row])]

    def name(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"sample {row} of {self._shards[shard].path}"


def _open_shard(path: pathlib.Path, num_samples: int) -> _Shard:
    index = path.with_suffix(".idx")
    try:
        words = index.read_text("ascii").split()
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise ManifestError(f"{error.filename}: {error.strerror}") from None
    except ValueError:  # not ASCII, or an empty tar
        raise ManifestError(f"{index}: no index of {path.name}") from None
    if words[:2] != [INDEX_VERSION, str(num_samples)] or len(words) != 2 + _WORDS * num_samples:
        raise ManifestError(f"{index}: no {INDEX_VERSION} index of the {num_samples} samples that the manifest states")
    rows = np.array(words[2:]).reshape(num_samples, _WORDS)
    if (rows[:, 0] != "jpg").any() or (rows[:, 4] != "cls").any():
        raise ManifestError(f"{index}: a sample is not one .jpg followed by one .cls")
    try:
        jpeg_at_N, jpeg_size_N, label_at_N, label_size_N = rows[:, [1, 2, 5, 6]].astype(np.int64).T.copy()
    except (ValueError, OverflowError):
        raise ManifestError(f"{index}: a place is no number") from None
    for start_N, size_N in ((jpeg_at_N, jpeg_size_N), (label_at_N, label_size_N)):
        if ((start_N < 0) | (size_N < 1) | (start_N > data.size - size_N)).any():
            raise ManifestError(f"{index}: a sample lies outside {path.name}")
    return _Shard(path, data, jpeg_at_N, jpeg_size_N, label_at_N, label_size_N)
