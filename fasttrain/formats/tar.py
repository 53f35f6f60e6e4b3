"""WebDataset shards: POSIX tars of `<key>.jpg` (or `.png`) and `<key>.cls`, each with an index.

The index is what DALI's reader wants beside a shard: `v1.2 N`, then a line for each sample with extension, offset of
the data, size and name of every component (wds2idx of DALI). The bytes depend on the samples alone: no times, owners.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttrain.formats import png
from fasttrain.formats.writer import ShardWriter
from fasttrain.system.durable import replace_file
from fasttrain.system.errors import DataError
from fasttrain.system.mapped import copied, map_file
from fasttrain.system.regular import read_at_most

_END = bytes(2 * tarfile.BLOCKSIZE)
_INDEX_VERSION = b"v1.2"
_IMAGES = (b"jpg", b"png")
_WORDS = 8  # a sample's line in the index: jpg OFFSET SIZE NAME cls OFFSET SIZE NAME
_LONGEST_LABEL, _LARGEST_LABEL = 20, (1 << 31) - 1  # digits; more is no class
_LONGEST_PLACE = 19  # digits that may be too many
HELD_BYTES = 1 << 18  # of an index, which is held while its shard is open: one of 2,048 samples has half
_LONGEST_LINE = 4096  # bytes: four short words, four numbers and two names of members, of 100 at most


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
        lines = (f"{_INDEX_VERSION.decode()} {self.num_samples}", *self._lines)
        replace_file(
            index_path(self._path), lambda file: file.writelines(f"{line}\n".encode("ascii") for line in lines)
        )
        self._new.publish()


class TarSample(NamedTuple):
    """Where a sample's image and its label lie, a whole number in ASCII: places and lengths in the shard, bytes."""

    is_png: bool
    image_at: int
    image_size: int
    label_at: int
    label_size: int


class TarShardReader:
    """A .tar shard and the index beside it, mapped into memory. Where a sample lies is read when it is asked for.

    Attributes:
        num_samples: N.
        data: the whole shard, uint8, read-only; address: where it begins in memory.
    """

    def __init__(self, path: str | os.PathLike[str], index: Path | None = None) -> None:
        """Map the shard and find the lines of its index. index: where that lies, if not beside the shard.

        Raises:
            TarShardError: one is missing, or the index has not as many lines as it states.
        """
        self._path = Path(path)
        self._index_path = index or index_path(self._path)
        try:
            self.data = map_file(self._path)
            # A sample has 2 KiB or more of a tar, and a line of its index.
            text = read_at_most(self._index_path, self.data.size)
            self._end_N = self._line_ends(text)
            self._held = text if len(text) <= HELD_BYTES else None
            self._index = map_file(self._index_path)
        except OSError as error:
            raise TarShardError(f"{error.filename}: {error.strerror}") from None
        if self._index.size != len(text):
            raise self._error("it has just changed")
        self.num_samples = len(self._end_N) - 1
        self.address: int = self.data.ctypes.data
        self._index_address: int = self._index.ctypes.data

    def _line_ends(self, text: bytes) -> np.ndarray:
        """Return where the first line ends, and that of each sample."""
        end_N = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
        stated = b"%s %d\n" % (_INDEX_VERSION, len(end_N) - 1)
        if not text.startswith(stated) or not text.endswith(b"\n"):
            raise self._error(f"no {_INDEX_VERSION.decode()} index of the samples it states")
        return end_N.astype(np.uint32) if len(text) < 1 << 32 else end_N

    def _error(self, reason: str) -> TarShardError:
        return TarShardError(f"{self._index_path}: {reason}")

    def sample(self, row: int) -> TarSample:
        """Read where a sample lies.

        Raises:
            TarShardError: its line in the index is malformed, not of one .jpg or .png and one .cls, or leads beyond the
                shard.
        """
        words = self._line(row).split()
        if len(words) != _WORDS or words[0] not in _IMAGES or words[4] != b"cls":
            raise self._error("a sample is not one .jpg or .png followed by one .cls")
        numbers = (*words[1:3], *words[5:7])
        if not all(word.isdigit() and len(word) < _LONGEST_PLACE for word in numbers):
            raise self._error("a place is no number")
        found = TarSample(words[0] == b"png", *map(int, numbers))
        for at, size in (found[1:3], found[3:5]):
            if size < 1 or at > self.data.size - size:
                raise self._error(f"a sample lies outside {self._path.name}")
        return found

    def _line(self, row: int) -> bytes:
        start, end = self._end_N[row : row + 2].tolist()
        if self._held is not None:
            return self._held[start + 1 : end]
        return copied(self._index_address + start + 1, min(end - start - 1, _LONGEST_LINE))

    def image(self, found: TarSample) -> np.ndarray:
        """Return the stream of a sample's image, uint8, in place."""
        return self.data[found.image_at : found.image_at + found.image_size]

    def image_bytes(self, found: TarSample) -> bytes:
        """Return a copy of a sample's image, made without the interpreter's lock."""
        return copied(self.address + found.image_at, found.image_size)

    def label(self, row: int) -> int:
        """Read the label of a sample; TarShardError where it is no number."""
        found = self.sample(row)
        try:
            label = int(copied(self.address + found.label_at, min(found.label_size, _LONGEST_LABEL)))
        except ValueError:
            label = -2
        if not -1 <= label <= _LARGEST_LABEL:
            raise TarShardError(f"sample {row} of {self._path}: its .cls is no number of a class")
        return label
