"""WebDataset shards: POSIX tars of `<key>.jpg` and `<key>.cls`, with the index that DALI's reader wants beside each.

The bytes depend on the samples alone: no times, no owners. Index: `v1.2 N`, then a line for each sample with
extension, offset of the data, size and name of every component (wds2idx of DALI).
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from fasttrain.formats.writer import ShardWriter
from fasttrain.system.durable import replace_file
from fasttrain.system.errors import DataError

_END = bytes(2 * tarfile.BLOCKSIZE)
_INDEX_VERSION = "v1.2"


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
        """Append one sample, a JPEG of any size; ValueError for raw pixels. Raises OSError when the disk is full."""
        if raw:
            raise ValueError("a .tar shard holds JPEGs only")
        key = f"{self._path.stem}-{self.num_samples:07d}"
        components = (("jpg", stream), ("cls", str(label).encode("ascii")))
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
        lines = (f"{_INDEX_VERSION} {self.num_samples}", *self._lines)
        replace_file(
            index_path(self._path), lambda file: file.writelines(f"{line}\n".encode("ascii") for line in lines)
        )
        self._new.publish()


def read_index(path: Path) -> list[dict[str, tuple[int, int]]]:
    """Return for every sample of a shard: extension -> (offset, size), from the index beside it.

    Raises:
        TarShardError: the index is missing or malformed, or reaches beyond the shard.
    """
    try:
        head, *lines = index_path(path).read_text("ascii").splitlines()
        samples = [_components(line.split(" ")) for line in lines]
        if head != f"{_INDEX_VERSION} {len(lines)}" or not all({"jpg", "cls"} <= set(s) for s in samples):
            raise ValueError
        end = max((offset + size for sample in samples for offset, size in sample.values()), default=0)
    except OSError as error:
        raise TarShardError(f"{index_path(path)}: {error.strerror}") from None
    except (ValueError, IndexError):
        raise TarShardError(f"{index_path(path)}: malformed index") from None
    if end > path.stat().st_size:
        raise TarShardError(f"{path}: the index reaches beyond its end")
    return samples


def _components(words: list[str]) -> dict[str, tuple[int, int]]:
    groups = [words[i : i + 4] for i in range(0, len(words), 4)]
    return {extension: (int(offset), int(size)) for extension, offset, size, _ in groups}
