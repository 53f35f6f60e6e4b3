"""WebDataset shards: POSIX tars of `<key>.jpg` (or `.png`) and `<key>.cls`, each with an index.

The index is what DALI's reader wants beside a shard: `v1.2 N`, then a line for each sample with extension, offset of
the data, size and name of every component (wds2idx of DALI). The bytes depend on the samples alone: no times, owners.
"""

from __future__ import annotations

import ctypes
import os
import tarfile
from pathlib import Path

import numpy as np

from fasttrain.formats import png
from fasttrain.formats.writer import ShardWriter
from fasttrain.system.durable import replace_file
from fasttrain.system.errors import DataError
from fasttrain.system.regular import open_regular, read_at_most

_END = bytes(2 * tarfile.BLOCKSIZE)
_INDEX_VERSION = "v1.2"
_IMAGES = ("jpg", "png")
_WORDS = 8  # a sample's line in the index: jpg OFFSET SIZE NAME cls OFFSET SIZE NAME
_LONGEST_LABEL, _LARGEST_LABEL = 20, (1 << 31) - 1  # digits; more is no class
_LONGEST_PLACE = 19  # digits that may be too many


class TarShardError(DataError):
    """The shard or its index is damaged, or they do not match; the text is one line."""


def index_path(path: Path) -> Path:
    """Return where the index of a shard lies."""
    return path.with_suffix(".idx")


class TarShardWriter(ShardWriter):
    """Writes one .tar shard and its index."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._lines: list[str] = []

    def write(self, stream: bytes, height: int, width: int, label: int, raw: bool = False) -> None:
        """Append one sample, a JPEG or PNG of any size; ValueError for raw pixels. OSError when the disk is full."""
        if raw:
            raise ValueError("a .tar shard holds JPEGs and PNGs only")
        key = f"{self._path.stem}-{self.num_samples:07d}"
        kind = "png" if stream.startswith(png.SIGNATURE) else "jpg"
        components = ((kind, stream), ("cls", str(label).encode("ascii")))
        self._lines.append(" ".join(self._member(key, extension, content) for extension, content in components))
        self.num_samples += 1
        self._hand_over(self._file.tell())

    def _member(self, key: str, extension: str, content: bytes) -> str:
        header = tarfile.TarInfo(f"{key}.{extension}")  # owner 0, time 0, mode 0644
        header.size = len(content)
        self._file.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._file.tell()
        self._file.write(content)
        self._file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return f"{extension} {offset} {len(content)} {header.name}"

    def finish(self) -> None:
        """Write the end mark and the index, make both durable, and give them their names, the shard last."""
        self._file.write(_END)
        self._new.flush()  # before the index has its name: a disk that is full now leaves neither
        lines = (f"{_INDEX_VERSION} {self.num_samples}", *self._lines)
        replace_file(
            index_path(self._path), lambda file: file.writelines(f"{line}\n".encode("ascii") for line in lines)
        )
        self._new.publish()


class TarShardReader:
    """A .tar shard, mapped into memory, and the index beside it, checked once, so that later reads stay inside.

    Attributes:
        path: the shard.
        num_samples: N.
        is_png_N: bool, whether a sample's image is a PNG, not a JPEG.
        image_at_N, image_size_N: int64, place and length of each sample's image in `data`, bytes.
        label_at_N, label_size_N: the same of its label, a whole number in ASCII.
        data: the whole file, uint8, read-only; address: where it begins in memory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map the shard and read its index.

        Raises:
            TarShardError: one is missing, the index is malformed, not of one .jpg or .png and one .cls a
                sample, or reaches beyond the shard.
        """
        self.path = Path(path)
        words = self._read_words()
        self.num_samples = (len(words) - 2) // _WORDS
        if words[:2] != [_INDEX_VERSION, str(self.num_samples)] or (len(words) - 2) % _WORDS:
            raise self._error(f"no {_INDEX_VERSION} index of the samples it states")
        del words[:2]
        if set(words[0::_WORDS]) - set(_IMAGES) or set(words[4::_WORDS]) - {"cls"}:
            raise self._error("a sample is not one .jpg or .png followed by one .cls")
        self.is_png_N = np.array([extension == "png" for extension in words[0::_WORDS]], bool)
        place_4N = np.stack([self._numbers(words[column::_WORDS]) for column in (1, 2, 5, 6)])
        self.image_at_N, self.image_size_N, self.label_at_N, self.label_size_N = place_4N
        for start_N, size_N in (place_4N[:2], place_4N[2:]):
            if ((start_N < 0) | (size_N < 1) | (start_N > self.data.size - size_N)).any():
                raise self._error(f"a sample lies outside {self.path.name}")

    def _read_words(self) -> list[str]:
        try:
            with open_regular(self.path) as file:
                self.data = np.memmap(file, np.uint8, "r")
            # A sample has 2 KiB or more of a tar, and a line of its index.
            words = read_at_most(index_path(self.path), self.data.size).decode("ascii").split()
        except OSError as error:
            raise TarShardError(f"{error.filename}: {error.strerror}") from None
        except ValueError:  # not ASCII, or an empty tar
            raise self._error(f"no index of {self.path.name}") from None
        self.address: int = self.data.ctypes.data
        return words

    def _numbers(self, words: list[str]) -> np.ndarray:
        if not all(word.isdecimal() and len(word) < _LONGEST_PLACE for word in words):
            raise self._error("a place is no number")
        return np.array(list(map(int, words)), np.int64)

    def _error(self, reason: str) -> TarShardError:
        return TarShardError(f"{index_path(self.path)}: {reason}")

    def image(self, row: int) -> np.ndarray:
        """Return the stream of a sample's image, uint8, in place."""
        start = int(self.image_at_N[row])
        return self.data[start : start + int(self.image_size_N[row])]

    def image_bytes(self, row: int) -> bytes:
        """Return a copy of the same, made without the interpreter's lock."""
        copy = ctypes.create_string_buffer(int(self.image_size_N[row]))
        ctypes.memmove(copy, self.address + int(self.image_at_N[row]), len(copy))
        return copy.raw

    def label(self, row: int) -> int:
        """Read the label of a sample; TarShardError where it is no number."""
        text = ctypes.create_string_buffer(min(int(self.label_size_N[row]), _LONGEST_LABEL))
        # Without the interpreter's lock: storage that hangs here must not keep others from saying so.
        ctypes.memmove(text, self.address + int(self.label_at_N[row]), len(text))
        try:
            label = int(text.raw)
        except ValueError:
            label = -2
        if not -1 <= label <= _LARGEST_LABEL:
            raise TarShardError(f"sample {row} of {self.path}: its .cls is no number of a class")
        return label
